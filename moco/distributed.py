"""Communicate between ranks: gathers, sums, shuffled batch norm, synchronized batch norm.

Every function also works in one process without a process group. moco/launch starts the processes.
"""

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from moco import devices

# torch 2.13 deprecates the older name
_all_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank() -> int:
    """Return the global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes W of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


# gathers and sums


def all_gather(x: Tensor) -> Tensor:
    """Return every rank's `x` [B, ...] in rank order, [W * B, ...].

    B is the same on every rank. No gradient passes.
    """
    if world_size() == 1:
        return x
    out = x.new_empty((world_size() * len(x), *x.shape[1:]))
    _all_gather_rows(out, x.contiguous())
    return out


def all_gather_uneven(x: Tensor) -> Tensor:
    """Return every rank's `x` [B, ...] in rank order, where B may differ between ranks."""
    if world_size() == 1:
        return x
    sizes = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros((max(sizes) - len(x), *x.shape[1:]))])
    return torch.cat(
        [part[:n] for part, n in zip(all_gather(padded).chunk(world_size()), sizes, strict=True)]
    )


class _AllGather(torch.autograd.Function):
    """`all_gather` with a backward pass that sums the gradients of this rank's `x` over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.n = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        return all_reduce_sum(gradient)[rank() * ctx.n :][: ctx.n]


def all_gather_with_gradient(x: Tensor, local: bool = False) -> Tensor:
    """Return every rank's `x` [B, ...] in rank order, [W * B, ...], with gradient.

    The gradient of `x` is the sum of the gradients of all ranks' losses. With `local`, it is that
    of this rank's loss only.
    """
    if world_size() == 1:
        return x
    if not local:
        return _AllGather.apply(x)
    parts = list(all_gather(x.detach()).split(len(x)))
    parts[rank()] = x
    return torch.cat(parts)


class _Exchange(torch.autograd.Function):
    """All-to-all of equal parts, whose backward pass is the same exchange of the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return _Exchange.apply(gradient)


def exchange(x: Tensor) -> Tensor:
    """Send `x[r]` to each rank r; return what each rank has sent to this one, [W, ...].

    The gradient returns to the rank that sent the values.

    Args:
        x: [W, ...], of the same shape on every rank.
    """
    return x if world_size() == 1 else _Exchange.apply(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum `x` over ranks in place; return it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def broadcast(x: Tensor, source: int) -> Tensor:
    """Copy `x` of rank `source` to every rank, in place; return it."""
    if world_size() > 1:
        dist.broadcast(x, source)
    return x


def data_parallel(module: nn.Module, compress: str = "off") -> nn.Module:
    """Return `module` with gradients averaged over ranks; `module` itself in one process.

    Forward passes do not broadcast buffers. Queues are equal on all ranks by construction, and
    `broadcast_buffers` copies the batch norm statistics once an epoch. Gradients are views of DDP's
    buckets, which saves a copy of them.

    Args:
        module: the module to train.
        compress: "bf16": exchange gradients in bf16, half as many bytes. "off": exchange them
            as they are.
    """
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        # newer versions of PyTorch have renamed this option; older ones know only this name
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        ddp = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    if compress == "bf16":
        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Return `module` with synchronized batch norm, which normalizes over all ranks' batches.

    In one process, return `module` itself. It may be changed in place.
    """
    if world_size() == 1:
        return module
    norms = [
        child for child in module.modules() if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    if device.type != "cuda":
        for norm in norms:
            norm.__class__ = _synced(type(norm))
        return module
    if all(type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) for norm in norms):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    # timm's function keeps the activations inside its batch norms
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(module)


class _SyncBatchNorm:
    """A mixin that synchronizes batch norm on the CPU, where torch.nn.SyncBatchNorm does not run.

    The other base class is a batch norm of torch, or of timm with its activation inside.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape = (1, -1, *[1] * (x.dim() - 2))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = world_size() * x.numel() / x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)  # at least float32, also under autocast
        mean = _AllReduce.apply(x.sum(axes, dtype=wide)) / count
        centered = x - mean.view(shape)
        variance = _AllReduce.apply(centered.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        out = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        out = out.to(x.dtype)
        return self.act(self.drop(out)) if "act" in self._modules else out  # timm joins both


class _AllReduce(torch.autograd.Function):
    """A sum over ranks with a backward pass that sums the gradients over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return all_reduce_sum(gradient.clone())


@functools.cache
def _synced(norm: type[nn.Module]) -> type[nn.Module]:
    """Return the synchronized version of the batch norm class `norm`."""
    return type(norm.__name__, (_SyncBatchNorm, norm), {})


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers, such as batch norm's running statistics, to every rank.

    Checkpoints contain the buffers of rank 0.
    """
    for buffer in model.buffers():
        broadcast(buffer, 0)


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's `value`, any object that can be pickled, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait until every rank has called this function."""
    if world_size() > 1:
        dist.barrier()


# shuffled BN (MoCo, section 3.3): shuffle the joint batch, encode the keys, unshuffle the features


def shuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """Return this rank's B samples of the shuffled joint batch.

    Slot j holds sample `permutation[rank * B + j]`. The exchange is all-to-all: each rank receives
    B samples, not W * B.

    Args:
        x: this rank's batch, [B, ...].
        permutation: [W * B], on the CPU, the same on all ranks.
    """
    n, w, r = len(x), world_size(), rank()
    if w == 1:
        return x[devices.to_device(permutation, x.device)]
    owner = permutation.div(n, rounding_mode="floor").view(w, n)  # [destination, slot]
    # each destination receives its samples in the order of its slots
    send = [permutation.view(w, n)[d][owner[d] == r] - r * n for d in range(w)]
    # each arriving sample's slot
    order = torch.cat([(owner[r] == s).nonzero().squeeze(1) for s in range(w)])
    sent = x[devices.to_device(torch.cat(send), x.device)].contiguous()
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(
        arrived, sent, owner[r].bincount(minlength=w).tolist(), [len(s) for s in send]
    )
    return arrived[devices.to_device(order.argsort(), x.device)]


def unshuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """Return the features of the joint batch, [W * B, C], in the order before `shuffle`.

    Every rank gets the features of all ranks, because each rank keeps a copy of the queue. The
    features of this rank's own samples are at indices rank * B to (rank + 1) * B - 1.

    Args:
        x: features of this rank's shuffled samples, [B, C].
        permutation: the permutation given to `shuffle`, [W * B].
    """
    return all_gather(x)[devices.to_device(permutation.argsort(), x.device)]
