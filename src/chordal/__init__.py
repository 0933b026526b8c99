"""Chordal: several tokens per forward pass, for autoregressive and diffusion language models.

import chordal
model = chordal.load("tiny-ar")
[result] = model.generate("reverse: Ana Ben Cleo", decoder="prompt_lookup")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first used: `import chordal` and the command line's help need no torch.
_PUBLIC = {
    "Chunk": "chordal.generation",
    "Decoder": "chordal.decoders.decoder",
    "Engine": "chordal.engine",
    "Forward": "chordal.forward",
    "Generation": "chordal.generation",
    "Job": "chordal.generation",
    "Law": "chordal.ops.sampling",
    "Model": "chordal.generation",
    "Reading": "chordal.forward",
    "Request": "chordal.generation",
    "Sequence": "chordal.sequence",
    "Verification": "chordal.verification.verify",
    "bundled_models": "chordal.models.checkpoint",
    "convert": "chordal.models.convert",
    "describe": "chordal.models.describe",
    "list_decoders": "chordal.registry",
    "load": "chordal.generation",
    "verify": "chordal.verification.verify",
}

if TYPE_CHECKING:
    from chordal.decoders.decoder import Decoder as Decoder
    from chordal.engine import Engine as Engine
    from chordal.forward import Forward as Forward
    from chordal.forward import Reading as Reading
    from chordal.generation import Chunk as Chunk
    from chordal.generation import Generation as Generation
    from chordal.generation import Job as Job
    from chordal.generation import Model as Model
    from chordal.generation import Request as Request
    from chordal.generation import load as load
    from chordal.models.checkpoint import bundled_models as bundled_models
    from chordal.models.convert import convert as convert
    from chordal.models.describe import describe as describe
    from chordal.ops.sampling import Law as Law
    from chordal.registry import list_decoders as list_decoders
    from chordal.sequence import Sequence as Sequence
    from chordal.verification.verify import Verification as Verification
    from chordal.verification.verify import verify as verify

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'chordal' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
