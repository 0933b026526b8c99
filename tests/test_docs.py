"""The documentation runs as it is pasted, and says what is there."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import chordal
from chordal import forward
from chordal.cli import main
from chordal.cli.options import parse_settings
from chordal.fields import make_config
from chordal.registry import decoder_class, decoder_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

# These run for hours or until they are stopped.
NOT_RUN = ("train", "serve")

FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def blocks(page, info):
    """Give the fenced blocks of a page that are marked so, with the line each starts at."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, block.start(2)), block[2]) for block in FENCE.finditer(text) if block[1] == info
    ]


def commands(script):
    """Split a script into commands; quotes and a backslash at the end carry on to the next line."""
    pending = ""
    for line in script.splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending.removesuffix("\n"), comments=True)
        except ValueError:
            continue
        if words:
            yield words
        pending = ""
    assert not pending.strip(), f"this command has no end: {pending}"


def table(page, heading):
    """Give the rows of the table that starts with a heading, without the backquotes of their cells."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    rows = []
    for line in lines:
        if line.startswith(f"| {heading} |"):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    return rows
                rows.append([cell.strip().strip("`") for cell in row.strip("|").split("|")])
    return rows


def of(page):
    return str(page.relative_to(ROOT))


def _commands():
    for page in PAGES:
        for _, script in blocks(page, "sh"):
            for words in commands(script):
                if words[0] == "chordal" and words[1] not in NOT_RUN:
                    yield pytest.param(words[1:], id=f"{of(page)}: {' '.join(words[1:3])}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for line, code in blocks(page, "python"):
        # Blank lines in front make a traceback show the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_the_fragments_of_a_page_are_python(page):
    for _, code in blocks(page, "python fragment"):
        ast.parse(code)


@pytest.mark.parametrize("words", [*_commands()])
def test_a_command_of_a_page_ends_well(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A comparison of one prompt, timed once, runs the same code.
    is_timed = words[0] in ("bench", "compare")
    code = main([*words, "--num-prompts", "1", "--repeats", "1"] if is_timed else words)
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{target} is no file"
        headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{target} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_source_files_that_are_named_exist(page):
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / "src/chordal" / name).exists() or (ROOT / name).exists(), f"{name} is no file"


def test_every_public_name_is_in_the_table_of_the_interface():
    assert sorted(name for name, _ in table(DOCS / "api.md", "name")) == chordal.__all__


def test_the_settings_of_a_request_are_all_in_their_table():
    fields = dataclasses.fields(chordal.Request)
    rows = table(DOCS / "api.md", "setting")
    assert [name for name, *_ in rows] == [field.name for field in fields]
    for (name, default, _), field in zip(rows, fields, strict=True):
        told = () if default == "()" else parse_settings([f"{name}={default}"])[name]
        assert told == field.default, f"the default of {name} is {field.default}"


@pytest.mark.parametrize("name", decoder_names())
def test_every_decoder_has_a_row_in_the_readme(name):
    assert re.search(rf"^\| \[?`?{name}\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", decoder_names())
def test_the_page_of_a_decoder_gives_its_promise_and_sources(name):
    cls, text = decoder_class(name), (DOCS / f"decoders/{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert f"- **Promise**: {cls.promise}" in text
    assert set(ARXIV.findall(cls.paper)) <= set(ARXIV.findall(text))


@pytest.mark.parametrize("name", decoder_names())
def test_the_page_of_a_decoder_gives_every_setting_with_its_default(name):
    config = decoder_class(name).Config
    defaults = {row[0]: row[1] for row in table(DOCS / f"decoders/{name}.md", "setting")}
    assert list(defaults) == [field.name for field in dataclasses.fields(config)]
    for setting, told in defaults.items():
        assert make_config(config, parse_settings([f"{setting}={told}"])) == config(), (
            f"{setting} is not {told}"
        )


def test_every_paper_that_the_code_cites_is_in_the_index():
    cited = {
        number
        for path in (ROOT / "src").rglob("*.py")
        for number in ARXIV.findall(path.read_text(encoding="utf-8"))
    }
    assert cited - set(ARXIV.findall((DOCS / "papers.md").read_text(encoding="utf-8"))) == set()


def test_the_drawn_attention_specs_see_what_is_drawn():
    [drawing] = [text for _, text in blocks(DOCS / "design.md", "text") if text.startswith("Causal()")]
    specs, *rows = drawing.splitlines()
    drawn = list(re.finditer(r"\w+\(.*?\)(?=  |$)", specs))
    assert len(drawn) == 6
    for spec in drawn:
        visible = eval(spec[0], vars(forward)).visible(np.arange(2, 6))
        at = np.arange(6)
        sees = (at >= visible.start[:, None]) & (at < visible.end[:, None])
        if visible.own is not None:
            sees[:, 2:] |= visible.own
        told = [[row[spec.start() + 2 * slot] == "x" for slot in at] for row in rows]
        assert sees.tolist() == told, spec[0]
