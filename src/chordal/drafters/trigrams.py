"""Draft what a table of trigrams, kept up to date with the text, makes a tree search find."""

from __future__ import annotations

import heapq
import math
from typing import TypeAlias

import numpy as np

from chordal.drafters.draft import NO_DRAFT, Draft, Drafter
from chordal.drafters.ngram_model import NgramTable
from chordal.forward import Floats, Ints
from chordal.sequence import Sequence

Pair: TypeAlias = tuple[int, int]
# Token and score, the highest score first.
Successors: TypeAlias = list[tuple[int, float]]


class TrigramTable:
    """What followed pairs of tokens, scored: shares in a corpus at first, raised with every use.

    After 5 6 7, 5 6 8 and 5 6 7 in a corpus the pair 5 6 has 7: 2/3 and 8: 1/3; learning 5 6 8 makes
    it 8: 1/3 + 0.04. Memory: 0.4 kB for a pair with one successor, 2.8 kB with twelve, bounded by
    `max_pairs`; the pair that has not been learnt for longest goes first, back to its scores in the corpus.

    Args:
        corpus: Counts behind contexts of two tokens, of which nothing is changed; None begins empty.
        num_successors: Most successors of a pair; a new one takes the place of the weakest.
        increment: What learning a trigram adds to its score.
        max_score: Largest score that can be learnt.
        max_pairs: Most pairs that are kept beside the corpus, at least 1.
    """

    def __init__(
        self,
        corpus: NgramTable | None = None,
        *,
        num_successors: int = 12,
        increment: float = 0.04,
        max_score: float = 3.0,
        max_pairs: int = 100_000,
    ) -> None:
        self.corpus, self.num_successors = corpus, num_successors
        self.increment, self.max_score, self.max_pairs = increment, max_score, max_pairs
        self._scores: dict[Pair, dict[int, float]] = {}

    def learn(self, tokens: Ints) -> None:
        """Raise every trigram of some tokens that follow each other."""
        ids = tokens.tolist()
        for first, second, token in zip(ids, ids[1:], ids[2:], strict=False):
            pair = first, second
            # Taken out and put back, so that the dictionary stays in the order of use.
            scores = self._scores.pop(pair, None) or dict(self._given(pair))
            if token not in scores and len(scores) >= self.num_successors:
                del scores[min(scores, key=lambda known: (scores[known], -known))]
            scores[token] = min(scores.get(token, 0.0) + self.increment, self.max_score)
            self._scores[pair] = scores
            if len(self._scores) > self.max_pairs:
                del self._scores[next(iter(self._scores))]

    def successors(self, pair: Pair) -> Successors:
        """List what may follow a pair, the highest score first and of equal ones the smallest token."""
        scores = self._scores.get(pair)
        known = self._given(pair) if scores is None else scores.items()
        return sorted(known, key=lambda item: (-item[1], item[0]))

    def _given(self, pair: Pair) -> Successors:
        """Look a pair up in the corpus."""
        if self.corpus is None:
            return []
        tokens, counts = self.corpus.followers(np.array(pair))
        best = np.lexsort((tokens, -counts))[: self.num_successors]
        return list(zip(tokens[best].tolist(), (counts[best] / counts.sum()).tolist(), strict=True))


class TrigramDrafter(Drafter):
    """Search the continuations a table of trigrams allows, and propose those visited most.

    The table stands in for the target: Monte Carlo tree search walks it from the last two tokens. Before
    that the last tokens are learnt, again at each step as long as they stay in the window. Scope: that of
    the table. Cost: about 1 ms a step on the host for 150 iterations, 0.1 ms where there is little to find.

    Args:
        seq: The sequence, whose seed the rollouts are drawn with; they decide how fast it goes, not what
            comes out.
        table: The table.
        num_iterations: Of the search.
        num_paths: Most visited nodes that are proposed, the root among them; each with its best successor.
        max_nodes: Most nodes of a draft.
        exploration: First constant of the search (c1).
        exploration_base: Second one (c2).
        window: Last tokens that are learnt at each step.
        learn_prompt: Whether all of the prompt is learnt once, at the first step.
    """

    def __init__(
        self,
        seq: Sequence,
        table: TrigramTable,
        *,
        num_iterations: int,
        num_paths: int,
        max_nodes: int,
        exploration: float,
        exploration_base: float,
        window: int,
        learn_prompt: bool,
    ) -> None:
        self.seq, self.table = seq, table
        self.num_iterations, self.num_paths, self.max_nodes = num_iterations, num_paths, max_nodes
        self.exploration, self.exploration_base = exploration, exploration_base
        self.window = window
        if learn_prompt:
            table.learn(seq.prompt)

    def propose(self, text: Ints, budget: int) -> Draft:
        """Search `budget` - 1 tokens deep, and one further along the best."""
        self.table.learn(text[max(0, len(text) - self.window) :])
        if len(text) < 2:
            return NO_DRAFT
        depth = budget - 1
        chance = self.seq.uniforms(np.arange(self.num_iterations * depth), "draft", len(text))
        search = Search(
            self.table, (int(text[-2]), int(text[-1])), depth, self.exploration, self.exploration_base
        )
        search.run(self.num_iterations, self.num_paths, chance)
        return search.draft(self.num_paths, self.max_nodes)


class Search:
    """Monte Carlo tree search over what a table says may follow a pair.

    Nodes are numbered as they are found, 0 the root; the children of one stand together, the likeliest
    first. All is deterministic but for the numbers that are given.

    Args:
        table: The table.
        pair: The last two tokens.
        depth: Most steps from the root.
        c1: Weight of a node's score against its mean reward.
        c2: Visits from which that weight grows with their logarithm.
    """

    def __init__(self, table: TrigramTable, pair: Pair, depth: int, c1: float, c2: float) -> None:
        self._table, self._depth, self._c1, self._c2 = table, depth, c1, c2
        self._known: dict[Pair, Successors] = {}
        # Of each node; children are None until they are listed, and empty at the end of a path.
        self._parents, self._pairs, self._levels = [-1], [pair], [0]
        self._children: list[range | None] = [None if depth else range(0)]
        self._priors, self._sums = [0.0], [1.0]  # its score, and 1 + all on the way to it
        self.rewards, self.visits = [0.0], [0]
        self._num_open = int(depth > 0)  # nodes whose children are not listed

    def run(self, num_iterations: int, num_paths: int, chance: Floats) -> None:
        """Search for so many iterations, or until everything is found and it is no more than is wanted."""
        numbers = iter(chance.tolist())
        for _ in range(num_iterations):
            if not self._num_open and len(self.visits) <= num_paths:
                return
            # Select, and expand what was never expanded.
            node = 0
            while children := self._children[node]:
                node = self._best_child(node, children)
            if children is None and (children := self._expand(node)):
                node = children[0]

            # Roll out.
            reward, pair = self._sums[node], self._pairs[node]
            for _ in range(self._levels[node], self._depth):
                known = self._successors(pair)
                if not known:
                    break
                token, score = _draw(known, next(numbers))
                reward += score
                pair = pair[1], token

            # Back up.
            while node >= 0:
                self.visits[node] += 1
                self.rewards[node] += reward
                node = self._parents[node]

    def draft(self, num_paths: int, max_nodes: int) -> Draft:
        """Give the most visited nodes, the root among them, each with its likeliest successor."""
        # A parent has no fewer visits than its child and a smaller number, so it comes first.
        kept = heapq.nsmallest(
            num_paths, range(len(self.visits)), key=lambda node: (-self.visits[node], node)
        )
        number = {node: at for at, node in enumerate(kept, -1)}
        tokens = [self._pairs[node][1] for node in kept[1:]]
        parents = [number[self._parents[node]] for node in kept[1:]]
        for node in kept:
            children = self._children[node]
            known = () if children and children[0] in number else self._successors(self._pairs[node])
            if known:
                tokens.append(known[0][0])
                parents.append(number[node])
        return Draft(np.array(tokens[:max_nodes], np.int64), np.array(parents[:max_nodes], np.int64))

    def _best_child(self, node: int, children: range) -> int:
        """Take the first child that was never visited, else the best by mean reward and score."""
        visits, rewards, priors = self.visits, self.rewards, self._priors
        if not visits[children[-1]]:
            return next(child for child in children if not visits[child])
        num = visits[node]
        weight = (self._c1 + math.log((num + self._c2 + 1) / self._c2)) * math.sqrt(num)
        return max(
            children,
            key=lambda child: rewards[child] / visits[child] + weight * priors[child] / (1 + visits[child]),
        )

    def _expand(self, node: int) -> range:
        """List the children of a node."""
        level, total, pair = self._levels[node] + 1, self._sums[node], self._pairs[node]
        known, is_last = self._successors(pair), level == self._depth
        children = self._children[node] = range(len(self.visits), len(self.visits) + len(known))
        self._num_open += -1 if is_last else len(known) - 1
        for token, score in known:
            self._parents.append(node)
            self._pairs.append((pair[1], token))
            self._priors.append(score)
            self._sums.append(total + score)
            self._levels.append(level)
            self._children.append(range(0) if is_last else None)
            self.visits.append(0)
            self.rewards.append(0.0)
        return children

    def _successors(self, pair: Pair) -> Successors:
        known = self._known.get(pair)
        if known is None:
            known = self._known[pair] = self._table.successors(pair)
        return known


def _draw(known: Successors, uniform: float) -> tuple[int, float]:
    """Draw a successor in proportion to its score."""
    left = uniform * sum(score for _, score in known)
    for successor in known:
        left -= successor[1]
        if left < 0:
            return successor
    return known[-1]  # rounding
