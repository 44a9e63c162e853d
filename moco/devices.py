"""Choose the device that a process computes on, and move tensors to it."""

import torch
from torch import Tensor

from moco.errors import InputError

TYPES = ("cpu", "cuda", "xpu", "mps")
ONE_PROCESS = ("xpu", "mps")  # several processes need NCCL, which is for CUDA, or gloo, for CPUs


def chosen(choice: str) -> str:
    """Return the device type that `--device` chooses; for auto, PyTorch's accelerator, else cpu.

    Raises InputError if PyTorch finds no such device.
    """
    if choice == "auto":
        available = torch.accelerator.is_available()
        found = torch.accelerator.current_accelerator().type if available else "cpu"
        return found if found in TYPES else "cpu"
    if choice != "cpu" and not count(choice):
        what = "PyTorch finds no such device on this machine"
        raise InputError(f"--device {choice}: {what}; leave it out, or give --device cpu")
    return choice


def count(kind: str) -> int:
    """Return how many devices of a type PyTorch can use on this machine; 0 for cpu."""
    # With an old driver, device_count() counts GPUs that PyTorch cannot use.
    if kind == "cpu" or (kind == "cuda" and not torch.cuda.is_available()):
        return 0
    return torch.get_device_module(kind).device_count()


def of_process(choice: str, gpu: int | None, local_rank: int) -> torch.device:
    """Return the device of process `local_rank` of this node, given `--device` and `--gpu`."""
    kind = chosen(choice)
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, local_rank % count(kind) if gpu is None else gpu)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move `x` from the CPU to `device`. On CUDA, queue the copy and do not wait for it."""
    # On XPU and MPS a queued copy may read the memory of `x` after Python has freed it.
    return x.to(device, non_blocking=device.type not in ONE_PROCESS)


def widest(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point type of `device`: float64, or float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
