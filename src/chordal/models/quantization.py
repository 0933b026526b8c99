"""Weights of linear layers in fewer bits, quantised by torchao while transformers reads them."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from chordal.errors import InputError

Quantization: TypeAlias = Literal["int8", "int8-dynamic", "int4"]

# Weights that share one scale in 4 bits, neighbours in a row. The smallest torchao has: it is the most
# exact, and layers whose width is no multiple of it would be left as they are.
_GROUP_SIZE = 32


def quantize(bits: Quantization | None, *, on_cpu: bool, dtype: str | None) -> dict[str, Any]:
    """Say to transformers' `from_pretrained` how to quantise.

    Args:
        bits: How far; None: not at all.
        on_cpu: Whether the model runs on the CPU.
        dtype: What it computes in, if that was asked for.

    Raises:
        InputError: No such quantisation, or it is not to be had here.
    """
    if bits is None:
        return {}
    if bits not in get_args(Quantization):
        *some, last = get_args(Quantization)
        raise InputError(f"quantization must be {', '.join(some)} or {last}; got {bits!r}.")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError:
        raise InputError(
            "quantization needs torchao; install it with: pip install 'chordal[quantization]'."
        ) from None
    from transformers import TorchAoConfig

    if bits == "int8":
        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    if bits == "int8-dynamic":
        return {"quantization_config": TorchAoConfig(_int8_dynamic(on_cpu=on_cpu))}
    if not on_cpu:
        if dtype not in (None, "bfloat16"):
            raise InputError(f"int4 on a GPU computes in bfloat16; got dtype {dtype}. Leave it out.")
        packed = Int4WeightOnlyConfig(group_size=_GROUP_SIZE, int4_packing_format="tile_packed_to_4d")
        return {"quantization_config": TorchAoConfig(packed)}
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError:
        raise InputError(
            "int4 on a CPU needs a torchao that has it, which this one has not; use int8, or a GPU."
        ) from None
    return {"quantization_config": TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=_GROUP_SIZE))}


def _int8_dynamic(*, on_cpu: bool) -> Any:
    """Multiply in 8 bits: the inputs of a layer are rounded too, each position by a scale of its own."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    try:
        from torchao.utils import should_reduce_range
    except ImportError:
        raise InputError(
            "int8-dynamic needs a torchao that knows which CPUs overflow, which this one does not; use int8."
        ) from None
    is_short = should_reduce_range(torch.device("cpu" if on_cpu else "cuda"))
    return Int8DynamicActivationInt8WeightConfig(reduce_range=is_short, set_inductor_config=False)
