"""An ideal masked-diffusion model: exact conditionals, so that what decoding loses is all there is.

The model knows every valid answer, each equally likely, and predicts a masked position by counting
those that agree with what is committed. With one commit a pass it is never wrong; whatever accuracy
parallel decoding loses on it is the price of committing dependent tokens together, and for simple
tasks that price has a closed form.

Source: ParallelBench (arXiv 2510.04767), its synthetic study.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.forward import Floats, Ints
from chordal.models.family import Family, Kind
from chordal.ops.sampling import Law
from chordal.sequence import Sequence, StopRules
from chordal.testing.toys import UNSEEN, ToyModel

_PROMPT = 8  # digits of the number of a run


def copy(n: int) -> Ints:
    """Answers to "repeat the list": one."""
    return np.arange(n)[None]


def shuffle(n: int) -> Ints:
    """Answers to "put the list in any order", the given one too: n! of them."""
    return np.array(list(itertools.permutations(range(n))))


def replace_random(n: int) -> Ints:
    """Answers to "replace any one item by a new one": n of them; the new item is n."""
    return np.where(np.eye(n, dtype=bool), n, np.arange(n))


def insert_random(n: int) -> Ints:
    """Answers to "insert a new item anywhere": n + 1 of them, n + 1 long; the new item is n."""
    return np.array([np.insert(np.arange(n), at, n) for at in range(n + 1)])


def remove_random(n: int) -> Ints:
    """Answers to "remove any one item": n of them, n - 1 long."""
    return np.array([np.delete(np.arange(n), at) for at in range(n)])


def latin(n: int) -> Ints:
    """Latin squares of n symbols row by row: 12 for n = 3, 576 for n = 4."""
    squares: list[tuple[tuple[int, ...], ...]] = [()]
    for _ in range(n):
        squares = [
            (*square, row)
            for square in squares
            for row in itertools.permutations(range(n))
            if all(a != b for above in square for a, b in zip(above, row, strict=True))
        ]
    return np.array(squares).reshape(-1, n * n)


class IdealModel(ToyModel):
    """Predicts each masked position with its exact law given the committed ones.

    Where the committed tokens agree with no valid answer, the law is that of an empty canvas.

    Args:
        answers: Every valid answer, int `[M, L]`.
        noise: Added to the logits, a different draw for each run and canvas: breaks ties of greedy
            decoding at random.
        shift: Of the family.
        kind: Of the family; a mask behind causal attention knows as much as it sees.
        max_rows: Runs at once.
    """

    def __init__(
        self,
        answers: Ints,
        *,
        noise: float = 0.0,
        shift: int = 0,
        kind: Kind = "masked",
        max_rows: int = 256,
    ) -> None:
        num_items = max(int(answers.max()) + 1, 10)  # digits of a prompt are tokens too
        family = Family(kind=kind, mask_id=num_items, shift=shift)
        window = _PROMPT + answers.shape[1]
        super().__init__(family, num_items + 1, window=window, max_rows=max_rows, name="ideal")
        self.answers, self.noise = answers, noise
        self._laws: dict[bytes, Floats] = {}

    def prompt(self, run: int) -> Ints:
        """Give the prompt of a run; it says nothing but its number, which keys the noise."""
        return np.array([int(digit) for digit in f"{run:0{_PROMPT}}"])

    def is_valid(self, answer: Ints) -> bool:
        """Whether an answer is one of the valid ones."""
        return bool((self.answers == answer).all(1).any())

    def logits(self, position: int, view: Ints) -> Floats:  # noqa: D102
        canvas = view[_PROMPT:]
        key = canvas.tobytes()
        if key not in self._laws:
            self._laws[key] = self._law(canvas)
        at = position + self.family.shift - _PROMPT
        if not 0 <= at < len(canvas):
            return np.zeros(self.vocab_size)
        logits: Floats = self._laws[key][at]
        if self.noise:
            rng = np.random.default_rng([at, *(view + 1)])
            logits = logits + self.noise * rng.random(len(logits))
        return logits

    def _law(self, canvas: Ints) -> Floats:
        is_known = (canvas != self.family.mask_id) & (canvas != UNSEEN)
        agree = self.answers[(self.answers == canvas)[:, is_known].all(1)]
        if not len(agree):
            agree = self.answers
        counts = (agree[:, :, None] == np.arange(self.vocab_size)).sum(0)
        with np.errstate(divide="ignore"):
            law: Floats = np.log(counts / len(agree))
        return law


@dataclass(frozen=True)
class Simulation:
    """What a decoder reached on an ideal model.

    Attributes:
        accuracy: Share of runs with a valid answer.
        forwards: Forward passes of each run, int `[runs]`.
    """

    accuracy: float
    forwards: Ints


def simulate(decoder: Decoder, model: IdealModel, runs: int, *, temperature: float = 0.0) -> Simulation:
    """Decode a number of runs, each with its number as seed, through the engine.

    Args:
        decoder: Decoder of models of its kind.
        model: The model.
        runs: How many.
        temperature: 0 is greedy.
    """
    engine = Engine(model)
    stop, law = StopRules(max_new_tokens=model.answers.shape[1]), Law(temperature=temperature)
    seqs = [
        engine.submit(
            decoder,
            Sequence(prompt=model.prompt(run), family=model.family, stop=stop, law=law, seed=run),
        )
        for run in range(runs)
    ]
    engine.run()
    for seq in seqs:
        if seq.error is not None:
            raise seq.error
    valid = [model.is_valid(seq.output) for seq in seqs]
    return Simulation(float(np.mean(valid)), np.array([seq.stats.forwards["target"] for seq in seqs]))
