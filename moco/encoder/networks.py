"""Backbones, torchvision's ResNets and timm's networks, and what all of them can be asked."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import models

from moco.encoder import timm_networks
from moco.encoder.resnets import ARCHS, resnet
from moco.errors import InputError, unknown


def check_arch(arch: str) -> None:
    """Raise InputError for an architecture that is neither among `ARCHS` nor timm's."""
    if arch not in ARCHS and not timm_networks.is_known(arch):
        raise unknown("arch", arch, [*ARCHS, *timm_networks.SHORT])


def create(
    arch: str,
    out: int,
    image_size: int = 224,
    drop_path: float = 0.0,
    stem: str | None = "imagenet",
) -> nn.Module:
    """A randomly initialised network for images of `image_size` pixels whose last layer maps to `out` features; none for 0.

    `drop_path` is the rate of stochastic depth, for timm's networks. `stem` is for ResNets (see
    `resnet`). Raises InputError for an unknown `arch`, or for one that does not support the image
    size, the stochastic depth or the stem.
    """
    if arch not in ARCHS:
        check_arch(arch)
        if stem == "cifar":
            raise InputError(f"--stem {stem}: {arch} is not a torchvision ResNet; leave --stem out")
        return timm_networks.create(arch, out, image_size, drop_path)
    if drop_path:
        raise InputError(
            f"{arch}: has no stochastic depth; leave --online-drop-path and --target-drop-path at 0"
        )
    net = resnet(arch, max(out, 1), stem=stem)
    if not out:
        net.fc = nn.Identity()
    return net


def projector(widths: Sequence[int], *last: nn.Module, bias: bool = False) -> nn.Sequential:
    """A projection head: linear layers from each of `widths` to the next, BN and ReLU between, `last` behind them."""
    layers: list[nn.Module] = []
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        between = [nn.BatchNorm1d(width), nn.ReLU(inplace=True)] if i else []
        layers += [*between, nn.Linear(width, out, bias=bias)]
    return nn.Sequential(*layers, *last)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """What the backbone says of `images` [B, 3, H, W] before its head: globally pooled features [B, D]."""
    if hasattr(net, "forward_head"):  # timm's
        return timm_networks.features(net, images)
    x = images
    for name, child in net.named_children():
        if name == "fc":
            break
        x = child(x)
    return torch.flatten(x, 1)


def embedding(net: nn.Module, images: Tensor) -> Tensor:
    """Return the output of the projection head, which is the last layer of `net`: [B, C]."""
    return head(net)(features(net, images))


def num_features(net: nn.Module) -> int:
    """How long these features are, D."""
    if isinstance(net, models.ResNet):
        return net.bn1.num_features * 8 * net.layer1[0].expansion
    return getattr(net, "head_hidden_size", net.num_features)


def head_name(net: nn.Module) -> str:
    """What the network calls its last layer, or the head in its place."""
    return net.pretrained_cfg["classifier"] if hasattr(net, "pretrained_cfg") else "fc"


def backbone_keys(net: nn.Module) -> list[str]:
    """The names of the tensors that make up the backbone: everything but the head."""
    return [name for name in net.state_dict() if not name.startswith(f"{head_name(net)}.")]


def head(net: nn.Module) -> nn.Module:
    """The last layer, or what is in its place."""
    return net.get_submodule(head_name(net))


def classifier(net: nn.Module) -> nn.Linear:
    """The last layer of a network that classifies."""
    layers = head(net)
    return layers[-1] if isinstance(layers, nn.Sequential) else layers


def set_head(net: nn.Module, head: nn.Module) -> None:
    """Put `head` in the place of the last layer."""
    parent, _, name = head_name(net).rpartition(".")
    setattr(net.get_submodule(parent), name, head)
