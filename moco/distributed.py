"""Ranks: what the processes exchange, the permutation behind shuffled BN, and batch norm over all of them."""

import functools
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from moco import devices

# torch 2.13 deprecates the older name
_all_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank() -> int:
    """This process's global rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0() -> bool:
    """Return whether this process speaks for the run: rank 0, also before the process group exists."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def world_size() -> int:
    """How many processes take part; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


# What the processes exchange. All of it is a plain copy where nothing is distributed.


def all_gather(x: Tensor) -> Tensor:
    """The rows of every rank's `x` [B, ...], in rank order: [W B, ...]. No gradient; B is the same on every rank."""
    if world_size() == 1:
        return x
    out = x.new_empty((world_size() * len(x), *x.shape[1:]))
    _all_gather_rows(out, x.contiguous())
    return out


def all_gather_uneven(x: Tensor) -> Tensor:
    """`all_gather` for ranks whose `x` may have different numbers of rows."""
    if world_size() == 1:
        return x
    sizes = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros((max(sizes) - len(x), *x.shape[1:]))])
    return torch.cat(
        [part[:n] for part, n in zip(all_gather(padded).chunk(world_size()), sizes, strict=True)]
    )


class _AllGather(torch.autograd.Function):
    """`all_gather` with gradient: what every rank's loss makes of this rank's rows, summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.n = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        return all_reduce_sum(gradient)[rank() * ctx.n :][: ctx.n]


def all_gather_with_gradient(x: Tensor) -> Tensor:
    """`all_gather` through which gradients pass, from every rank's loss to the rank that made the rows."""
    return x if world_size() == 1 else _AllGather.apply(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def data_parallel(module: nn.Module) -> nn.Module:
    """`module` with gradients averaged over ranks. Buffers stay each rank's own: queues are equal by construction, and
    `broadcast_buffers` shares BatchNorm's once an epoch.
    """
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        # newer versions of PyTorch have another name for the option, which older ones do not know
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False)


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch norm over the joint batch of all ranks in place of the rank's own; as it is for one process."""
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
    from timm.layers import (
        convert_sync_batchnorm,  # which keeps the activations that timm has inside its batch norms
    )

    return convert_sync_batchnorm(module)


class _SyncBatchNorm:
    """Before one of torch's batch norms, or timm's with its activation: statistics of the joint batch on a CPU, where
    torch.nn.SyncBatchNorm does not run.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape = (1, -1, *[1] * (x.dim() - 2))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = world_size() * x.numel() / x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)  # also under autocast
        mean = _AllReduce.apply(x.sum(axes, dtype=wide)) / count
        centred = x - mean.view(shape)
        variance = _AllReduce.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        out = (out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out).to(
            x.dtype
        )
        return self.act(self.drop(out)) if hasattr(self, "act") else out


class _AllReduce(torch.autograd.Function):
    """The sum over ranks, and of its gradients over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


@functools.cache
def _synced(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_SyncBatchNorm, kind), {})


def broadcast_buffers(model: nn.Module) -> None:
    """Make every rank's buffers (BatchNorm's running statistics) those of rank 0, which are the ones saved."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's `value`, any object that can be pickled, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


# Shuffled BN: the joint batch's samples change places, pass through the key encoder, and change back.


def shuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """This rank's part of the shuffled joint batch: slot j holds sample `permutation[rank B + j]`, x [B, ...].

    `permutation` [W B] lies on the CPU and is the same on all ranks. The exchange is all-to-all: each rank receives
    B samples, and not W B.
    """
    n, w, r = len(x), world_size(), rank()
    if w == 1:
        return x[devices.to_device(permutation, x.device)]
    owner = permutation.div(n, rounding_mode="floor").view(w, n)  # [destination, slot]
    # to each destination go my samples that it asked for, in the order of its slots
    send = [permutation.view(w, n)[d][owner[d] == r] - r * n for d in range(w)]
    order = torch.cat(
        [(owner[r] == s).nonzero().squeeze(1) for s in range(w)]
    )  # slot of each row as it arrives
    sent = x[devices.to_device(torch.cat(send), x.device)].contiguous()
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(
        arrived, sent, owner[r].bincount(minlength=w).tolist(), [len(s) for s in send]
    )
    return arrived[devices.to_device(order.argsort(), x.device)]


def unshuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """Undo `shuffle` for features: from each rank's shuffled x [B, C] the joint batch in its own order, [W B, C].

    Every rank gets all rows: the queue needs them. This rank's own are rows rank B to (rank + 1) B.
    """
    return all_gather(x)[devices.to_device(permutation.argsort(), x.device)]


def print_rank0(message: str) -> None:
    """Print one line, on rank 0 only, above any progress bar."""
    if is_rank0():
        tqdm.write(message)
        sys.stdout.flush()
