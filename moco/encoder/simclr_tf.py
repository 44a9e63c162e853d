"""Convert the variables of SimCLR's and FNC's TensorFlow code to torchvision's names.

That code numbers its convolutions and batch norms in the order in which it creates them, such as
base_model/conv2d_7/kernel. In the first block of a stage, the projection of the shortcut comes
before the block's own convolutions.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moco.encoder import networks
from moco.encoder.pretrained import first_names
from moco.encoder.tensor_bundle import Bundle
from moco.errors import InputError

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
_CONVS = {3 * sum(blocks) + 5: arch for arch, blocks in BLOCKS.items()}
_BASIC = {21: "ResNet-18", 37: "ResNet-34"}  # by number of convolutions

_BACKBONE = re.compile(r"(conv2d|(?:sync_)?batch_normalization)(?:_(\d{1,6}))?/(\w+)")
_HEAD = re.compile(r"head_contrastive/n?l_(\d{1,3})/(?:[\w-]+/)?(\w+)")
_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_USED = {"kernel", "bias", *_NORM}  # other leaves are slots of the optimizer


class Converted(NamedTuple):
    """An encoder with torchvision's names.

    Attributes:
        arch: a ResNet of torchvision.
        stem: one of `sections.STEMS`.
        tensors: the tensors by name; those of the projection head are `fc.0.weight` and so on.
        layers: number of linear layers of the projection head.
        left_out: names of the variables that were not converted, without the optimizer's.
        slots: number of the optimizer's variables.
    """

    arch: str
    stem: str
    tensors: dict[str, Tensor]
    layers: int
    left_out: list[str]
    slots: int


def convert(bundle: Bundle, scope: str | None = None) -> Converted:
    """Return the encoder in a checkpoint.

    Args:
        bundle: the checkpoint.
        scope: the first part of the names of the encoder's variables; by default base_model, or the
            only one there is.

    Raises InputError if the checkpoint holds another network, or cannot be read.
    """
    scope = _scope(bundle, scope)
    layers = _numbered(bundle, scope)
    convs, norms = (layers.get(kind, []) for kind in ("conv2d", "batch_normalization"))
    arch, stem = _network(bundle, convs, norms)
    used: dict[str, str] = {}  # torchvision's name: the variable
    for (conv, norm), source, values in zip(_order(arch), convs, norms, strict=True):
        used[f"{conv}.weight"] = source["kernel"]
        used |= {f"{norm}.{_NORM[leaf]}": name for leaf, name in values.items()}
    wanted = networks.create(arch, 0, stem=stem).state_dict()
    tensors = {}
    for name, variable in used.items():
        tensors[name] = _tensor(bundle, variable)
        if tensors[name].shape != wanted[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
            raise InputError(
                f"{bundle.prefix}: does not fit a {arch}: {variable} is {shapes} (in PyTorch's "
                "order); give a checkpoint of SimCLR's or FNC's TensorFlow code"
            )
    counters = [name for name in wanted if name.endswith("num_batches_tracked")]
    tensors |= {name: torch.tensor(0) for name in counters}
    if missing := wanted.keys() - tensors.keys():
        raise InputError(
            f"{bundle.prefix}: has no variables for {first_names(sorted(missing))} of a {arch}"
        )
    head, variables = _head(bundle)
    rest = bundle.variables.keys() - used.values() - set(variables)
    slots = {name for name in rest if name.rpartition("/")[0] in bundle.variables}
    linear = sum(x.dim() == 2 for x in head.values())
    return Converted(arch, stem, tensors | head, linear, sorted(rest - slots), len(slots))


def _scope(bundle: Bundle, scope: str | None) -> str:
    """Return the scope of the encoder with a slash at its end. Raises InputError without one."""
    end = "conv2d/kernel"
    found = [name.removesuffix(end) for name in bundle.variables if name.endswith(f"/{end}")]
    if any(name.endswith("/.ATTRIBUTES/VARIABLE_VALUE") for name in bundle.variables):
        raise InputError(
            f"{bundle.prefix}: was saved by TensorFlow 2 (tf.train.Checkpoint), as SimCLR's tf2/ "
            "code does with other names; give a checkpoint of the TensorFlow 1 code"
        )
    if scope is not None:
        scope = f"{scope.strip('/')}/"
        if scope not in found:
            named = f"; the scopes are {first_names([one[:-1] for one in found])}" if found else ""
            raise InputError(f"--scope {scope[:-1]}: has no variable {scope}{end}{named}")
        return scope
    if "base_model/" in found:
        return "base_model/"
    if len(found) == 1:
        return found[0]
    if found:
        names = first_names([one[:-1] for one in found])
        raise InputError(f"{bundle.prefix}: holds {len(found)} encoders ({names}); give --scope")
    raise InputError(
        f"{bundle.prefix}: has no variable base_model/{end}; its names are "
        f"{first_names(list(bundle.variables), 3)}; give a checkpoint of SimCLR's or FNC's "
        "TensorFlow code"
    )


def _numbered(bundle: Bundle, scope: str) -> dict[str, list[dict[str, str]]]:
    """Return the convolutions and batch norms in order: the variable of each leaf, by kind."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in bundle.variables:
        match = name.startswith(scope) and _BACKBONE.fullmatch(name[len(scope) :])
        if match and match[3] in _USED:
            kind = match[1].removeprefix("sync_")
            found.setdefault(kind, {}).setdefault(int(match[2] or 0), {})[match[3]] = name
    return {kind: [layers[i] for i in sorted(layers)] for kind, layers in found.items()}


def _network(
    bundle: Bundle, convs: list[dict[str, str]], norms: list[dict[str, str]]
) -> tuple[str, str]:
    """Return the architecture and its stem. Raises InputError if torchvision has no such ResNet."""
    if any("kernel" not in conv for conv in convs):
        raise InputError(f"{bundle.prefix}: has a convolution without a kernel")
    shape = bundle.variables[convs[0]["kernel"]].shape  # height, width, in, out
    advice = "only ResNet-50, 101 and 152 of width 1x, without selective kernels, are converted"
    if len(shape) == 4 and shape[:3] == (3, 3, 3) and shape[3] % 64:
        raise InputError(f"{bundle.prefix}: is a ResNet with selective kernels (SK); {advice}")
    if len(shape) != 4 or shape[2] != 3 or shape[:2] not in ((7, 7), (3, 3)) or shape[3] % 64:
        raise InputError(f"{bundle.prefix}: does not begin with a ResNet's convolution; {advice}")
    if shape[3] != 64:
        wide = f"is a ResNet of width {shape[3] // 64}x, which torchvision does not have"
        raise InputError(f"{bundle.prefix}: {wide}; {advice}")
    if basic := _BASIC.get(len(convs)):
        projected = "the first block of SimCLR's has a projection that torchvision's lacks"
        raise InputError(f"{bundle.prefix}: is a {basic}: {projected}; {advice}")
    if len(convs) not in _CONVS or len(norms) != len(convs):
        counts = f"has {len(convs)} convolutions and {len(norms)} batch norms"
        raise InputError(f"{bundle.prefix}: {counts}; {advice}")
    return _CONVS[len(convs)], "imagenet" if shape[0] == 7 else "cifar"


def _order(arch: str) -> Iterator[tuple[str, str]]:
    """Yield torchvision's names of each convolution and its batch norm, in SimCLR's order."""
    yield "conv1", "bn1"
    for stage, blocks in enumerate(BLOCKS[arch], 1):
        for block in range(blocks):
            start = f"layer{stage}.{block}."
            if not block:
                yield f"{start}downsample.0", f"{start}downsample.1"
            yield from ((f"{start}conv{i}", f"{start}bn{i}") for i in (1, 2, 3))


def _head(bundle: Bundle) -> tuple[dict[str, Tensor], list[str]]:
    """Return the projection head, and the names of its variables.

    Each linear layer is followed by its batch norm, if any, and by a ReLU except the last one.
    """
    layers: dict[int, dict[str, str]] = {}
    for name in bundle.variables:
        match = _HEAD.fullmatch(name)
        if match and match[2] in _USED:
            layers.setdefault(int(match[1]), {})[match[2]] = name
    tensors, index = {}, 0
    for _, leaves in sorted(layers.items()):
        if "kernel" not in leaves:
            raise InputError(f"{bundle.prefix}: a layer of head_contrastive/ has no kernel")
        tensors[f"fc.{index}.weight"] = _tensor(bundle, leaves["kernel"])
        if "bias" in leaves:
            tensors[f"fc.{index}.bias"] = _tensor(bundle, leaves["bias"])
        index += 1
        norm = {_NORM[leaf]: name for leaf, name in leaves.items() if leaf in _NORM}
        if norm:
            tensors |= {f"fc.{index}.{leaf}": _tensor(bundle, x) for leaf, x in norm.items()}
            if "weight" in norm and "bias" not in norm:  # the last one has no bias
                tensors[f"fc.{index}.bias"] = torch.zeros_like(tensors[f"fc.{index}.weight"])
            index += 1
        index += 1  # the ReLU
    return tensors, [name for leaves in layers.values() for name in leaves.values()]


def _tensor(bundle: Bundle, name: str) -> Tensor:
    """Return a variable in PyTorch's order of axes. Raises InputError if it is not finite."""
    tensor = bundle.tensor(name).float()
    if not tensor.isfinite().all():
        diverged = "its training diverged; take an earlier checkpoint"
        raise InputError(f"{bundle.prefix}: {name} holds NaN or infinite values: {diverged}")
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    return tensor.T.contiguous() if tensor.dim() == 2 else tensor
