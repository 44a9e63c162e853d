"""Choose the device of each process, and move tensors to it."""

import sys

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows has none
    resource = None

from moco.errors import InputError
from moco.messages import counted

TYPES = ("cpu", "cuda", "xpu", "mps")
# several processes need NCCL, which supports CUDA only, or gloo, which supports CPUs
ONE_PROCESS = ("xpu", "mps")


def resolve_type(choice: str) -> str:
    """Return the device type for a value of `--device`.

    For "auto", return the type of PyTorch's accelerator, or cpu if there is none. Raises InputError
    if PyTorch does not find the device.
    """
    if choice == "auto":
        available = torch.accelerator.is_available()
        found = torch.accelerator.current_accelerator().type if available else "cpu"
        return found if found in TYPES else "cpu"
    if choice != "cpu" and not count(choice):
        absent = "PyTorch finds no such device on this machine"
        raise InputError(f"--device {choice}: {absent}; leave it out, or give --device cpu")
    return choice


def count(device_type: str) -> int:
    """Return the number of devices of a type that PyTorch can use on this machine; 0 for cpu."""
    # With an old driver, device_count() includes GPUs that PyTorch cannot use.
    if device_type == "cpu" or (device_type == "cuda" and not torch.cuda.is_available()):
        return 0
    return torch.get_device_module(device_type).device_count()


def for_process(choice: str, gpu: int | None, local_rank: int) -> torch.device:
    """Return the device of process `local_rank` of this node, given `--device` and `--gpu`."""
    device_type = resolve_type(choice)
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, local_rank % count(device_type) if gpu is None else gpu)


def describe(device: torch.device) -> str:
    """Return the readable name of a device, such as "NVIDIA H100" or "CPU, 2 threads"."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device.type).get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {counted(threads, 'thread')}" if device.type == "cpu" else device.type


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes; None on systems that do not report it.

    On CUDA and XPU, it is the device memory that PyTorch allocated. Otherwise, it is the resident
    memory of the process, without its loader processes.
    """
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device.type).max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts KiB


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move `x` from the CPU to `device`. On CUDA, return before the copy has finished."""
    # On XPU and MPS an unfinished copy may read the memory of `x` after Python has freed it.
    return x.to(device, non_blocking=device.type not in ONE_PROCESS)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of `device`: float64, or float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
