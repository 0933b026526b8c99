"""Whether a checkpoint holds the weights its architecture needs, said by file and by stored name.

Names and shapes are known from the headers, so most misfits are found before anything is read. The
rest is transformers' to judge, which also knows how older checkpoints call a weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from chordal.errors import CheckpointError
from chordal.models.checkpoint import Checkpoint
from chordal.models.weights import WeightMap


@dataclass(frozen=True)
class Fit:
    """A checkpoint beside what its architecture needs.

    Attributes:
        checkpoint: The files.
        architecture: Name of the transformers class.
        shapes: Of each weight that the files should hold, by its name in them.
        optional: Those that may be left out, because they are another weight as well.
        ignored: Expressions for names that may be there and are not read.
    """

    checkpoint: Checkpoint
    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    optional: frozenset[str]
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, model_class: Any, config: Any, weight_map: WeightMap) -> Fit:
        """Ask an architecture, made without memory for its weights, what its files hold."""
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
        ours = revert_weight_conversion(model, model.state_dict())
        shapes = {}
        for name, parts in weight_map.to_published(ours).items():
            first, *more = (tuple(ours[part].shape) for part in parts)
            shapes[name] = (first[0] + sum(shape[0] for shape in more), *first[1:]) if more else first
        return cls(
            checkpoint=checkpoint,
            architecture=model_class.__name__,
            shapes=shapes,
            optional=frozenset(weight_map.to_published(model.all_tied_weights_keys)),
            ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        )

    def refuse_unread(self) -> None:
        """Refuse what names and shapes show to be wrong.

        Raises:
            CheckpointError: A weight has another shape, or a layer or an expert is missing or too many.
        """
        stored = self.checkpoint.weights
        for name, weight in stored.items():
            if name in self.shapes and weight.shape != self.shapes[name]:
                self._refuse_shape(name, weight.shape, self.shapes[name])
        # Of what is numbered, files that have some must have all, and no others. This is not transformers'
        # to say: it stacks experts in order, so that a wrong number would pass.
        kinds, stored_kinds = set(map(_kind, self.shapes)), set(map(_kind, stored))
        if lost := [name for name in self._lost() if _kind(name) in stored_kinds]:
            self._refuse_missing(lost)
        if extra := [name for name in self._extra() if _kind(name) in kinds]:
            self._refuse_extra(extra)

    def refuse_reported(self, report: Mapping[str, Any]) -> None:
        """Refuse what transformers found while it loaded, in the names of the files.

        Args:
            report: Its loading info.

        Raises:
            CheckpointError: It found something.
        """
        if mismatched := sorted(report["mismatched_keys"]):
            self._refuse_shape(*mismatched[0])
        if missing := sorted(report["missing_keys"]):
            needed = [name for name in missing if name in self.shapes and name not in self.optional]
            self._refuse_missing(needed or self._lost() or missing)
        if unexpected := sorted(report["unexpected_keys"]):
            stored = [name for name in unexpected if name in self.checkpoint.weights]
            self._refuse_extra(stored or self._extra() or unexpected)
        if errors := report["error_msgs"]:
            raise CheckpointError(f"{self.checkpoint.path}: {str(errors[0]).splitlines()[0]}")

    def _lost(self) -> list[str]:
        needed = (name for name in self.shapes if name not in self.optional)
        return [name for name in needed if name not in self.checkpoint.weights]

    def _extra(self) -> list[str]:
        names = (name for name in self.checkpoint.weights if name not in self.shapes)
        return [name for name in names if not any(re.search(ignored, name) for ignored in self.ignored)]

    def _refuse_shape(self, name: str, shape: Sequence[int], needed: Sequence[int]) -> None:
        raise CheckpointError(
            f"{self._file(name)}: {name} must have the shape {list(needed)} by config.json; it has "
            f"{list(shape)}."
        )

    def _refuse_missing(self, names: Sequence[str]) -> None:
        raise CheckpointError(
            f"{self._file(names[0])} lacks {_listed(names)}, which {self.architecture} needs by config.json."
        )

    def _refuse_extra(self, names: Sequence[str]) -> None:
        raise CheckpointError(
            f"{self._file(names[0])} holds {_listed(names)}, for which {self.architecture} has no place by "
            f"config.json."
        )

    def _file(self, name: str) -> Path:
        """Give the file of a weight, or where it would be."""
        weights = self.checkpoint.weights
        if name in weights:
            return weights[name].file
        files = {weight.file for weight in weights.values()}
        return files.pop() if len(files) == 1 else self.checkpoint.path


def _kind(name: str) -> str:
    """What a weight is, whatever its layer or expert."""
    return re.sub(r"\d+", "{n}", name)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
