"""Load an encoder from a checkpoint of this project or of other software.

weights.py reads the file; metadata.py reads the facts in it.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from moco.config import MEAN, STD
from moco.encoder import metadata, networks, weights
from moco.encoder.networks import backbone_keys, classifier, head_name, set_head
from moco.errors import InputError, short
from moco.messages import print_rank0
from moco.sections_images import Decoding


class Encoder(NamedTuple):
    """A pre-trained encoder and the facts that its users need."""

    net: nn.Module  # normalized images [B, 3, H, W] -> features [B, D], in eval mode
    arch: str
    image_size: int  # pixels: the requested size, else the file's, else 224
    method: str  # the pre-training method; "unknown" if the file does not say
    epoch: int | None  # number of pre-training epochs
    stem: str  # the stem of a ResNet, see `resnets.resnet`
    mean: list[float]  # [3], mean of RGB values in [0, 1], to normalize images with
    std: list[float]  # [3], their standard deviation, to normalize images with
    resized: list[str]  # names of the position embeddings that were interpolated to the image size
    norm_eps: str  # the epsilons of a Swin's layer norms, see `timm_networks.create`
    decoding: Decoding  # how the images were decoded
    script: str | None  # of the pre-training, such as synco for main_synco.py
    options: dict[str, Any]  # the options of the run that wrote the file; {} if it has none


@contextlib.contextmanager
def suggest_arch(path: str, own: str | None, arch: str) -> Iterator[None]:
    """Add the right `-a` to an InputError about a checkpoint that does not fit `arch`.

    Args:
        path: the checkpoint.
        own: the architecture that the file names, or None.
        arch: the architecture that was tried.
    """
    try:
        yield
    except InputError as error:
        if own is None:
            tried = f"the file does not name its network, and {arch} was tried"
            raise InputError(f"{error}; {tried}: give another -a ARCH") from None
        if not networks.is_same(own, arch):
            raise InputError(f"{path}: contains {own}, not {arch}; give -a {own}") from None
        raise


def read(
    path: str,
    arch: str | None = None,
    image_size: int | None = None,
    norm_eps: str | None = None,
) -> Encoder:
    """Return the encoder of a checkpoint of this project or of other software.

    Prints a line if the file does not contain the mean and std to normalize images with.

    Args:
        path: the checkpoint.
        arch: the architecture. By default the file decides; resnet50 if the file does not say.
        image_size: pixels. By default the file decides; 224 if the file does not say.
        norm_eps: the epsilons of a Swin's layer norms, if the file does not say; timm's by default.

    Raises InputError if the file cannot be read, if `arch` is unknown, or if an argument does not
    fit the file.
    """
    state = weights.read(path)
    facts = metadata.read_metadata(state)
    arch = networks.canonical(arch or facts.arch or "resnet50")
    image_size = image_size or facts.image_size or 224
    norm_eps = metadata.norm_eps(path, facts, norm_eps)
    net = networks.create(arch, 0, image_size, norm_eps=norm_eps)
    tensors = tensors_of(net, state)
    stem = stem_of(net, tensors)
    if stem != "imagenet":
        net = networks.create(arch, 0, image_size, stem=stem)
    with suggest_arch(path, facts.arch, arch):
        load_backbone(net, tensors, path)
    start = prefix(net, tensors)
    tables = {
        name: x for name, x in net.state_dict().items() if "pos" in name and start + name in tensors
    }
    resized = [name for name, x in tables.items() if tensors[start + name].shape != x.shape]
    if line := metadata.normalization_note(path, facts):
        print_rank0(line)
    mean, std = facts.mean or list(MEAN), facts.std or list(STD)
    origin = (arch, image_size, facts.method, facts.epoch, stem)
    decoding = Decoding(facts.exif or "ignore", facts.white)
    rest = (norm_eps, decoding, facts.script, facts.options)
    return Encoder(net.eval(), *origin, mean, std, resized, *rest)


def load_backbone(net: nn.Module, tensors: dict[str, Tensor], source: str) -> int:
    """Load a pre-trained backbone into `net`; return the number of tensors that matched.

    `prefix` finds the prefix of the names. `networks.adapt` renames the tensors of a
    transformer, and interpolates its position embeddings to the network's image size.

    Args:
        net: a network of `networks.create`; its head is not changed.
        tensors: the checkpoint's tensors by name, from `tensors_of`.
        source: name of the file, for messages.

    Raises InputError if no tensor matches, if backbone tensors are missing or unexpected, if shapes
    differ, or if weights are not finite.
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
        mine = networks.adapt(net, inner)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    found = {name: mine[name] for name in wanted if name in mine}
    # files from before PyTorch 0.4 lack batch norm's step counter, which this project does not use
    missing = [
        name for name in wanted if name not in found and not name.endswith("num_batches_tracked")
    ]
    if len(found) < len(wanted) / 10:  # another network may share a few names
        names = [f"'{short(name)}'" for name in tensors]
        look = (
            f"its names look like {first_names(names, 3)}" if names else "it has no named tensors"
        )
        advice = "give its network with -a, or rename its tensors as torchvision or timm does"
        raise InputError(f"{source}: no tensor matches the encoder; {look}; {advice}")
    wrong = [
        f"{name} is {_describe(t)}, expected {_describe(wanted[name])}"
        for name, t in found.items()
        if not fits(t, wanted[name])
    ]
    # a deeper network of the same widths has all wanted tensors, and further blocks
    parts = {name.split(".")[0] for name in wanted}
    head = f"{head_name(net)}."
    extra = [
        name
        for name in mine
        if name.split(".")[0] in parts and name not in wanted and not name.startswith(head)
    ]
    problems = {"missing tensors": missing, "unexpected tensors": extra, "wrong shapes": wrong}
    if any(problems.values()):
        listed = [
            f"{problem} ({len(names)}): {first_names(names)}"
            for problem, names in problems.items()
            if names
        ]
        raise InputError(f"{source}: does not fit the encoder: {'; '.join(listed)}")
    if bad := [name for name, tensor in found.items() if not is_finite(tensor)]:
        diverged = "its training diverged; take an earlier checkpoint"
        raise InputError(f"{source}: its weights are not finite ({first_names(bad)}): {diverged}")
    net.load_state_dict(found, strict=False)
    return len(found)


def fits(tensor: Tensor, wanted: Tensor) -> bool:
    """Return whether a file's tensor can be copied into `wanted` unchanged.

    Only the floating-point precision may differ.
    """
    dense = (
        tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_complex()
    )
    return (
        dense
        and tensor.shape == wanted.shape
        and tensor.is_floating_point() == wanted.is_floating_point()
    )


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of `tensor` is NaN or infinite."""
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _describe(tensor: Tensor) -> str:
    usual = tensor.is_floating_point() and tensor.layout == torch.strided
    dtype = "" if usual else f" of {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{dtype}"


def prefix(net: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Return the prefix of the backbone's names in `tensors`, such as `module.encoder_q.`."""
    return next(iter(_prefixes(net, tensors)), "")


def describe_choice(net: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Return a text with the prefix that is read and one that is not: `teacher.*, not student.*`.

    The text is "" if the names have no prefix.
    """
    first, *others = (f"{start}*" for start in _prefixes(net, tensors) or [""])
    return "" if first == "*" else ", not ".join([first, *others[:1]])


def _prefixes(net: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Return the prefixes with (nearly) the most matching backbone tensors, best first.

    DINO's teacher comes first, then trained encoders, then their moving averages.
    """
    state = net.state_dict()
    wanted = {name: state[name] for name in backbone_keys(net)}
    # count equal shapes, too, because teacher and student may be different networks
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
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if name[start:] in wanted:
                yield name[:start], name[start:]


_DEPTH = 10  # levels of nested dicts that are searched

# the names of a ResNet's layers in an nn.Sequential of its children
_NUMBERS = {
    "conv1.": "0.",
    "bn1.": "1.",
    "layer1.": "4.",
    "layer2.": "5.",
    "layer3.": "6.",
    "layer4.": "7.",
}


def tensors_of(net: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return all named tensors of a checkpoint, except the optimizer's.

    A name is the path in the nested dicts, such as `teacher.backbone.conv1.weight`, without the
    `_orig_mod.` that torch.compile adds. If a ResNet is stored as an nn.Sequential, its layers are
    renamed to torchvision's names.

    Args:
        net: the network that the tensors are for.
        state: the content of the checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()  # a dict may contain itself

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
    """Return the stem of the weights in `tensors`, one of `sections.STEMS`.

    It is "cifar" if `net` is a ResNet whose first convolution is 3x3 in `tensors`, else "imagenet".
    """
    first = (
        tensors.get(f"{prefix(net, tensors)}conv1.weight")
        if isinstance(net, models.ResNet)
        else None
    )
    return "cifar" if first is not None and first.shape[1:] == (3, 3, 3) else "imagenet"


def keep_projection(net: nn.Module, tensors: dict[str, Tensor], layers: int, source: str) -> None:
    """Insert the first layers of a pre-trained projection head before the classifier.

    Args:
        net: a network whose head is a linear classifier.
        tensors: the checkpoint's tensors by name, from `tensors_of`.
        layers: number of linear layers to keep, with the BN and ReLU that follow each.
        source: name of the file, for messages.

    Raises InputError if `projection` does.
    """
    kept, width = projection(net, tensors, layers, source)
    set_head(net, nn.Sequential(*kept, nn.Linear(width, classifier(net).out_features)))


def load_projection(net: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Replace the last layer of `net` by the full pre-trained projection head.

    Raises InputError if `projection` does.
    """
    set_head(net, nn.Sequential(*projection(net, tensors, 0, source)[0]))


def projection(
    net: nn.Module, tensors: dict[str, Tensor], layers: int, source: str
) -> tuple[list[nn.Module], int]:
    """Return the layers of a pre-trained projection head, and the number of its output features.

    The names and shapes of the tensors define the layers. A two-dimensional weight is a linear
    layer, running statistics are batch norm, and an index without tensors is a ReLU.

    Args:
        net: the network whose backbone the file contains.
        tensors: the checkpoint's tensors by name, from `tensors_of`.
        layers: number of linear layers to keep, with the layers that follow each; 0 for all.
        source: name of the file, for messages.

    Raises InputError if the file has no head, fewer linear layers, or layers of other types.
    """
    start = prefix(net, tensors)
    inside = f"{start}{head_name(net)}."
    outside = start.removesuffix("encoder.") + "projector."  # MoBY's head is outside the encoder
    start = outside if any(name.startswith(outside) for name in tensors) else inside
    option = "--ft-proj" if layers else "--features head"
    strange = f"{source}: its projection head is not a sequence of linear, BN and ReLU layers"
    head: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(start):
            index, _, inner = name.removeprefix(start).rpartition(".")
            if index and not index.isdecimal():
                raise InputError(f"{strange} (at '{name}'); leave out {option}")
            head.setdefault(int(index or 0), {})[inner] = tensor
    linear = [index for index, layer in sorted(head.items()) if "running_mean" not in layer]
    if not linear and not layers:
        raise InputError(f"{source}: has no projection head; leave out {option}")
    layers = layers or len(linear)
    if len(linear) < layers:
        raise InputError(
            f"{source}: its projection head has {len(linear)} linear layers, "
            f"not --ft-proj {layers}; lower --ft-proj"
        )
    end = linear[layers] if layers < len(linear) else max(head) + 1
    try:
        kept = [_layer(head.get(index)) for index in range(end)]
    except (KeyError, TypeError, RuntimeError):  # a weight is missing, no matrix, or does not fit
        unfit = f"{strange}, or their tensors do not fit each other"
        raise InputError(f"{unfit}; leave out {option}") from None
    return kept, head[linear[layers - 1]]["weight"].shape[0]


def _layer(tensors: dict[str, Tensor] | None) -> nn.Module:
    """Return the layer that has these tensors; a ReLU for None."""
    if tensors is None:
        return nn.ReLU()
    if "running_mean" in tensors:
        layer = nn.BatchNorm1d(len(tensors["running_mean"]), affine="weight" in tensors)
    else:
        layer = nn.Linear(*reversed(tensors["weight"].shape), bias="bias" in tensors)
    layer.load_state_dict(tensors, strict=False)
    return layer


def first_names(names: list[str], most: int = 5) -> str:
    """Return the first `most` of `names`, and how many more there are, for a message."""
    return ", ".join(short(name) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
