"""Recompute a network's blocks in the backward pass, to save memory (--grad-checkpoint)."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.encoder.torchvision_networks import last_layer
from moco.errors import InputError


def recompute_blocks(net: nn.Module) -> None:
    """Make the residual blocks in `net` recompute their activations in the backward pass.

    Gradients and batch norm statistics stay bit-identical. Raises InputError for a network of timm
    that has batch norm or does not support recomputing, and for torchvision's networks other than
    ResNets.
    """
    for module in net.modules():
        if last_layer(module):
            name = type(module).__name__
            lacks = "does not support recomputing"
            raise InputError(f"--grad-checkpoint: torchvision's {name} {lacks}; leave it out")
        if type(module) in _RECOMPUTED:
            module.__class__ = _RECOMPUTED[type(module)]
        elif getattr(module, "set_grad_checkpointing", None):  # a network of timm
            name = type(module).__name__
            # timm would update batch norm's statistics in both passes, except in the head, which
            # it does not recompute
            head = set(module.get_classifier().modules())
            if any(
                isinstance(child, nn.modules.batchnorm._BatchNorm)
                for child in module.modules()
                if child not in head
            ):
                twice = "has batch norm, whose statistics would be updated twice a step"
                raise InputError(f"--grad-checkpoint: timm's {name} {twice}; leave it out")
            try:
                module.set_grad_checkpointing()
            except AssertionError:
                lacks = "does not support recomputing"
                raise InputError(
                    f"--grad-checkpoint: timm's {name} {lacks}; leave it out"
                ) from None


class _Recomputed:
    """A mixin for torchvision's residual blocks that recomputes them in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        # the compiler does not support contexts, and updates batch norm only once without them
        if torch.compiler.is_compiling():
            return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)
        contexts = functools.partial(_contexts, self)
        return checkpoint(
            super().forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


_RECOMPUTED = {
    block: type(block.__name__, (_Recomputed, block), {}) for block in (BasicBlock, Bottleneck)
}


def check_compiled_recomputation() -> None:
    """Raise InputError if PyTorch updates batch norm twice when recomputed blocks are compiled.

    PyTorch 2.6 does, because its compiler keeps the update of the second pass.
    """
    block = BasicBlock(4, 4)
    recompute_blocks(block)
    block.compile(backend="aot_eager")  # traces like the default backend
    with torch.random.fork_rng(devices=[]):
        block(torch.randn(2, 4, 4, 4)).sum().backward()
    if int(block.bn1.num_batches_tracked) != 1:
        twice = f"PyTorch {torch.__version__} would update batch norm's statistics twice a step"
        raise InputError(
            f"--compile with --grad-checkpoint: {twice}; leave one of them out, or install a newer "
            "PyTorch"
        )


def _contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of the forward pass and of the recomputation."""
    return contextlib.nullcontext(), _frozen_statistics(block)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of the block's batch norms unchanged."""
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
