"""Load an encoder from a checkpoint of any origin."""

import contextlib
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from moco.config import MEAN, STD
from moco.distributed import print_rank0
from moco.encoder import metadata, networks, timm_networks, weights
from moco.encoder.networks import backbone_keys, classifier, head_name, set_head
from moco.errors import InputError, short


class Encoder(NamedTuple):
    net: nn.Module  # normalized images [B, 3, H, W] -> features [B, D], in eval mode
    arch: str
    image_size: int  # pixels that it was trained at, where the file says so, or that are asked for
    method: (
        str  # of pre-training; "unknown" where the file does not say it, as those of other software
    )
    epoch: int | None  # how many epochs it was trained for
    stem: str  # of a ResNet, see `networks.resnet`
    mean: list[float]  # [3], by which RGB values in [0, 1] are normalized
    std: list[float]
    resized: list[
        str
    ]  # tensors that are of another shape in the file: tables of positions, interpolated


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
    state = weights.read(path)
    facts = metadata.read_metadata(state)
    arch = arch or facts.arch or "resnet50"
    image_size = image_size or facts.image_size or 224
    net = networks.create(arch, 0, image_size)
    tensors = tensors_of(net, state)
    stem = stem_of(net, tensors)
    if stem != "imagenet":
        net = networks.create(arch, 0, image_size, stem=stem)
    with naming_arch(path, facts.arch, arch):
        load_backbone(net, tensors, path)
    start = prefix(net, tensors)
    tables = {
        name: x for name, x in net.state_dict().items() if "pos" in name and start + name in tensors
    }
    resized = [name for name, x in tables.items() if tensors[start + name].shape != x.shape]
    if line := metadata.lacks_normalization(path, facts):
        print_rank0(line)
    mean, std = facts.mean or list(MEAN), facts.std or list(STD)
    return Encoder(
        net.eval(), arch, image_size, facts.method, facts.epoch, stem, mean, std, resized
    )


def load_backbone(net: nn.Module, tensors: dict[str, Tensor], source: str) -> int:
    """Load a published encoder into `net`, whatever prefix its names carry; returns how many tensors matched.

    `prefix` finds the prefix. A transformer's tensors are renamed to timm's names, and position
    tables are converted to the network's image size. Raises InputError if nothing matches, if a
    backbone tensor is missing or superfluous, or if a shape differs.
    """
    state = net.state_dict()
    wanted = {name: state[name] for name in backbone_keys(net)}
    start = prefix(net, tensors)
    inner = {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
    try:
        mine = timm_networks.to_timm_names(net, inner)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    found = {name: mine[name] for name in wanted if name in mine}
    # files older than PyTorch 0.4 lack BatchNorm's step counter, which nothing here reads
    missing = [
        name for name in wanted if name not in found and not name.endswith("num_batches_tracked")
    ]
    if len(found) < len(wanted) / 10:  # a file of another network may share a few names
        names = [f"'{short(name)}'" for name in tensors]
        look = (
            f"its names look like {first_names(names, 3)}"
            if names
            else "it holds no tensors by name"
        )
        what = "give its network with -a, or rename its tensors as torchvision or timm does"
        raise InputError(f"{source}: no tensor matches the encoder; {look}; {what}")
    wrong = [
        f"{name} {_words(t)} for {_words(wanted[name])}"
        for name, t in found.items()
        if not fits(t, wanted[name])
    ]
    # a deeper network of the same widths holds every tensor that is wanted, and more blocks
    parts = {name.split(".")[0] for name in wanted}
    head = f"{head_name(net)}."
    extra = [
        name
        for name in mine
        if name.split(".")[0] in parts and name not in wanted and not name.startswith(head)
    ]
    odd = {"tensors missing": missing, "tensors too many": extra, "shapes differ": wrong}
    if any(odd.values()):
        what = "; ".join(
            f"{len(names)} {kind}: {first_names(names)}" for kind, names in odd.items() if names
        )
        raise InputError(f"{source}: does not fit the encoder: {what}")
    if sick := [name for name, tensor in found.items() if not is_finite(tensor)]:
        raise InputError(
            f"{source}: its numbers are not finite ({first_names(sick)}): its training diverged; take an earlier checkpoint"
        )
    net.load_state_dict(found, strict=False)
    return len(found)


def fits(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether a file's tensor can be copied into the `wanted` one and be the same there, but for the precision of its numbers."""
    plain = (
        tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_complex()
    )
    return (
        plain
        and tensor.shape == wanted.shape
        and tensor.is_floating_point() == wanted.is_floating_point()
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all its numbers are."""
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _words(tensor: Tensor) -> str:
    kind = (
        ""
        if tensor.is_floating_point() and tensor.layout == torch.strided
        else f" of {tensor.dtype}".replace("torch.", "")
    )
    return f"{tuple(tensor.shape)}{kind}"


def prefix(net: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Return what stands before the backbone's names in `tensors`."""
    return next(iter(_prefixes(net, tensors)), "")


def describe_choice(net: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Return which encoder of a file is read, such as `teacher.backbone.*, not student.backbone.*`.

    The text is empty if the names have no prefix.
    """
    first, *others = (f"{start}*" for start in _prefixes(net, tensors) or [""])
    return "" if first == "*" else ", not ".join([first, *others[:1]])


def _prefixes(net: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Return the prefixes that match (nearly) the most backbone tensors, the one to read first.

    The first is DINO's teacher; without one, the encoder that was trained; without that, its moving
    average.
    """
    state = net.state_dict()
    wanted = {name: state[name] for name in backbone_keys(net)}
    # shapes count, too: the teacher may be another network
    scores: Counter[str] = Counter()
    for start, name in _splits(tensors, wanted):
        scores[start] += 1 + (tensors[start + name].shape == wanted[name].shape)
    near = [start for start in scores if scores[start] >= 0.95 * max(scores.values())]
    return sorted(near, key=lambda start: (_rank(start), -scores[start]))


_TEACHER = re.compile(r"(^|[._])teacher")


_COPY = re.compile(r"(^|[._])(student|ema|momentum|target|averaged?|shadow|key|k)([._]|$)")


def _rank(start: str) -> int:
    return 0 if _TEACHER.search(start) else 2 if _COPY.search(start) else 1


def _splits(names: Iterable[str], wanted: Container[str]) -> Iterator[tuple[str, str]]:
    """Split each of `names` at each dot; yield the prefix and the rest if the rest is `wanted`."""
    for name in names:
        for place in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if name[place:] in wanted:
                yield name[:place], name[place:]


_DEPTH = 10  # levels of nested dicts that are searched


# a ResNet's layers, and their numbers in an nn.Sequential of its children
_NUMBERS = {
    "conv1.": "0.",
    "bn1.": "1.",
    "layer1.": "4.",
    "layer2.": "5.",
    "layer3.": "6.",
    "layer4.": "7.",
}


def tensors_of(net: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return every named tensor of a checkpoint of any origin, by its path.

    A path is, for example, `teacher.backbone.conv1.weight`. Leaves out the optimizer's tensors, and
    removes from names what torch.compile adds. Gives the numbered layers of a ResNet in an
    nn.Sequential torchvision's names.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()  # a dict may hold itself

    def walk(table: dict, path: str, depth: int) -> None:
        seen.add(id(table))
        for name, value in table.items():
            if not isinstance(name, str) or name.startswith("optim"):
                continue
            if isinstance(value, Tensor):
                tensors[f"{path}{name}".replace("_orig_mod.", "")] = value
            elif isinstance(value, dict) and id(value) not in seen and depth < _DEPTH:
                walk(value, f"{path}{name}.", depth + 1)

    walk(state, "", 0)
    if not isinstance(net, models.ResNet):
        return tensors
    numbered = {
        re.sub(r"^\w+\.", lambda layer: _NUMBERS[layer[0]], name): name
        for name in backbone_keys(net)
    }
    found = list(_splits(tensors, numbered))
    counts = Counter(start for start, _ in found)
    renamed = {
        start + name: start + numbered[name]
        for start, name in found
        if counts[start] > len(numbered) / 2
    }
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def stem_of(net: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Return the stem, one of `networks.STEMS`, of the weights in `tensors`.

    It is cifar if `net` is a ResNet and its first convolution is 3x3 in `tensors`, else imagenet.
    """
    first = (
        tensors.get(f"{prefix(net, tensors)}conv1.weight")
        if isinstance(net, models.ResNet)
        else None
    )
    return "cifar" if first is not None and first.shape[1:] == (3, 3, 3) else "imagenet"


def keep_projection(net: nn.Module, tensors: dict[str, Tensor], layers: int, source: str) -> None:
    """Put the first `layers` linear layers of a published projection head, with what follows each, below `net`'s classifier.

    Raises InputError as `projection` does.
    """
    kept, width = projection(net, tensors, layers, source)
    set_head(net, nn.Sequential(*kept, nn.Linear(width, classifier(net).out_features)))


def load_projection(net: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Replace the last layer of `net` by a published projection head.

    Raises InputError as `projection` does.
    """
    set_head(net, nn.Sequential(*projection(net, tensors, 0, source)[0]))


def projection(
    net: nn.Module, tensors: dict[str, Tensor], layers: int, source: str
) -> tuple[list[nn.Module], int]:
    """Return the layers of a published projection head, and the width of their output.

    With `layers` above 0, keep only that many linear layers, with the layers that follow each.
    The head is read from the names and shapes of its tensors: a weight of two dimensions is a linear layer, running statistics
    are batch norm's, and a place without tensors is a ReLU. Raises InputError if it has fewer linear layers,
    layers of other types, or none.
    """
    start = prefix(net, tensors)
    inside, beside = (
        f"{start}{head_name(net)}.",
        start.removesuffix("encoder.") + "projector.",
    )  # MoBY has it beside the encoder
    start = beside if any(name.startswith(beside) for name in tensors) else inside
    option = "--ft-proj" if layers else "--features head"
    strange = f"{source}: its projection head is not a plain sequence of layers"
    head: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(start):
            place, _, inner = name.removeprefix(start).rpartition(".")
            if place and not place.isdecimal():
                raise InputError(f"{strange} (at '{name}'); leave out {option}")
            head.setdefault(int(place or 0), {})[inner] = tensor
    linear = [place for place, of in sorted(head.items()) if "running_mean" not in of]
    if not linear and not layers:
        raise InputError(f"{source}: has no projection head; leave out {option}")
    layers = layers or len(linear)
    if len(linear) < layers:
        raise InputError(
            f"{source}: its projection head has {len(linear)} linear layers, not --ft-proj {layers}"
        )
    end = linear[layers] if layers < len(linear) else max(head) + 1
    try:
        kept = [_layer(head.get(place)) for place in range(end)]
    except (
        KeyError,
        TypeError,
        RuntimeError,
    ):  # no weight, or one that is no matrix, or others that do not go with it
        raise InputError(
            f"{strange}, or their tensors do not fit each other; leave out {option}"
        ) from None
    return kept, head[linear[layers - 1]]["weight"].shape[0]


def _layer(of: dict[str, Tensor] | None) -> nn.Module:
    """The layer that has these tensors."""
    if of is None:
        return nn.ReLU()
    if "running_mean" in of:
        layer = nn.BatchNorm1d(len(of["running_mean"]), affine="weight" in of)
    else:
        layer = nn.Linear(*reversed(of["weight"].shape), bias="bias" in of)
    layer.load_state_dict(of, strict=False)
    return layer


def first_names(names: list[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(short(name) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
