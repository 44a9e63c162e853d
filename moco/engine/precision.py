"""Mixed precision, memory format and compilation: how the networks compute, not what."""

import torch
from torch import nn

from moco.encoder import networks
from moco.errors import InputError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        for child in model.children():
            child.compile()
    return model


def layout(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in the memory format that `place` gave the model."""
    return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images
