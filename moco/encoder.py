"""Backbones: any torchvision ResNet, with a projection head in place of its classifier."""

import torch
from torch import Tensor, nn
from torchvision import models

from moco.errors import InputError, unknown

ARCHS = sorted(name for name in models.list_models(module=models) if "resn" in name)  # resnet, resnext, wide_resnet


def check_arch(arch: str) -> None:
    """Raise InputError for an architecture that is not among `ARCHS`."""
    if arch not in ARCHS:
        raise unknown("arch", arch, ARCHS)


def resnet(arch: str, out: int, mlp: bool = False) -> nn.Module:
    """A randomly initialised torchvision ResNet whose `fc` maps to `out` features.

    With `mlp`, `fc` is MoCo v2's head: Linear(D, D), ReLU, Linear(D, out). Raises InputError for an unknown `arch`.
    """
    check_arch(arch)
    net = models.get_model(arch, weights=None, num_classes=out)
    if mlp:
        width = net.fc.in_features
        net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), net.fc)
    return net


def features(net: nn.Module, images: Tensor) -> Tensor:
    """What the backbone says of `images` [B, 3, H, W] before its head: globally pooled features [B, D]."""
    x = images
    for name, child in net.named_children():
        if name == "fc":
            break
        x = child(x)
    return torch.flatten(x, 1)


def backbone_keys(net: nn.Module) -> list[str]:
    """The names of the tensors that make up the backbone: everything but the head."""
    return [name for name in net.state_dict() if not name.startswith("fc.")]


def load_backbone(net: nn.Module, tensors: dict[str, Tensor], source: str) -> int:
    """Load a published encoder into `net`, whatever prefix its names carry; returns how many tensors matched.

    The prefix is the one (of `PREFIXES`) that matches most names. Raises InputError where nothing matches, where a
    backbone tensor is missing or one too many, or where a shape differs.
    """
    state = net.state_dict()
    wanted = {name: state[name] for name in backbone_keys(net)}
    prefix = max(PREFIXES, key=lambda p: sum(p + name in tensors for name in wanted))
    found = {name: tensors[prefix + name] for name in wanted if prefix + name in tensors}
    # files older than PyTorch 0.4 lack BatchNorm's step counter, which nothing here reads
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    if not found:
        raise InputError(f"{source}: no tensor matches the encoder; its names look like '{next(iter(tensors), '')}'")
    if missing:
        raise InputError(f"{source}: does not fit the encoder: {len(missing)} tensors missing: {_some(missing)}")
    wrong = [
        f"{name} {tuple(t.shape)} for {tuple(wanted[name].shape)}" for name, t in found.items() if t.shape != wanted[name].shape
    ]
    # a deeper network of the same widths holds every tensor that is wanted, and more blocks
    parts = {name.split(".")[0] for name in wanted}
    inner = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    extra = [name for name in inner if name.split(".")[0] in parts and name not in wanted]
    if extra:
        raise InputError(f"{source}: does not fit the encoder: {len(extra)} tensors too many: {_some(extra)}")
    if wrong:
        raise InputError(f"{source}: does not fit the encoder: {len(wrong)} shapes differ: {_some(wrong)}")
    net.load_state_dict(found, strict=False)
    return len(found)


PREFIXES = (
    "module.encoder_q.",  # MoCo, SynCo, AdCo
    "encoder_q.",
    "module.base_encoder.",  # SogCLR, MoCo v3
    "base_encoder.",
    "module.encoder.",
    "encoder.",  # MoBY, SynCo-v2 (below `model`)
    "module.backbone.",
    "backbone.",
    "module.",
    "",  # a bare torchvision state dict
)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
