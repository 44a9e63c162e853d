"""Mixed precision, memory format and compilation: how the networks compute, not what."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from moco.encoder import networks
from moco.engine.log import say
from moco.errors import InputError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# flags in /proc/cpuinfo of CPUs with bf16 instructions: two of Intel and AMD, one of Arm
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def choose(args: Namespace) -> None:
    """Set `args.amp` to off, and print a line, if this CPU computes it slowly.

    Every CPU is slow in fp16: PyTorch's convolutions take minutes a step. CPUs without bf16
    instructions are slow in bf16.
    """
    if args.amp == "off" or torch.cuda.is_available() or (args.amp == "bf16" and _multiplies_bf16()):
        return
    say(f"--amp {args.amp} is slow on this CPU: this run computes in float32 (--amp off)")
    args.amp = "off"


def _multiplies_bf16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & _BF16)


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The autocast context that `--amp` asks for."""
    return torch.autocast(device.type, _DTYPES.get(amp), enabled=amp != "off")


def scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler; a plain pass-through unless `--amp fp16`."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def restore(scaler: torch.amp.GradScaler, saved: object, path: str) -> None:
    """Load what the checkpoint in `path` has of a gradient scaler; without --amp fp16 it has nothing. Raises InputError."""
    if saved == {} or not scaler.is_enabled():
        return
    try:
        before = scaler.state_dict()
        if saved.keys() != before.keys() or not all(isinstance(value, int | float) and value >= 0 for value in saved.values()):
            raise ValueError
        scaler.load_state_dict(saved)
    except (AttributeError, ValueError, RuntimeError):
        raise InputError(f"{path}: its gradient scaler is damaged; take an earlier one, or another --amp") from None


def place(model: nn.Module, device: torch.device, compile: bool, recompute: bool) -> nn.Module:
    """Move `model` to `device`, channels last on a GPU.

    With `recompute`, its networks' blocks keep nothing for the gradient but what they get, and run once more for it; with
    `compile`, compile its children (the networks) in place.
    """
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    if recompute:
        networks.recompute_blocks(model)
        if compile:
            networks.check_compiled_recomputation()
    if compile:
        for child in model.children():
            child.compile()
    return model


def layout(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in the memory format that `place` gave the model."""
    return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images
