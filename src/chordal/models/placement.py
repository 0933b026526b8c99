"""Where a model goes: one device, layers spread over several, or every layer split over processes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chordal.errors import InputError

# How accelerate spreads layers by itself.
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")

# What a device map calls layers whose weights are read from disk each time they run.
_DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """Where a model goes.

    Attributes:
        arguments: What transformers' `from_pretrained` needs to know of it.
        is_on_cpu: Whether all of it runs on the CPU.
        may_offload: Whether some of its weights may be left on disk.
        num_processes: Processes it is split over.
    """

    arguments: Mapping[str, Any]
    is_on_cpu: bool
    may_offload: bool = False
    num_processes: int = 1


def place(
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    tensor_parallel: bool = False,
) -> Placement:
    """Decide where a model goes; of the three at most one may be given.

    Args:
        device: As torch names it; None takes "cuda" if there is one, else "cpu".
        device_map: "auto" and the like, or devices by name of a part of the model.
        tensor_parallel: Whether to split it over the processes that torchrun started.

    Raises:
        InputError: More than one is given, or a device is not usable.
    """
    import torch

    if sum([device is not None, device_map is not None, tensor_parallel]) > 1:
        raise InputError("device, device_map and tensor_parallel exclude each other; give one.")
    if tensor_parallel:
        return _split(torch)
    if device_map is None:
        one = _device(torch, device)
        return Placement({"device_map": str(one)}, is_on_cpu=one.type == "cpu")
    if device_map in _SPREADS:
        arguments = {"device_map": device_map}
        return Placement(arguments, is_on_cpu=not torch.accelerator.is_available(), may_offload=True)
    if isinstance(device_map, str):
        raise InputError(
            f"device_map must be {', '.join(_SPREADS)} or a device by name of a part; got {device_map!r}."
        )
    devices = {_device(torch, name).type for name in device_map.values() if name != _DISK}
    return Placement({"device_map": dict(device_map)}, is_on_cpu=devices <= {"cpu"}, may_offload=True)


def _split(torch: Any) -> Placement:
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes < 2:
        raise InputError(
            "tensor parallelism needs several processes; start them with torchrun --nproc-per-node N."
        )
    from transformers.distributed.configuration_utils import DistributedConfig

    atexit.register(_leave, torch.distributed)
    return Placement(
        {"distributed_config": DistributedConfig(tp_plan="auto")},
        is_on_cpu=not torch.accelerator.is_available(),
        num_processes=num_processes,
    )


def _leave(distributed: Any) -> None:
    """Leave the group of processes; ending inside it is an error to some of them."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _device(torch: Any, name: str | int | None) -> Any:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return device
