"""The one training loop: Muon for the weight matrices, AdamW for the rest, EMA, resumable.

A run is a folder. `state.pt` holds everything the next step depends on and is replaced atomically,
so a run that was stopped anywhere continues with the same numbers as one that was not.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from chordal.training.data import EVEN, Mixture, make_batches
from chordal.training.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training run.

    Attributes:
        start: First step of the stage.
        mixture: Which tasks, and how much of each.
        objective: The loss.
    """

    objective: Objective
    mixture: Mixture = field(default_factory=lambda: EVEN)
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a bundled model is trained as.

    Attributes:
        name: Name of the model.
        summary: One line for the command line's list.
        family: Family spec written into the model's `config.json` under the key "chordal".
        stages: What is trained on, in order of their starts.
        backbone: Settings of the transformers Qwen3 configuration.
        num_steps: Training steps.
        learning_rate: Peak, for both optimizers.
        init_from: Name of the recipe whose result this one starts from, or None for random weights.
        remake: Makes another architecture of the model it starts from.
        slack: Columns of end tokens to keep behind the longest example of a batch.
    """

    name: str
    summary: str
    family: dict[str, Any]
    stages: tuple[Stage, ...]
    backbone: dict[str, Any]
    num_steps: int
    learning_rate: float = 3e-3
    init_from: str | None = None
    remake: Callable[[Any], Any] | None = None
    slack: int = 0


@dataclass(frozen=True)
class Progress:
    """What the loop reports after each step: loss in nats a token, speed, peak memory."""

    step: int
    num_steps: int
    loss: float
    tokens_per_second: float
    memory_gb: float


WARMUP_STEPS = 100
DECAY_SHARE = 0.35
EMA_DECAY = 0.998


def train(
    recipe: Recipe,
    directory: Path,
    *,
    tokenizer_dir: Path,
    init_dir: Path | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    save_every: int = 200,
    scale: float = 1.0,
) -> Iterator[Progress]:
    """Train a recipe in `directory`, resuming what is there, and yield progress after each step.

    Args:
        recipe: What to train.
        directory: Run folder: `state.pt` while training, the finished model in `model/`.
        tokenizer_dir: Folder of the tokenizer.
        init_dir: Model folder to start from, where the recipe has `init_from`.
        num_steps: Overrides the recipe's number of steps, also of a run that is resumed.
        seed: Of weights, data and masks.
        save_every: Steps between checkpoints.
        scale: Multiplies the examples of a step.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
    total = num_steps or recipe.num_steps
    torch.manual_seed(seed)
    model = _build(recipe, len(tokenizer), tokenizer.eos_token_id, init_dir)
    # Norms and embeddings are no linear maps between activations; Muon is for those that are.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    lr = recipe.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    params = list(model.parameters())
    ema = [p.detach().clone() for p in params]
    first, seconds = 0, 0.0
    state_path = directory / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema, first, seconds = state["ema"], state["step"], state["seconds"]

    model.train()
    for step in range(first, total):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        num_tokens, loss_sum = 0, 0.0
        stage = [stage for stage in recipe.stages if stage.start <= step][-1]
        for batch in make_batches(
            tokenizer, seed=seed, step=step, mixture=stage.mixture, slack=recipe.slack, scale=scale
        ):
            with torch.autocast("cpu", torch.bfloat16):
                loss = stage.objective(model, batch, generator)
            (loss * batch.weight).backward()
            num_tokens += int(batch.length_B.sum())
            loss_sum += loss.item() * batch.weight
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        elapsed = time.perf_counter() - started
        seconds += elapsed
        if (step + 1) % save_every == 0 or step + 1 == total:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "ema": ema,
                "step": step + 1,
                "seconds": seconds,
            }
            torch.save(state, directory / "state.tmp")
            (directory / "state.tmp").replace(state_path)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield Progress(step + 1, total, loss_sum, num_tokens / elapsed, memory)

    _export(recipe, model, ema, tokenizer, directory / "model", seed=seed, steps=total, seconds=seconds)


def _schedule(step: int, total: int) -> float:
    """Warm up, stay, then fall linearly to 2% over the last `DECAY_SHARE` of the steps."""
    left = (total - step) / (total * DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.02, left))


def _build(recipe: Recipe, vocab_size: int, end_id: int, init_dir: Path | None) -> Any:
    if recipe.init_from is not None:
        if init_dir is None or not (init_dir / "config.json").exists():
            raise FileNotFoundError(
                f"{recipe.name} starts from {recipe.init_from}, which must be trained first; "
                f"found no model at {init_dir}. Run: chordal train {recipe.init_from}"
            )
        start = AutoModelForCausalLM.from_pretrained(
            init_dir, dtype=torch.float32, attn_implementation="eager"
        )
        return start if recipe.remake is None else recipe.remake(start)
    config = Qwen3Config(
        vocab_size=vocab_size, eos_token_id=end_id, pad_token_id=None, bos_token_id=None, **recipe.backbone
    )
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config)


def _export(
    recipe: Recipe, model: Any, ema: list[torch.Tensor], tokenizer: Any, directory: Path, **facts: Any
) -> None:
    """Write the averaged weights in bfloat16, the tokenizer and the run's facts."""
    with torch.no_grad():
        for param, average in zip(model.parameters(), ema, strict=True):
            param.copy_(average)
    model.to(torch.bfloat16)
    model.config.chordal = recipe.family
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    (directory / "training.json").write_text(json.dumps({"recipe": recipe.name, **facts}, indent=1) + "\n")
