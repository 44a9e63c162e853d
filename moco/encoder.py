"""Backbones: any torchvision ResNet, with a projection head in place of its classifier."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.errors import InputError, unknown

ARCHS = sorted(name for name in models.list_models(module=models) if "resn" in name)  # resnet, resnext, wide_resnet


def check_arch(arch: str) -> None:
    """Raise InputError for an architecture that is not among `ARCHS`."""
    if arch not in ARCHS:
        raise unknown("arch", arch, ARCHS)


def resnet(arch: str, out: int, mlp: bool = False, **more: bool) -> nn.Module:
    """A randomly initialised torchvision ResNet whose `fc` maps to `out` features.

    With `mlp`, `fc` is MoCo v2's head: Linear(D, D), ReLU, Linear(D, out). `more` goes to torchvision. Raises InputError for an
    unknown `arch`.
    """
    check_arch(arch)
    net = models.get_model(arch, weights=None, num_classes=out, **more)
    if mlp:
        width = net.fc.in_features
        net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), net.fc)
    return net


def projector(widths: Sequence[int], last: nn.Module) -> nn.Sequential:
    """A projection head: linear layers without bias from each of `widths` to the next, BN and ReLU between, `last` behind them."""
    layers: list[nn.Module] = []
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        between = [nn.BatchNorm1d(width), nn.ReLU(inplace=True)] if i else []
        layers += [*between, nn.Linear(width, out, bias=False)]
    return nn.Sequential(*layers, last)


def recompute_blocks(net: nn.Module) -> None:
    """From now on the residual blocks inside `net` keep only what they get, and run a second time for the gradient.

    The gradient is the same, bit for bit, and so is what batch norm has seen.
    """
    for block in net.modules():
        if type(block) in _RECOMPUTED:
            block.__class__ = _RECOMPUTED[type(block)]


class _Recomputed:
    """Before one of torchvision's blocks."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        if torch.compiler.is_compiling():  # which takes no contexts, and counts once by itself
            return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)
        contexts = functools.partial(_first_and_second_time, self)
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


_RECOMPUTED = {kind: type(kind.__name__, (_Recomputed, kind), {}) for kind in (BasicBlock, Bottleneck)}


def _first_and_second_time(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The block's batch norms count nothing as seen."""
    norms = [child for child in block.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """What the backbone says of `images` [B, 3, H, W] before its head: globally pooled features [B, D]."""
    x = images
    for name, child in net.named_children():
        if name == "fc":
            break
        x = child(x)
    return torch.flatten(x, 1)


def backbone_keys(net: nn.Module) -> list[str]:
    """The names of the tensors that make up the backbone: everything but the head."""
    return [name for name in net.state_dict() if not name.startswith("fc.")]


def load_backbone(net: nn.Module, tensors: dict[str, Tensor], source: str) -> int:
    """Load a published encoder into `net`, whatever prefix its names carry; returns how many tensors matched.

    The prefix is the one (of `PREFIXES`) that matches most names. Raises InputError where nothing matches, where a
    backbone tensor is missing or one too many, or where a shape differs.
    """
    state = net.state_dict()
    wanted = {name: state[name] for name in backbone_keys(net)}
    start = prefix(net, tensors)
    found = {name: tensors[start + name] for name in wanted if start + name in tensors}
    # files older than PyTorch 0.4 lack BatchNorm's step counter, which nothing here reads
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    if not found:
        raise InputError(f"{source}: no tensor matches the encoder; its names look like '{next(iter(tensors), '')}'")
    wrong = [
        f"{name} {tuple(t.shape)} for {tuple(wanted[name].shape)}" for name, t in found.items() if t.shape != wanted[name].shape
    ]
    # a deeper network of the same widths holds every tensor that is wanted, and more blocks
    parts = {name.split(".")[0] for name in wanted}
    inner = [name.removeprefix(start) for name in tensors if name.startswith(start)]
    extra = [name for name in inner if name.split(".")[0] in parts and name not in wanted]
    odd = {"tensors missing": missing, "tensors too many": extra, "shapes differ": wrong}
    if any(odd.values()):
        what = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in odd.items() if names)
        raise InputError(f"{source}: does not fit the encoder: {what}")
    net.load_state_dict(found, strict=False)
    return len(found)


def prefix(net: nn.Module, tensors: dict[str, Tensor]) -> str:
    """What stands before the backbone's names in `tensors`."""
    wanted = backbone_keys(net)
    return max(PREFIXES, key=lambda p: sum(p + name in tensors for name in wanted))


PREFIXES = (
    "module.encoder_q.",  # MoCo, SynCo, AdCo
    "encoder_q.",
    "module.base_encoder.",  # SogCLR, MoCo v3
    "base_encoder.",
    "module.encoder.",
    "encoder.",  # MoBY, SynCo-v2 (below `model`)
    "module.backbone.",
    "backbone.",
    "module.",
    "",  # a bare torchvision state dict
)


def classifier(net: nn.Module) -> nn.Linear:
    """The last layer of a network that classifies."""
    return net.fc[-1] if isinstance(net.fc, nn.Sequential) else net.fc


def keep_projection(net: nn.Module, tensors: dict[str, Tensor], layers: int, source: str) -> None:
    """Put the first `layers` linear layers of a published projection head, with what follows each, below `net`'s classifier.

    The head is read from the names and shapes of its tensors: a weight of two dimensions is a linear layer, running statistics
    are batch norm's, and a place without tensors is a ReLU. Raises InputError where it has fewer layers, or other ones.
    """
    start = prefix(net, tensors) + "fc."
    head: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(start):
            place, _, inner = name.removeprefix(start).rpartition(".")
            if place and not place.isdigit():
                raise InputError(
                    f"{source}: its projection head is not a plain sequence of layers (at '{name}'); leave out --ft-proj"
                )
            head.setdefault(int(place or 0), {})[inner] = tensor
    linear = [place for place, of in sorted(head.items()) if "running_mean" not in of]
    if len(linear) < layers:
        raise InputError(f"{source}: its projection head has {len(linear)} linear layers, not --ft-proj {layers}")
    end = linear[layers] if layers < len(linear) else max(head) + 1
    kept = [_layer(head.get(place)) for place in range(end)]
    width = head[linear[layers - 1]]["weight"].shape[0]
    net.fc = nn.Sequential(*kept, nn.Linear(width, net.fc.out_features))


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


def some(names: list[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
