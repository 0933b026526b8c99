from __future__ import annotations

import numpy as np
import pytest

from chordal.decoders.autoregressive import Autoregressive
from chordal.decoders.decoder import Decoder
from chordal.decoders.speculate import speculate
from chordal.drafters.draft import Draft, Drafter
from chordal.forward import Causal, Forward, Logits
from chordal.ops.sampling import Law
from chordal.testing import CountingModel, TableModel, chi_square, random_prompt, sample_joint

NEW_TOKENS = 14
LAWS = [
    Law(),
    Law(temperature=1.0),
    Law(temperature=0.8, top_k=4),
    Law(temperature=1.2, top_p=0.7),
    Law(temperature=1.0, min_p=0.2),
    Law(repetition_penalty=1.5),
    Law(temperature=1.0, top_p=0.9, repetition_penalty=1.5),
]


class Speculates(Decoder):
    """Drafts with one function of the committed tokens and the budget."""

    name, family, promise, needs, paper = "speculates", "autoregressive", "exact", ("causal",), "-"

    class Config:
        pass

    def __init__(self, propose, num_draft=4):
        super().__init__()
        self.propose, self.num_draft = propose, num_draft

    def decode(self, seq):
        return speculate(seq, Chooses(self.propose), num_draft=self.num_draft)


class Chooses(Drafter):
    """Drafts a chain with a function of the committed tokens and the budget."""

    def __init__(self, function):
        self.function = function

    def propose(self, text, budget):
        return Draft.chain(self.function(text, budget))


def oracle(prompt, output):
    """Drafts what plain decoding gives."""
    whole = np.concatenate([prompt, output])
    return lambda committed, budget: whole[len(committed) : len(committed) + budget]


def garbage(prompt, output):
    """Drafts what plain decoding never gives."""
    right = oracle(prompt, output)
    return lambda committed, budget: (right(committed, budget) + 1) % 29


def half_right(prompt, output):
    """Drafts what plain decoding gives, with every third token of the text wrong."""
    whole = np.concatenate([prompt, output])
    whole[::3] = (whole[::3] + 1) % 29
    return lambda committed, budget: whole[len(committed) : len(committed) + budget]


def nothing(prompt, output):
    return lambda committed, budget: committed[:0]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("drafter", [oracle, garbage, half_right, nothing])
def test_output_equals_plain_decoding_whatever_is_drafted(tiny, decode, law, drafter):
    for seed in range(3):
        prompt = random_prompt(4 + seed, seed)
        run = {"prompts": [prompt], "max_new_tokens": NEW_TOKENS, "law": law, "seeds": [seed]}
        [plain] = decode(tiny("causal"), Autoregressive(), **run)
        [seq] = decode(tiny("causal"), Speculates(drafter(prompt, plain.output)), **run)
        assert seq.output.tolist() == plain.output.tolist()


@pytest.mark.parametrize("law", [Law(), Law(temperature=1.0)], ids=str)
@pytest.mark.parametrize(("num_draft", "forwards"), [(0, 14), (1, 7), (4, 3), (13, 1), (50, 1)])
def test_right_drafts_are_all_accepted(tiny, decode, law, num_draft, forwards):
    prompt = random_prompt(5)
    run = {"prompts": [prompt], "max_new_tokens": NEW_TOKENS, "law": law}
    [plain] = decode(tiny("causal"), Autoregressive(), **run)
    [seq] = decode(tiny("causal"), Speculates(oracle(prompt, plain.output), num_draft), **run)
    assert seq.stats.forwards["target"] == forwards
    # A forward draws one token beyond its draft, so no draft ends behind the last token but one.
    assert seq.stats.accepted_tokens == seq.stats.draft_tokens == NEW_TOKENS - forwards
    assert seq.stats.positions_fed["target"] == len(prompt) + NEW_TOKENS - 1


@pytest.mark.parametrize("law", [Law(), Law(temperature=1.0)], ids=str)
def test_wrong_drafts_are_all_rejected_and_cost_no_forward(tiny, decode, law):
    prompt = random_prompt(5)
    run = {"prompts": [prompt], "max_new_tokens": NEW_TOKENS, "law": law}
    [plain] = decode(tiny("causal"), Autoregressive(), **run)
    [seq] = decode(tiny("causal"), Speculates(garbage(prompt, plain.output)), **run)
    assert seq.stats.forwards["target"] == NEW_TOKENS
    assert seq.stats.accepted_tokens == 0
    assert seq.stats.draft_tokens == 10 * 4 + 3 + 2 + 1


def test_no_draft_feeds_what_plain_decoding_feeds(tiny, decode):
    prompt = random_prompt(5)
    [seq] = decode(
        tiny("causal"), Speculates(nothing(prompt, None)), prompts=[prompt], max_new_tokens=NEW_TOKENS
    )
    assert seq.stats.forwards["target"] == NEW_TOKENS
    assert seq.stats.positions_fed["target"] == len(prompt) + NEW_TOKENS - 1
    assert seq.stats.draft_tokens == 0


def test_a_draft_longer_than_its_budget_is_cut(tiny, decode):
    prompt = random_prompt(5)
    [plain] = decode(tiny("causal"), Autoregressive(), prompts=[prompt], max_new_tokens=NEW_TOKENS)
    endless = oracle(prompt, np.resize(plain.output, 100))
    model = CountingModel(tiny("causal"))
    [seq] = decode(
        model,
        Speculates(lambda committed, budget: endless(committed, 99), num_draft=4),
        prompts=[prompt],
        max_new_tokens=NEW_TOKENS,
    )
    assert seq.output.tolist() == plain.output.tolist()
    assert [len(forward.tokens) for [(_, forward)] in model.calls] == [5 + 4, 5, 4]


def test_sequences_of_a_batch_accept_different_numbers(tiny, decode):
    given = [random_prompt(3 + seed, seed) for seed in range(4)]
    plain = decode(tiny("causal"), Autoregressive(), prompts=given, max_new_tokens=NEW_TOKENS)
    whole = {tuple(prompt): np.append(prompt, seq.output) for prompt, seq in zip(given, plain, strict=True)}

    def propose(committed, budget):
        """Draft rightly for the first two prompts, every third token wrong for the others."""
        [(prompt, text)] = [
            (prompt, text) for prompt, text in whole.items() if tuple(committed[: len(prompt)]) == prompt
        ]
        drafter = oracle if len(prompt) < 5 else half_right
        return drafter(np.array(prompt), text[len(prompt) :])(committed, budget)

    seqs = decode(tiny("causal"), Speculates(propose), prompts=given, max_new_tokens=NEW_TOKENS)
    assert [seq.output.tolist() for seq in seqs] == [seq.output.tolist() for seq in plain]
    forwards = [seq.stats.forwards["target"] for seq in seqs]
    assert forwards[:2] == [3, 3]
    assert min(forwards[2:]) > 3


def test_a_stop_token_inside_an_accepted_draft_ends_the_text(tiny, decode):
    prompt = random_prompt(5)
    [plain] = decode(tiny("causal"), Autoregressive(), prompts=[prompt], max_new_tokens=NEW_TOKENS)
    tokens = plain.output.tolist()
    for eos in dict.fromkeys(tokens[:9]):
        [seq] = decode(
            tiny("causal"),
            Speculates(oracle(prompt, plain.output), num_draft=9),
            prompts=[prompt],
            max_new_tokens=NEW_TOKENS,
            eos_ids=(eos,),
        )
        assert seq.output.tolist() == tokens[: tokens.index(eos) + 1]
        assert (seq.finish_reason, seq.stop_reason) == ("stop", eos)
        assert seq.stats.committed_tokens == tokens.index(eos) + 1
        assert seq.stats.forwards["target"] == 1


def test_accepted_tokens_behind_a_stop_token_do_not_count(tiny, decode):
    prompt = random_prompt(5)
    [plain] = decode(tiny("causal"), Autoregressive(), prompts=[prompt], max_new_tokens=NEW_TOKENS)
    [seq] = decode(
        tiny("causal"),
        Speculates(oracle(prompt, plain.output), num_draft=9),
        prompts=[prompt],
        max_new_tokens=NEW_TOKENS,
        eos_ids=(int(plain.output[0]),),
    )
    assert (seq.stats.committed_tokens, seq.stats.accepted_tokens) == (1, 1)


def cycle(committed, budget):
    """Drafts the tokens that follow the last one in alphabetical order: often right, often wrong."""
    return (committed[-1] + 1 + np.arange(budget)) % 4


def test_sampled_output_has_the_law_of_the_model():
    """All 64 continuations of 3 tokens, 1,500 runs; chi-square, false alarm once in a million."""
    model, prompt = TableModel(seed=3), np.array([2, 0, 1])
    counts = sample_joint(Speculates(cycle), model, prompt, 3, 1500, Law(temperature=1.0))
    assert chi_square(counts, model.joint(prompt, 3)) > 1e-6


class AcceptsWhatIsPossible(Speculates):
    """Broken on purpose: keeps every draft token that has any probability."""

    def decode(self, seq):
        while not seq.done:
            draft = self.propose(seq.committed, max(0, seq.limit - seq.frontier - 1))
            tokens = np.append(seq.committed, draft)
            positions = np.arange(len(tokens))
            rows = positions[seq.frontier - 1 :]
            read = Forward(tokens, positions, Causal(), Logits(rows), slots=positions)
            probs = (yield read).logits.softmax(1).numpy()
            num_kept = 0
            while num_kept < len(draft) and probs[num_kept, draft[num_kept]] > 0:
                num_kept += 1
            number = seq.uniforms(np.array([seq.frontier + num_kept]), "token")
            drawn = (probs[num_kept].cumsum() <= number).sum()
            seq.append(np.append(draft[:num_kept], min(drawn, 3)))


class UsesOneNumberForAll(Speculates):
    """Broken on purpose: every position draws with the same random number."""

    def decode(self, seq):
        seq.uniforms = lambda positions, purpose, draw=0: np.full(
            len(positions), type(seq).uniforms(seq, np.array([0]), purpose)[0]
        )
        return super().decode(seq)


@pytest.mark.parametrize("broken", [AcceptsWhatIsPossible, UsesOneNumberForAll])
def test_the_test_of_the_law_catches_a_broken_acceptance(broken):
    model, prompt = TableModel(seed=3), np.array([2, 0, 1])
    counts = sample_joint(broken(cycle), model, prompt, 3, 600, Law(temperature=1.0))
    assert chi_square(counts, model.joint(prompt, 3)) < 1e-12
