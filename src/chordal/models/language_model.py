"""A transformers backbone that runs a batch of `Forward` requests in one pass.

This is the only place where a model is called, where requests become padded tensors, and where
readings are reduced on the device and brought to the host in one transfer. Layer kinds that see less
than the request asks for (sliding windows, chunks) are kept to what they see, by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chordal.errors import InputError
from chordal.forward import Forward, Hidden, Ints, Reading, Visible
from chordal.models.architecture import Architecture, LayerKind
from chordal.models.cache import SlotCache
from chordal.models.family import Family
from chordal.models.kernels import speed_up
from chordal.models.reading import LogitsRead, read_logits
from chordal.models.runner import Request


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where one request stands in the batch: row, first query, the slots it writes, what it sees."""

    row: int
    at: int
    forward: Forward
    slots: Ints
    visible: Visible


class LanguageModel:
    """A causal-LM checkpoint of transformers and the cache of the sequences that run on it.

    Args:
        model: A transformers `...ForCausalLM` with a backbone at its `base_model_prefix` and an output
            embedding.
        family: What decoders need to know of it.
        tokenizer: transformers tokenizer, or None for models of tests.
        name: For messages and results.
        max_rows: Sequences at once, at most.
    """

    def __init__(
        self, model: Any, family: Family, tokenizer: Any = None, *, name: str = "model", max_rows: int = 64
    ):
        self.model = model.eval()
        speed_up(model)
        self.architecture = Architecture.of(model)
        self.family = family
        self.tokenizer = tokenizer
        self.name = name
        self.window = self.architecture.window
        self.vocab_size = self.architecture.vocab_size
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.max_rows = max_rows
        # Read-only requests need slots behind a full window; one tuple of them may be twice as wide.
        self.cache = SlotCache(self.architecture.num_layers, max_rows, 3 * self.window)
        self._used = [0] * max_rows  # one past the highest slot each row has written

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[Reading]:
        """Run requests together in one forward pass and give each its reading.

        Several requests of one row stand side by side on its query axis. Rows between the lowest and
        the highest take part whether they ask for something or not, as padding, so that the batch is
        one view of the cache.

        Raises:
            InputError: A request needs more slots than the cache can have.
        """
        first_row = min(row for row, _ in requests)
        width_B = [0] * (max(row for row, _ in requests) - first_row + 1)
        used = {row: self._used[row] for row, _ in requests}
        for row, forward in requests:
            if forward.slots is not None:
                used[row] = max(used[row], int(forward.slots.max()) + 1)
        placed = []
        for row, forward in requests:
            at = width_B[row - first_row]
            slots = forward.slots
            if slots is None:
                slots = np.arange(used[row] + at, used[row] + at + len(forward.tokens))
            placed.append(_Placed(row - first_row, at, forward, slots, _visible(forward, slots)))
            width_B[row - first_row] += len(forward.tokens)

        # One host array and one transfer for everything that is an integer.
        packed_5BT = np.zeros((5, len(width_B), max(width_B)), np.int64)
        packed_5BT[2] = -1
        packed_5BT[4] = 1  # padding looks at slot 0: attention over nothing would be NaN
        for p in placed:
            row_5T = packed_5BT[:, p.row, p.at : p.at + len(p.slots)]
            row_5T[0], row_5T[1], row_5T[2] = p.forward.tokens, p.forward.positions, p.slots
            row_5T[3], row_5T[4] = p.visible.start, p.visible.end
        span = max(int(packed_5BT[2].max()) + 1, int(packed_5BT[4].max()))
        if span > self.cache.max_slots:
            raise InputError(f"a sequence needs {span} cache slots; {self.name} has {self.cache.max_slots}.")
        self.cache.reserve(first_row + len(width_B), span)
        for row, end in used.items():
            self._used[row] = end
        packed_5BT[2][packed_5BT[2] < 0] = self.cache.trash
        tokens_BT, positions_BT, slots_BT, start_BT, end_BT = torch.from_numpy(packed_5BT).to(self.device)

        self.cache.aim(first_row, slots_BT, span)
        # One query a row that sees the whole span needs no mask. (Several would be taken for causal.)
        is_all_seen = packed_5BT.shape[2] == 1 and (packed_5BT[4] == span).all() and not packed_5BT[3].any()
        can_attend_B1TS: Tensor | None = None
        if not is_all_seen:
            at_S = torch.arange(span, device=self.device)
            can_attend_B1TS = ((at_S >= start_BT[..., None]) & (at_S < end_BT[..., None]))[:, None]
            for p in placed:
                if p.visible.own is not None:
                    query_Q = torch.arange(p.at, p.at + len(p.slots), device=self.device)
                    slot_Q = torch.from_numpy(p.slots).to(self.device)
                    own_QQ = torch.from_numpy(p.visible.own).to(self.device)
                    can_attend_B1TS[p.row, 0, query_Q[:, None], slot_Q] |= own_QQ

        output = self.architecture.backbone(
            input_ids=tokens_BT,
            position_ids=positions_BT,
            attention_mask=self._masks(can_attend_B1TS, positions_BT),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=any(isinstance(p.forward.read, Hidden) for p in placed),
        )
        return self._read(placed, output)

    def move_row(self, source: int, target: int) -> None:
        """Give the cache rows of one sequence another place."""
        self.cache.move_row(source, target)
        self._used[target] = self._used[source]

    def free_row(self, row: int, *, clear: bool = False) -> None:
        """Forget the sequence of a row; `clear` wipes values that may not be finite."""
        self._used[row] = 0
        if clear:
            self.cache.clear_row(row)

    def _masks(self, can_attend_B1TS: Tensor | None, positions_BT: Tensor) -> Any:
        """Give the mask in the form the backbone takes, one for each kind of layer if there are several."""
        reach = self.architecture.reach
        if all(size is None for size in reach.values()):
            return self._mask(can_attend_B1TS)
        masks = {kind: self._mask(can_attend_B1TS) for kind, size in reach.items() if size is None}
        positions_BS = self.cache.place(positions_BT)
        for kind, size in reach.items():
            if size is not None:
                near_B1TS = _is_near(kind, size, positions_BT[:, None, :, None], positions_BS[:, None, None])
                masks[kind] = self._mask(
                    near_B1TS if can_attend_B1TS is None else can_attend_B1TS & near_B1TS
                )
        return masks if self.architecture.has_mask_per_kind else next(iter(masks.values()))

    def _mask(self, can_attend_B1TS: Tensor | None) -> Tensor | None:
        if can_attend_B1TS is None or not self.architecture.adds_mask:
            return can_attend_B1TS
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(can_attend_B1TS, dtype=self.dtype).masked_fill(~can_attend_B1TS, lowest)

    def _read(self, placed: Sequence[_Placed], output: Any) -> list[Reading]:
        """Compute logits at the rows that are read, for the whole batch at once."""
        readings = [Reading() for _ in placed]
        reads: list[tuple[int, LogitsRead]] = []
        at_2N = []
        for index, p in enumerate(placed):
            read = p.forward.read
            if isinstance(read, Hidden):
                states = [output.hidden_states[layer][p.row, p.at + read.rows] for layer in read.layers]
                readings[index] = Reading(hidden=torch.stack(states, 1))
            elif read is not None:
                reads.append((index, read))
                at_2N.append(np.stack([np.full(len(read.rows), p.row), p.at + read.rows]))
        if reads:
            row_N, query_N = torch.from_numpy(np.concatenate(at_2N, 1)).to(self.device)
            logits_NV = self.architecture.logits(output.last_hidden_state[row_N, query_N]).float()
            if self.family.mask_id is not None:
                logits_NV[:, self.family.mask_id] = float("-inf")
            for (index, _), reading in zip(reads, read_logits(logits_NV, [r for _, r in reads]), strict=True):
                readings[index] = reading
        return readings


def _visible(forward: Forward, slots: Ints) -> Visible:
    return forward.sees if isinstance(forward.sees, Visible) else forward.sees.visible(slots)


def _is_near(kind: LayerKind, size: int, query: Tensor, key: Tensor) -> Tensor:
    """Say which keys are within the reach of a layer, by their positions in the text."""
    if kind == "chunked_attention":
        return query // size == key // size
    return (query - key).abs() < size
