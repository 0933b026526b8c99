"""Batches of task examples: tokenized, grouped by task group, the same for the same seed and step."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from chordal.bench.tasks import GROUPS, TASKS, Instance, is_held_out

# Examples of a task group in one step, and its weight in the loss.
Mixture: TypeAlias = Mapping[str, tuple[int, float]]

# About as many tokens of each group, more weight on the ten list operations.
EVEN: Mixture = {"lists": (64, 0.4), "puzzles": (32, 0.2), "arithmetic": (24, 0.2), "edits": (12, 0.2)}

# For models that start from one that knows the tasks: more of the long answers.
LONG: Mixture = {"lists": (40, 0.25), "puzzles": (24, 0.2), "arithmetic": (44, 0.3), "edits": (24, 0.25)}

# Most of all arithmetic, which masked models find hardest.
HARD: Mixture = {"lists": (40, 0.25), "puzzles": (24, 0.15), "arithmetic": (48, 0.4), "edits": (16, 0.2)}


@dataclass(frozen=True)
class Batch:
    """Examples of one task group, padded on the right with the end token.

    Attributes:
        tokens_BT: Prompt, then answer, then end tokens.
        prompt_length_B: Where each answer starts.
        length_B: Where each row ends, its first end token included.
        weight: Share of this batch in the loss of its step.
    """

    tokens_BT: torch.Tensor
    prompt_length_B: torch.Tensor
    length_B: torch.Tensor
    weight: float


def make_batches(
    tokenizer: Any,
    *,
    seed: int,
    step: int,
    mixture: Mixture = EVEN,
    slack: int = 0,
    scale: float = 1.0,
) -> list[Batch]:
    """Make one batch a task group, together one training step.

    Args:
        tokenizer: Gives token ids and the chat template.
        seed: Of the run.
        step: Number of the step; the same seed and step give the same batches.
        mixture: How many examples of each group.
        slack: Columns of end tokens kept free behind the longest row.
        scale: Multiplies the number of examples.
    """
    end = tokenizer.eos_token_id
    batches = []
    for group in GROUPS:
        rng = random.Random(f"{seed}:{step}:{group}")
        tasks = [task for task in TASKS.values() if task.group == group]
        examples: list[Instance] = []
        num_examples, weight = mixture[group]
        count = max(2, round(num_examples * scale))
        while len(examples) < count:
            # In turn rather than at random: every task in every step.
            instance = tasks[(len(examples) + step) % len(tasks)].make(rng)
            if not is_held_out(instance.prompt):
                examples.append(instance)
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": example.prompt}] for example in examples],
            add_generation_prompt=True,
        )["input_ids"]
        answers = tokenizer([example.answer for example in examples])["input_ids"]
        length_B = np.array([len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True)])
        tokens_BT = np.full((count, length_B.max() + slack), end, dtype=np.int64)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens_BT[row, : length_B[row] - 1] = prompt + answer
        batches.append(
            Batch(
                tokens_BT=torch.from_numpy(tokens_BT),
                prompt_length_B=torch.tensor([len(prompt) for prompt in prompts]),
                length_B=torch.from_numpy(length_B),
                weight=weight,
            )
        )
    return batches
