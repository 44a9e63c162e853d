"""The encoder of any checkpoint, by itself: what it maps images to, and what the file says of it."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from moco.augment.recipes import MEAN, STD
from moco.encoder import networks, published
from moco.engine import checkpoint
from moco.engine.log import say
from moco.errors import InputError


class Encoder(NamedTuple):
    net: nn.Module  # normalized images [B, 3, H, W] -> features [B, D], in eval mode
    arch: str
    image_size: int  # pixels that it was trained at, where the file says so, or that are asked for
    method: str  # of pre-training; "unknown" where the file does not say it, as those of other software
    epoch: int | None  # how many epochs it was trained for
    stem: str  # of a ResNet, see `networks.resnet`
    mean: list[float]  # [3], by which RGB values in [0, 1] are normalized
    std: list[float]
    resized: list[str]  # tensors that are of another shape in the file: tables of positions, interpolated


@contextlib.contextmanager
def naming_arch(path: str, own: str | None, arch: str) -> Iterator[None]:
    """Let an InputError about a checkpoint that does not fit `arch` say which -a to give.

    `own` is the architecture that the file names, or None.
    """
    try:
        yield
    except InputError as error:
        if own is None:
            tried = f"the file does not name its network, and {arch} was tried"
            raise InputError(f"{error}; {tried}: give another -a ARCH") from None
        if own != arch:
            raise InputError(f"{path}: is of {own}, not {arch}; give -a {own}") from None
        raise


def read(path: str, arch: str | None = None, image_size: int | None = None) -> Encoder:
    """The encoder of a checkpoint of this project, by any method, or of a published one that the evaluations read.

    What `arch` and `image_size` leave open the file decides, and where it does not, resnet50 and 224. Prints a line if the file
    does not say by which mean and std images are normalized. Raises InputError for a file that cannot be read, an unknown `arch`,
    or one that does not fit the file.
    """
    state = checkpoint.load(path)
    about = checkpoint.about(state)
    arch = arch or about.arch or "resnet50"
    image_size = image_size or about.image_size or 224
    net = networks.create(arch, 0, image_size)
    tensors = published.tensors_of(net, state)
    stem = published.stem(net, tensors)
    if stem != "imagenet":
        net = networks.create(arch, 0, image_size, stem=stem)
    with naming_arch(path, about.arch, arch):
        published.load_backbone(net, tensors, path)
    start = published.prefix(net, tensors)
    tables = {name: x for name, x in net.state_dict().items() if "pos" in name and start + name in tensors}
    resized = [name for name, x in tables.items() if tensors[start + name].shape != x.shape]
    if line := checkpoint.lacks_normalization(path, about):
        say(line)
    facts = (about.method, about.epoch, stem, about.mean or list(MEAN), about.std or list(STD))
    return Encoder(net.eval(), arch, image_size, *facts, resized)
