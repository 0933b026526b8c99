from __future__ import annotations

import pytest
import torch

from chordal.errors import InputError
from chordal.ops.experts import Gate, Routing, coreset, share

# Two tokens, four experts, two a token: by itself the first takes 0 and 1, the second 1 and 3.
SCORES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.45, 0.05, 0.4]])
LOGITS = SCORES.log()
PAIR = torch.zeros(2, dtype=torch.long)
GATE = Gate(2)


def random_logits(num_tokens, num_experts=16, seed=0):
    return 2 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def agree(routing, logits, gate, group=None):
    """Give the coreset of each group, of tokens that chose by themselves before."""
    group = torch.zeros(len(logits), dtype=torch.long) if group is None else group
    scores = gate.scores(logits)
    _, own = gate.choose(scores)
    return coreset(routing, scores, gate.preferences(scores), own, group, int(group.max()) + 1)


def route(routing, logits, gate, group=None):
    group = torch.zeros(len(logits), dtype=torch.long) if group is None else group
    own = gate.choose(gate.scores(logits))
    return share(routing, gate, logits, own, group, int(group.max()) + 1)


def members(is_in):
    return set(torch.nonzero(is_in).flatten().tolist())


# --- the coreset -----------------------------------------------------------------------------------


def test_votes_of_own_experts_are_added_up():
    """Worked by hand: (.5, .3 + .45, 0, .4), of which .75 and .5 are the largest."""
    assert members(agree(Routing(share=0.5), LOGITS, GATE)[0]) == {0, 1}
    assert members(agree(Routing(share=0.75), LOGITS, GATE)[0]) == {0, 1, 3}
    assert members(agree(Routing(share=0.25), LOGITS, GATE)[0]) == {1}


def test_experts_that_a_token_did_not_choose_have_no_vote_of_it():
    """Counting all scores, expert 2 would have .9 and win against .6 and .8."""
    scores = torch.tensor([[0.6, 0.0, 0.3, 0.1], [0.0, 0.4, 0.3, 0.3], [0.0, 0.4, 0.3, 0.3]])
    own = torch.tensor([[0], [1], [1]])
    group = torch.zeros(3, dtype=torch.long)
    assert members(coreset(Routing(share=0.25), scores, scores, own, group, 1)[0]) == {1}
    assert scores.sum(0).argmax() == 2


def test_the_largest_score_of_any_token_admits_an_expert():
    assert members(agree(Routing("max", 0.5), LOGITS, GATE)[0]) == {0, 1}
    assert members(agree(Routing("max", 0.75), LOGITS, GATE)[0]) == {0, 1, 3}
    mostly_0 = torch.tensor([[0.4, 0.35, 0.25]] * 3 + [[0.05, 0.05, 0.9]]).log()
    assert members(agree(Routing("max", 0.34), mostly_0, Gate(1))[0]) == {2}
    assert members(agree(Routing("vote", 0.34), mostly_0, Gate(1))[0]) == {0}


def test_first_choices_of_every_token_are_united():
    assert members(agree(Routing("seq", num_choices=1), LOGITS, GATE)[0]) == {0, 1}
    assert members(agree(Routing("seq", num_choices=2), LOGITS, GATE)[0]) == {0, 1, 3}


def test_first_choices_go_by_what_a_token_prefers_not_by_its_score():
    gate = Gate(2, "sigmoid", bias_M=torch.tensor([0.0, 0.0, 0.0, 9.0]))
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert members(agree(Routing("seq", num_choices=1), logits, gate)[0]) == {3}


def test_ties_go_to_the_lower_expert():
    even = torch.zeros(3, 300)
    own = torch.arange(300).flip(0).view(3, 100)
    group = torch.zeros(3, dtype=torch.long)
    for rule in ("vote", "max"):
        found = coreset(Routing(rule, 0.5), even + 0.5, even, own, group, 1)
        assert members(found[0]) == set(range(150))


@pytest.mark.parametrize(
    ("share", "num_experts", "size"),
    [(0.15, 256, 38), (0.1, 256, 25), (0.6, 64, 38), (0.4, 64, 25), (0.29, 100, 29), (0.01, 8, 1), (1, 7, 7)],
)
def test_a_share_is_rounded_down_to_at_least_one_expert(share, num_experts, size):
    assert Routing(share=share).size(num_experts) == size
    logits = random_logits(5, num_experts)
    assert agree(Routing(share=share), logits, Gate(min(4, num_experts))).sum() == size


@pytest.mark.parametrize(
    "settings", [{"share": 0}, {"share": 1.1}, {"share": float("nan")}, {"num_choices": 0}], ids=str
)
def test_impossible_routings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Routing(**settings)


@pytest.mark.parametrize(
    "routing", [Routing(share=0.4), Routing("max", 0.4), Routing("seq", num_choices=2)], ids=str
)
def test_only_the_tokens_of_a_group_decide_and_their_order_does_not(routing):
    gate, logits = Gate(4), random_logits(12)
    group = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1, 0, 1, 2, 0])
    together = agree(routing, logits, gate, group)
    for one in range(3):
        assert torch.equal(together[one], agree(routing, logits[group == one], gate)[0])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(agree(routing, logits[order], gate, group[order]), together)


# --- the choice inside it --------------------------------------------------------------------------


def test_a_token_takes_others_of_the_coreset_for_those_it_lost():
    """The second token loses 3 and takes 0, so both have two experts and all of them need two."""
    weights, chosen = route(Routing(share=0.5), LOGITS, GATE)
    assert chosen.tolist() == [[0, 1], [1, 0]]
    assert torch.allclose(weights, torch.tensor([[5 / 8, 3 / 8], [0.45 / 0.55, 0.1 / 0.55]]))


@pytest.mark.parametrize(
    "gate",
    [
        Gate(4),
        Gate(4, normalizes=False),
        Gate(4, "sigmoid", scale=2.5, bias_M=random_logits(1)[0], num_groups=4, num_kept_groups=2),
    ],
    ids=["softmax", "raw", "grouped"],
)
def test_with_all_experts_or_all_choices_nothing_changes(gate):
    logits = random_logits(9)
    weights, chosen = gate.choose(gate.scores(logits))
    # An order that `choose` would not give, as of routers that do not sort.
    own = weights.flip(1) + 1e-9, chosen.flip(1)
    for routing in (Routing(), Routing("max"), Routing("seq", num_choices=4), Routing("seq", num_choices=99)):
        group = torch.zeros(9, dtype=torch.long)
        routed = share(routing, gate, logits, own, group, 1)
        assert all(map(torch.equal, routed, own))


def test_one_token_alone_keeps_its_experts_if_the_coreset_can_hold_them():
    gate, logits = Gate(4), random_logits(1)
    own = gate.choose(gate.scores(logits))
    for routing in (Routing(share=0.25), Routing("max", 0.25)):
        assert all(map(torch.equal, route(routing, logits, gate), own))
    assert not torch.equal(route(Routing(share=0.2), logits, gate)[1], own[1])


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_weights_of_a_token_add_up_to_the_scale_after_the_restriction(activation, scale):
    gate, logits = Gate(4, activation, scale=scale), random_logits(20)
    for routing in (
        Routing(share=0.3),
        Routing(share=0.1),
        Routing("seq", num_choices=1),
        Routing("max", 0.3),
    ):
        weights, chosen = route(routing, logits, gate)
        torch.testing.assert_close(weights.sum(1), torch.full((20,), scale))
        allowed = agree(routing, logits, gate)[0]
        assert allowed[chosen].all()


def test_scores_that_are_not_normalized_stay_what_they_are():
    gate, logits = Gate(4, normalizes=False), random_logits(20)
    weights, chosen = route(Routing(share=0.4), logits, gate)
    assert torch.equal(weights, logits.softmax(1).gather(1, chosen))


def test_a_token_that_is_allowed_too_few_has_no_other_expert_and_none_twice():
    gate, logits = Gate(4), random_logits(20)
    weights, chosen = route(Routing(share=0.125), logits, gate)  # 2 of 16
    assert ((weights > 0).sum(1) == 2).all()
    for mine, experts in zip(weights, chosen.tolist(), strict=True):
        assert len({expert for expert, weight in zip(experts, mine, strict=True) if weight > 0}) == 2
        assert len(set(experts)) == 2


def test_groups_limit_the_choice_unless_they_hold_too_few_of_the_coreset():
    """Groups (0, 1), (2, 3) and (4, 5), of which a token keeps the best two by their sum."""
    gate = Gate(2, "sigmoid", num_groups=3, num_kept_groups=2)
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 6.0, -9.0]])
    scores = gate.scores(logits)
    assert gate.choose(scores)[1].tolist() == [[0, 1]]
    allowed = torch.tensor([[False, True, True, True, True, False]])
    assert gate.choose(scores, allowed)[1].tolist() == [[1, 2]]  # 4 is the best, but not in a kept group
    allowed = torch.tensor([[False, True, False, False, True, False]])
    assert gate.choose(scores, allowed)[1].tolist() == [[4, 1]]


# --- what it is for --------------------------------------------------------------------------------


def test_more_experts_are_used_and_less_is_lost_as_the_share_grows():
    """Experts that give random vectors; the loss is how far the output of a layer moves."""
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(30, 16, 8, generator=generator)
    gate, logits = Gate(4), random_logits(30)

    def output(weights, chosen):
        return (weights[..., None] * outputs.gather(1, chosen[..., None].expand(-1, -1, 8))).sum(1)

    want = output(*gate.choose(gate.scores(logits)))
    used, lost = [], []
    for part in (0.25, 0.5, 0.75, 1.0):
        weights, chosen = route(Routing(share=part), logits, gate)
        used.append(len(chosen.unique()))
        lost.append(float((output(weights, chosen) - want).norm(dim=1).mean()))
    assert used == [4, 8, 12, 16]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] == 0


def test_no_coreset_of_its_size_keeps_more_of_the_scores_than_a_vote():
    gate = Gate(4)
    for seed in range(20):
        logits = random_logits(12, seed=seed)
        scores = gate.scores(logits)
        own = gate.choose(scores)[1]
        kept = torch.zeros_like(scores).scatter(1, own, scores.gather(1, own)).sum(0)
        for other in (Routing("seq", num_choices=1), Routing("seq", num_choices=2), Routing("max", 0.4)):
            is_in = agree(other, logits, gate)[0]
            by_vote = agree(Routing(share=float(is_in.sum()) / 16), logits, gate)[0]
            assert by_vote.sum() == is_in.sum()
            assert kept[by_vote].sum() >= kept[is_in].sum() - 1e-6
