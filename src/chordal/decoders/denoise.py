"""Denoise a masked canvas: feed some positions, score the masked ones, commit some, repeat.

The loop of every masked-diffusion decoder that is a choice of feed, refinement, commit rule and stop, and
the decoder that takes that choice as its settings. Blocks are filled from left to right; inside a block
the rule decides. Committed positions never change.

Promise: approximate. With commit="schedule" and num_steps=None a pass commits one token: the model's own
slow reference, as long as the feed is exact.
Cost: one pass a step, feeding what the feed says; twice as many rows with guidance.
"""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from chordal.decoders.decoder import Decoder, Decoding
from chordal.errors import InputError
from chordal.forward import Blocks, Confidence, Forward, Ints, Logits, Reading, Sees, Together
from chordal.models.family import Family, Kind
from chordal.models.reading import read_logits
from chordal.ops.experts import Routing
from chordal.ops.sampling import guide
from chordal.ops.unmask import split_by_weight
from chordal.policies.commit import Candidates, CommitRule, Order
from chordal.policies.experts import SharedExperts
from chordal.policies.feed import Block, Feed
from chordal.policies.feed import canvas_blocks as canvas_blocks
from chordal.policies.parts import PARTS, BlockLength, Part, ScoresOf, Slot, check_ranges, choose, feeds_of
from chordal.policies.refine import Refine
from chordal.policies.stop import StopRule
from chordal.sequence import UNCOMMITTED, Sequence
from chordal.stats import TARGET

_EXACT_FEEDS: dict[Kind, str] = {"masked": "whole", "block": "block"}


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """Settings of `denoise`: a part for each slot, then the settings of parts, None for the part's own."""

    feed: str | None = None
    """What a pass recomputes: whole, prefix, dual or window, and of block models block or sub_block; None
    is whole or block, which are exact."""
    commit: str = "threshold"
    """What a pass commits: schedule, threshold, factor, local_leap, entropy, near_independent, coherent or
    averaged."""
    refine: str | None = None
    """What changes the logits before: credit."""
    stop: str | None = None
    """What ends the search early: prophet."""
    experts: str | None = None
    """How the rows of a pass agree on few experts, of a mixture of experts: vote, max or seq."""
    block_length: BlockLength | None = None
    """Tokens of a block, at least 1, or "canvas" for all as one; block models have their own."""
    active_length: int | None = None
    """Masks that a window recomputes in most passes (A), at least 1."""
    window_length: int | None = None
    """Masks that it sees (W), at least 1."""
    refresh_period: int | None = None
    """Passes from one refresh of the whole canvas to the next (R), at least 1."""
    sub_block_length: int | None = None
    """Positions of a model's block that are denoised together, at least 1."""
    sub_block_cache: bool | None = None
    """Feed only those, over stale keys and values of the rest of the block."""
    num_steps: int | None = None
    """Passes for the whole canvas, at least one a block; None is one a token."""
    order: Order | None = None
    """Which positions a schedule takes first."""
    scores_of: ScoresOf | None = None
    """Whose probabilities and entropies decide: the model's, or the law's that tokens are drawn from."""
    threshold: float | None = None
    """Confidence that suffices (tau), at least 0."""
    relaxed_threshold: float | None = None
    """Confidence that suffices near a position that reaches the threshold (tau_r), at least 0."""
    radius: int | None = None
    """How many positions near is (r), at least 0."""
    factor: float | None = None
    """The factor rule's f, above 0; larger commits more."""
    entropy_bound: float | None = None
    """What the entropies of a pass may add up to, in nats, above 0."""
    adaptive: bool | None = None
    """Commit all that is coherent, or keep to the budget of a plain step."""
    expand_ratio: float | None = None
    """By how many plain budgets the pool of the coherent rule may exceed one (r), at least 0."""
    history_length: int | None = None
    """Earlier steps that the averaged rule looks at (d), at least 0."""
    pool_size: int | None = None
    """Most confident positions of a step that are its candidates (V), at least 1."""
    max_entropy: float | None = None
    """Entropy of an averaged law that suffices, in nats, at least 0."""
    fusion: float | None = None
    """Weight of the credit in the logits (alpha), at least 0."""
    decay: float | None = None
    """Share of the credit that is left after a step (beta), from 0 to 1."""
    concavity: float | None = None
    """Power of the probability that is credited (gamma), above 0."""
    answer_start: int | None = None
    """Offset of the answer in the canvas; a negative one counts from its end."""
    answer_length: int | None = None
    """Positions of the answer, at least 1."""
    early_threshold: float | None = None
    """Mean gap of logits that stops in the first third of the passes."""
    middle_threshold: float | None = None
    """In the second."""
    late_threshold: float | None = None
    """And in the last."""
    expert_share: float | None = None
    """Share of a layer's experts that a vote leaves (beta), above 0 and at most 1."""
    expert_choices: int | None = None
    """First choices of every position that seq leaves (k), at least 1."""
    expert_refresh: bool | None = None
    """Share experts also in passes that feed what lies before their block."""
    cfg_scale: float = 0.0
    """Classifier-free guidance, at least 0; above 0 every pass runs a second copy without the prompt."""
    ban_eos: bool = False
    """Never commit a stop token, so the whole canvas is filled."""
    defer_eos: bool = False
    """Commit stop tokens only when nothing else is left."""

    def __post_init__(self) -> None:
        check_ranges(self)
        # For block models a feed that is not given leaves less choice; `parts` is asked again for them.
        self.parts("masked")

    def parts(self, kind: Kind) -> dict[Slot, Part]:
        """Give the part of each slot that has one, for a kind of model.

        Raises:
            InputError: They do not go together, or a setting belongs to none of them.
        """
        feed = self.feed or _EXACT_FEEDS[kind]
        names: dict[Slot, str | None] = {"feed": feed, "commit": self.commit}
        names |= {"refine": self.refine, "stop": self.stop, "experts": self.experts}
        parts = choose(names, [field.name for field in fields(self) if getattr(self, field.name) is not None])
        if self.cfg_scale > 0 and feed != "whole":
            raise InputError(f"cfg_scale needs passes over the whole canvas; got feed={feed}.")
        return parts

    def settings(self, part: Part, num_steps: int | None = None) -> dict[str, Any]:
        """Give the settings of a part, with its defaults where they are None and a number of passes."""
        given = {name: getattr(self, name) for name in part.settings} | {"num_steps": num_steps}
        return {
            name: default if given[name] is None else given[name] for name, default in part.settings.items()
        }


class Denoise(Decoder):
    """Denoise with any feed, commit rule, refinement, stop and routing that go together."""

    name = "denoise"
    family = "diffusion"
    promise = "approximate"
    exact_when = "commit = schedule, exact feed"
    needs = ("masked", "block")
    paper = "-"
    Config = DenoiseConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.needs_experts = self.config.experts is not None
        # That rule draws from averages of several passes.
        self.tells_logprobs = self.config.commit != "averaged"

    def check(self, family: Family) -> None:
        """Refuse a model that the decoder or its parts are not for."""
        super().check(family)
        feed = self.config.parts(family.kind)["feed"]
        if feed.kind != family.kind:
            raise InputError(
                f"feed={self.config.feed} is for {feed.kind} models; this one is {family.kind}. "
                f"Use {feeds_of(family.kind)}."
            )
        if feed is PARTS["feed"]["whole"] and self.config.experts and not self.config.expert_refresh:
            raise InputError(
                f"experts={self.config.experts} shares experts inside blocks, and feed=whole feeds all in "
                f"every pass. Use feed=prefix or feed=dual, or expert_refresh=true."
            )

    def decode(self, seq: Sequence) -> Decoding:
        """Decode one sequence."""
        config: DenoiseConfig = self.config
        parts = config.parts(seq.family.kind)
        feed, blocks = parts["feed"].make(seq, **config.settings(parts["feed"]))
        num_steps = split_steps(
            config.num_steps, [block.end - max(block.start, seq.num_prompt) for block in blocks]
        )
        refine, stop, experts = (
            parts[slot].make(seq, **config.settings(parts[slot], sum(num_steps))) if slot in parts else None
            for slot in ("refine", "stop", "experts")
        )
        commit = parts["commit"]
        rules = [commit.make(seq, **config.settings(commit, steps)) for steps in num_steps]

        # Prefill the whole blocks of the prompt but the last, which the first step carries along.
        length = seq.family.block_length
        if length and seq.num_prompt // length > 1:
            positions = np.arange((seq.num_prompt // length - 1) * length)
            yield Forward(seq.prompt[positions], positions, Blocks(length), slots=positions)

        seq.open_canvas(blocks[-1].canvas_end)
        yield from denoise(
            seq,
            blocks,
            feed,
            rules,
            num_steps=num_steps if commit.is_timed else None,
            refine=refine,
            stop=stop,
            experts=experts,
            cfg_scale=config.cfg_scale,
            banned=seq.family.eos_ids if config.ban_eos else (),
            unscored=seq.family.eos_ids if config.defer_eos else (),
        )


def denoise(
    seq: Sequence,
    blocks: Seq[Block],
    feed: Feed,
    rules: Seq[CommitRule],
    *,
    num_steps: Seq[int] | None = None,
    refine: Refine | None = None,
    stop: StopRule | None = None,
    experts: SharedExperts | None = None,
    cfg_scale: float = 0.0,
    banned: tuple[int, ...] = (),
    unscored: tuple[int, ...] = (),
) -> Decoding:
    """Fill the blocks of a canvas that was opened with `seq.open_canvas`.

    Args:
        seq: The sequence.
        blocks: Where to denoise, from left to right.
        feed: What each step recomputes.
        rules: What each step of each block commits, one rule a block.
        num_steps: Forward passes of each block at least; passes behind the last mask still run, as
            published samplers do. None stops a block when nothing is masked.
        refine: Changes the logits of the candidates, after guidance.
        stop: Ends the search early and commits everything; the feed must leave nothing out.
        experts: In which passes a mixture of experts shares them.
        cfg_scale: Classifier-free guidance; above 0 a second copy without the prompt runs beside each
            pass and the feed must be the whole canvas.
        banned: Tokens that are never committed.
        unscored: Tokens that score no confidence, so they are committed last.
    """
    for index, block in enumerate(blocks):
        rule, step = rules[index], 0
        num_at_start = num_left = len(seq.masked(block.start, block.end))
        at_least = num_steps[index] if num_steps else 0
        while not seq.done and (num_left > 0 or step < at_least):
            pass_number = seq.stats.forwards.get(TARGET, 0)
            plan = feed.plan(seq, block, step)
            targets = plan.candidates if stop is None else np.union1d(plan.candidates, stop.watches(seq))
            candidates_at = np.searchsorted(targets, plan.candidates)
            scores = [name for name in rule.reads if name != "logits"]
            routing = experts(plan, block) if experts is not None else None

            # Predict: the row before a position predicts it if the model's logits are shifted.
            needed = np.maximum(targets - seq.family.shift, 0)
            positions = np.union1d(plan.positions, needed)
            read = seq.sample(
                np.searchsorted(positions, needed),
                targets,
                draw=pass_number,
                scores=(*scores, *(() if stop is None else ("gap",))),
                of=rule.of,
                banned=banned,
                unscored=unscored,
                contexts=_contexts(seq, len(targets)),
            )
            logits: Any = None
            if cfg_scale > 0 or refine is not None or "logits" in rule.reads:
                logits = yield from _logits(seq, positions, plan.sees, needed, cfg_scale, routing)
                if refine is not None:
                    at = (torch.from_numpy(candidates_at).to(logits.device),)
                    logits = logits.index_put(at, refine(logits[at], plan.candidates, seq))
                [reading] = read_logits(logits, [read])
            else:
                reading = yield Forward(
                    tokens=seq.tokens[positions],
                    positions=positions,
                    slots=positions,
                    sees=plan.sees,
                    read=read if len(targets) else None,
                    routing=routing,
                )

            # Stop: everything that is still masked is committed as it is seen now.
            if stop is not None and stop(seq, targets, reading.gap):
                is_masked = seq.committed_at[targets] == UNCOMMITTED
                seq.commit(
                    targets[is_masked], reading.tokens[is_masked], confidence=reading.confidence(is_masked)
                )
                return

            # Commit.
            if len(plan.candidates):
                given: dict[str, Any] = {name: getattr(reading, name)[candidates_at] for name in scores}
                if "logits" in rule.reads:
                    given["logits"] = logits[candidates_at]
                    given["logits"][:, list(banned)] = -torch.inf
                candidates = Candidates(
                    plan.candidates,
                    reading.tokens[candidates_at],
                    given,
                    step,
                    num_at_start,
                    seq,
                    pass_number,
                )
                chosen = rule(candidates)
                chosen.sort()
                tokens = candidates.tokens[chosen]
                confidence = _confidence(reading, candidates_at[chosen], tokens)
                seq.commit(plan.candidates[chosen], tokens, confidence=confidence)
            num_left = len(seq.masked(block.start, block.end))
            step += 1
        if seq.done:
            return


def split_steps(num_steps: int | None, num_masked: Seq[int]) -> list[int]:
    """Split the passes of a canvas over its blocks by their masked positions; None is one a token.

    Raises:
        InputError: There are fewer passes than blocks.
    """
    total = sum(num_masked) if num_steps is None else num_steps
    if total < len(num_masked):
        raise InputError(
            f"num_steps must be at least the number of blocks; got {total} and {len(num_masked)} blocks. "
            f"Use num_steps={len(num_masked)} or longer blocks."
        )
    parts: list[int] = split_by_weight(total, num_masked).tolist()
    return parts


def _logits(
    seq: Sequence, positions: Ints, sees: Sees, rows_of: Ints, cfg_scale: float, routing: Routing | None
) -> Generator[Forward | tuple[Forward, ...], Any, Any]:
    """Read the logits at some positions, guided away from those given no prompt if asked for.

    Guidance runs the canvas with and without its prompt, both without cache.
    """
    rows, tokens = np.searchsorted(positions, rows_of), seq.tokens[positions]
    if cfg_scale == 0:
        reading = yield Forward(tokens, positions, sees, Logits(rows), slots=positions, routing=routing)
        return reading.logits
    assert seq.family.mask_id is not None, "open_canvas refuses a model without a mask token"
    hidden = np.where(positions < seq.num_prompt, seq.family.mask_id, tokens)
    pair = tuple(
        Forward(some, positions, Together(), Logits(rows), routing=routing) for some in (tokens, hidden)
    )
    given, without = yield pair
    return guide(given.logits, without.logits, cfg_scale)


def _confidence(reading: Reading, rows: Ints, tokens: Ints) -> Confidence:
    """Say how sure the model was of tokens read at some rows; of others in their place it is not known."""
    as_read, is_other = reading.confidence(rows), tokens != reading.tokens[rows]
    probs, logprobs = as_read.probs, as_read.logprobs
    if probs is not None:
        probs = np.where(is_other, np.nan, probs)
    if logprobs is not None:
        logprobs = replace(logprobs, chosen=np.where(is_other, np.nan, logprobs.chosen))
    return Confidence(probs, logprobs)


def _contexts(seq: Sequence, count: int) -> tuple[Ints, ...] | None:
    """Every committed token, for penalties: masked positions have no order among them."""
    if not seq.law.reads_context:
        return None
    return (seq.tokens[np.flatnonzero(seq.committed_at[: seq.canvas_end] >= 0)],) * count
