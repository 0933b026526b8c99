"""The plan: for each batch the draft that commits most tokens a second, or none.

A round of drafting and verification commits tau tokens a row and takes the draft model's passes, the
target's pass over root and draft, and the time outside of the models. Times are measured, tau is what
measured acceptance gives for a shape, and the best shape is compared with plain decoding.

Source: Sequoia (arXiv 2402.12374) for trees from measured chances by rank and measured times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from chordal.errors import InputError
from chordal.planning import trees
from chordal.planning.acceptance import Acceptance, expected_tokens, hits_by_rank, outcomes
from chordal.planning.latency import Latency, LatencyTable, measure_latency
from chordal.planning.measure import Run, decode_prompts
from chordal.planning.replay import replay
from chordal.stats import TARGET

if TYPE_CHECKING:
    from chordal.generation import Model, Prompt


@dataclass(frozen=True, slots=True)
class Takes:
    """What a decoder drafts.

    Attributes:
        shape: "chain", "tree" (any) or "widths" (every node of a level has as many children).
        setting: Setting that takes the shape.
        draft: The engine's model that drafts, one pass a level; None for drafts that cost no pass.
        fixed: Other settings that make it take the shape.
    """

    shape: Literal["chain", "tree", "widths"]
    setting: str
    draft: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


TAKES: dict[str, Takes] = {
    "prompt_lookup": Takes("chain", "num_draft"),
    "copyspec": Takes("chain", "num_copy"),
    "aggressive": Takes("chain", "num_draft"),
    "draft_model": Takes("chain", "num_draft", "draft"),
    "token_recycling": Takes("tree", "tree"),
    "rsd": Takes("widths", "widths", "draft", {"tree": "constant"}),
}

# Trees that acceptance is measured with: ranks that are told apart, and levels.
_RANKS, _PROBED_LEVELS = 8, 2
_MISFIT = 0.1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is searched.

    Attributes:
        max_draft: Longest path of a draft, at least 1.
        max_nodes: Most nodes of a tree, at least 1.
        margin: How much faster than plain decoding a draft must be, as a share, or there is none.
    """

    max_draft: int = 16
    max_nodes: int = 64
    margin: float = 0.05

    def __post_init__(self) -> None:
        if self.max_draft < 1 or self.max_nodes < 1 or self.margin < 0:
            raise InputError(
                f"max_draft and max_nodes must be at least 1 and margin at least 0; got {self.max_draft}, "
                f"{self.max_nodes} and {self.margin}."
            )


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Where the time goes at one batch.

    Attributes:
        target: Passes of the target.
        draft: Passes of the draft model, if one drafts.
        plain_host_s: Seconds outside of the models for each pass of plain decoding.
        host_s: The same for each pass of the decoder that drafts.
    """

    target: Latency
    draft: Latency | None = None
    plain_host_s: float = 0.0
    host_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Option:
    """One shape and what it would do.

    Attributes:
        settings: Settings that ask for it; none for plain decoding.
        num_nodes: Most draft tokens of a round.
        tokens: Tokens a row commits in a round (tau).
        round_s: Seconds of a round.
        tokens_per_s: Speed of the batch.
        ratio: How many times the speed of plain decoding that is.
    """

    settings: dict[str, Any]
    num_nodes: int
    tokens: float
    round_s: float
    tokens_per_s: float
    ratio: float

    @property
    def label(self) -> str:
        """The shape in words."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items()) or "off"


@dataclass(frozen=True, kw_only=True)
class Check:
    """The chosen setting as it ran, to hold against what was predicted.

    Attributes:
        tokens_per_s: Measured speed of the batch.
        plain_tokens_per_s: That of plain decoding, in the same process.
        ratio: How many times as fast, median of paired rounds.
        misfit: Measured by predicted speed, less 1.
    """

    tokens_per_s: float
    plain_tokens_per_s: float
    ratio: float
    misfit: float

    @property
    def is_misfit(self) -> bool:
        """Whether the prediction is more than a tenth off."""
        return abs(self.misfit) > _MISFIT


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to do at one batch.

    Attributes:
        batch: Sequences at once.
        decoder: Name of the decoder to use; the plain one if drafting is off.
        chosen: The option.
        options: All that were looked at, plain decoding first, then by the number of draft tokens.
        reason: Why, in a few sentences.
        check: How it ran, if it did.
    """

    batch: int
    decoder: str
    chosen: Option
    options: tuple[Option, ...]
    reason: str
    check: Check | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A choice for each batch, and what they rest on."""

    choices: tuple[Choice, ...]
    latency: Mapping[str, LatencyTable]
    acceptance: Acceptance

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as plain values; `decoder` and `settings` are those of the first batch."""
        first = self.choices[0]
        return {
            "decoder": first.decoder,
            "settings": first.chosen.settings,
            "reason": first.reason,
            "ladder": [
                {
                    "batch": choice.batch,
                    "decoder": choice.decoder,
                    "settings": choice.chosen.settings,
                    "reason": choice.reason,
                    "predicted": asdict(choice.chosen),
                    "measured": asdict(choice.check) if choice.check else None,
                    "options": [asdict(option) for option in choice.options],
                }
                for choice in self.choices
            ],
            "acceptance": {"per_rank": list(self.acceptance.per_rank)},
            "table": {name: table.to_dict() for name, table in self.latency.items()},
        }


def choose(
    decoder: str,
    acceptance: Acceptance,
    costs: Costs,
    *,
    batch: int,
    limits: Limits,
    plain: str = "autoregressive",
) -> Choice:
    """Choose the shape that commits most tokens a second at one batch; of equal ones the smallest.

    Args:
        decoder: Name of the decoder that drafts, one of `TAKES`.
        acceptance: How often its drafts are right.
        costs: Where the time goes.
        batch: Rows.
        limits: What is searched.
        plain: Name of the plain decoder.
    """
    takes = _takes(decoder)
    plain_s = costs.target.seconds(1, batch) + costs.plain_host_s
    off = Option(
        settings={}, num_nodes=0, tokens=1.0, round_s=plain_s, tokens_per_s=batch / plain_s, ratio=1.0
    )
    found: dict[int, Option] = {}
    for settings, num_nodes, tokens, seconds in _shapes(takes, acceptance, costs, batch, limits):
        speed = batch * tokens / seconds
        option = Option(
            settings=settings,
            num_nodes=num_nodes,
            tokens=tokens,
            round_s=seconds,
            tokens_per_s=speed,
            ratio=speed / off.tokens_per_s,
        )
        if num_nodes not in found or speed > found[num_nodes].tokens_per_s:
            found[num_nodes] = option
    if not found:
        raise InputError(
            f"texts are too short to plan for: no pass but the first had {batch} of them at once."
        )
    options = [found[num] for num in sorted(found)]
    best = max(options, key=lambda option: option.tokens_per_s)
    is_off = best.ratio < 1 + limits.margin
    return Choice(
        batch=batch,
        decoder=plain if is_off else decoder,
        chosen=off if is_off else best,
        options=(off, *options),
        reason=_reason(decoder, acceptance, best, off, options, batch, limits, is_off=is_off),
    )


def make_plan(
    model: Model,
    decoder: str,
    prompts: Seq[Prompt],
    *,
    settings: Mapping[str, Any] | None = None,
    batches: Seq[int] = (1,),
    limits: Limits | None = None,
    acceptance: Acceptance | None = None,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    on_step: Callable[[int, int, str], None] = lambda done, total, words: None,
    **request: Any,
) -> Plan:
    """Measure, choose and check: latency of passes, acceptance on prompts, then the choices as they run.

    Args:
        model: The model, with the draft model if the decoder asks for one; its engine must be idle.
        decoder: Name of a decoder, one of `TAKES`.
        prompts: Like those that it is for; acceptance belongs to them.
        settings: Its other settings that differ from its defaults.
        batches: Sequences at once, each at most what the engine holds.
        limits: What is searched.
        acceptance: What is known already, e.g. from a law; None measures it.
        repeats: Timed rounds of the check, at least 1; each is a plain and a chosen one.
        clock: Gives the time in seconds.
        on_step: Called with how many steps are done, of how many, and what comes.
        **request: Fields of `Request` for every prompt, e.g. the temperature.

    Raises:
        InputError: The decoder is not one of `TAKES` or lacks its draft model, or something given is out of
            range.

    Cost: (4 + 2 * `repeats`) runs over the prompts a batch, and the passes of `measure_latency`.
    """
    takes, engine, limits, base = _takes(decoder), model.engine, limits or Limits(), dict(settings or {})
    batches = sorted(set(batches))
    if takes.setting in base:
        raise InputError(f"{takes.setting} is what the plan chooses; leave it out.")
    if takes.draft is not None and takes.draft not in engine.models:
        raise InputError(f"{decoder} drafts with a second model; load one, e.g. with --draft.")
    if repeats < 1 or not prompts or not batches or not 1 <= min(batches) <= max(batches) <= engine.max_rows:
        raise InputError(
            f"a plan needs prompts, repeats of at least 1 and batches from 1 to {engine.max_rows}; got "
            f"{len(prompts)} prompts, {repeats} and {list(batches)}."
        )
    plain, plain_settings = model.family.default_decoder, dict(model.family.plain_settings)
    generous = _generous(takes, limits)
    total, done = 1 + 2 * len(batches), 0

    def step(words: str) -> None:
        nonlocal done
        on_step(done, total, words)
        done += 1

    def run(name: str, config: Mapping[str, Any], batch: int) -> Run:
        return decode_prompts(model, prompts, name, config, batch=batch, clock=clock, **request)

    def run_warm(name: str, config: Mapping[str, Any], batch: int) -> Run:
        run(name, config, batch)
        return run(name, config, batch)

    # Everything that can be refused is refused by these runs.
    step("plain decoding")
    plain_runs = {batch: run_warm(plain, plain_settings, batch) for batch in batches}
    probes = {}
    for batch in batches:
        step(f"drafting generously, {batch} at once")
        probes[batch] = run_warm(decoder, {**base, **generous}, batch)

    first = batches[0]
    if acceptance is None:
        acceptance = _measured(takes, probes[first], limits)
    lengths = [len(seq.prompt) + len(seq.output) // 2 for seq in plain_runs[first].seqs]
    # The longest row of a batch is what every row is padded to.
    contexts = [int(np.quantile(lengths, batch / (batch + 1))) for batch in batches]
    widest = 1 + (limits.max_draft if takes.shape == "chain" else limits.max_nodes)
    tables = {}
    for name in (TARGET, takes.draft):
        if name is not None:
            widths = _grid(widest if name == TARGET or takes.shape != "chain" else 1)
            tables[name] = measure_latency(
                engine.models[name], widths, batches, contexts=contexts, clock=clock
            )

    choices = []
    for batch in batches:
        costs = Costs(
            target=tables[TARGET],
            draft=tables[takes.draft] if takes.draft else None,
            plain_host_s=plain_runs[batch].host_s,
            host_s=probes[batch].host_s,
        )
        choice = choose(decoder, acceptance, costs, batch=batch, limits=limits, plain=plain)
        step(f"checking {choice.chosen.label}, {batch} at once")
        config = {**base, **choice.chosen.settings} if choice.decoder == decoder else plain_settings
        rounds = [
            (run(plain, plain_settings, batch), run(choice.decoder, config, batch)) for _ in range(repeats)
        ]
        choices.append(_checked(choice, rounds, settings=config, plain=plain))
    step("done")
    return Plan(choices=tuple(choices), latency=tables, acceptance=acceptance)


def _takes(decoder: str) -> Takes:
    if decoder not in TAKES:
        raise InputError(f"nothing is known to plan for {decoder}; it must be one of {', '.join(TAKES)}.")
    return TAKES[decoder]


def _generous(takes: Takes, limits: Limits) -> dict[str, Any]:
    """Give the settings to measure acceptance with: long chains, trees in which no node lacks a child."""
    if takes.shape == "chain":
        return {takes.setting: limits.max_draft}
    widths = (_RANKS,) * _PROBED_LEVELS
    text = ",".join(map(str, widths)) if takes.shape == "widths" else trees.tree_text(trees.even_tree(widths))
    return {**takes.fixed, takes.setting: text}


def _measured(takes: Takes, probe: Run, limits: Limits) -> Acceptance:
    """Take acceptance from what became of generous drafts."""
    traced = list(zip(probe.seqs, probe.traces, strict=True))
    if takes.shape == "chain":
        return Acceptance.of_chains(
            outcomes(trace, seq.num_prompt, len(seq.output), limits.max_draft) for seq, trace in traced
        )
    # Nothing is drafted for the last token that the length limit allows.
    return Acceptance.of_trees(
        hits_by_rank(trace, _RANKS, _PROBED_LEVELS, min(seq.num_prompt + len(seq.output), seq.limit - 1))
        for seq, trace in traced
    )


def _checked(
    choice: Choice, rounds: Seq[tuple[Run, Run]], *, settings: Mapping[str, Any], plain: str
) -> Choice:
    """Hold a choice against rounds of plain decoding and of itself; what loses all the same is off."""
    plain_speed = statistics.median(other.tokens_per_s for other, _ in rounds)
    speed = statistics.median(mine.tokens_per_s for _, mine in rounds)
    ratio = statistics.median(mine.tokens_per_s / other.tokens_per_s for other, mine in rounds)
    chosen = choice.chosen
    if choice.decoder != plain and ratio < 1:
        reason = (
            f"Drafting is off at batch {choice.batch}, as {choice.decoder} with {chosen.label} was predicted "
            f"to be {chosen.ratio:.2f} times as fast as plain decoding and ran {ratio:.2f} times as fast."
        )
        off, speed, ratio = choice.options[0], plain_speed, 1.0
        choice = replace(choice, decoder=plain, chosen=off, reason=reason)
    elif choice.decoder != plain:
        choice = replace(choice, chosen=replace(chosen, settings=dict(settings)))
    check = Check(
        tokens_per_s=speed,
        plain_tokens_per_s=plain_speed,
        ratio=ratio,
        misfit=speed / choice.chosen.tokens_per_s - 1,
    )
    return replace(choice, check=check)


def _shapes(
    takes: Takes, acceptance: Acceptance, costs: Costs, batch: int, limits: Limits
) -> Iterator[tuple[dict[str, Any], int, float, float]]:
    """List settings, draft tokens, tokens and seconds of a round for everything that can be asked for."""
    target, host_s = costs.target, costs.host_s
    draft = costs.draft if takes.draft else None
    if takes.shape == "chain":
        for num in range(1, limits.max_draft + 1):
            settings = {takes.setting: num}
            if acceptance.texts:
                played = replay(acceptance.texts, num, batch, target, draft, host_s)
                if played.passes:
                    yield settings, num, played.tokens / played.passes, played.seconds * batch / played.passes
            else:
                seconds = target.seconds(1 + num, batch) + host_s
                if draft is not None:
                    seconds += num * (draft.seconds(1, batch) + host_s)
                yield settings, num, expected_tokens(acceptance.alpha, num), seconds
    elif takes.shape == "tree":
        for tree in trees.best_trees(acceptance.per_rank, limits.max_nodes, limits.max_draft)[1:]:
            num = trees.num_nodes(tree)
            seconds = target.seconds(1 + num, batch) + host_s
            tokens = trees.expected_tokens(tree, acceptance.per_rank)
            yield {takes.setting: trees.tree_text(tree)}, num, tokens, seconds
    else:
        for widths in trees.even_trees(len(acceptance.per_rank), limits.max_nodes, limits.max_draft):
            tree = trees.even_tree(widths)
            num = trees.num_nodes(tree)
            seconds = target.seconds(1 + num, batch) + host_s
            if draft is not None:  # the i-th draft pass feeds the nodes of the level above
                seconds += sum(draft.seconds(len(level), batch) + host_s for level in tree)
            text = ",".join(map(str, widths))
            yield (
                {**takes.fixed, takes.setting: text},
                num,
                trees.expected_tokens(tree, acceptance.per_rank),
                seconds,
            )


def _grid(widest: int) -> list[int]:
    """List 1, 2, 4, ... and the widest."""
    return sorted({*(2**power for power in range(widest.bit_length()) if 2**power <= widest), widest})


def _reason(
    decoder: str,
    acceptance: Acceptance,
    best: Option,
    off: Option,
    options: Seq[Option],
    batch: int,
    limits: Limits,
    *,
    is_off: bool,
) -> str:
    """Say in a few sentences what was chosen and why."""
    costs = (
        f"a round commits {best.tokens:.2f} tokens a row and takes {best.round_s * 1e3:.2f} ms, "
        f"{best.round_s / off.round_s:.2f} times a plain pass ({off.round_s * 1e3:.2f} ms)"
    )
    if len(acceptance.per_rank) == 1:
        right = f"A draft token is right with a chance of {acceptance.alpha:.2f}"
    else:
        right = (
            f"Candidates are right with chances of {', '.join(f'{one:.2f}' for one in acceptance.per_rank)}"
        )
    if is_off:
        return (
            f"Drafting is off at batch {batch}, as the best draft, {decoder} with {best.label}, would be "
            f"{best.ratio:.2f} times as fast as plain decoding, and {1 + limits.margin:.2f} times is asked "
            f"for: {costs}. {right}."
        )
    at = options.index(best)
    beside = [options[place] for place in (at - 1, at + 1) if 0 <= place < len(options)]
    others = " and ".join(f"{other.label} {other.ratio:.2f}" for other in beside)
    return (
        f"Chose {decoder} with {best.label} at batch {batch}, {best.ratio:.2f} times as fast as plain "
        f"decoding, because "
        f"{costs}. {right}." + (f" Its neighbours: {others}." if others else "")
    )
