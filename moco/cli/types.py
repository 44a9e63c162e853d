"""Types for the annotations of scripts, which import torch only when they train."""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moco.builder import base
    from moco.data import images

Device: TypeAlias = "torch.device"
Images: TypeAlias = "images.Images"
Method: TypeAlias = "base.Method"
Module: TypeAlias = "nn.Module"
