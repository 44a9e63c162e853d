"""The names of the architectures, and which are transformers. `networks` creates the networks.

This file does not import torch, so that options are read quickly.
"""

# torchvision's ResNets: resnet, resnext and wide_resnet
ARCHS = (
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "wide_resnet101_2",
    "wide_resnet50_2",
)
# this project's short names of timm's transformers
SHORT = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
}


def is_swin(arch: str) -> bool:
    """Return whether `arch` is a Swin, of the first version."""
    return SHORT.get(arch, arch).startswith("swin_")


def is_transformer(arch: str) -> bool:
    """Return whether the name of an architecture is that of a transformer, such as vit_small."""
    return any(part in arch for part in ("vit", "deit", "beit", "swin", "cait"))
