"""Check before a run starts that a network takes the run's images, and whether it has batch norm.

The network computes shapes only, on PyTorch's meta device, which takes a fraction of a second.
"""

import functools
from collections.abc import Iterable

import torch
from torch import nn

from moco.encoder import networks
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
    for size in sorted(set(sizes), reverse=True):
        try:
            shape = networks.features(net, torch.empty(2, 3, size, size, device="meta")).shape
        except NotImplementedError:  # an operation without a meta version
            return
        except Exception as error:  # each network raises errors of its own
            why = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{arch}: does not take images of {size} pixels ({why}); choose another -a, "
                "--image-size or --recipe"
            ) from None
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
