"""Draft and verify: propose several tokens, check them in one forward pass, keep what is right.

Promise: exact, with any drafter. Where draft tokens were chosen, each verified position draws the token
plain decoding would draw there, with the same random number, and a draft token stays as long as it equals
that draw: greedy and sampled, the output is plain decoding's token for token. Where they were drawn from
a law of their own, an acceptance rule keeps more of them; greedy output is the same, sampled output has
the target's law.

Cost: one forward pass of 1 + n positions for 1 to 1 + depth tokens, of a draft of n tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chordal.cursor import Cursor, Feed
from chordal.decoders.decoder import Decoding
from chordal.drafters.draft import Draft, Drafter, Outcome
from chordal.forward import Confidence, Ints, Reading
from chordal.models.reading import read_logprobs
from chordal.ops import sampling, tree
from chordal.sequence import Sequence


def speculate(seq: Sequence, drafter: Drafter, *, num_draft: int, target: Cursor | None = None) -> Decoding:
    """Decode one sequence with a drafter.

    Between steps the cache holds every committed token but the last, the root, which is fed next
    together with the draft. Slots of rejected tokens are not visible until they are written again.

    Args:
        seq: The sequence.
        drafter: Its drafter.
        num_draft: Longest path of one draft; 0 is plain decoding.
        target: What the target has cached of the sequence, if it was asked before.
    """
    target = target or Cursor()
    while not seq.done:
        # Draft. The last token of the result never needs a draft behind it.
        draft = yield from drafter.ask(seq.committed, min(num_draft, seq.limit - seq.frontier - 1))

        # Verify: the rows of the root and of every node each tell what follows them.
        feed = target.feed(seq.committed, draft)
        is_judged = draft.laws is not None and not seq.law.is_greedy
        ask = feed.logits() if is_judged else feed.sample(seq, candidates=drafter.candidates)
        reading = yield ask

        # Commit what is accepted and the draw that follows it.
        root = int(seq.committed[-1])
        kept, tokens, confidence = accept(seq, feed, draft, reading)
        seq.append(
            tokens,
            confidence=confidence,
            draft=draft.tokens,
            parents=None if draft.is_chain else draft.parents,
            draft_confidence=draft.known_confidence() if seq.wants_confidence else None,
        )
        drafter.observe(Outcome(root, draft, kept, reading))


def accept(seq: Sequence, feed: Feed, draft: Draft, reading: Reading) -> tuple[Ints, Ints, Confidence]:
    """Accept what is right of a draft: by rule if logits were read, else as far as it equals what was drawn.

    Args:
        seq: The sequence; its frontier is where the draft begins.
        feed: What was fed for it.
        draft: The draft. Leaves may not have been fed, and then nothing is drawn behind them.
        reading: Of the root and of the nodes that were fed.

    Returns:
        The accepted nodes; their tokens, with the draw that follows them if there is one; and how sure
        the target was of each of these, as far as it was read or is wanted.
    """
    if reading.logits is None:
        kept = tree.follow_drawn(draft.tokens, draft.parents, reading.tokens)
        rows = np.append(0, kept + 1)
        drawn = reading.tokens[rows[-1] : rows[-1] + 1]
        tokens = np.append(draft.tokens[kept], drawn)
        return kept, tokens, reading.confidence(rows[: len(tokens)])
    probs_NV = feed.under_law(reading, seq).double().softmax(1)
    kept, last = judge(seq, draft, probs_NV)
    tokens = draft.tokens[kept] if last is None else np.append(draft.tokens[kept], last)
    rows = np.append(0, kept + 1)[: len(tokens)]
    probs = sampling.probs_of(probs_NV[rows], tokens) if seq.wants_confidence else None
    logprobs = None
    if seq.num_logprobs is not None:
        logprobs = read_logprobs(reading.logits[rows], tokens, seq.num_logprobs)
    return kept, tokens, Confidence(probs, logprobs)


def judge(seq: Sequence, draft: Draft, probs_NV: Tensor) -> tuple[Ints, int | None]:
    """Walk down a draft whose tokens were drawn: which nodes are accepted, and the token behind them.

    Each position is judged once in the life of a sequence and uses numbers of its own, so positions
    stay independent.

    Args:
        seq: The sequence; its frontier is where the draft begins.
        draft: The draft.
        probs_NV: The target's law at the root and behind each node, in float64. Leaves may be left out, and
            then nothing is drawn behind them.

    Returns:
        The accepted nodes from the root's child down, and the token, or None.
    """
    laws = draft.laws or {}
    nodes: list[int] = []
    while True:
        position = np.array([seq.frontier + len(nodes)])
        node = nodes[-1] if nodes else -1
        if node + 1 >= len(probs_NV):
            return np.array(nodes, np.int64), None
        owed_V, offered = probs_NV[node + 1], tree.children(draft.parents, node)
        accepted = None
        if node in laws:
            offers = draft.offers(owed_V, laws[node], draft.tokens[offered])
            for number, (child, (chance, rest_V)) in enumerate(zip(offered.tolist(), offers, strict=False)):
                if seq.uniforms(position, "accept", number)[0] < chance:
                    accepted = child
                    break
                owed_V = rest_V
        if accepted is None:
            uniform = torch.from_numpy(seq.uniforms(position, "token")).to(owed_V.device)
            token = int(sampling.draw(owed_V[None].log(), uniform))
            if node not in laws:  # chosen, not drawn
                accepted = next((child for child in offered.tolist() if draft.tokens[child] == token), None)
            if accepted is None:
                return np.array(nodes, np.int64), token
        nodes.append(accepted)
