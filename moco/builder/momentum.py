"""MoCo: a momentum encoder, shuffled BN and a queue of keys (He et al., arXiv 1911.05722; v2: arXiv 2003.04297)."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.loss.contrastive import bank_info_nce, contrast_accuracy, spread, unit
from moco.loss.synthetic import Mixture, hardest
from moco.rng import SHUFFLE, Progress

MIN_BN_GROUP = 8  # images; batch statistics of fewer are useless


def bn_groups(splits: int, images: int) -> int:
    """Return into how many groups batch norm splits a batch: `splits`, or fewer for a small batch."""
    return max(1, min(splits, images // MIN_BN_GROUP))


class _SplitBatchNorm:
    """A mixin for torch's batch norms: normalizes `splits` groups of a training batch separately.

    This gives the batch statistics of as many GPUs. The running statistics are the mean of those of
    the groups, as in MoCo's demo on CIFAR-10.
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
        return out

    def group_by_group(self, x: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `x` normalized, and the running means and variances after each group, [splits, C]."""
        means, variances = (running.repeat(splits, 1) for running in (self.running_mean, self.running_var))
        sizes = [len(x) // splits + (group < len(x) % splits) for group in range(splits)]
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.split(sizes), means, variances, strict=True)
        ]
        return torch.cat(parts), means, variances

    def groups_as_channels(self, x: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `group_by_group` does by one batch norm, for groups of equal size.

        To this batch norm, the channels of the second group are further channels of the first
        group's images, and so on. That is fewer operations, but two more copies of `x`. A GPU takes
        .5 to .7 of the time of `group_by_group`, for small tensors and for large ones.
        """
        n, channels, *spatial = x.shape
        # [N, C, H, W] -> [N / splits, splits C, H, W]; the channels are the last dimension in memory
        wide = x.movedim(1, -1).reshape(splits, -1, channels).transpose(0, 1)
        wide = wide.reshape(n // splits, *spatial, splits * channels).movedim(-1, 1)
        means, variances = (running.repeat(splits) for running in (self.running_mean, self.running_var))
        weight, bias = self.weight.repeat(splits), self.bias.repeat(splits)
        wide = F.batch_norm(wide, means, variances, weight, bias, True, self.momentum, self.eps)
        out = wide.movedim(1, -1).reshape(-1, splits, channels).transpose(0, 1)
        out = out.reshape(n, *spatial, channels).movedim(-1, 1)
        return out, means.view(splits, channels), variances.view(splits, channels)


_SPLIT = {kind: type(kind.__name__, (_SplitBatchNorm, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d)}


def split_batch_norm(net: nn.Module, splits: int) -> None:
    """Let every batch norm of `net` normalize `splits` groups of a batch separately.

    There are fewer groups if they would have fewer than `MIN_BN_GROUP` images.
    """
    for module in net.modules():
        if type(module) in _SPLIT:
            module.__class__, module.splits = _SPLIT[type(module)], splits


class MovingAverage(nn.Module):
    """An encoder that trains, `encoder_q`, and its exponential moving average `encoder_k`.

    Args:
        encoder: makes one encoder [B, 3, H, W] -> [B, C].
        m: momentum of the average, in [0, 1].
    """

    def __init__(self, encoder: Callable[[], nn.Module], m: float):
        super().__init__()
        self.m = m
        self.encoder_q = encoder()
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """The encoder that evaluation uses."""
        return self.encoder_q

    # The encoder with its projection head: the same network, because the head is its last layer.
    embedding = encoder

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the average follows."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)


class QueryAndKey(MovingAverage):
    """Queries from `encoder_q`, keys from `encoder_k` under shuffled BN: what MoCo and AdCo share.

    Args:
        encoder, m: `MovingAverage`'s.
        bn_splits: with one process, groups of a shuffled batch over which the key encoder's BN runs.
        bn_splits_query: whether the query encoder's BN also runs over `bn_splits` groups.
    """

    def __init__(self, encoder: Callable[[], nn.Module], m: float, bn_splits: int, bn_splits_query: bool = False):
        super().__init__(encoder, m)
        if distributed.world() == 1:
            for net in (self.encoder_k, self.encoder_q)[: 1 + bn_splits_query]:
                split_batch_norm(net, bn_splits)

    @torch.no_grad()
    def keys(self, images: Tensor, progress: Progress, *counters: int) -> Tensor:
        """Unit keys of the joint batch in its own order, [W B, C], under shuffled BN.

        Images change places by a permutation that all ranks share and every pass draws anew, so that a key's BN group
        is not its query's. With a single process, batch norm runs over groups of the shuffled batch
        instead. Give each view other `counters`, so that their permutations differ.
        """
        generator = progress.generator(SHUFFLE, "cpu", *counters)
        permutation = torch.randperm(distributed.world() * len(images), generator=generator)
        return distributed.unshuffle(unit(self.encoder_k(distributed.shuffle(images, permutation))), permutation)


class MoCo(QueryAndKey):
    """InfoNCE of queries and keys, against a queue of the latest keys.

    Args:
        encoder, m, bn_splits, bn_splits_query: `QueryAndKey`'s.
        dim: feature size C.
        K: rows of the queue.
        T: softmax temperature.
        symmetric: whether each view has queries, compared with the keys of the other view.
            The losses of both directions are added, and the keys of both views enter the queue.
    """

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        bn_splits: int = 8,
        bn_splits_query: bool = False,
        symmetric: bool = False,
    ):
        super().__init__(encoder, m, bn_splits, bn_splits_query)
        self.K, self.T, self.symmetric = K, T, symmetric
        self.register_buffer("queue", unit(torch.randn(K, dim)))  # [K, C]
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._new_keys: list[Tensor] = []

    def forward(self, views: Sequence[Tensor], index: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of this rank's batch.

        Args:
            views: query view and key view, each [B, 3, H, W].
            index: each sample's place in the data set, [B]; unused.
            progress: where in the run this pass stands; fixes the shuffle.
        """
        pairs = [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]  # query view, key view
        found, keys = [], {}
        for direction, (query, key) in enumerate(pairs):
            q = unit(self.encoder_q(views[query]))  # [B, C]
            keys[key] = k = self.keys(views[key], progress, *[direction] * direction)  # [W B, C]
            own = k[distributed.rank() * len(q) :][: len(q)]
            with torch.autocast(q.device.type, enabled=False):
                found.append(self.contrast(q, own, progress, direction))
        self._new_keys += [keys[view] for view in sorted(keys)]
        losses, metrics = zip(*found, strict=True)
        return torch.stack(losses).sum(), {name: torch.stack([one[name] for one in metrics]).mean() for name in metrics[0]}

    def contrast(self, q: Tensor, k: Tensor, progress: Progress, direction: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the InfoNCE loss of unit queries and keys [B, C], and metrics.

        The metrics count only the queue's entries as negatives, not synthetic ones. `direction` is
        the index, from 0, of the pair of views in this pass: each pair has random draws of its own.
        """
        positive = (q * k).sum(1)  # [B]
        with torch.no_grad():
            similarity = q @ self.queue.T  # [B, K]
            hard, mixture = self.negatives(q, similarity, progress, direction)
            nearest = similarity.gather(1, hard[:, :5])
            metrics = {**contrast_accuracy(positive, nearest), **spread(q, positive, nearest[:, 0])}
        return bank_info_nce(q, positive, self.queue, similarity, self.T, mixture), metrics

    def negatives(self, q: Tensor, similarity: Tensor, progress: Progress, direction: int = 0) -> tuple[Tensor, Mixture | None]:
        """The queries' hardest rows of the queue, five at least, and what they face beside the queue.

        Given their similarities to it, [B, K].
        """
        return hardest(similarity, min(5, self.K)), None

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the key encoder follows, the step's keys enter the queue."""
        super().after_step()
        for keys in self._new_keys:
            self.enqueue(keys)
        self._new_keys.clear()

    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with `keys` [n, C]; any n, the queue wraps around."""
        enqueue(self.queue, self.queue_ptr, keys)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> Tensor:
    """Overwrite the rows of `queue` [K, C] from `pointer` [1] on, which moves along, with `keys` [n, C]; any n, it wraps around.

    Returns where each key belongs, [n]; with n above K only the last K keys stay.
    """
    n, K = len(keys), len(queue)
    places = (pointer + torch.arange(n, device=keys.device)) % K
    queue[places[-K:]] = keys[-K:]
    pointer.add_(n).remainder_(K)
    return places
