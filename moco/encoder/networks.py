"""Create networks of torchvision and timm, and access their backbones and heads alike.

See resnets.py and timm_networks.py for the networks, pretrained.py for loading weights.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import models

from moco.encoder import timm_networks
from moco.encoder.resnets import ARCHS, resnet
from moco.encoder.timm_networks import head_name
from moco.errors import InputError, unknown


def check_arch(arch: str) -> None:
    """Raise InputError unless `arch` is one of `ARCHS` or an architecture of timm."""
    if arch not in ARCHS and not timm_networks.is_known(arch):
        raise unknown("arch", arch, [*ARCHS, *timm_networks.SHORT])


def create(
    arch: str,
    out: int,
    image_size: int = 224,
    drop_path: float = 0.0,
    stem: str | None = "imagenet",
    norm_eps: str | None = None,
) -> nn.Module:
    """Return a randomly initialized network.

    Args:
        arch: an architecture of torchvision's ResNets or of timm.
        out: number of output features of the last layer; 0 for a network without that layer.
        image_size: side of the square input images, in pixels.
        drop_path: rate of stochastic depth, in [0, 1). Only timm's networks have it.
        stem: the stem of a ResNet, see `resnets.resnet`.
        norm_eps: the epsilons of a Swin's layer norms, see `timm_networks.create`.

    Raises InputError if `arch` is unknown or does not support the image size, the stochastic depth
    or the stem.
    """
    if arch not in ARCHS:
        check_arch(arch)
        if stem == "cifar":
            raise InputError(f"--stem {stem}: {arch} is not a torchvision ResNet; leave --stem out")
        return timm_networks.create(arch, out, image_size, drop_path, norm_eps)
    if drop_path:
        raise InputError(f"{arch}: {timm_networks.NO_STOCHASTIC_DEPTH}")
    net = resnet(arch, max(out, 1), stem=stem)
    if not out:
        net.fc = nn.Identity()
    return net


def projector(widths: Sequence[int], *last: nn.Module, bias: bool = False) -> nn.Sequential:
    """Return a projection head, an MLP with BN and ReLU between its linear layers.

    Args:
        widths: numbers of features: input, hidden layers, output.
        last: layers to append.
        bias: whether the linear layers have a bias.
    """
    layers: list[nn.Module] = []
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        between = [nn.BatchNorm1d(width), nn.ReLU(inplace=True)] if i else []
        layers += [*between, nn.Linear(width, out, bias=bias)]
    return nn.Sequential(*layers, *last)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features [B, D] of `images` [B, 3, H, W], which are the head's input."""
    if getattr(net, "forward_head", None):  # a network of timm
        return timm_networks.features(net, images)
    x = images
    for name, child in net.named_children():
        if name == "fc":
            break
        x = child(x)
    return torch.flatten(x, 1)


def embedding(net: nn.Module, images: Tensor) -> Tensor:
    """Return the output [B, C] of the projection head, which is the last layer of `net`."""
    return head(net)(features(net, images))


def num_features(net: nn.Module) -> int:
    """Return D, the number of features of the backbone `net`."""
    if isinstance(net, models.ResNet):
        return net.bn1.num_features * 8 * net.layer1[0].expansion
    return getattr(net, "head_hidden_size", net.num_features)


def backbone_keys(net: nn.Module) -> list[str]:
    """Return the names of the backbone's tensors: all tensors except those of the head."""
    return [name for name in net.state_dict() if not name.startswith(f"{head_name(net)}.")]


def head(net: nn.Module) -> nn.Module:
    """Return the last layer, or the head that replaces it."""
    return net.get_submodule(head_name(net))


def classifier(net: nn.Module) -> nn.Linear:
    """Return the linear classifier, which is the last layer of the head."""
    layers = head(net)
    return layers[-1] if isinstance(layers, nn.Sequential) else layers


def set_head(net: nn.Module, head: nn.Module) -> None:
    """Replace the last layer of `net` by `head`."""
    parent, _, name = head_name(net).rpartition(".")
    setattr(net.get_submodule(parent), name, head)
