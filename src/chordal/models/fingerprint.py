"""Which weights a model has, told from a few numbers of each."""

from __future__ import annotations

import hashlib

import torch

_SAMPLES = 16


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """Give 16 hexadecimal digits that are the same for the same weights, on any device and in any type.

    Of each weight its name, its shape and a few numbers spread over it are hashed, as bfloat16: what was
    trained further differs somewhere, and reading all of it would take as long as loading. Weights in
    fewer bits are other weights.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        # What torchao quantised keeps its whole numbers apart.
        values = getattr(weight, "qdata", weight)
        if type(values) in (torch.Tensor, torch.nn.Parameter) and not values.is_meta and values.numel():
            flat = values.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
            digest.update(str(some.to(torch.bfloat16).tolist()).encode())
    return digest.hexdigest()[:16]
