"""Batch norm over groups of a batch, which simulates on one GPU the batch norms of several GPUs."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_BN_GROUP = 8  # images; batch statistics of fewer images are too noisy


def bn_groups(splits: int, images: int) -> int:
    """Return the number of groups for batch norm: `splits`, or fewer for a small batch.

    Args:
        splits: the requested number of groups.
        images: images in the batch.
    """
    return max(1, min(splits, images // MIN_BN_GROUP))


class _SplitBatchNorm:
    """A mixin for batch norms that normalizes `splits` groups of a batch separately.

    Each group stands for the batch of one GPU. The running statistics are the mean of those of the
    groups, as in MoCo's demo on CIFAR-10. The other base class is a batch norm of torch, or of timm
    with its activation inside.
    """

    splits = 1

    def forward(self, x: Tensor) -> Tensor:
        splits = bn_groups(self.splits, len(x))
        if not self.training or splits == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        together = x.device.type != "cpu" and len(x) % splits == 0
        normalize = self.groups_as_channels if together else self.group_by_group
        out, means, variances = normalize(x, splits)
        torch.mean(means, 0, out=self.running_mean)
        torch.mean(variances, 0, out=self.running_var)
        return self.act(self.drop(out)) if "act" in self._modules else out  # timm's include both

    def group_by_group(self, x: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `x` normalized, and each group's running means and variances, [splits, C]."""
        means, variances = (
            running.repeat(splits, 1) for running in (self.running_mean, self.running_var)
        )
        sizes = [len(x) // splits + (group < len(x) % splits) for group in range(splits)]
        parts = [
            F.batch_norm(
                part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps
            )
            for part, mean, variance in zip(x.split(sizes), means, variances, strict=True)
        ]
        return torch.cat(parts), means, variances

    def groups_as_channels(self, x: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `group_by_group`, by a single batch norm over groups of equal size.

        The groups become further channels of the first group's images: fewer operations, but two
        more copies of `x`. On a GPU it takes 50 to 70 % of the time of `group_by_group`.
        """
        n, channels, *spatial = x.shape
        # [N, C, H, W] -> [N / splits, splits C, H, W], with the channels last in memory
        wide = x.movedim(1, -1).reshape(splits, -1, channels).transpose(0, 1)
        wide = wide.reshape(n // splits, *spatial, splits * channels).movedim(-1, 1)
        means, variances = (
            running.repeat(splits) for running in (self.running_mean, self.running_var)
        )
        weight, bias = (
            None if scale is None else scale.repeat(splits) for scale in (self.weight, self.bias)
        )
        wide = F.batch_norm(wide, means, variances, weight, bias, True, self.momentum, self.eps)
        out = wide.movedim(1, -1).reshape(-1, splits, channels).transpose(0, 1)
        out = out.reshape(n, *spatial, channels).movedim(-1, 1)
        return out, means.view(splits, channels), variances.view(splits, channels)


@functools.cache
def _split(norm: type[nn.Module]) -> type[nn.Module]:
    """Return the version of the batch norm class `norm` that normalizes groups."""
    return type(norm.__name__, (_SplitBatchNorm, norm), {})


def split_batch_norm(net: nn.Module, splits: int) -> None:
    """Make every batch norm of `net` normalize `splits` groups of a batch separately, in place.

    There are fewer groups if they would have fewer than `MIN_BN_GROUP` images each.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__, module.splits = _split(type(module)), splits
