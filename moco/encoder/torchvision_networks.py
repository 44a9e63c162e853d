"""Create torchvision's classifiers other than its ResNets.

networks.py calls these functions. The features of a network are the input of its last layer.
"""

import copy
from typing import NamedTuple

from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import StochasticDepth

from moco.encoder.timm_networks import (
    NO_LINEAR_LAYER,
    NO_STOCHASTIC_DEPTH,
    cannot_create,
    remove_dropout,
)
from moco.errors import InputError

NAMES = sorted(models.list_models(module=models))  # all classifiers, ResNets included

# the option for the side of the input images, of networks with a fixed input size
_SIZED = {"vit": "image_size", "maxvit": "input_size"}
_AUXILIARY = "has auxiliary outputs, which no method here trains"
# why some networks are refused, by the beginning of their names
_REFUSED = {
    "googlenet": _AUXILIARY,
    "inception_v3": _AUXILIARY,
    "mnasnet": "reads only files with a version number, which checkpoints do not have",
}


class LastLayer(NamedTuple):
    """The last layer of a network, whose input are the features."""

    name: str  # its path in the network, such as "classifier.3"
    width: int  # D, the number of features


def create_arguments(name: str, image_size: int) -> dict[str, object]:
    """Return the arguments that torchvision's function `name` needs for the image size."""
    option = _SIZED.get(name.split("_")[0])
    size = (image_size, image_size) if option == "input_size" else image_size
    return {option: size} if option else {}


def create(name: str, out: int, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """Return a randomly initialized classifier of torchvision, without dropout.

    Args:
        name: one of `NAMES`.
        out: number of output features of the last layer; 0 for a network without that layer.
        image_size: side of the square input images, in pixels.
        drop_path: rate of stochastic depth of the last block, in [0, 1).

    Raises InputError if the network does not support the image size or stochastic depth, if its
    last layer is not one linear layer, or if it is one of `_REFUSED`.
    """
    for start, why in _REFUSED.items():
        if name.startswith(start):
            raise InputError(f"torchvision:{name}: {why}; choose another -a")
    try:
        net = models.get_model(
            name, weights=None, num_classes=max(out, 1), **create_arguments(name, image_size)
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise cannot_create(f"torchvision:{name}", image_size, error) from None
    last, layer = list(net.named_modules())[-1]
    if not isinstance(layer, nn.Linear):
        raise InputError(f"torchvision:{name}: {NO_LINEAR_LAYER}")
    net.last_layer = LastLayer(last, layer.in_features)
    if not out:
        net.set_submodule(last, nn.Identity())
    remove_dropout(net)
    if not _set_stochastic_depth(net, drop_path):
        raise InputError(f"torchvision:{name}: {NO_STOCHASTIC_DEPTH}")
    return net


def last_layer(net: nn.Module) -> LastLayer | None:
    """Return the last layer of a network of `create`; None for other networks."""
    return getattr(net, "last_layer", None)


def _set_stochastic_depth(net: nn.Module, rate: float) -> bool:
    """Scale the rates of stochastic depth, so that the largest is `rate`.

    Returns whether the network has stochastic depth, or `rate` is 0.
    """
    modules = stochastic_depth(net)
    largest = max((module.p for module in modules), default=0.0)
    for module in modules:
        module.p = module.p * rate / largest if largest else 0.0
    return rate == 0 or largest > 0


def stochastic_depth(net: nn.Module) -> list[nn.Module]:
    """Return the modules of `net` that drop residual branches at random in training."""
    return [module for module in net.modules() if isinstance(module, StochasticDepth)]


def without_head(net: nn.Module, name: str) -> nn.Module:
    """Return a copy of `net` without its head. All other modules and all tensors are shared.

    Args:
        net: a network whose `forward` ends with the head.
        name: the path of the head in the network.
    """
    first, _, rest = name.partition(".")
    shallow = copy.copy(net)
    shallow._modules = dict(net._modules)
    child = net.get_submodule(first)
    shallow._modules[first] = without_head(child, rest) if rest else nn.Identity()
    return shallow


def resize_positions(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ViT with position embeddings for the image size of `net`.

    The embeddings are interpolated if they are for another size. Returns `tensors` unchanged if
    `net` is no ViT of torchvision, or if they cannot be interpolated.
    """
    table = tensors.get("encoder.pos_embedding")
    if table is None or not isinstance(net, models.VisionTransformer) or table.dim() != 3:
        return tensors
    if table.shape[1] == net.seq_length:
        return tensors
    try:
        return interpolate_embeddings(net.image_size, net.patch_size, {**tensors})
    except ValueError:  # no square grid; `load_backbone` reports the shapes
        return tensors


def patch_projection(net: nn.Module) -> nn.Module | None:
    """Return the projection of patches of a ViT or Swin of torchvision; None for other networks."""
    if isinstance(net, models.VisionTransformer):
        return net.conv_proj
    return net.features[0][0] if isinstance(net, models.SwinTransformer) else None
