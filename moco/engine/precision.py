"""Set up mixed precision, memory format, recomputation and compilation of the networks."""

from pathlib import Path

import torch
from torch import nn

from moco import devices
from moco.config import AnyConfig, replaced
from moco.encoder.recompute import check_compiled_recomputation, recompute_blocks
from moco.errors import InputError, short
from moco.messages import print_rank0

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# flags in /proc/cpuinfo of CPUs with bf16 instructions: Intel and AMD have the first two, Arm has
# the third
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def disable_slow_amp(config: AnyConfig) -> AnyConfig:
    """Return `config`, with `--amp off` if mixed precision is slow on the CPU of the run.

    Prints a line if it turns mixed precision off. Every CPU is slow in fp16: a step takes minutes
    with PyTorch's convolutions. CPUs without bf16 instructions are slow in bf16. Raises InputError
    if the device is not found.
    """
    on_cpu = devices.resolve_type(config.launch.device) == "cpu"
    if (
        config.compute.amp == "off"
        or not on_cpu
        or (config.compute.amp == "bf16" and _multiplies_bf16())
    ):
        return config
    print_rank0(
        f"--amp {config.compute.amp} is slow on this CPU: this run computes in float32 (--amp off)"
    )
    return replaced(config, amp="off")


def _multiplies_bf16() -> bool:
    """Return whether the CPU has bf16 instructions."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & _BF16)


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Return an autocast context for `device` with the dtype of `--amp`; disabled if it is off."""
    return torch.autocast(device.type, _DTYPES.get(amp), enabled=amp != "off")


def scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Return a gradient scaler for `device`. It is enabled only with `--amp fp16`.

    Raises InputError if PyTorch cannot scale gradients on this device.
    """
    if amp == "fp16" and device.type not in ("cpu", "cuda"):
        _check_scales(device)
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def _check_scales(device: torch.device) -> None:
    """Raise InputError if a gradient scaler fails on `device`, in a trial with one weight."""
    trial = torch.amp.GradScaler(device.type)
    weight = torch.zeros(1, device=device, requires_grad=True)
    try:
        trial.scale(weight.sum()).backward()
        trial.step(torch.optim.SGD([weight], lr=0.0))
        trial.update()
    except (RuntimeError, TypeError) as error:
        why = short(" ".join(str(error).split()))
        lacks = f"--amp fp16: PyTorch cannot scale gradients on {device.type}"
        raise InputError(f"{lacks}; give --amp bf16 or off ({why})") from None


def restore(scaler: torch.amp.GradScaler, saved: object, path: str) -> None:
    """Load the state of a gradient scaler from a checkpoint.

    Does nothing if this run or the run of the checkpoint does not use `--amp fp16`.

    Args:
        scaler: the gradient scaler of this run.
        saved: its state in the checkpoint, {} without `--amp fp16`.
        path: the file of the checkpoint, for messages.

    Raises InputError if the state is damaged.
    """
    if saved == {} or not scaler.is_enabled():
        return
    try:
        before = scaler.state_dict()
        if saved.keys() != before.keys() or not all(
            isinstance(value, int | float) and value >= 0 for value in saved.values()
        ):
            raise ValueError
        scaler.load_state_dict(saved)
    except (AttributeError, ValueError, RuntimeError):
        raise InputError(
            f"{path}: its gradient scaler is damaged; take an earlier checkpoint, or another --amp"
        ) from None


def prepare_model(
    model: nn.Module, device: torch.device, compile: bool, recompute: bool
) -> nn.Module:
    """Move `model` to `device`, and set up its memory format, recomputation and compilation.

    The model is changed in place and returned. On CUDA and XPU, its memory format is channels last.

    Args:
        model: a module whose children are networks.
        device: the device that trains.
        compile: whether to compile the children.
        recompute: whether to recompute the blocks of the networks in the backward pass, to save
            memory.

    Raises InputError if PyTorch cannot compile for the device, or with recomputation.
    """
    model.to(device)
    if device.type in _CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if recompute:
        recompute_blocks(model)
        if compile:
            check_compiled_recomputation()
    if compile:
        _check_compiles(device)
        for child in model.children():
            child.compile()
    return model


# device types on which convolutions are faster if images are channels last
_CHANNELS_LAST = ("cuda", "xpu")


def _check_compiles(device: torch.device) -> None:
    """Raise InputError if torch.compile fails on `device`, in a trial with one sum.

    There is no trial on the CPU and CUDA.
    """
    if device.type in ("cpu", "cuda"):
        return
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # each backend raises errors of its own
        why = short(" ".join(str(error).split()))
        cannot = f"--compile: PyTorch cannot compile for {device.type} on this machine"
        raise InputError(f"{cannot}; leave it out ({why})") from None


def prepare_images(images: torch.Tensor) -> torch.Tensor:
    """Return `images` [B, 3, H, W] in the memory format of the models of `prepare_model`."""
    if images.device.type not in _CHANNELS_LAST:
        return images
    return images.contiguous(memory_format=torch.channels_last)
