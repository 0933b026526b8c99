"""Run a transformers backbone with faster kernels for the same formulas, without another model file.

Two things dominate a forward pass of a few tokens on a CPU: calling operations, of which RMS norms as
spelled out in Python are a quarter, and weight matrices that are repacked at every call; linear layers of
torchao that round their inputs to 8 bits do both in excess. All are replaced in place, only for inference,
and only where the result is shown to be the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chordal.models.memory import Trimmer

# Measured up to here; larger models are mostly bound by memory.
_PACK_BELOW_PARAMETERS = 500_000_000

# Multiplications from which the packed product is faster, measured on one core: below it the cost of
# the call outweighs what packing saves.
_PACKED_FROM = 500_000

# Both round inputs to 8 bits, with scales that differ by half a step.
_LIKE_TORCHAO = 0.03

# Rows of zeros are divided by this.
_TINY = 1e-30


def speed_up(model: torch.nn.Module) -> None:
    """Replace the norms and, on a CPU, the linear layers of a model in evaluation.

    Modules that are hooked, quantised otherwise, split over processes or kept elsewhere stay as they are.
    """
    for module in filter(_is_untouched, model.modules()):
        eps = getattr(module, "variance_epsilon", None)
        if eps is not None and type(module).__name__.endswith("RMSNorm") and _is_plain_norm(module, eps):
            module.forward = _fused_norm(module.weight, eps)
    on_cpu = next(model.parameters()).device.type == "cpu"
    size = sum(p.numel() for p in model.parameters())
    if on_cpu and size < _PACK_BELOW_PARAMETERS and torch.backends.mkldnn.is_available():
        num_users = Counter(id(module.weight) for module in model.modules() if hasattr(module, "weight"))
        trimmer = Trimmer()
        for module in filter(_is_untouched, model.modules()):
            if type(module) is torch.nn.Linear and module.weight.dtype in (torch.float32, torch.bfloat16):
                is_shared, num_bytes = num_users[id(module.weight)] > 1, module.weight.nbytes
                module.forward = _packed_linear(module, is_shared=is_shared)  # type: ignore[assignment]
                trimmer.count(num_bytes)
    if on_cpu:
        trimmer = Trimmer()
        rounding: list[Any] = list(filter(_rounds_inputs, model.modules()))
        for module in rounding:
            num_bytes = module.weight.qdata.nbytes
            if (forward := _int8_linear(module)) is not None:
                module.forward = forward
                trimmer.count(num_bytes)


def _is_untouched(module: torch.nn.Module) -> bool:
    """Whether a module computes with a weight that is nothing but a tensor, in the way its class says."""
    weight = getattr(module, "weight", None)
    is_tensor = type(weight) is torch.nn.Parameter and not weight.is_meta
    return is_tensor and "forward" not in vars(module)


def _rounds_inputs(module: torch.nn.Module) -> bool:
    """Whether a linear layer has 8-bit weights of torchao and rounds its inputs to 8 bits as it goes."""
    weight = getattr(module, "weight", None)
    is_int8 = type(module) is torch.nn.Linear and getattr(weight, "act_quant_kwargs", None) is not None
    is_plain = is_int8 and all(hasattr(weight, name) for name in ("qdata", "scale"))
    return is_plain and weight.device.type == "cpu" and "forward" not in vars(module)  # type: ignore[union-attr]


def _fused_norm(weight: Any, eps: float) -> Callable[[Tensor], Tensor]:
    shape = tuple(weight.shape)

    def forward(hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, shape, weight, eps)

    return forward


@torch.no_grad()
def _is_plain_norm(module: Any, eps: float) -> bool:
    """Whether a norm is x / rms(x) * weight and nothing else (Gemma's, say, adds 1 to the weight)."""
    weight = module.weight
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
    want, got = module(x), F.rms_norm(x, tuple(weight.shape), weight, eps)
    # Both round to the same type; in half precision the last bit may differ.
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return got.dtype == want.dtype and torch.allclose(got.float(), want.float(), rtol=tolerance)


@torch.no_grad()
def _packed_linear(module: torch.nn.Linear, *, is_shared: bool) -> Callable[[Tensor], Tensor]:
    """Keep the weights in oneDNN's blocked layout, as a compiled and frozen model would.

    The weights as they were are given up where the packed ones serve every call and nothing else needs
    them, so that memory does not hold both.
    """
    weight, bias = module.weight, module.bias
    num_outputs, size = weight.shape[0], weight.numel()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    product = torch.ops.mkldnn._linear_pointwise
    if size >= _PACKED_FROM and not is_shared:
        module.weight = weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        if x.numel() * num_outputs < _PACKED_FROM:  # never true of a weight that was given up
            return F.linear(x, weight, bias)
        y: Tensor = product(x.reshape(-1, x.shape[-1]), packed, bias, "none", [], "")
        return y.view(*x.shape[:-1], -1)

    return forward


@torch.no_grad()
def _int8_linear(module: Any) -> Callable[[Tensor], Tensor] | None:
    """Multiply in 8 bits with packed weights, in a third of the time of torchao's own code.

    That product has one scale for all of its input. So each row is first divided by its largest number; it
    then has a scale of its own, and does not depend on what is fed beside it. The weights as they were are
    given up.

    Returns:
        What replaces `forward`, None if this build of torch has no such product.
    """
    weight, bias = module.weight, module.bias
    product = torch.ops.onednn.qlinear_pointwise
    scale_N, middle = weight.scale.flatten().float(), torch.tensor(128.5)
    zero_N = torch.zeros(len(scale_N), dtype=torch.int64)

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        largest = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True).clamp_(min=_TINY)
        # Whole numbers from 1 to 255 around 128; what is converted is cut, so a half more rounds.
        bytes_ = torch.addcmul(middle, rows, 127 / largest).to(torch.uint8)
        y: Tensor = product(
            bytes_, 1 / 127, 128, packed, scale_N, zero_N, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = (y * largest).view(*x.shape[:-1], -1).to(x.dtype)
        return y if bias is None else y + bias

    x = torch.randn(1, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight.qdata, None)
        got, want = forward(x), module(x)
    except (RuntimeError, AttributeError):
        return None
    if not (got - want).norm() <= _LIKE_TORCHAO * want.norm():
        return None
    module.weight = torch.nn.Parameter(scale_N.new_empty(0), requires_grad=False)
    return forward
