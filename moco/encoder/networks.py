"""Backbones, torchvision's ResNets and timm's networks, and what all of them can be asked."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.encoder import timm_networks
from moco.errors import InputError, unknown

ARCHS = sorted(name for name in models.list_models(module=models) if "resn" in name)  # resnet, resnext, wide_resnet


STEMS = ("imagenet", "cifar")  # of ResNets; see `resnet`


def check_arch(arch: str) -> None:
    """Raise InputError for an architecture that is neither among `ARCHS` nor timm's."""
    if arch not in ARCHS and not timm_networks.known(arch):
        raise unknown("arch", arch, [*ARCHS, *timm_networks.SHORT])


def create(arch: str, out: int, image_size: int = 224, drop_path: float = 0.0, stem: str | None = "imagenet") -> nn.Module:
    """A randomly initialised network for images of `image_size` pixels whose last layer maps to `out` features; none for 0.

    `drop_path` is the rate of stochastic depth, for timm's networks. `stem` is for ResNets (see
    `resnet`). Raises InputError for an unknown `arch`, or for one that does not support the image
    size, the stochastic depth or the stem.
    """
    if arch not in ARCHS:
        check_arch(arch)
        if stem == "cifar":
            raise InputError(f"--stem {stem}: {arch} is not a torchvision ResNet; leave --stem out")
        return timm_networks.create(arch, out, image_size, drop_path)
    if drop_path:
        raise InputError(f"{arch}: has no stochastic depth; leave --online-drop-path and --target-drop-path at 0")
    net = resnet(arch, max(out, 1), stem=stem)
    if not out:
        net.fc = nn.Identity()
    return net


def resnet(arch: str, out: int, mlp: bool = False, stem: str | None = "imagenet", **more: bool) -> nn.Module:
    """A randomly initialised torchvision ResNet whose `fc` maps to `out` features.

    Args:
        mlp: whether `fc` is MoCo v2's head: Linear(D, D), ReLU, Linear(D, out).
        stem: "imagenet" for torchvision's 7x7 convolution of stride 2 and max-pooling; "cifar" for a
            3x3 convolution of stride 1 and no pooling, as in MoCo's demo on CIFAR-10.
        more: further options of torchvision's function.

    Raises InputError for an unknown `arch`.
    """
    if arch not in ARCHS:
        raise unknown("ResNet", arch, ARCHS)
    net = models.get_model(arch, weights=None, num_classes=out, **more)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    if mlp:
        width = net.fc.in_features
        net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), net.fc)
    return net


def projector(widths: Sequence[int], *last: nn.Module, bias: bool = False) -> nn.Sequential:
    """A projection head: linear layers from each of `widths` to the next, BN and ReLU between, `last` behind them."""
    layers: list[nn.Module] = []
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        between = [nn.BatchNorm1d(width), nn.ReLU(inplace=True)] if i else []
        layers += [*between, nn.Linear(width, out, bias=bias)]
    return nn.Sequential(*layers, *last)


def recompute_blocks(net: nn.Module) -> None:
    """From now on the blocks of networks inside `net` keep only what they get, and run a second time for the gradient.

    The gradient is the same, bit for bit, and so is what batch norm has seen. Raises InputError for timm's networks that cannot.
    """
    for module in net.modules():
        if type(module) in _RECOMPUTED:
            module.__class__ = _RECOMPUTED[type(module)]
        elif hasattr(module, "set_grad_checkpointing"):  # timm's, which would count in batch norm twice
            name = type(module).__name__
            if any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules()):
                raise InputError(f"--grad-checkpoint: timm's {name} has batch norm, which must not run twice; leave it out")
            try:
                module.set_grad_checkpointing()
            except AssertionError:
                raise InputError(f"--grad-checkpoint: timm's {name} cannot; leave it out") from None


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


def check_compiled_recomputation() -> None:
    """Raise InputError if PyTorch updates batch norm twice when recomputed blocks are compiled.

    PyTorch 2.6 does: its compiler keeps what the second pass adds to the statistics.
    """
    block = BasicBlock(4, 4)
    recompute_blocks(block)
    block.compile(backend="aot_eager")  # traces like the default backend
    with torch.random.fork_rng(devices=[]):
        block(torch.randn(2, 4, 4, 4)).sum().backward()
    if int(block.bn1.num_batches_tracked) != 1:
        raise InputError(
            f"--compile with --grad-checkpoint: PyTorch {torch.__version__} would update batch norm's statistics "
            "twice a step; leave one of them out, or install a newer PyTorch"
        )


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
    if hasattr(net, "forward_head"):  # timm's
        return timm_networks.features(net, images)
    x = images
    for name, child in net.named_children():
        if name == "fc":
            break
        x = child(x)
    return torch.flatten(x, 1)


def embedding(net: nn.Module, images: Tensor) -> Tensor:
    """Return the output of the projection head, which is the last layer of `net`: [B, C]."""
    return head(net)(features(net, images))


def width(net: nn.Module) -> int:
    """How long these features are, D."""
    if isinstance(net, models.ResNet):
        return net.bn1.num_features * 8 * net.layer1[0].expansion
    return getattr(net, "head_hidden_size", net.num_features)


def head_name(net: nn.Module) -> str:
    """What the network calls its last layer, or the head in its place."""
    return net.pretrained_cfg["classifier"] if hasattr(net, "pretrained_cfg") else "fc"


def backbone_keys(net: nn.Module) -> list[str]:
    """The names of the tensors that make up the backbone: everything but the head."""
    return [name for name in net.state_dict() if not name.startswith(f"{head_name(net)}.")]


def head(net: nn.Module) -> nn.Module:
    """The last layer, or what is in its place."""
    return net.get_submodule(head_name(net))


def classifier(net: nn.Module) -> nn.Linear:
    """The last layer of a network that classifies."""
    layers = head(net)
    return layers[-1] if isinstance(layers, nn.Sequential) else layers


def set_head(net: nn.Module, head: nn.Module) -> None:
    """Put `head` in the place of the last layer."""
    parent, _, name = head_name(net).rpartition(".")
    setattr(net.get_submodule(parent), name, head)
