# One command each, from a fresh clone: `make demo` shows it, `make test` checks it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
RECIPES := tiny-ar tiny-block tiny-mdm tiny-draft tiny-moe tiny-recurrent

.DEFAULT_GOAL := help
.PHONY: help demo test harness install lint format bench models clean

# On models this small, handing work to a second thread costs more time than it saves.
demo test harness: export OMP_NUM_THREADS ?= 1

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 16

demo: install ## Install, then compare decoders on the bundled models
	@$(BIN)/chordal compare --demo

# The reports' tests drive a headless Chromium (apt-get install chromium) and are skipped where there is none.
test: lint ## Install, then lint, check types and run the default test suite
	@$(BIN)/pytest -q -n 2 $(PYTEST_ARGS)

# Half a gigabyte: not among the tools of every check.
harness: install ## Install lm-evaluation-harness and test the bridge to it, and the server with it
	@$(PIP) -e '.[dev,lm-eval]' tenacity
	@$(BIN)/pytest -q tests/bridges/test_lm_eval.py tests/server/test_lm_eval.py

install: $(VENV)/.installed ## Create .venv and install the package into it

lint: $(VENV)/.installed-dev ## Check style, format and types
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

format: $(VENV)/.installed-dev ## Fix what the linter can fix, and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: install ## Measure decoders against transformers' generate
	@$(BIN)/python benchmarks/decode.py

# In this order: tiny-block starts from tiny-ar, tiny-mdm from tiny-block and tiny-moe from tiny-mdm.
models: install ## Retrain the bundled models (hours)
	@for recipe in $(RECIPES); do $(BIN)/chordal train $$recipe || exit 1; done

clean: ## Remove .venv, caches and builds
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps are older than these files exactly when there is something to install.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing chordal into $(VENV)" >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing chordal and its test tools into $(VENV)" >&2
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Error: chordal needs Python 3.11 or later; $(PYTHON) is `$(PYTHON) --version 2>&1`." \
	    "Name another with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
