"""The search: Optuna proposes decoders with settings, a few prompts weed them out, all prompts rank the rest.

A trial runs its decoder and the plain one over more and more of the prompts, each prompt once, side by side:
what counts is the ratio of their tokens a second. After each rung, what is not among the best third so far
stops. Trials are kept in a journal file as they are made; what is proposed next depends on the seed and on
finished trials alone, so that a search that was interrupted goes on as if it had not been.

Source: asynchronous successive halving, Li et al. 2018 (arXiv 1810.05934); the tree-structured Parzen
estimator, Bergstra et al. 2011, as Optuna has it.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chordal.bench.compare import Contender
from chordal.errors import DecodingError, InputError
from chordal.tuning.arena import Arena, Run, Yardstick, side_by_side
from chordal.tuning.space import Range, Real, Space, Whole, defaults_of

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

_KEPT_OF = 3
# Fewer prompts, or less time, tell nothing.
_FIRST_RUNG, _FIRST_RUNG_S = 4, 0.5
# Proposals in a row that had been tried: from so many on they are random, from so many the search ends.
_FEW_REPEATS, _MOST_REPEATS = 4, 40
_NAME = "chordal tune"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a trial found.

    Attributes:
        contender: The decoder with the settings that differ from its defaults.
        is_complete: Whether it ran on all prompts.
        ratio: How many times the plain decoder's tokens a second, None if it could not run.
        quality: What it keeps of the plain decoder's, None if it could not run.
        value: What was maximised: the ratio or, below the floor, how far below, which is negative.
        problem: Why it could not run.
    """

    contender: Contender
    is_complete: bool = False
    ratio: float | None = None
    quality: float | None = None
    value: float | None = None
    problem: str | None = None


class Study:
    """A search with its journal.

    Args:
        path: Journal file, None for a search that is not kept.
        conditions: What its trials depend on, as plain values; a file made under others is refused.
        space: What is searched.
        seed: Of the optimiser.

    Raises:
        InputError: Optuna is not installed, or the file is no study, belongs to other conditions or cannot be
            written.
    """

    def __init__(
        self, path: Path | None, conditions: Mapping[str, Any], space: Space, *, seed: int = 0
    ) -> None:
        _check_optuna()
        self._space, self._seed = space, seed
        self._study = _open(path)
        conditions = json.loads(json.dumps({**conditions, "seed": seed, "space": repr(space)}))
        known = self._study.user_attrs.get("conditions")
        if known is None:
            self._study.set_user_attr("conditions", conditions)
        elif known != conditions:
            names = sorted(name for name in {*known, *conditions} if known.get(name) != conditions.get(name))
            raise InputError(
                f"{path} holds a search under other conditions ({', '.join(names)} differ); its trials say "
                "nothing about these. Name another file with --study, or delete it."
            )
        for trial in self._in_state("RUNNING"):
            # It was cut short; it will be proposed again.
            self._study.tell(trial.number, state=trial.state.FAIL)

    @property
    def num_trials(self) -> int:
        """Finished trials."""
        return len(self._finished())

    def results(self) -> list[Result]:
        """Give what the finished trials found, in order."""
        return [self._result(trial) for trial in self._finished()]

    def first(self, make: Callable[[], Seq[Contender]]) -> list[Contender]:
        """Give what is tried first; made once and kept with the trials."""
        known = self._study.user_attrs.get("first")
        if known is None:
            known = []
            for contender in make():
                defaults = defaults_of(contender.decoder)
                changed = {key: value for key, value in contender.settings.items() if value != defaults[key]}
                if [contender.decoder, changed] not in known:
                    known.append([contender.decoder, changed])
            self._study.set_user_attr("first", known)
        return [Contender(name, settings) for name, settings in known]

    def run(
        self,
        arena: Arena,
        yardstick: Yardstick,
        *,
        floor: float,
        num_trials: int,
        timeout_s: float | None = None,
        first: Seq[Contender] = (),
        clock: Callable[[], float] = time.perf_counter,
        on_trial: Callable[[int, int, Result], None] = lambda done, total, result: None,
    ) -> None:
        """Search until there are so many trials.

        Args:
            arena: Runs the decoders.
            yardstick: Judges the approximate ones.
            floor: Least quality of these, from 0 to 1.
            num_trials: Finished trials when it ends, those of earlier calls among them; fewer if there is
                nothing new to propose.
            timeout_s: No trial begins later than this many seconds after the start.
            first: What is tried before the optimiser proposes anything, nothing twice.
            clock: Gives the time in seconds.
            on_trial: Called with how many trials are done, of how many, and what the last one found.
        """
        started, already = clock(), self.num_trials
        ends = self._rungs(arena, yardstick.run.seconds)
        # Where all there is has been tried, even random proposals repeat themselves.
        while (done := self.num_trials) < num_trials and self._num_repeats() < _MOST_REPEATS:
            if timeout_s is not None and clock() - started >= timeout_s:
                return
            result = self._try(arena, yardstick, floor, ends, first[done] if done < len(first) else None)
            if result is None:
                continue
            total = num_trials
            if timeout_s is not None:
                # What the time left is enough for, at the pace so far.
                pace = max(clock() - started, 1e-9) / (done + 1 - already)
                left = max(0.0, timeout_s - (clock() - started))
                total = min(total, done + 1 + math.ceil(left / pace))
            on_trial(done + 1, total, result)

    def _try(
        self, arena: Arena, yardstick: Yardstick, floor: float, ends: Seq[int], given: Contender | None
    ) -> Result | None:
        """Make one trial; none if what is proposed was tried before."""
        from optuna.trial import TrialState

        study, number = self._study, self.num_trials
        study.sampler = self._sampler()
        if given is not None and not self._in_state("WAITING"):
            study.enqueue_trial(self._params(given))
        trial = study.ask()
        contender = self._suggest(trial)
        if any(result.contender == contender for result in self.results()):
            trial.set_user_attr("is_repeat", True)
            study.tell(trial, state=TrialState.FAIL)
            return None
        trial.set_user_attr("contender", [contender.decoder, dict(contender.settings)])
        try:
            # Warm up; what does not go together fails here.
            arena.run(contender, 0, 1)
            pairs: list[list[Run]] = []
            for rung, end in enumerate(ends):
                start = ends[rung - 1] if rung else 0
                pairs.append(side_by_side(arena, [arena.plain, contender], start, end, flip=number % 2 == 1))
                plain, own = (sum(runs[1:], runs[0]) for runs in zip(*pairs, strict=True))
                value = self._note(trial, plain, own, yardstick, floor)
                if rung < len(ends) - 1:
                    trial.report(value, step=rung)
                    if value < 0 or not self._is_kept(rung, value):
                        study.tell(trial, state=TrialState.PRUNED)
                        break
            else:
                study.tell(trial, value)
        except (InputError, DecodingError) as error:
            trial.set_user_attr("problem", str(error))
            study.tell(trial, state=TrialState.PRUNED)
        return self.results()[-1]

    def _is_kept(self, rung: int, value: float) -> bool:
        """Whether a value is among the best third at its rung, of all that did not miss the floor later.

        Optuna's own successive halving counts those as well, and trials that were cut short twice.
        """
        others = [
            trial.intermediate_values[rung]
            for trial in self._finished()
            if rung in trial.intermediate_values and trial.user_attrs["value"] > 0
        ]
        return sum(other > value for other in others) < math.ceil((len(others) + 1) / _KEPT_OF)

    def _note(self, trial: optuna.Trial, plain: Run, own: Run, yardstick: Yardstick, floor: float) -> float:
        """Keep what a trial has found so far and give its value."""
        ratio = own.tokens_per_s / plain.tokens_per_s if plain.tokens_per_s else 1.0
        quality = yardstick.quality(own.outputs)
        misses = own.promise == "approximate" and yardstick.misses(floor, own.outputs)
        # Any decoder within the floor is better than all below; of those, the nearest to it is best.
        value = min(quality - floor, -1e-6) if misses else ratio
        for name, found in (("ratio", ratio), ("quality", quality), ("value", value)):
            trial.set_user_attr(name, found)
        return value

    def _suggest(self, trial: optuna.Trial) -> Contender:
        decoder = trial.suggest_categorical("decoder", list(self._space))
        defaults, settings = defaults_of(decoder), {}
        for name, given in self._space[decoder].items():
            value = _ask(trial, f"{decoder}.{name}", given)
            if value != defaults[name]:
                settings[name] = value
        return Contender(decoder, settings)

    def _params(self, contender: Contender) -> dict[str, Any]:
        """Give the optimiser's parameters of a decoder whose settings are in the space."""
        settings = defaults_of(contender.decoder) | dict(contender.settings)
        named = {f"{contender.decoder}.{name}": settings[name] for name in self._space[contender.decoder]}
        return {"decoder": contender.decoder, **named}

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """Make a sampler seeded by what there is, so that it proposes the same behind an interruption."""
        from optuna.samplers import RandomSampler, TPESampler

        repeats = self._num_repeats()
        entropy = np.random.SeedSequence((self._seed, self.num_trials, repeats))
        seed = int(entropy.generate_state(1)[0])
        # The estimator may insist on what it knows to be good.
        return TPESampler(seed=seed) if repeats < _FEW_REPEATS else RandomSampler(seed=seed)

    def _num_repeats(self) -> int:
        """Proposals since the last finished trial, all of which had been tried before."""
        last = max((trial.number for trial in self._finished()), default=-1)
        return sum(trial.number > last for trial in self._in_state("FAIL") if "is_repeat" in trial.user_attrs)

    def _rungs(self, arena: Arena, seconds: float) -> list[int]:
        """Give how many prompts a trial has seen after each rung, as in the trials that there are.

        Args:
            arena: Where they run.
            seconds: What plain decoding takes for all prompts.
        """
        ends: list[int] | None = self._study.user_attrs.get("rungs")
        if ends is None:
            least = math.ceil(_FIRST_RUNG_S * arena.num_prompts / seconds) if seconds else 1
            ends = [max(_FIRST_RUNG, arena.batch_size, least)]
            while ends[-1] < arena.num_prompts:
                ends.append(ends[-1] * _KEPT_OF)
            # A last rung of a few prompts more would tell nothing.
            if len(ends) > 1 and arena.num_prompts - ends[-2] < ends[-2]:
                ends.pop(-2)
            ends = [*ends[:-1], arena.num_prompts]
            self._study.set_user_attr("rungs", ends)
        return ends

    def _in_state(self, *names: str) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return self._study.get_trials(deepcopy=False, states=[TrialState[name] for name in names])

    def _finished(self) -> list[FrozenTrial]:
        return self._in_state("COMPLETE", "PRUNED")

    def _result(self, trial: FrozenTrial) -> Result:
        name, settings = trial.user_attrs["contender"]
        found = {key: value for key, value in trial.user_attrs.items() if key != "contender"}
        return Result(
            contender=Contender(name, settings), is_complete=trial.state == trial.state.COMPLETE, **found
        )


def best_results(results: Seq[Result], num: int) -> list[Result]:
    """Give the fastest that ran on all prompts within the floor and beat the plain decoder.

    The best of each decoder comes first: its other good settings are likely as good, and tell less.
    """
    found: dict[str, Result] = {}
    for result in sorted(results, key=lambda one: one.value or 0.0, reverse=True):
        if result.is_complete and (result.value or 0.0) > 1.0:
            found.setdefault(result.contender.label, result)
    first = {result.contender.decoder: result for result in reversed(found.values())}
    return sorted(found.values(), key=lambda one: first[one.contender.decoder] is not one)[:num]


def _open(path: Path | None) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if path is not None:
        _mend(path)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))) if path is not None else None,
        study_name=_NAME,
        direction="maximize",
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def _ask(trial: optuna.Trial, name: str, given: Range) -> Any:
    if isinstance(given, Whole):
        return trial.suggest_int(name, given.low, given.high, log=given.log)
    if isinstance(given, Real):
        # Without the digits that steps leave behind.
        return round(trial.suggest_float(name, given.low, given.high, step=given.step), 6)
    return trial.suggest_categorical(name, given.values)


def _mend(path: Path) -> None:
    """Cut off a last line that was not written to its end.

    Raises:
        InputError: It cannot be written, or is no journal.
    """
    try:
        with path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            head = None
            with contextlib.suppress(ValueError):
                head = json.loads(content.partition(b"\n")[0])
            if b"\n" in content and not (isinstance(head, dict) and "op_code" in head):
                raise InputError(f"{path} is no journal of a search. Name another file with --study.")
            file.truncate(content.rfind(b"\n") + 1)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from None


def _check_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise InputError(
            "tuning needs Optuna, which is not installed. Install it: pip install 'chordal[tune]'."
        ) from None
    # It tells of every trial; so do we.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
