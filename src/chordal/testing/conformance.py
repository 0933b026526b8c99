"""What every decoder must keep to, whatever it is: checks that run on any of them by name.

Each check takes a `Subject` and raises AssertionError with what was wrong. They run on seeded
transformers models in float64, where equal means token for token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, get_args

import numpy as np

from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.decoder import Decoder, Decoding
from chordal.engine import Engine
from chordal.errors import DecodingError, InputError, UnknownNameError
from chordal.fields import make_config
from chordal.forward import Bools, Causal, Forward, Ints, Logits
from chordal.generation import Model
from chordal.models.family import Kind, Need
from chordal.models.language_model import LanguageModel
from chordal.models.runner import Runner
from chordal.ops.sampling import Law
from chordal.registry import decoder_class, decoder_names, make_decoder
from chordal.sequence import Event, Listener, Sequence, StopRules
from chordal.stats import TARGET
from chordal.testing.laws import chi_square, sample_joint
from chordal.testing.tiny import TINY_POISON, Alphabet, CountingModel, random_prompt, tiny_model
from chordal.testing.toys import TableModel

LENGTH = 12
"""New tokens of most checks; no check asks for more than 16."""

_SAMPLED = Law(temperature=1.0)
_ADJUSTED = Law(presence_penalty=0.5, frequency_penalty=0.7, logit_bias=((3, 1.5), (5, -2.0)))
_LAWS = (
    Law(),
    _SAMPLED,
    Law(temperature=0.7, top_k=6, min_p=0.05),
    Law(temperature=1.3, top_p=0.8, repetition_penalty=1.4),
)
_KINDS: tuple[tuple[Need, int], ...] = (
    ("causal", 1),
    ("masked", 0),
    ("masked", 1),
    ("block", 0),
    ("block", 1),
    ("masked_causal", 0),
    ("uniform", 0),
    ("looped", 1),
)


@dataclass(frozen=True)
class Subject:
    """A decoder and the kind of model it is checked on.

    Attributes:
        decoder: The decoder with its config.
        kind: Of the model, or "looped".
        shift: Of the model.
    """

    decoder: Decoder
    kind: Need
    shift: int

    def __str__(self) -> str:
        return f"{self.kind}-shift{self.shift}"

    @property
    def model(self) -> LanguageModel:
        """The target; every subject of its kind shares it, so a row must leave nothing behind."""
        return _model(self.kind, self.shift, has_experts=self.decoder.needs_experts)

    @property
    def is_possible(self) -> bool:
        """Whether the decoder accepts the model with its settings."""
        try:
            self.decoder.check(self.model.family)
        except InputError:
            return False
        return True

    def laws(self, *laws: Law) -> list[Law]:
        """Keep of some laws those the decoder takes: a search, say, takes greedy ones only."""
        return [law for law in laws if self._takes(law)]

    def _takes(self, law: Law) -> bool:
        try:
            self.decoder.check_law(law)
        except InputError:
            return False
        return True

    def engine(self, target: Runner | None = None) -> Engine:
        """Make an engine with a target, a draft and a middle model."""
        others = {"draft": _model("causal", 1, seed=1), "middle": _model("causal", 1, seed=2)}
        return Engine({TARGET: target or self.model, **others})

    def sequence(
        self,
        prompt: Ints,
        *,
        law: Law = Law(),  # noqa: B008  it is frozen
        seed: int = 0,
        max_new_tokens: int = LENGTH,
        eos_ids: tuple[int, ...] = (),
        stop_strings: tuple[str, ...] = (),
        listeners: tuple[Listener, ...] = (),
        num_logprobs: int | None = None,
    ) -> Sequence:
        """Make a sequence for the target."""
        return Sequence(
            prompt=prompt,
            family=self.model.family,
            stop=StopRules(max_new_tokens=max_new_tokens, eos_ids=eos_ids, stop_strings=stop_strings),
            law=law,
            seed=seed,
            detokenize=Alphabet().decode,
            listeners=list(listeners),
            num_logprobs=num_logprobs,
        )

    def decode(self, *seqs: Sequence, engine: Engine | None = None) -> tuple[Sequence, ...]:
        """Decode sequences together and give them back; an error of any is raised."""
        engine = engine or self.engine()
        for seq in seqs:
            engine.submit(self.decoder, seq)
        engine.run()
        for seq in seqs:
            if seq.error is not None:
                raise seq.error
        return seqs


Check: TypeAlias = Callable[[Subject], None]


def subjects(decoder: str, settings: Mapping[str, Any] | None = None) -> list[Subject]:
    """List what a decoder is checked on: each kind of model it needs, with and without shifted logits.

    Settings may rule some of them out; the defaults must not.
    """
    made = make_decoder(decoder, settings)
    every = [Subject(made, kind, shift) for kind, shift in _KINDS if kind in made.needs]
    return [subject for subject in every if not settings or subject.is_possible]


def conformance(decoder: str, settings: Mapping[str, Any] | None = None) -> None:
    """Run every check on a decoder.

    Args:
        decoder: Its name; a plug-in must be registered.
        settings: Of its config; they must be possible for results of 1 to 16 tokens.

    Raises:
        AssertionError: A check failed.
    """
    for subject in subjects(decoder, settings):
        for check in CHECKS:
            check(subject)


def prompt_is_untouched_and_the_limit_is_kept(subject: Subject) -> None:
    """Without a stop the result has exactly the length asked for, and holds no mask token."""
    for law in subject.laws(*_LAWS[::3]):
        seqs = [
            subject.sequence(random_prompt(num_prompt), law=law, max_new_tokens=length)
            for num_prompt, length in ((1, 1), (3, 2), (4, 5), (6, 16))
        ]
        for seq in subject.decode(*seqs):
            _same(seq.tokens[: seq.num_prompt], random_prompt(seq.num_prompt), "the prompt")
            _same(len(seq.output), seq.stop.max_new_tokens, "the number of tokens")
            _same(seq.stats.committed_tokens, len(seq.output), "committed_tokens")
            _same((seq.finish_reason, seq.stop_reason), ("length", None), "finish and stop reason")
            assert seq.family.mask_id not in seq.output, f"the result has the mask token: {seq.output}"


def a_stop_token_ends_the_text_wherever_it_falls(subject: Subject) -> None:
    """A stop token inside a committed span cuts what is behind it, and that is not counted.

    Who chooses among texts may then prefer another one; that, too, ends where it must.
    """
    prompt = random_prompt(5)
    for law in subject.laws(*_LAWS[:2]):
        [whole] = subject.decode(subject.sequence(prompt, law=law))
        firsts = [list(whole.output).index(token) for token in dict.fromkeys(whole.output.tolist())]
        ended = subject.decode(
            *(subject.sequence(prompt, law=law, eos_ids=(int(whole.output[at]),)) for at in firsts)
        )
        for at, seq in zip(firsts, ended, strict=True):
            token = int(whole.output[at])
            if subject.decoder.samples and not subject.decoder.chooses:
                _same(seq.output, whole.output[: at + 1], f"the result that stops after {at + 1} tokens")
            stopped = token in seq.output
            num = list(seq.output).index(token) + 1 if stopped else LENGTH
            why = ("stop", token) if stopped else ("length", None)
            _same(len(seq.output), num, "the number of tokens")
            _same((seq.finish_reason, seq.stop_reason), why, "finish and stop reason")
            _same(seq.stats.committed_tokens, num, "committed_tokens")
            _same(seq.text, Alphabet().decode(seq.output[: num - stopped]), "the text")
            assert seq.stats.accepted_tokens <= at + 1, (
                f"{seq.stats.accepted_tokens} draft tokens count as kept in a result of {at + 1} tokens"
            )


def a_stop_string_ends_the_text_wherever_it_falls(subject: Subject) -> None:
    """The text is cut before the first stop string, the tokens behind the one that completes it.

    A search may then prefer another text; that one, too, ends where it must.
    """
    prompt = random_prompt(5)
    [whole] = subject.decode(subject.sequence(prompt))
    strings = list(dict.fromkeys(whole.text[at : at + 2] for at in range(len(whole.text) - 1)))
    ended = subject.decode(*(subject.sequence(prompt, stop_strings=("!", string)) for string in strings))
    for string, seq in zip(strings, ended, strict=True):
        # What a search prefers may hold neither string.
        output = whole.output if subject.decoder.samples else seq.output
        texts = [Alphabet().decode(output[:num]) for num in range(len(output) + 1)]
        num = next((num for num, text in enumerate(texts) if string in text), LENGTH)
        stopped = string in texts[-1]
        why = ("stop", string) if stopped else ("length", None)
        _same(seq.output, output[:num], f"the result that stops at {string!r}")
        _same(seq.text, texts[-1].partition(string)[0], "the text")
        _same((seq.finish_reason, seq.stop_reason), why, "finish and stop reason")
        _same(seq.stats.committed_tokens, num, "committed_tokens")


def stop_tokens_can_be_ignored(subject: Subject) -> None:
    """The model's own stop tokens end the text, and with ignore_eos they do not."""
    [whole] = subject.decode(subject.sequence(random_prompt(5)))
    stopping = CountingModel(subject.model)
    eos = int(whole.output[LENGTH // 2])
    stopping.family = dataclasses.replace(subject.model.family, eos_ids=(eos,))
    model, prompt = Model(subject.engine(stopping)), random_prompt(5).tolist()
    for ignore_eos in (False, True):
        [result] = model.generate(
            prompt, decoder=subject.decoder, max_new_tokens=LENGTH, ignore_eos=ignore_eos
        )
        if eos in result.tokens and not ignore_eos:
            _same(result.tokens.index(eos), len(result.tokens) - 1, "the place of the stop token")
            _same(result.finish_reason, "stop", "the finish reason")
        else:
            _same((len(result.tokens), result.finish_reason), (LENGTH, "length"), "length and finish reason")


def the_seed_decides_the_output(subject: Subject) -> None:
    """Same seed, same output; another seed, another output. A search refuses what would need a seed."""
    prompt = random_prompt(5)
    if not subject.decoder.samples:
        _refuses(InputError, lambda: subject.decode(subject.sequence(prompt, law=_SAMPLED)))
        return
    seqs = subject.decode(*(subject.sequence(prompt, law=_SAMPLED, seed=seed) for seed in (7, 7, 8, 9, 10)))
    first, again, *others = (seq.output.tolist() for seq in seqs)
    _same(again, first, "the output under the same seed")
    assert all(other != first for other in others), f"other seeds give the same output {first}"


def alone_equals_in_a_batch(subject: Subject) -> None:
    """Who else runs, with which decoder, law and length and since when, changes nothing.

    A decoder that remembers other requests gives the same text, in as many passes as it takes.
    """
    names = [name for name in decoder_names() if decoder_class(name).fits(subject.model.family)]
    decoders = [
        subject.decoder if at % 2 == 0 else make_decoder(names[at // 2 % len(names)]) for at in range(8)
    ]

    def sequences() -> list[Sequence]:
        return [
            subject.sequence(
                random_prompt(1 + 5 * at % 9, seed=at),
                law=_LAWS[at // 2 % 4] if decoders[at].samples else Law(),
                seed=at,
                max_new_tokens=5 + 3 * at % 8,
            )
            for at in range(8)
        ]

    alone = sequences()
    for decoder, seq in zip(decoders, alone, strict=True):
        engine = subject.engine()
        engine.submit(decoder, seq)
        engine.run()
    together, engine = sequences(), subject.engine()
    arrivals, tick = [0, 0, 0, 1, 1, 3, 4, 6], 0
    while tick <= max(arrivals) or engine.has_work:
        for at in range(8):
            if arrivals[at] == tick:
                engine.submit(decoders[at], together[at])
        engine.step()
        tick += 1
    for decoder, seq, want in zip(decoders, together, alone, strict=True):
        _same(repr(seq.error), repr(want.error), "the error")
        _same(seq.output, want.output, "the output in a batch")
        if decoder.remembers:
            continue
        _same(seq.committed_at, want.committed_at, "the forward that committed each position in a batch")
        _same(seq.stats.forwards, want.stats.forwards, "the forwards in a batch")


def the_steps_add_up_to_the_result(subject: Subject) -> None:
    """The commits together are the output, each position once and with the forward it came from.

    That somebody listens who wants to know how sure the model was changes nothing.
    """
    for law in subject.laws(*_LAWS[::3]):
        events: list[Event] = []
        heard = subject.sequence(random_prompt(6), law=law, listeners=(_Keep(events),))
        seq, alone = subject.decode(heard, subject.sequence(random_prompt(6), law=law))
        _same(seq.output, alone.output, "the output that is listened to")
        for event in events:
            probs = np.zeros(len(event.tokens)) if event.confidence is None else event.confidence
            _same(len(probs), len(event.tokens), "the number of confidences of an event")
            is_known = ~np.isnan(probs)
            assert ((probs[is_known] >= 0) & (probs[is_known] <= 1 + 1e-6)).all(), f"confidences {probs}"
        commits = [event for event in events if event.kind == "commit"]
        positions = np.concatenate([event.positions for event in commits])
        tokens = np.concatenate([event.tokens for event in commits])
        _same(len(set(positions.tolist())), len(positions), "the number of positions that were committed")
        inside = positions < seq.limit
        order = np.argsort(positions[inside])
        _same(tokens[inside][order], seq.output, "what the commits add up to")
        _same(positions[inside][order], np.arange(seq.num_prompt, seq.limit), "the committed positions")
        forwards = [event.forward for event in commits]
        _same(forwards, sorted(forwards), "the order of the commits")
        # Before the target first runs, only another model can have written something.
        first, last = int(not subject.decoder.needs_models), seq.stats.forwards.get(TARGET, 0)
        assert first <= forwards[0] <= forwards[-1] <= last, f"commits of forwards {forwards}"
        for event in commits:
            _same(set(seq.committed_at[event.positions]) - {event.forward}, set(), "committed_at")


def the_counters_equal_what_the_model_saw(subject: Subject) -> None:
    """Forwards, prefills, rows and fed positions are those of a model that counts for itself."""
    counting = CountingModel(subject.model)
    engine = subject.engine(counting)
    [seq] = subject.decode(subject.sequence(random_prompt(9)), engine=engine)
    prefills = [
        call
        for call in counting.calls
        if all(ask.read is None and ask.positions.max() < seq.num_prompt for _, ask in call)
    ]
    _same(seq.stats.prefills, len(prefills), "prefills")
    _same(seq.stats.forwards.get(TARGET, 0), len(counting.calls) - len(prefills), "forwards")
    _same(seq.stats.rows, sum(map(len, counting.calls)) - sum(map(len, prefills)), "rows")
    _same(seq.stats.positions_fed.get(TARGET, 0), _fed(counting), "positions_fed")
    _same(engine.passes[TARGET], len(counting.calls), "the engine's passes")

    counting.calls.clear()
    seqs = subject.decode(
        *(subject.sequence(random_prompt(9, seed), max_new_tokens=4 + seed) for seed in range(5)),
        engine=subject.engine(counting),
    )
    fed = sum(seq.stats.positions_fed.get(TARGET, 0) for seq in seqs)
    _same(fed, _fed(counting), "positions_fed of a batch")


def closing_early_frees_the_rows(subject: Subject) -> None:
    """A stream that is closed and a sequence that is cancelled leave nothing behind."""
    law = subject.laws(Law(), _SAMPLED)[-1]
    [want] = subject.decode(subject.sequence(random_prompt(5), law=law, seed=3))
    [other] = subject.decode(subject.sequence(random_prompt(7)))
    model = Model(subject.engine())
    settings: dict[str, Any] = {
        "decoder": subject.decoder,
        "max_new_tokens": LENGTH,
        "temperature": law.temperature,
        "seed": 3,
        "ignore_eos": True,
    }
    stream: Any = model.stream(random_prompt(5).tolist(), **settings)
    next(stream)
    stream.close()
    _same((model.engine.num_live, model.engine.has_work), (0, False), "live rows and work after closing")
    [result] = model.generate([random_prompt(5).tolist()], **settings)
    _same(result.tokens, want.output.tolist(), "the next result")

    engine, cancelled, kept = (
        model.engine,
        subject.sequence(random_prompt(9)),
        subject.sequence(random_prompt(7)),
    )
    for seq in (cancelled, kept):
        engine.submit(subject.decoder, seq)
    engine.step()
    is_early = not cancelled.done
    engine.cancel(cancelled)
    _same(engine.num_live, int(not kept.done), "live rows after cancelling")
    _same(cancelled.finish_reason == "cancelled", is_early, "whether the finish reason is cancelled")
    engine.run()
    _same(kept.output, other.output, "the output beside a cancelled sequence")


def an_error_ends_its_own_sequence_only(subject: Subject) -> None:
    """A decoder that raises, and a prompt that gives NaN, end themselves; the row's next user is right."""
    poison = np.array([1, TINY_POISON, 2, 3, 4, 5])
    for law in subject.laws(*_LAWS[:2]):
        prompts = [random_prompt(length) for length in (4, 6, 8)]
        want = subject.decode(*(subject.sequence(prompt, law=law) for prompt in prompts))
        first, last, after = (subject.sequence(prompt, law=law) for prompt in prompts)
        raising, poisoned = subject.sequence(prompts[0], law=law), subject.sequence(poison, law=law)
        engine = subject.engine()
        engine.submit(subject.decoder, first)
        engine.submit(_Raises(), raising)
        engine.submit(subject.decoder, poisoned)
        engine.submit(subject.decoder, last)
        while not (raising.done and poisoned.done):
            engine.step()
        engine.submit(subject.decoder, after)
        engine.run()
        assert isinstance(raising.error, _RaisedError), f"the raising sequence ended with {raising.error!r}"
        assert isinstance(poisoned.error, DecodingError), f"the NaN sequence ended with {poisoned.error!r}"
        _same((raising.finish_reason, poisoned.finish_reason), ("error", "error"), "the finish reasons")
        _same(len(poisoned.output), 0, "the number of tokens from NaN logits")
        for seq, other in zip((first, last, after), want, strict=True):
            _same(seq.error, None, "the error of a neighbour")
            _same(seq.output, other.output, "the output of a neighbour")


def the_config_survives_a_round_trip(subject: Subject) -> None:
    """Settings go through JSON unchanged, cannot be edited, and unknown ones are refused."""
    config = subject.decoder.config
    settings = dataclasses.asdict(config)
    _same(make_config(type(config), json.loads(json.dumps(settings))), config, "the config")
    _refuses(UnknownNameError, lambda: make_config(type(config), {"no_such_setting": 1}))
    _refuses(dataclasses.FrozenInstanceError, lambda: setattr(config, next(iter(settings), "any"), None))


def what_a_request_adjusts_holds_at_every_position(subject: Subject) -> None:
    """A token with a large bias is always taken or never; a constraint is kept to or refused."""
    prompt = random_prompt(7, 3)
    [free] = subject.decode(subject.sequence(prompt))
    token = int(free.output[0])
    for bias, count in ((1e4, LENGTH), (-1e4, 0)):
        biased = (dataclasses.replace(law, logit_bias=((token, bias),)) for law in (Law(), _SAMPLED))
        for law in subject.laws(*biased):
            [seq] = subject.decode(subject.sequence(prompt, law=law))
            _same(int((seq.output == token).sum()), count, f"the number of tokens with bias {bias}")
    if not subject.decoder.constrains:
        _refuses(InputError, lambda: subject.decoder.check_law(Law(constraint=_Alternating(1))))
    for law in subject.laws(*_constrained(subject, Law()), *_constrained(subject, _SAMPLED)):
        seqs = subject.decode(*(subject.sequence(prompt, law=law, seed=seed) for seed in range(3)))
        for seq in seqs:
            assert _Alternating.holds(seq.output), f"{seq.output} breaks the constraint"


def log_probabilities_are_of_the_models_own_law(subject: Subject) -> None:
    """Each token has one, by the logits it was taken from; of an exact decoder plain decoding's."""
    if not subject.decoder.tells_logprobs:
        return
    prompts, everything = [random_prompt(5 + seed, seed) for seed in range(3)], subject.model.vocab_size
    for law in subject.laws(Law(), _ADJUSTED, _SAMPLED):
        seqs = [subject.sequence(prompt, law=law, num_logprobs=everything) for prompt in prompts]
        for seq in subject.decode(*seqs):
            for at, token in enumerate(seq.output.tolist(), seq.num_prompt):
                found = seq.logprobs[at]
                _same(found.token, token, "the token of a log-probability")
                _same(found.logprob, dict(found.top)[token], "the log-probability")
                total = np.exp([logprob for _, logprob in found.top]).sum()
                assert abs(total - 1) < 1e-9, f"the probabilities of all tokens add up to {total}"
                if subject.kind == "causal" and subject.decoder.promise == "exact":
                    _same_logprob(subject, seq, at, found.logprob)


def _same_logprob(subject: Subject, seq: Sequence, at: int, logprob: float) -> None:
    rows = np.arange(at)
    [reading] = subject.model.run(
        [(0, Forward(seq.tokens[:at], rows, Causal(), Logits(rows[-1:]), slots=rows))]
    )
    subject.model.free_row(0, clear=True)
    want = float(reading.logits[0].log_softmax(0)[int(seq.tokens[at])])
    assert abs(want - logprob) < 1e-9, f"a log-probability of {logprob} where the model gives {want}"


def an_exact_decoder_gives_what_plain_decoding_gives(subject: Subject) -> None:
    """Greedy token for token; sampled in law, by 1,000 runs of two tokens that fail once in a million."""
    if subject.decoder.promise != "exact":
        return
    plain = Subject(Autoregressive(), subject.kind, subject.shift)
    laws = [Law(), Law(repetition_penalty=1.5), _ADJUSTED, *_constrained(subject, Law())]
    for law in laws:
        prompts = [np.resize(random_prompt(3, seed), 9) for seed in range(4)]
        got = subject.decode(*(subject.sequence(prompt, law=law, max_new_tokens=16) for prompt in prompts))
        want = plain.decode(*(plain.sequence(prompt, law=law, max_new_tokens=16) for prompt in prompts))
        for one, other in zip(got, want, strict=True):
            _same(one.output, other.output, "the greedy output")
    table, prompt = TableModel(), np.array([0, 1, 0, 1, 0])
    # No loop changes a table.
    table.family = dataclasses.replace(table.family, num_loops=subject.model.family.num_loops)
    others = {name: TableModel(seed=at) for at, name in enumerate(subject.decoder.needs_models, 1)}
    models = {TARGET: table, **others}
    joint = table.joint(prompt, 2)
    for law in (_SAMPLED, *_constrained(subject, _SAMPLED, table.vocab_size)):
        subject.decoder.reset()  # what it remembers is of another model
        if law.constraint is not None:
            kept = joint * (np.add.outer(np.arange(len(joint)), np.arange(len(joint))) % 2)
            joint = kept * joint.sum(1, keepdims=True) / kept.sum(1, keepdims=True)
        counts = sample_joint(subject.decoder, models, prompt, length=2, runs=1000, law=law)
        chance = chi_square(counts, joint)
        assert chance > 1e-6, f"sampled output this far from the law has probability {chance:.1e}"


CHECKS: tuple[Check, ...] = (
    prompt_is_untouched_and_the_limit_is_kept,
    a_stop_token_ends_the_text_wherever_it_falls,
    a_stop_string_ends_the_text_wherever_it_falls,
    stop_tokens_can_be_ignored,
    the_seed_decides_the_output,
    alone_equals_in_a_batch,
    the_steps_add_up_to_the_result,
    the_counters_equal_what_the_model_saw,
    closing_early_frees_the_rows,
    an_error_ends_its_own_sequence_only,
    the_config_survives_a_round_trip,
    what_a_request_adjusts_holds_at_every_position,
    log_probabilities_are_of_the_models_own_law,
    an_exact_decoder_gives_what_plain_decoding_gives,
)


@dataclass(frozen=True)
class _Alternating:
    """A constraint: an even token follows an odd one and an odd one an even one."""

    vocab_size: int

    def allowed(self, generated: Ints) -> Bools:
        """Allow either first; behind a text that breaks it, anything."""
        is_odd = np.arange(self.vocab_size) % 2 == 1
        if not len(generated) or not self.holds(generated):
            return np.ones(self.vocab_size, bool)
        allowed: Bools = is_odd if generated[-1] % 2 == 0 else ~is_odd
        return allowed

    @staticmethod
    def holds(tokens: Ints) -> bool:
        return bool((np.diff(tokens) % 2 == 1).all())


def _constrained(subject: Subject, law: Law, vocab_size: int | None = None) -> list[Law]:
    """Constrain a law, for a decoder that can keep to it."""
    constraint = _Alternating(vocab_size or subject.model.vocab_size)
    return [dataclasses.replace(law, constraint=constraint)] if subject.decoder.constrains else []


class _RaisedError(Exception):
    pass


class _Raises(Decoder):
    """Raises after one forward pass."""

    name = "raises"
    family = "autoregressive"
    promise = "exact"
    needs = get_args(Kind)
    paper = "-"

    @dataclass(frozen=True)
    class Config:
        pass

    def decode(self, seq: Sequence) -> Decoding:
        positions = np.arange(seq.num_prompt)
        last, following = positions[-1:], positions[-1:] + 1
        yield Forward(seq.prompt, positions, Causal(), seq.sample(last, following), slots=positions)
        raise _RaisedError


@cache
def _model(kind: Need, shift: int, seed: int = 0, has_experts: bool = False) -> LanguageModel:
    # Fewer rows than the largest batch, so that sequences wait and take over rows.
    if kind == "looped":
        return tiny_model(arch="looped", shift=shift, seed=seed, max_rows=6)
    arch = "qwen3_moe" if has_experts else None
    return tiny_model(kind, shift=shift, arch=arch, seed=seed, max_rows=6)


class _Keep:
    """Keeps events, with confidences."""

    wants_confidence = True

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def __call__(self, seq: Sequence, event: Event) -> None:
        self._events.append(event)


def _fed(counting: CountingModel) -> int:
    return sum(len(ask.tokens) for call in counting.calls for _, ask in call)


def _same(got: Any, want: Any, what: str) -> None:
    assert np.array_equal(got, want), f"{what} must be {want}; got {got}"


def _refuses(error: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"{error.__name__} must be raised; nothing was")
