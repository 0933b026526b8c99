"""The parts that decoder `denoise` is put together from, by name.

A part is a function that makes it for a sequence; its keyword arguments are its settings, and what has
no default must be given. A new part is such a function and one entry in `PARTS`. Settings that no other
part has are also fields of `DenoiseConfig`, with their range in `_RANGES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import Parameter, signature
from typing import Any, Literal, TypeAlias

from chordal.errors import InputError, UnknownNameError
from chordal.models.family import Kind
from chordal.ops.experts import Routing, RoutingRule
from chordal.policies.commit import (
    Averaged,
    Coherent,
    CommitRule,
    EntropyBound,
    Factor,
    LocalLeap,
    NearIndependent,
    Order,
    Scheduled,
    Threshold,
)
from chordal.policies.experts import SharedExperts
from chordal.policies.feed import (
    Block,
    BlockFeed,
    CanvasFeed,
    Feed,
    FeedName,
    SubBlockFeed,
    WindowFeed,
    canvas_blocks,
    model_blocks,
)
from chordal.policies.refine import Credit, Refine
from chordal.policies.stop import Prophet, StopRule, answer_region
from chordal.sequence import Sequence

Slot: TypeAlias = Literal["feed", "commit", "refine", "stop", "experts"]
ScoresOf: TypeAlias = Literal["model", "law"]
BlockLength: TypeAlias = int | Literal["canvas"]
Fed: TypeAlias = tuple[Feed, list[Block]]


@dataclass(frozen=True)
class Part:
    """One choice for a slot.

    Attributes:
        make: Makes it from a sequence and its settings: a feed with the blocks it goes through, a rule
            for each of these, a refinement, a stop or a routing. `num_steps` is the passes of what it is
            made for, the block of a rule and the canvas of all else.
        kind: Of a feed: the kind of model it is for.
        skips: Of a feed: whether some passes leave out masked positions.
        is_timed: Of a rule: whether all passes of a block run, even behind its last mask.
    """

    make: Callable[..., Any]
    kind: Kind = "masked"
    skips: bool = False
    is_timed: bool = False

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Its settings with their defaults, `Parameter.empty` for what must be given."""
        parameters = signature(self.make).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


def _canvas(name: FeedName, seq: Sequence, *, block_length: BlockLength = 32) -> Fed:
    length = seq.limit - seq.num_prompt if block_length == "canvas" else block_length
    return CanvasFeed(name), canvas_blocks(seq.num_prompt, seq.limit, length)


def _block(seq: Sequence) -> Fed:
    assert seq.family.block_length is not None, "a block model has a block length"
    return BlockFeed(seq.family.block_length), model_blocks(seq, seq.family.block_length)


def _window(
    seq: Sequence, *, active_length: int = 16, window_length: int = 64, refresh_period: int = 32
) -> Fed:
    canvas = Block(seq.num_prompt, seq.limit, seq.limit)
    return WindowFeed(active_length, window_length, refresh_period), [canvas]


def _sub_block(seq: Sequence, *, sub_block_length: int = 8, sub_block_cache: bool = False) -> Fed:
    length = seq.family.block_length
    assert length is not None, "a block model has a block length"
    return SubBlockFeed(length, sub_block_cache), model_blocks(seq, length, sub_block_length)


def _schedule(
    _: Sequence, *, num_steps: int, order: Order = "confidence", scores_of: ScoresOf = "model"
) -> CommitRule:
    return Scheduled(num_steps, order, scores_of)


def _threshold(_: Sequence, *, threshold: float = 0.9, scores_of: ScoresOf = "model") -> CommitRule:
    return Threshold(threshold, of=scores_of)


def _factor(_: Sequence, *, factor: float = 1.0, scores_of: ScoresOf = "model") -> CommitRule:
    return Factor(factor, scores_of)


def _local_leap(
    _: Sequence,
    *,
    threshold: float = 0.9,
    relaxed_threshold: float = 0.75,
    radius: int = 4,
    scores_of: ScoresOf = "model",
) -> CommitRule:
    return LocalLeap(threshold, relaxed_threshold, radius, scores_of)


def _entropy(_: Sequence, *, entropy_bound: float = 0.1, scores_of: ScoresOf = "law") -> CommitRule:
    return EntropyBound(entropy_bound, scores_of)


def _near_independent(_: Sequence, *, entropy_bound: float = 0.1, scores_of: ScoresOf = "law") -> CommitRule:
    return NearIndependent(entropy_bound, scores_of)


def _coherent(
    seq: Sequence,
    *,
    num_steps: int,
    adaptive: bool = True,
    expand_ratio: float = 4.0,
    order: Order = "entropy",
) -> CommitRule:
    return Coherent(
        num_steps,
        adaptive=adaptive,
        expand_ratio=expand_ratio,
        order=order,
        of="law" if order == "entropy" else "model",
        is_greedy=seq.law.is_greedy,
    )


def _averaged(
    _: Sequence,
    *,
    num_steps: int,
    adaptive: bool = True,
    history_length: int = 3,
    pool_size: int = 4,
    max_entropy: float = 0.3,
    order: Order = "entropy",
) -> CommitRule:
    return Averaged(
        num_steps,
        history_length=history_length,
        pool_size=pool_size,
        adaptive=adaptive,
        max_entropy=max_entropy,
        order=order,
    )


def _credit(_: Sequence, *, fusion: float = 0.65, decay: float = 0.7, concavity: float = 0.2) -> Refine:
    return Credit(fusion, decay, concavity)


def _prophet(
    seq: Sequence,
    *,
    num_steps: int,
    answer_start: int,
    answer_length: int = 5,
    early_threshold: float = 7.5,
    middle_threshold: float = 5.0,
    late_threshold: float = 2.5,
) -> StopRule:
    region = answer_region(seq, answer_start, answer_length)
    return Prophet(num_steps, region, (early_threshold, middle_threshold, late_threshold))


def _share(
    rule: RoutingRule, _: Sequence, *, expert_share: float = 0.6, expert_refresh: bool = False
) -> SharedExperts:
    return SharedExperts(Routing(rule, share=expert_share), expert_refresh)


def _choices(_: Sequence, *, expert_choices: int = 3, expert_refresh: bool = False) -> SharedExperts:
    return SharedExperts(Routing("seq", num_choices=expert_choices), expert_refresh)


PARTS: dict[Slot, dict[str, Part]] = {
    "feed": {
        "whole": Part(partial(_canvas, "whole")),
        "prefix": Part(partial(_canvas, "prefix")),
        "dual": Part(partial(_canvas, "dual"), skips=True),
        "window": Part(_window, skips=True),
        "block": Part(_block, kind="block", skips=True),
        "sub_block": Part(_sub_block, kind="block", skips=True),
    },
    "commit": {
        "schedule": Part(_schedule, is_timed=True),
        "threshold": Part(_threshold),
        "factor": Part(_factor),
        "local_leap": Part(_local_leap),
        "entropy": Part(_entropy),
        "near_independent": Part(_near_independent),
        "coherent": Part(_coherent),
        "averaged": Part(_averaged),
    },
    "refine": {"credit": Part(_credit)},
    "stop": {"prophet": Part(_prophet)},
    "experts": {
        "vote": Part(partial(_share, "vote")),
        "max": Part(partial(_share, "max")),
        "seq": Part(_choices),
    },
}


def choose(names: Mapping[Slot, str | None], given: Collection[str]) -> dict[Slot, Part]:
    """Look up the parts of some slots, and refuse what does not go together.

    Args:
        names: Of the part of each slot, None for a slot without one.
        given: Names of the settings that have a value.

    Raises:
        UnknownNameError: A slot has no such part.
        InputError: A setting belongs to no chosen part or is missing, or a stop does not go with the feed.
    """
    for slot, name in names.items():
        if name is not None and name not in PARTS[slot]:
            raise UnknownNameError(slot, name, PARTS[slot])
    parts = {slot: PARTS[slot][name] for slot, name in names.items() if name is not None}

    used = {name for part in parts.values() for name in part.settings}
    for setting in given:
        owners = [
            f"{slot}={name}" for slot in PARTS for name, one in PARTS[slot].items() if setting in one.settings
        ]
        if owners and setting not in used:
            raise InputError(
                f"no part that was chosen takes {setting}; these do: {', '.join(owners)}. Choose one, or "
                f"leave {setting} out."
            )
    for slot, part in parts.items():
        for setting, default in part.settings.items():
            if default is Parameter.empty and setting not in (*given, "num_steps"):
                raise InputError(f"{slot}={names[slot]} needs {setting}; give it.")
    if "stop" in parts and parts["feed"].skips:
        raise InputError(
            f"stop={names['stop']} commits all that is masked, so every pass must read all of it, and "
            f"feed={names['feed']} leaves some out. Use {_feeds_that(lambda part: not part.skips)}."
        )
    return parts


def feeds_of(kind: Kind) -> str:
    """List the feeds for a kind of model, for messages."""
    return _feeds_that(lambda part: part.kind == kind)


def _feeds_that(fit: Callable[[Part], bool]) -> str:
    return " or ".join(f"feed={name}" for name, part in PARTS["feed"].items() if fit(part))


_Range: TypeAlias = tuple[Callable[[Any], bool], str]
_AT_LEAST_0: _Range = (lambda x: x >= 0, "at least 0")
_AT_LEAST_1: _Range = (lambda x: x >= 1, "at least 1")
_ABOVE_0: _Range = (lambda x: x > 0, "above 0")
_FINITE: _Range = (lambda x: 0 <= x < float("inf"), "a finite number of at least 0")
_NUMBER: _Range = (lambda x: x == x, "a number")
_RANGES: dict[str, _Range] = {
    "num_steps": _AT_LEAST_1,
    "block_length": _AT_LEAST_1,
    "threshold": _AT_LEAST_0,
    "relaxed_threshold": _AT_LEAST_0,
    "radius": _AT_LEAST_0,
    "sub_block_length": _AT_LEAST_1,
    "factor": _ABOVE_0,
    "entropy_bound": _ABOVE_0,
    "fusion": _FINITE,
    "decay": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "concavity": (lambda x: 0 < x < float("inf"), "a finite number above 0"),
    "answer_length": _AT_LEAST_1,
    "early_threshold": _NUMBER,
    "middle_threshold": _NUMBER,
    "late_threshold": _NUMBER,
    "cfg_scale": _FINITE,
    "expand_ratio": _FINITE,
    "history_length": _AT_LEAST_0,
    "pool_size": _AT_LEAST_1,
    "max_entropy": _AT_LEAST_0,
    "active_length": _AT_LEAST_1,
    "window_length": _AT_LEAST_1,
    "refresh_period": _AT_LEAST_1,
    "expert_share": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "expert_choices": _AT_LEAST_1,
    "num_branches": _AT_LEAST_1,
    "window_blocks": _AT_LEAST_1,
    "explore_below": _AT_LEAST_0,
    "cascade_weight": _FINITE,
    "eos_threshold": _AT_LEAST_0,
}


def check_ranges(config: Any) -> None:
    """Check the numbers of a config by the names of its fields.

    Raises:
        InputError: One is outside its range or not a number.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _RANGES and isinstance(value, (int, float)):
            holds, must = _RANGES[field.name]
            if not holds(value):
                raise InputError(f"{field.name} must be {must}; got {value}.")
