"""What the plain models of these tests are made of, and how they are compared with ours.

Plain torch in float64, for one sequence; nothing of transformers or Chordal computes anything here. The
architectures themselves are in `reference_*.py`. T: tokens, H: heads, K: key and value heads, E: size of
a head.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch.nn import functional as F


def read_published(folder):
    """Read config.json and all weights, under the names they have in the files."""
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return config, {name: weight.double() for name, weight in weights.items()}


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_THE, theta, size=None, positions=None):
    """Turn pairs (e, e + size/2) of the first `size` numbers of a head by position times theta^(-2e/size)."""
    size = size or x_THE.shape[-1]
    positions_T = torch.as_tensor(range(len(x_THE)) if positions is None else positions)
    angle_TE = positions_T[:, None] * theta ** (-torch.arange(0, size, 2).double() / size)
    turn_T1E = torch.polar(torch.ones_like(angle_TE), angle_TE)[:, None]
    turned_THE = torch.complex(x_THE[..., : size // 2], x_THE[..., size // 2 : size]) * turn_T1E
    return torch.cat([turned_THE.real, turned_THE.imag, x_THE[..., size:]], -1)


def attend(q_THE, k_TKE, v_TKE, can_attend_TT):
    """Softmax attention, neighbouring query heads sharing a key head, heads side by side in the end."""
    groups = q_THE.shape[1] // k_TKE.shape[1]
    k_THE, v_THE = (x.repeat_interleave(groups, 1) for x in (k_TKE, v_TKE))
    scores_HTT = torch.einsum("the,she->hts", q_THE, k_THE) / q_THE.shape[-1] ** 0.5
    probs_HTT = scores_HTT.masked_fill(~can_attend_TT, -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", probs_HTT, v_THE).flatten(1)


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def full(num):
    """Everything sees everything."""
    return torch.ones(num, num, dtype=torch.bool)


def causal(num):
    """A row sees itself and those before it."""
    return full(num).tril()


def blocks(num, length):
    """A row sees its own block, aligned to 0, and those before it."""
    block = torch.arange(num) // length
    return block[None] <= block[:, None]


def error(got_TV, want_TV, mask_id):
    """Largest difference of a logit, relative to the largest logit; the mask token, never given, left out."""
    assert got_TV.shape == want_TV.shape
    assert (got_TV[:, mask_id] == -torch.inf).all()
    rest = torch.arange(got_TV.shape[1]) != mask_id
    want_TR = want_TV[:, rest].double()
    return ((got_TV[:, rest].double() - want_TR).abs().max() / want_TR.abs().max()).item()
