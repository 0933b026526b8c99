"""Choose a decoder and its settings: search, then hold the best few against the plain decoder once more.

The search ranks by one run over the prompts, and the best of many such numbers is too good to be true. So
its best few run again, on all prompts and in several rounds beside the plain decoder; only those rounds are
reported, and what does not win every one of them is not chosen.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chordal.bench.compare import Contender, describe_setup
from chordal.errors import InputError
from chordal.planning.plan import TAKES, Limits, make_plan
from chordal.registry import decoder_class, decoder_names
from chordal.tuning.arena import Arena, ModelArena, Run, Yardstick, side_by_side
from chordal.tuning.search import Result, Study, best_results
from chordal.tuning.space import Space, Whole, space_of

if TYPE_CHECKING:
    from chordal.bench.tasks.workload import Workload
    from chordal.generation import Model

_NUM_PLANNED = 4


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A decoder in the last rounds.

    Attributes:
        decoder: Its name.
        settings: Those that differ from its defaults.
        promise: "exact" or "approximate".
        quality: What it keeps of the plain decoder's; see `Yardstick`.
        ratio: How many times the plain decoder's tokens a second, median of the paired rounds.
        low: The lowest of the rounds.
        high: The highest.
        tokens_per_s: Median of the rounds.
        tokens_per_forward: Committed tokens by forward passes of the target.
        break_even: Tokens a forward at which it would be no faster than the plain decoder.
        num_slower: Prompts that stay below that.
    """

    decoder: str
    settings: dict[str, Any]
    promise: Literal["exact", "approximate"]
    quality: float
    ratio: float
    low: float
    high: float
    tokens_per_s: float
    tokens_per_forward: float
    break_even: float
    num_slower: int

    @property
    def label(self) -> str:
        """Name and settings in words."""
        return _words(Contender(self.decoder, self.settings))


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The choice.

    Attributes:
        chosen: What won, the plain decoder if nothing else did.
        plain: The plain decoder in the same rounds.
        finalists: All that ran in them, the fastest first.
        metric: What quality is: "accuracy" or "agreement".
        floor: Least quality of an approximate decoder.
        num_trials: Finished trials of the search.
        num_prompts: Prompts.
        rounds: Last rounds.
        why: The choice in one paragraph.
    """

    chosen: Finalist
    plain: Finalist
    finalists: list[Finalist]
    metric: Literal["accuracy", "agreement"]
    floor: float
    num_trials: int
    num_prompts: int
    rounds: int
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values; `decoder` and `settings` are what `--config` reads."""
        measured, plain = _plain_values(self.chosen), _plain_values(self.plain)
        return {
            "decoder": measured.pop("decoder"),
            "settings": measured.pop("settings"),
            "why": self.why,
            "measured": {
                **measured,
                "plain": {name: plain[name] for name in ("decoder", "tokens_per_s", "tokens_per_forward")},
                "metric": self.metric,
                "quality_floor": self.floor,
                "prompts": self.num_prompts,
                "rounds": self.rounds,
                "trials": self.num_trials,
            },
            "finalists": [_plain_values(finalist) for finalist in self.finalists],
        }


def tune(
    model: Model,
    workloads: Seq[Workload],
    *,
    decoders: Iterable[str] | None = None,
    floor: float = 0.99,
    num_trials: int = 60,
    timeout_s: float | None = None,
    study: Path | None = None,
    use_planner: bool = True,
    repeats: int = 5,
    num_finalists: int = 3,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    on_note: Callable[[str], None] = lambda text: None,
    on_step: Callable[[int, int, str], None] = lambda done, total, words: None,
    on_trial: Callable[[int, int, Result], None] = lambda done, total, result: None,
    **request: Any,
) -> Tuned:
    """Choose a decoder and its settings for a model and prompts, on this machine.

    Args:
        model: The model, with the other models that decoders may ask; its engine says how many prompts share
            a forward pass.
        workloads: Prompts like those that it is for, graded or not.
        decoders: Names of those to search; None takes all that fit the model.
        floor: Least quality of an approximate decoder against the plain one, above 0 and at most 1.
        num_trials: Settings to try, those of an earlier, interrupted search among them.
        timeout_s: No trial begins later than this many seconds after the search did.
        study: Journal file of the search, to be gone on with; None keeps none.
        use_planner: Ask `make_plan` for draft lengths to try first.
        repeats: Last rounds, at least 1.
        num_finalists: How many run in them.
        seed: Of the optimiser and the order of the prompts; `request` may hold another for decoding.
        clock: Gives the time in seconds.
        on_note: Called with a line that the user should know: trials that the journal held, what is left out.
        on_step: Called before what is neither a trial nor quick.
        on_trial: Called after each trial with how many are done, of how many, and what the last one found.
        **request: Fields of `Request` for every prompt, e.g. the temperature.

    Raises:
        InputError: Something given cannot be used, or Optuna is not installed.

    Promise: what is chosen is exact, or within the floor on these prompts; it beat the plain decoder in every
    one of the last rounds, else the plain decoder is chosen. Same seed, same trials, if runs take the same
    times.
    """
    if not 0 < floor <= 1:
        raise InputError(f"the quality floor must be above 0 and at most 1; got {floor}.")
    if num_trials < 1 or repeats < 1 or num_finalists < 1:
        raise InputError(
            f"trials, repeats and finalists must be at least 1; got {num_trials}, {repeats}, {num_finalists}."
        )
    arena = ModelArena(model, workloads, seed=seed, clock=clock, **request)
    if not arena.num_prompts:
        raise InputError("tuning needs at least one prompt.")
    # Two samples differ for no fault of theirs.
    is_sampled = bool(request.get("temperature"))
    is_judged = not is_sampled or any(workload.grade for workload in workloads)
    space = search_space(model, decoders, is_sampled=is_sampled, exact_only=not is_judged)
    if not is_judged:
        on_note("Sampled texts that nobody grades cannot be judged: approximate decoders are left out.")
    conditions = _conditions(model, workloads, floor, request)
    search = Study(study, conditions, space, seed=seed)
    if search.num_trials:
        on_note(f"{study} holds {search.num_trials} trials; going on with them.")

    def first() -> list[Contender]:
        planned = _planned(model, arena, space, on_step, request) if use_planner else []
        return [*planned, *(Contender(name) for name in space if name != arena.plain.decoder)]

    return tune_in(
        arena,
        search,
        floor=floor,
        num_trials=num_trials,
        timeout_s=timeout_s,
        repeats=repeats,
        num_finalists=num_finalists,
        first=first,
        clock=clock,
        on_note=on_note,
        on_step=on_step,
        on_trial=on_trial,
    )


def tune_in(
    arena: Arena,
    search: Study,
    *,
    floor: float,
    num_trials: int,
    timeout_s: float | None = None,
    repeats: int = 5,
    num_finalists: int = 3,
    first: Callable[[], Seq[Contender]] = tuple,
    clock: Callable[[], float] = time.perf_counter,
    on_note: Callable[[str], None] = lambda text: None,
    on_step: Callable[[int, int, str], None] = lambda done, total, words: None,
    on_trial: Callable[[int, int, Result], None] = lambda done, total, result: None,
) -> Tuned:
    """Search in an arena, run the best few again, choose; the arguments are those of `tune`."""
    on_step(0, num_trials, "plain decoding")
    arena.run(arena.plain, 0, 1)
    yardstick = Yardstick(arena.run(arena.plain, 0, arena.num_prompts))
    if yardstick.metric == "agreement" and any(output.right is not None for output in yardstick.run.outputs):
        on_note("The plain decoder gets no answer right: approximate ones are judged by their text instead.")
    search.run(
        arena,
        yardstick,
        floor=floor,
        num_trials=num_trials,
        timeout_s=timeout_s,
        first=search.first(first),
        clock=clock,
        on_trial=on_trial,
    )
    results = search.results()
    best = [result.contender for result in best_results(results, num_finalists)]
    plain, *finalists = _final(arena, yardstick, best, repeats, on_step)
    finalists.sort(key=lambda one: one.ratio, reverse=True)
    chosen = _choose(finalists, floor) or plain
    return Tuned(
        chosen=chosen,
        plain=plain,
        finalists=finalists,
        metric=yardstick.metric,
        floor=floor,
        num_trials=len(results),
        num_prompts=arena.num_prompts,
        rounds=repeats,
        why=_why(chosen, plain, finalists, results, yardstick.metric, floor, arena, repeats),
    )


def search_space(
    model: Model,
    decoders: Iterable[str] | None = None,
    *,
    is_sampled: bool = False,
    exact_only: bool = False,
) -> Space:
    """Give the space of some decoders, or of all that fit a model and the others it was loaded with.

    Args:
        model: The model.
        decoders: Their names; None takes all.
        is_sampled: Leave out searches, which draw no tokens.
        exact_only: Leave out what is approximate at its defaults.

    Raises:
        InputError: There is no such decoder, it does not fit, or none is left.
    """
    given = dict.fromkeys(decoders) if decoders is not None else None
    for name in given or ():
        cls = decoder_class(name)
        cls().check(model.family)
        cls().check_models(model.engine.models)
    names = [
        name
        for name in given or decoder_names()
        if (cls := decoder_class(name)).fits(model.family)
        and model.engine.models.keys() >= set(cls.needs_models)
    ]
    space = {name: space_of(name) for name in names}
    if is_sampled:
        space = {name: its for name, its in space.items() if decoder_class(name).samples}
    if exact_only:
        space = {name: its for name, its in space.items() if decoder_class(name).promise == "exact"}
    # The plain decoder is in every run; without a setting to search there is nothing else to it.
    plain = model.family.default_decoder
    space = {name: settings for name, settings in space.items() if settings or name != plain}
    if not space:
        raise InputError(
            f"there is nothing to search beside {plain}, the plain decoder. Name other decoders"
            + (", give graded tasks, or take temperature 0." if exact_only else ".")
        )
    return space


def _conditions(
    model: Model, workloads: Seq[Workload], floor: float, request: dict[str, Any]
) -> dict[str, Any]:
    """Give what the trials of a search depend on."""
    prompts = [[workload.name, workload.max_new_tokens, workload.hash] for workload in workloads]
    return {
        **describe_setup(model, repeats=1),
        "models": {name: getattr(one, "name", name) for name, one in model.engine.models.items()},
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        "quality_floor": floor,
        "request": {name: value for name, value in request.items() if value not in (None, ())},
    }


def _planned(
    model: Model,
    arena: ModelArena,
    space: Space,
    on_step: Callable[[int, int, str], None],
    request: dict[str, Any],
) -> list[Contender]:
    """Give the draft lengths that measured latency and acceptance speak for."""
    found = []
    for name, takes in TAKES.items():
        lengths = space.get(name, {}).get(takes.setting)
        if takes.shape == "chain" and isinstance(lengths, Whole):
            try:
                plan = make_plan(
                    model,
                    name,
                    arena.prompts[: max(_NUM_PLANNED, arena.batch_size)],
                    batches=(arena.batch_size,),
                    limits=Limits(max_draft=lengths.high),
                    repeats=1,
                    on_step=functools.partial(_tell_of, on_step, name),
                    **request | {"max_new_tokens": arena.max_new_tokens},
                )
            except InputError:
                continue  # nothing to plan with, e.g. texts of one token: the search begins without
            settings = plan.choices[0].chosen.settings
            if settings.get(takes.setting) in lengths:
                found.append(Contender(name, settings))
    return found


def _tell_of(on_step: Callable[[int, int, str], None], name: str, done: int, total: int, words: str) -> None:
    on_step(done, total, f"{name}: {words}")


def _final(
    arena: Arena,
    yardstick: Yardstick,
    best: Seq[Contender],
    repeats: int,
    on_step: Callable[[int, int, str], None],
) -> list[Finalist]:
    """Run the plain decoder and the best others in rounds, every second one backwards."""
    lineup = [arena.plain, *best]
    rounds = []
    for round_ in range(repeats):
        on_step(round_, repeats, "last rounds")
        rounds.append(side_by_side(arena, lineup, 0, arena.num_prompts, flip=round_ % 2 == 1))
    runs = list(zip(*rounds, strict=True))
    return [
        _finalist(contender, mine, runs[0], yardstick) for contender, mine in zip(lineup, runs, strict=True)
    ]


def _finalist(contender: Contender, runs: Seq[Run], plain_runs: Seq[Run], yardstick: Yardstick) -> Finalist:
    ratios = [
        own.tokens_per_s / plain.tokens_per_s if plain.tokens_per_s else 1.0
        for own, plain in zip(runs, plain_runs, strict=True)
    ]
    ratio, own = statistics.median(ratios), runs[0]
    tokens_per_forward = own.num_tokens / own.forwards if own.forwards else 0.0
    # Tokens a second are tokens a pass by its seconds: with fewer by this factor it would be no faster.
    break_even = tokens_per_forward / ratio if ratio else 0.0
    return Finalist(
        decoder=contender.decoder,
        settings=dict(contender.settings),
        promise=own.promise,
        quality=yardstick.quality(own.outputs),
        ratio=ratio,
        low=min(ratios),
        high=max(ratios),
        tokens_per_s=statistics.median(run.tokens_per_s for run in runs),
        tokens_per_forward=tokens_per_forward,
        break_even=break_even,
        num_slower=sum(output.num_tokens < break_even * output.forwards for output in own.outputs),
    )


def _plain_values(finalist: Finalist) -> dict[str, Any]:
    values = asdict(finalist).items()
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values}


def _choose(finalists: Seq[Finalist], floor: float) -> Finalist | None:
    """Choose the fastest that won every round within the floor, or an exact one as good."""
    winners = [
        one for one in finalists if one.low > 1 and (one.promise == "exact" or one.quality >= floor - 1e-9)
    ]
    exact = [one for one in winners if one.promise == "exact"]
    if exact and exact[0].high >= winners[0].low:
        return exact[0]
    return winners[0] if winners else None


def _why(
    chosen: Finalist,
    plain: Finalist,
    finalists: Seq[Finalist],
    results: Seq[Result],
    metric: str,
    floor: float,
    arena: Arena,
    repeats: int,
) -> str:
    """Say what was chosen, by how much it wins, and when it would not."""
    tried = f"{len(results)} trials of {len({result.contender.decoder for result in results})} decoders"
    where = f"on {arena.num_prompts} prompts, {arena.batch_size} at once"
    if chosen is plain:
        said = [
            f"Kept {plain.label}, {plain.tokens_per_s:,.0f} tokens/s {where}: {_nothing(finalists, tried)}"
        ]
    else:
        said = [
            f"Chose {chosen.label}: {_times(chosen, repeats)} as fast as {plain.label} "
            f"({chosen.tokens_per_s:,.0f} against {plain.tokens_per_s:,.0f} tokens/s) {where}, "
            f"out of {tried}.",
            _quality_words(chosen, metric, floor),
            f"It commits {chosen.tokens_per_forward:.2f} tokens a forward pass, which takes "
            f"{chosen.break_even / (plain.tokens_per_forward or 1):.2f} times a plain one, so it would lose "
            f"where fewer than {chosen.break_even:.2f} are committed; {chosen.num_slower} of the "
            f"{arena.num_prompts} prompts are such.",
        ]
        others = [one for one in finalists if one is not chosen]
        if others:
            kind = "" if others[0].promise == "exact" else "the approximate "
            said.append(f"Next is {kind}{others[0].label}, {_times(others[0], repeats)}.")
    fastest = max(
        (one for one in results if one.value is not None and one.value < 0),
        key=lambda one: one.ratio or 0.0,
        default=None,
    )
    if fastest is not None and (fastest.ratio or 0.0) > chosen.ratio:
        said.append(
            f"{_words(fastest.contender)} ran {fastest.ratio:.2f} times as fast and kept "
            f"{fastest.quality:.1%} of the {_of(metric)}, below the floor of {floor:.1%}."
        )
    said.append("Other prompts, lengths, temperatures, batch sizes or machines may choose otherwise.")
    return " ".join(said)


def _nothing(finalists: Seq[Finalist], tried: str) -> str:
    if not finalists:
        return f"in {tried} nothing was faster within the floor."
    nearest = finalists[0]
    fault = "missed the floor" if nearest.low > 1 else "was not faster in every round"
    return (
        f"the best of {tried}, {nearest.label}, ran {nearest.ratio:.2f} times as fast ({nearest.low:.2f} to "
        f"{nearest.high:.2f}) and {fault}."
    )


def _quality_words(chosen: Finalist, metric: str, floor: float) -> str:
    if chosen.promise == "exact":
        return "It is exact: the text is the plain decoder's."
    return f"It is approximate and keeps {chosen.quality:.1%} of the {_of(metric)}; the floor is {floor:.1%}."


def _of(metric: str) -> str:
    return "plain decoder's right answers" if metric == "accuracy" else "plain decoder's text"


def _times(finalist: Finalist, repeats: int) -> str:
    spread = f" ({finalist.low:.2f} to {finalist.high:.2f} in {repeats} rounds)" if repeats > 1 else ""
    return f"{finalist.ratio:.2f} times{spread}"


def _words(contender: Contender) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in contender.settings.items())
    return f"{contender.decoder} with {settings}" if settings else contender.decoder
