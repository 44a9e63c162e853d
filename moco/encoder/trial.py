"""Check before a run starts that a network takes the run's images, and whether it has batch norm.

The network computes shapes only, on PyTorch's meta device, which takes a fraction of a second.
"""

import functools
from collections.abc import Iterable

import torch
from torch import nn

from moco.encoder import networks
from moco.encoder.archs import ARCHS
from moco.errors import InputError
from moco.sections import Network


def check(net: nn.Module, arch: str, sizes: Iterable[int]) -> None:
    """Raise InputError unless `net` computes pooled features of images of all `sizes`.

    Args:
        net: a network of `networks.create`. It is moved to the meta device, so do not use it again.
        arch: its architecture, for the message.
        sizes: the sides of square images, in pixels.
    """
    net.to("meta").train()
    largest, *others = sorted(set(sizes), reverse=True)
    for size in (largest, *others):
        try:
            shape = networks.features(net, torch.empty(2, 3, size, size, device="meta")).shape
        except NotImplementedError:  # an operation without a meta version
            return
        except Exception as error:  # each network raises errors of its own
            why = " ".join(str(error).split()) or type(error).__name__
            what = f"{arch}: does not take images of {size} pixels ({why})"
            if size != largest:
                both = f"the recipe has such views next to those of {largest} pixels"
                raise InputError(f"{what}; {both}; choose another -a or recipe") from None
            raise InputError(f"{what}; choose another -a or --image-size") from None
        if tuple(shape) != (2, networks.num_features(net)):
            raise InputError(
                f"{arch}: its last layer gets features of the shape {list(shape[1:])} from each "
                f"image of {size} pixels, not {networks.num_features(net)} pooled ones; choose "
                "another -a"
            )


@functools.lru_cache(maxsize=4)
def has_batch_norm(network: Network, image_size: int) -> bool:
    """Return whether a network has batch norm. Raises InputError if it cannot be created."""
    net = networks.create(network.arch, 0, image_size, stem=network.stem, norm_eps=network.norm_eps)
    return networks.has_batch_norm(net)


@functools.lru_cache(maxsize=4)
def has_stochastic_depth(network: Network, image_size: int) -> bool:
    """Return whether a network can have stochastic depth.

    Raises InputError if it cannot be created.
    """
    norm_eps = network.norm_eps
    if networks.canonical(network.arch) in ARCHS:
        return False
    networks.create(network.arch, 0, image_size, stem=network.stem, norm_eps=norm_eps)
    try:
        # without a rate, timm's networks have no modules for it
        networks.create(network.arch, 0, image_size, 0.1, network.stem, norm_eps)
    except InputError:
        return False
    return True
