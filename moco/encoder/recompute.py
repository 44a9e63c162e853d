"""Recompute a network's blocks in the backward pass, to save memory."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.errors import InputError


def recompute_blocks(net: nn.Module) -> None:
    """From now on the blocks of networks inside `net` keep only what they get, and run a second time for the gradient.

    The gradient is the same, bit for bit, and so is what batch norm has seen. Raises InputError for timm's networks that cannot.
    """
    for module in net.modules():
        if type(module) in _RECOMPUTED:
            module.__class__ = _RECOMPUTED[type(module)]
        elif hasattr(
            module, "set_grad_checkpointing"
        ):  # timm's, which would count in batch norm twice
            name = type(module).__name__
            if any(
                isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules()
            ):
                raise InputError(
                    f"--grad-checkpoint: timm's {name} has batch norm, which must not run twice; leave it out"
                )
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
        return checkpoint(
            super().forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


_RECOMPUTED = {
    kind: type(kind.__name__, (_Recomputed, kind), {}) for kind in (BasicBlock, Bottleneck)
}


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


def _first_and_second_time(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The block's batch norms count nothing as seen."""
    norms = [
        child for child in block.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
