"""What the benchmarks share: paired rounds, transformers' generation, conditions, tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import chordal


def interleave(
    runs: Sequence[Callable[[], Any]], repeats: int, on_run: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Time runs in turns, every second round in the other direction: the seconds of each, by round.

    A machine that slows down slows all of them down, so ratios are to be taken within a round. `on_run` is
    called after each.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for round_ in range(repeats):
        order = list(zip(runs, seconds, strict=True))
        for run, spent in order if round_ % 2 == 0 else reversed(order):
            started = time.perf_counter()
            run()
            spent.append(time.perf_counter() - started)
            on_run()
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Give lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def generate(
    model: Any, prompts: Sequence[Sequence[int]], eos_ids: Iterable[int], **arguments: Any
) -> list[list[int]]:
    """Decode greedily with transformers' `generate`, prompts of one batch padded on the left.

    Returns:
        The new tokens of each prompt, the stop token included and nothing behind it.
    """
    ends = list(eos_ids)
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    is_prompt = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=is_prompt.to(model.device),
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **arguments,
    )
    answers = []
    for answer in out[:, width:].tolist():
        stops = [index for index, token in enumerate(answer) if token in ends]
        answers.append(answer[: stops[0] + 1] if stops else answer)
    return answers


def conditions() -> dict[str, Any]:
    """What any number depends on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "chordal": chordal.__version__,
    }


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
