"""What is searched: the settings of each decoder that are worth it, and their ranges.

Types and defaults are read from the decoder's config; only the ranges stand here. A decoder that has no
entry, such as a plug-in's, is searched over its choices and flags and over settings of usual names.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from chordal.registry import decoder_class


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole numbers from `low` to `high`, both included; `log` tries small ones more often."""

    low: int
    high: int
    log: bool = False

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Real:
    """Numbers from `low` to `high` in steps, both included."""

    low: float
    high: float
    step: float = 0.01

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, float) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class OneOf:
    """A few values without an order."""

    values: tuple[bool | int | float | str | None, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.values


Range: TypeAlias = Whole | Real | OneOf
Space: TypeAlias = Mapping[str, Mapping[str, Range]]

_DRAFT = Whole(1, 32, log=True)
_THRESHOLD = Real(0.5, 0.99)
_STEPS = OneOf((None, 4, 8, 12, 16, 24, 32, 48))
_BLOCK = OneOf((None, 4, 8, 16, 32))
# "of the config": every value that the annotation of the setting allows.
_ALL = None

_RANGES: dict[str, dict[str, Range | None]] = {
    "autoregressive": {},
    "prompt_lookup": {"num_draft": _DRAFT, "max_ngram": Whole(1, 5), "match": _ALL},
    "copyspec": {
        "num_copy": _DRAFT,
        "ngram": Whole(1, 6),
        "match": _ALL,
        "adaptive": _ALL,
        "draft_model": _ALL,
        "num_draft": Whole(1, 16, log=True),
    },
    "aggressive": {"num_draft": _DRAFT, "max_ngram": Whole(1, 5), "match": _ALL},
    "jacobi": {
        "window": Whole(1, 16),
        "ngram": Whole(2, 8),
        "num_branches": Whole(0, 16),
        "learn_text": _ALL,
    },
    "token_recycling": {"tree": OneOf(("1/1/1", "4/2,1,0,0/1,0,0", "6/3,2,1,0,0,0/2,1,0,1,0,0/1,0,0,0"))},
    "aded": {
        "num_draft": Whole(1, 12, log=True),
        "num_iterations": OneOf((25, 75, 150)),
        "num_paths": OneOf((6, 12, 24)),
    },
    # These look for other texts, not for the same one sooner: as they are, or not at all.
    "superposed": {},
    "diverse_beam": {},
    "first_finish": {},
    "entropy_adaptive": {"threshold": Real(0.1, 2.0, 0.1), "window": Whole(1, 10), "min_run": Whole(1, 20)},
    "draft_model": {
        "num_draft": Whole(1, 16, log=True),
        "min_confidence": Real(0.0, 0.8, 0.1),
        "schedule": _ALL,
        "acceptance": _ALL,
    },
    "rsd": {
        "tree": _ALL,
        "beam_width": Whole(1, 8),
        "depth": Whole(1, 8),
        "widths": OneOf(("2,1", "2,2,1,1", "3,2,1,1", "4,2,1,1,1")),
    },
    "pearl": {"num_draft": Whole(1, 16, log=True)},
    "specmquant": {"draft": _ALL, "num_draft": Whole(2, 16), "min_draft": Whole(1, 12), "width": Whole(1, 3)},
    "low_confidence": {"num_steps": _STEPS, "block_length": _BLOCK},
    "threshold": {"threshold": _THRESHOLD, "block_length": _BLOCK, "feed": _ALL},
    "localleap": {
        "threshold": _THRESHOLD,
        "relaxed_threshold": Real(0.4, 0.95),
        "radius": Whole(1, 8),
        "block_length": _BLOCK,
        "feed": _ALL,
    },
    "credit_decoding": {
        "threshold": _THRESHOLD,
        "fusion": Real(0.1, 1.5, 0.05),
        "decay": Real(0.1, 0.95, 0.05),
        "block_length": _BLOCK,
        "feed": _ALL,
    },
    "prophet": {
        "early_threshold": Real(2.5, 12.5, 0.5),
        "middle_threshold": Real(1.0, 9.0, 0.5),
        "late_threshold": Real(0.5, 6.0, 0.5),
        "block_length": _BLOCK,
        "feed": OneOf(("whole", "prefix")),
    },
    # Its parts with settings of their own are the decoders around it.
    "denoise": {
        "feed": OneOf((None, "prefix", "dual")),
        "commit": OneOf(("threshold", "local_leap", "near_independent")),
        "refine": OneOf((None, "credit")),
        "block_length": _BLOCK,
    },
    "ccd": {
        "variant": _ALL,
        "expand_ratio": Real(1.0, 8.0, 0.5),
        "max_entropy": Real(0.05, 1.0, 0.05),
        "block_length": _BLOCK,
    },
    "des": {"experts": _ALL, "expert_share": Real(0.3, 1.0, 0.05), "threshold": _THRESHOLD, "feed": _ALL},
    "window_diffusion": {
        "active_length": Whole(4, 32),
        "window_length": OneOf((16, 32, 64, 128)),
        "refresh_period": OneOf((8, 16, 32, 64)),
        "threshold": OneOf((None, 0.6, 0.7, 0.8, 0.9)),
    },
    "ete": {
        "num_branches": Whole(1, 8),
        "threshold": _THRESHOLD,
        "explore_below": Whole(1, 4),
        "block_length": _BLOCK,
        "feed": _ALL,
    },
    "block_diffusion": {
        "threshold": OneOf((None, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
        "entropy_bound": OneOf((None, 0.1, 0.3, 0.6)),
    },
    "freedave": {
        "num_drafts": Whole(1, 8),
        "threshold": OneOf((None, 0.7, 0.8, 0.9)),
        "feed": _ALL,
        "num_ahead": Whole(0, 2),
    },
    "fast_dllm_v2": {
        "threshold": _THRESHOLD,
        "sub_block_length": OneOf((2, 4, 8, 16)),
        "sub_block_cache": _ALL,
    },
    "s2d2": {
        "threshold": _THRESHOLD,
        "route": _ALL,
        "min_span": Whole(2, 16),
        "verify_cost": Real(0.0, 3.0, 0.25),
    },
    "wedlm": {
        "entropy_threshold": OneOf((None, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
        "distance_penalty": OneOf((0.0, 0.01, 0.02, 0.05)),
        "window_length": Whole(4, 32, log=True),
    },
    "renoise": {
        "num_steps": OneOf((8, 16, 24, 32, 48)),
        "entropy_bound": OneOf((0.05, 0.1, 0.2, 0.4)),
        "stability_threshold": Whole(0, 3),
        "confidence_threshold": OneOf((0.002, 0.005, 0.02, 0.05)),
    },
    "recurrent_depth": {
        "inner_recurrence": Whole(1, 8),
        "exit_threshold": OneOf((0.01, 0.03, 0.1, 0.3)),
        "freeze": _ALL,
        "headway": Whole(1, 4),
    },
    "loop_speculative": {"num_draft": Whole(1, 16, log=True), "draft_loops": Whole(1, 6)},
}

_USUAL: dict[str, Range] = {
    "num_draft": _DRAFT,
    "max_ngram": Whole(1, 5),
    "threshold": _THRESHOLD,
    "block_length": _BLOCK,
    "num_steps": _STEPS,
}


def space_of(decoder: str) -> dict[str, Range]:
    """Give the searched settings of a decoder with their ranges; the default is in each of them.

    Raises:
        UnknownNameError: No decoder has that name.
    """
    config = decoder_class(decoder).Config
    hints, defaults = typing.get_type_hints(config), defaults_of(decoder)
    if decoder in _RANGES:
        return {
            name: _with(defaults[name], given or OneOf(_values(hints[name])))
            for name, given in _RANGES[decoder].items()
        }
    found: dict[str, Range] = {
        name: OneOf(values) for name, hint in hints.items() if name in defaults and (values := _values(hint))
    }
    return found | {
        name: given for name, given in _USUAL.items() if name in defaults and defaults[name] in given
    }


def defaults_of(decoder: str) -> dict[str, Any]:
    """Give the default of every setting of a decoder."""
    config = decoder_class(decoder).Config()
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _with(default: Any, given: Range) -> Range:
    """Put the default before a few values that lack it."""
    if isinstance(given, OneOf) and default not in given:
        return OneOf((default, *given.values))
    return given


def _values(hint: Any) -> tuple[Any, ...]:
    """Give all values of an annotation that allows only a few."""
    if hint is bool:
        return (False, True)
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
