"""Create networks of torchvision and timm, and access their backbones and heads alike.

See resnets.py, torchvision_networks.py and timm_networks.py for the networks, pretrained.py for
loading weights.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from moco.encoder import timm_networks, torchvision_networks
from moco.encoder.archs import ARCHS, SHORT
from moco.encoder.resnets import resnet
from moco.errors import InputError, nearest, short
from moco.sections import Network


class Arch(NamedTuple):
    """An architecture: the library that has the network, and its name there or a short name."""

    library: str  # torchvision or timm
    name: str

    def __str__(self) -> str:
        """Return the architecture as in checkpoints: the shortest name that is not ambiguous.

        It is the bare name of a ResNet of torchvision or of a network of timm. torchvision's other
        networks have the library before the name. So do timm's networks with a ResNet's name.
        """
        bare = (self.name in ARCHS) == (self.library == "torchvision")
        return self.name if bare else f"{self.library}:{self.name}"


def find(arch: str) -> Arch:
    """Return the architecture that `--arch` names.

    `timm:NAME` and `torchvision:NAME` select the library. A bare name is that of a ResNet of
    torchvision, else a short name or a network of timm, else another classifier of torchvision.

    Raises InputError if there is none. It names the nearest one.
    """
    library, colon, name = arch.rpartition(":")
    if colon and library not in ("timm", "torchvision"):
        raise InputError(
            f"unknown arch '{short(arch)}'; the word before the colon must be timm or torchvision"
        )
    if library == "timm" and name in SHORT:
        own = f"is this project's short name of {SHORT[name]}"
        raise InputError(f"unknown arch '{arch}': {name} {own}; give -a {name}, without timm:")
    if library != "timm" and name in ARCHS:
        return Arch("torchvision", name)
    if not library and name in SHORT:
        return Arch("timm", name)
    if library != "torchvision" and timm_networks.is_known(name):
        return Arch("timm", name)
    if library != "timm" and name in torchvision_networks.NAMES:
        return Arch("torchvision", name)
    raise _unknown(arch, library, name)


def _unknown(arch: str, library: str, name: str) -> InputError:
    """Return the error for an unknown architecture, with the nearest name if one is close."""
    known: Iterable[list[str]] = (
        [torchvision_networks.NAMES]
        if library == "torchvision"
        else [timm_networks.all_names()]
        if library
        else [
            [*ARCHS, *SHORT],
            [*torchvision_networks.NAMES, *timm_networks.all_names()],
        ]
    )
    near = next(filter(None, (nearest(name, names) for names in known)), None)
    prefix = f"{library}:" if library else ""
    hint = (
        f"the nearest is '{prefix}{near}'"
        if near
        else "timm.list_models() and torchvision.models.list_models() list the names"
    )
    return InputError(f"unknown arch '{short(arch)}'; {hint}")


def canonical(arch: str) -> str:
    """Return the name of an architecture in checkpoints. Raises InputError if it is unknown."""
    return str(find(arch))


def is_same(arch: str, other: str) -> bool:
    """Return whether two names mean the same architecture. An unknown name differs from others."""
    try:
        return arch == other or find(arch) == find(other)
    except InputError:
        return False


def create(
    arch: str,
    out: int,
    image_size: int = 224,
    drop_path: float = 0.0,
    stem: str | None = "imagenet",
    norm_eps: str | None = None,
    zero_init_residual: bool = False,
    any_size: bool = False,
) -> nn.Module:
    """Return a randomly initialized network.

    Args:
        arch: an architecture, see `find`.
        out: number of output features of the last layer; 0 for a network without that layer.
        image_size: side of the square input images, in pixels.
        drop_path: rate of stochastic depth, in [0, 1). ResNets do not have it.
        stem: the stem of a ResNet, see `resnets.resnet`.
        norm_eps: the epsilons of a Swin's layer norms, see `timm_networks.create`.
        zero_init_residual: whether the residual blocks of a ResNet start as identities.
        any_size: whether the network must also take images of other sizes and shapes, which most
            ViTs and Swins otherwise refuse.

    Raises InputError if `arch` is unknown or does not support the image size, other sizes, the
    stochastic depth or the stem.
    """
    library, name = found = find(arch)
    if stem == "cifar" and str(found) not in ARCHS:
        raise InputError(f"--stem {stem}: {arch} is not a torchvision ResNet; leave --stem out")
    if library == "timm":
        return timm_networks.create(name, out, image_size, drop_path, norm_eps, any_size)
    if any_size and torchvision_networks.create_arguments(name, image_size):
        raise InputError(f"torchvision:{name}: {timm_networks.ONE_SIZE}")
    if name not in ARCHS:
        return torchvision_networks.create(name, out, image_size, drop_path)
    if drop_path:
        raise InputError(f"{arch}: {timm_networks.NO_STOCHASTIC_DEPTH}")
    net = resnet(name, max(out, 1), stem=stem, zero_init_residual=zero_init_residual)
    if not out:
        net.fc = nn.Identity()
    return net


def create_encoder(
    network: Network,
    image_size: int,
    out: int,
    mlp: bool = False,
    zero_init_residual: bool = False,
) -> nn.Module:
    """Return a randomly initialized encoder with a head of its own, for pre-training.

    Args:
        network: the architecture.
        image_size: side of the square input images, in pixels.
        out: number of output features of the head.
        mlp: whether the head is MoCo v2's: Linear(D, D), ReLU, Linear(D, out). Otherwise it is
            one linear layer.
        zero_init_residual: whether the residual blocks of a ResNet start as identities.

    Raises InputError if the network does not support these settings.
    """
    net = create(
        network.arch,
        out,
        image_size,
        stem=network.stem,
        norm_eps=network.norm_eps,
        zero_init_residual=zero_init_residual,
    )
    width = num_features(net)
    # some libraries initialize a classifier with zeros, which a normalized feature cannot start at
    last = head(net) if isinstance(net, models.ResNet) else nn.Linear(width, out)
    mlp_layers = [nn.Linear(width, width), nn.ReLU()] if mlp else []
    set_head(net, nn.Sequential(*mlp_layers, last) if mlp else last)
    return net


def projector(
    widths: Sequence[int], *last: nn.Module, bias: bool = False, last_bias: bool | None = None
) -> nn.Sequential:
    """Return a projection head, an MLP with BN and ReLU between its linear layers.

    Args:
        widths: numbers of features: input, hidden layers, output.
        last: layers to append.
        bias: whether the linear layers have a bias.
        last_bias: whether the last linear layer has a bias; None: as the others.
    """
    biases = [bias] * (len(widths) - 2) + [bias if last_bias is None else last_bias]
    layers: list[nn.Module] = []
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        between = [nn.BatchNorm1d(width), nn.ReLU(inplace=True)] if i else []
        layers += [*between, nn.Linear(width, out, bias=biases[i])]
    return nn.Sequential(*layers, *last)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features [B, D] of `images` [B, 3, H, W], which are the head's input."""
    if getattr(net, "forward_head", None):  # a network of timm
        return timm_networks.features(net, images)
    x = torchvision_networks.without_head(net, head_name(net)).forward(images)
    return torch.flatten(x, 1)


def embedding(net: nn.Module, images: Tensor) -> Tensor:
    """Return the output [B, C] of the projection head, which is the last layer of `net`."""
    return head(net)(features(net, images))


def num_features(net: nn.Module) -> int:
    """Return D, the number of features of the backbone `net`."""
    if isinstance(net, models.ResNet):
        return net.bn1.num_features * 8 * net.layer1[0].expansion
    if last := torchvision_networks.last_layer(net):
        return last.width
    return getattr(net, "head_hidden_size", net.num_features)


def head_name(net: nn.Module) -> str:
    """Return the name of the last layer, or of the head that replaces it."""
    if isinstance(net, models.ResNet):
        return "fc"
    if last := torchvision_networks.last_layer(net):
        return last.name
    return timm_networks.head_name(net)


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


def stochastic_depth(net: nn.Module) -> list[nn.Module]:
    """Return the modules of `net` that drop residual branches at random in training."""
    return [*timm_networks.stochastic_depth(net), *torchvision_networks.stochastic_depth(net)]


def patch_projection(net: nn.Module) -> nn.Module | None:
    """Return the projection of patches of a ViT or Swin; None for other networks."""
    if isinstance(net, models.ResNet) or torchvision_networks.last_layer(net):
        return torchvision_networks.patch_projection(net)
    return timm_networks.patch_projection(net)


def freeze_patch_projection(net: nn.Module, arch: str) -> None:
    """Stop training the projection of patches (MoCo v3, section 4.1).

    Raises InputError if `net`, of the architecture `arch`, has none.
    """
    projection = patch_projection(net)
    if projection is None:
        raise InputError(f"--stop-grad-conv1: {arch} has no patch projection; leave it out")
    projection.requires_grad_(False)


def patch_size(net: nn.Module) -> int:
    """Return the side of the patches of a ViT or Swin, in pixels; 1 for other networks."""
    projection = patch_projection(net)
    # patches of other convolutions overlap, and take images of any size
    tiles = isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride
    return max(projection.stride) if tiles else 1


def has_feature_map(net: nn.Module) -> bool:
    """Return whether `feature_map` accepts `net`: torchvision's ResNets."""
    return isinstance(net, models.ResNet)


def feature_map(net: models.ResNet, images: Tensor) -> Tensor:
    """Return the features of a ResNet before pooling, [B, D, H / 32, W / 32]."""
    *layers, _pool, _head = net.children()
    for layer in layers:
        images = layer(images)
    return images


def adapt(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a pre-trained backbone's tensors with the names and shapes of `net`.

    Position embeddings are interpolated to the network's image size. For a network of timm, the
    tensors of other software are renamed. Tensors that cannot be adapted are returned unchanged.

    Raises InputError if `timm_networks.to_timm_names` does.
    """
    if isinstance(net, models.ResNet):
        return tensors
    if torchvision_networks.last_layer(net):
        return torchvision_networks.resize_positions(net, tensors)
    return timm_networks.to_timm_names(net, tensors)


def has_batch_norm(net: nn.Module) -> bool:
    """Return whether `net` has batch norm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
