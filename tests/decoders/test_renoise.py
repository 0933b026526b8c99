from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from transformers import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StableAndConfidentStoppingCriteria,
    TopKLogitsWarper,
)

from chordal.engine import Engine
from chordal.errors import InputError
from chordal.forward import Reading
from chordal.models.family import Family
from chordal.ops.randomness import uniforms
from chordal.ops.sampling import Law
from chordal.ops.unmask import nearly_independent
from chordal.registry import decoder_class, make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.testing import TINY_VOCAB, CountingModel, random_prompt, tiny_backbone

LENGTH = 4  # of a canvas
NAMES = {"num_steps": "max_denoising_steps"}  # what transformers calls it, where it is not the same


@pytest.fixture(scope="module")
def theirs():
    """The transformers model behind `tiny("uniform", num_layers=3)`, untouched by us."""
    return tiny_backbone("diffusion_gemma", num_layers=3)


@pytest.fixture
def published(theirs, monkeypatch):
    """Runs transformers' own `generate` on a prompt, with our random numbers in place of its own.

    Gives the tokens, and how many denoising steps they took.
    """

    def published(prompt, max_new_tokens, settings=None, *, law=None, seed=0, eos_ids=()):
        law = law or Law()
        now = types.SimpleNamespace(start=len(prompt) - LENGTH, step=0)

        def noise(sampler, batch_size, device):
            if now.step == 0:
                now.start += LENGTH
            at = np.arange(now.start, now.start + LENGTH)
            drawn = np.floor(uniforms(seed, "noise", at, now.step) * TINY_VOCAB)
            now.step += 1
            return torch.from_numpy(drawn.astype(np.int64))[None]

        def multinomial(probs, num_samples):
            if law.is_greedy:
                return probs.argmax(-1, keepdim=True)
            at = np.arange(now.start, now.start + LENGTH)
            numbers = torch.from_numpy(uniforms(seed, "token", at, now.step))
            return (probs.double().cumsum(-1) <= numbers[:, None]).sum(-1, keepdim=True)

        def reset(criteria):
            criteria.argmax_canvas_history = None
            now.step = 1  # the first noise of the canvas is drawn

        def finalize(**kwargs):
            now.step = 0
            return whole(**kwargs)

        config = decoder_class("renoise").Config(**settings or {})
        scale = law.temperature or 1
        asked = DiffusionGemmaGenerationConfig(
            max_new_tokens=max_new_tokens,
            max_denoising_steps=config.num_steps,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=config.entropy_bound),
            t_max=config.t_max * scale,
            t_min=config.t_min * scale,
            stability_threshold=config.stability_threshold,
            confidence_threshold=config.confidence_threshold,
            eos_token_id=list(eos_ids) or None,
        )
        processors = LogitsProcessorList()
        if law.repetition_penalty != 1:
            processors.append(_Penalty(law.repetition_penalty))
        if law.top_k:
            processors.append(_TopK(law.top_k))
        whole = theirs._finalize_canvas
        monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", noise)
        monkeypatch.setattr(StableAndConfidentStoppingCriteria, "reset", reset)
        monkeypatch.setattr(theirs, "_finalize_canvas", finalize, raising=False)
        monkeypatch.setattr(torch, "multinomial", multinomial)
        # It would import the compiler, on any machine.
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
        found = theirs.generate(
            torch.from_numpy(prompt)[None], generation_config=asked, logits_processor=processors
        )
        monkeypatch.undo()
        tokens = found.sequences[0, len(prompt) :].tolist()
        return tokens, round(len(tokens) / float(found.tokens_per_forward))

    return published


class _TopK:
    """transformers' top-k, which takes the rows of a canvas one by one."""

    def __init__(self, k):
        self.warper = TopKLogitsWarper(k)

    def __call__(self, input_ids, scores, cur_step):
        return self.warper(input_ids, scores)


class _Penalty:
    """transformers' repetition penalty, which knows one row of logits for each text."""

    def __init__(self, penalty):
        self.processor = RepetitionPenaltyLogitsProcessor(penalty)

    def __call__(self, input_ids, scores, cur_step):
        return self.processor(input_ids.expand(scores.shape[1], -1), scores[0].clone())[None]


def num_denoising(seq):
    """Passes of a sequence that were not spent on storing a canvas."""
    num_stored = -(-len(seq.output) // LENGTH) - 1
    return seq.stats.forwards["target"] - num_stored


RULES = {
    "defaults": {},
    "few steps": {"num_steps": 5},
    "one step": {"num_steps": 1},
    "accepting more": {"num_steps": 9, "entropy_bound": 2.5},
    "colder": {"num_steps": 8, "t_max": 0.3, "t_min": 0.0, "entropy_bound": 0.5},
    "stopping when stable": {"num_steps": 10, "entropy_bound": 4.0, "confidence_threshold": 9.0},
    "stopping when stable for long": {
        "num_steps": 12,
        "entropy_bound": 99.0,
        "confidence_threshold": 9.0,
        "stability_threshold": 3,
    },
    "stopping when sure": {
        "num_steps": 10,
        "confidence_threshold": 0.6,
        "stability_threshold": 0,
        "t_max": 0.4,
        "t_min": 0.2,
    },
}


@pytest.mark.parametrize("name", RULES)
def test_greedy_decoding_equals_transformers_generate(tiny, decode, published, name):
    """Tokens and steps, over prompts shorter and longer than the sliding window, in one batch."""
    settings = RULES[name]
    prompts = [random_prompt(num, seed) for seed, num in enumerate((1, 20, 3, 6))]
    model, length = tiny("uniform", num_layers=3), 2 * LENGTH
    if not settings:  # many steps: one prompt, but canvases that see canvases
        prompts, length = prompts[2:3], 3 * LENGTH
    seqs = decode(model, "renoise", settings, prompts=prompts, max_new_tokens=length)
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert (seq.output.tolist(), num_denoising(seq)) == published(prompt, length, settings)
    if "stopping" in name:
        assert len({num_denoising(seq) for seq in seqs}) >= 3


@pytest.mark.parametrize(
    "law",
    [
        Law(temperature=1.0),
        Law(temperature=0.6),
        Law(temperature=1.5, top_k=5),
        Law(temperature=0.8, repetition_penalty=1.3),
        Law(top_k=3),
    ],
    ids=str,
)
def test_sampling_equals_transformers_generate_with_our_random_numbers(tiny, decode, published, law):
    settings = {"num_steps": 7, "entropy_bound": 1.5, "confidence_threshold": 0.5}
    prompts, seeds = [random_prompt(num, num) for num in (2, 7, 15)], (0, 5, -3)
    seqs = decode(
        tiny("uniform", num_layers=3),
        "renoise",
        settings,
        prompts=prompts,
        law=law,
        seeds=seeds,
        max_new_tokens=2 * LENGTH,
    )
    for seq, prompt, seed in zip(seqs, prompts, seeds, strict=True):
        want = published(prompt, 2 * LENGTH, settings, law=law, seed=seed)
        assert (seq.output.tolist(), num_denoising(seq)) == want


def test_a_stop_token_ends_the_text_after_its_canvas(tiny, decode, published):
    prompt, settings = random_prompt(9), {"num_steps": 4}
    model = tiny("uniform", num_layers=3)
    [whole] = decode(model, "renoise", settings, prompts=[prompt], max_new_tokens=4 * LENGTH)
    eos_ids = (int(whole.output[LENGTH + 1]),)
    [seq] = decode(model, "renoise", settings, prompts=[prompt], max_new_tokens=4 * LENGTH, eos_ids=eos_ids)
    tokens, num_steps = published(prompt, 4 * LENGTH, settings, eos_ids=eos_ids)
    assert seq.finish_reason == "stop"
    assert seq.output.tolist() == tokens[: tokens.index(eos_ids[0]) + 1]
    assert num_denoising(seq) == num_steps


@pytest.mark.parametrize("num_new", [1, 2, 5, 7])
def test_the_last_canvas_is_whole_and_what_exceeds_the_limit_is_dropped(tiny, decode, published, num_new):
    counting = CountingModel(tiny("uniform", num_layers=3))
    prompt, settings = random_prompt(5), {"num_steps": 3}
    [seq] = decode(counting, "renoise", settings, prompts=[prompt], max_new_tokens=num_new)
    assert seq.output.tolist() == published(prompt, num_new, settings)[0][:num_new]
    assert {len(ask.tokens) for [(_, ask)] in counting.calls if ask.slots is None} == {LENGTH}


# The rules.


def test_acceptance_equals_that_of_transformers_on_random_logits():
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for bound in (0.05, 0.5, 2.0, 10.0):
        sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(entropy_bound=bound), 16, 50, 48)
        for spread in (1.0, 4.0, 20.0):
            logits = spread * torch.randn(25, 16, 50, generator=generator)
            entropies = torch.special.entr(logits.softmax(2)).sum(2)
            sampler.accept_canvas(torch.zeros(25, 16).long(), torch.ones(25, 16).long(), logits, None)
            for row, want in zip(entropies.double().numpy(), sampler.accepted_token_mask, strict=True):
                got = nearly_independent(row, bound)
                assert sorted(got.tolist()) == np.flatnonzero(want).tolist()
                sizes.append(len(got))
    assert {1, 2, 5, 16} <= set(sizes)


class Scripted:
    """A model that says what it is given, whatever it is fed; it keeps what that was.

    Args:
        logits: Of each step, `[S, Q, V]`.
    """

    name, window, max_rows, tokenizer, device, dtype = "scripted", 64, 1, None, None, None
    packs = False

    def __init__(self, logits):
        self.logits, self.vocab_size = logits, logits.shape[2]
        self.family = Family(
            kind="uniform", shift=0, block_length=logits.shape[1], vocab_size=self.vocab_size
        )
        self.canvases, self.injected = [], []

    def run(self, requests):
        [(_, forward)] = requests
        if forward.read is None:
            return [Reading()]
        logits = self.logits[len(self.canvases)]
        self.canvases.append(forward.tokens)
        self.injected.append(forward.inject)
        return [Reading(logits=logits, max_logit=logits.max(1).values.numpy())]

    def free_row(self, row, *, clear=False):
        pass


def follow(logits, settings, law=None, seed=0):
    """Decode one canvas of a script; gives its sequence and the model."""
    model = Scripted(logits)
    stop = StopRules(max_new_tokens=logits.shape[1])
    seq = Sequence(prompt=np.array([1, 0]), family=model.family, stop=stop, law=law or Law(), seed=seed)
    engine = Engine(model)
    engine.submit(make_decoder("renoise", settings), seq)
    engine.run()
    if seq.error is not None:
        raise seq.error
    return seq, model


@pytest.mark.parametrize("stability", [0, 1, 2, 4])
@pytest.mark.parametrize("confidence", [0.0, 0.02, 0.3, 5.0])
def test_stopping_equals_that_of_transformers_on_random_logits(stability, confidence):
    """Scripts of logits that settle on a canvas now and then, and become surer."""
    rng, num_steps, stopped = np.random.default_rng([stability, int(100 * confidence)]), 24, []
    for _ in range(12):
        base = rng.normal(size=(num_steps // 4 + 1, 3, 6)).repeat(5, 0)[:num_steps]
        script = torch.from_numpy(base * np.linspace(0.5, 12, num_steps)[:, None, None]).float()
        settings = {"num_steps": num_steps, "stability_threshold": stability}
        seq, model = follow(script, settings | {"confidence_threshold": confidence})

        criteria = StableAndConfidentStoppingCriteria(stability, confidence)
        for step in range(1, num_steps + 1):
            processed = script[step - 1] / (0.4 + 0.4 * (num_steps - step + 1) / num_steps)
            best = processed.argmax(1)
            if criteria(best[None], processed[None]).all():
                break
        assert (len(model.canvases), seq.output.tolist()) == (step, best.tolist())
        stopped.append(step)
    if confidence == 0:
        assert set(stopped) == {num_steps}
    if (stability, confidence) in ((1, 0.3), (4, 0.3), (0, 0.3)):
        assert len(set(stopped)) > 1
        assert min(stopped) > stability


def test_a_step_is_fed_what_was_accepted_noise_elsewhere_and_what_the_last_one_said():
    """One position is sure of token 2, and the first of those with any entropy is accepted beside it."""
    sure, unsure = [-9.0, -9.0, 9.0, -9.0], [0.2, 0.1, 0.0, 0.3]
    script = torch.tensor([[unsure, sure, unsure], [sure, unsure, unsure], [unsure] * 3])
    seq, model = follow(script, {"num_steps": 3, "t_max": 0.9, "t_min": 0.3}, seed=4)
    noise = [np.floor(uniforms(4, "noise", [2, 3, 4], step) * 4).tolist() for step in range(3)]
    first, second, third = (canvas.tolist() for canvas in model.canvases)
    assert first == noise[0]
    assert second == [3, 2, noise[1][2]]
    assert third == [2, 3, noise[2][2]]
    assert model.injected[0] is None
    for said, logits, temperature in zip(model.injected[1:], script, (0.9, 0.7), strict=False):
        torch.testing.assert_close(said, logits / temperature)
    assert seq.output.tolist() == [3, 3, 3]
    assert seq.committed_at[2:].tolist() == [3, 3, 3]


def test_noise_is_any_token_and_another_for_each_seed_position_and_step():
    script = torch.zeros(8, 400, 7)
    canvases = np.concatenate([follow(script, {"num_steps": 8}, seed=seed)[1].canvases for seed in (0, 1)])
    counts = np.bincount(canvases.ravel(), minlength=7)
    assert counts.argmin() >= 0
    assert (abs(counts - counts.sum() / 7) < 5 * np.sqrt(counts.sum() / 7)).all()
    for a in range(16):
        for b in range(a):
            assert 20 < (canvases[a] == canvases[b]).sum() < 110  # 400 / 7 is 57


def test_sampled_proposals_follow_the_law_of_their_step():
    """The first step's temperature is 0.8 times that of the request: 1, and the odds are e to 1."""
    script = torch.tensor([0.0, 1.0]).expand(2, 4000, 2)
    law = Law(temperature=1.25)
    _, model = follow(script, {"num_steps": 2, "entropy_bound": 1e9, "t_max": 0.8, "t_min": 0.4}, law)
    chance = np.e / (1 + np.e)
    assert abs(model.canvases[1].mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / 4000)


def test_nothing_is_shown_before_the_canvas_is_done(tiny):
    model = tiny("uniform", num_layers=3)
    engine = Engine(model)
    seq = Sequence(prompt=random_prompt(5), family=model.family, stop=StopRules(max_new_tokens=2 * LENGTH))
    engine.submit(make_decoder("renoise", {"num_steps": 3}), seq)
    lengths = []
    while not seq.done:
        engine.step()
        lengths.append(len(seq.output))
    # The prompt, three steps, the canvas, three steps.
    assert lengths == [0, 0, 0, 4, 4, 4, 4, 8]
    assert (seq.stats.prefills, seq.stats.forwards["target"], seq.stats.positions_fed["target"]) == (
        1,
        3 + 1 + 3,
        5 + 7 * LENGTH,
    )
    assert seq.committed_at[5:].tolist() == [3] * 4 + [7] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1; got 0."),
        ({"entropy_bound": 0.0}, "entropy_bound must be above 0; got 0.0."),
        ({"entropy_bound": float("nan")}, "entropy_bound must be above 0; got nan."),
        ({"t_min": 0.8}, "t_min must be at least 0 and below a finite t_max; got 0.8 and 0.8."),
        ({"t_min": -0.1}, "t_min must be at least 0 and below a finite t_max; got -0.1 and 0.8."),
        ({"t_max": float("inf")}, "t_min must be at least 0 and below a finite t_max; got 0.4 and inf."),
        ({"stability_threshold": -1}, "stability_threshold must be at least 0; got -1."),
        ({"confidence_threshold": -0.5}, "confidence_threshold must be at least 0; got -0.5."),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_decoder("renoise", settings)
    assert str(error.value) == message


def test_the_defaults_are_those_of_transformers():
    published = DiffusionGemmaGenerationConfig._get_default_generation_params()
    config = decoder_class("renoise").Config()
    assert config.entropy_bound == published["sampler_config"].entropy_bound
    for name in ("num_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold"):
        assert getattr(config, name) == published[NAMES.get(name, name)]
