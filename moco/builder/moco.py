"""MoCo: a momentum encoder, shuffled BN and a queue of keys (He et al., arXiv 1911.05722).

Version 2 (arXiv 2003.04297) only changes the head, the views, the temperature and the schedule.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import QueryAndKey, enqueue
from moco.builder.negatives import mixture
from moco.loss.bank import bank_log_sum, mixed_log_sum
from moco.loss.contrastive import (
    Anchors,
    InfoNCE,
    feature_statistics,
    normalize,
    rank_accuracy,
    synthetic_hardness,
)
from moco.loss.hardest import hardest
from moco.loss.synthetic import Synthetic
from moco.rng import Progress


def contrast(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    T: float,
    loss: InfoNCE,
    synthetic: Synthetic | None,
    progress: Progress,
    *counters: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of queries against a queue and synthetic negatives, and metrics.

    Accuracy and hardness count only the queue's entries as negatives. Each type of synthetic
    negative has a hardness of its own.

    Args:
        q: normalized queries, [B, C].
        k: their normalized keys, [B, C].
        queue: normalized entries, [K, C].
        T: softmax temperature.
        loss: the loss of a query.
        synthetic: the config of the synthetic negatives; None: there are none.
        progress: position in the run; seeds the synthetic negatives.
        counters: numbers that tell several calls in a step apart.
    """
    positive = (q * k).sum(1)  # [B]
    mixed = above = top = None
    if synthetic is not None:
        with torch.no_grad():
            similarity = q @ queue.T  # [B, K]
            hard = hardest(similarity, max(synthetic.n_hard, min(5, len(queue))))
            mixed = mixture(synthetic, q, queue, similarity, hard, progress, *counters)
            nearest = similarity.gather(1, hard[:, :5])
            above, top = (nearest > positive[:, None]).sum(1), nearest[:, 0]

    def log_sums(*powers: float) -> list[Tensor]:
        nonlocal above, top
        sums = []
        for i, power in enumerate(powers, 1):
            if mixed is None:
                one, *numbers = bank_log_sum(q, positive, queue, T / power)
                if power == max(powers):  # `hardest` has the smallest rounding error
                    above, top = numbers
            else:
                # `mixed_log_sum` overwrites the similarities
                copy = similarity if i == len(powers) else similarity.clone()
                one = mixed_log_sum(q, queue, copy, T / power, mixed)
            sums.append(one)
        return sums

    def joint_positive() -> Tensor:
        return distributed.all_gather_with_gradient(positive)

    losses, of_loss = loss(Anchors(positive, T, log_sums, len(queue), joint_positive))
    metrics = {
        **rank_accuracy(above),
        **feature_statistics(q, positive, top),
        **synthetic_hardness(mixed),
        **of_loss,
    }
    return losses.mean(), metrics


class MoCo(QueryAndKey):
    """MoCo: InfoNCE of queries and keys, against a queue of the latest keys.

    Args:
        encoder, m, bn_splits, bn_splits_query: see `QueryAndKey`.
        dim: feature size C.
        K: entries of the queue.
        T: softmax temperature.
        symmetric: whether each view has queries, compared with the keys of the other view.
            The losses of both directions are added, and the keys of both views enter the queue.
        loss: the loss of a query. The negatives are the queue's K entries. In the papers of
            DCL, the debiased loss and HCL, they are the other images of the batch. With synthetic
            negatives, the loss must be `InfoNCE` or `Decoupled`, which add the exponentials of
            all negatives. `Debiased` needs negatives that are real images.
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
        loss: InfoNCE | None = None,
    ):
        super().__init__(encoder, m, bn_splits, bn_splits_query)
        self.K, self.T, self.symmetric = K, T, symmetric
        self.loss = loss or InfoNCE()
        self.register_buffer("queue", normalize(torch.randn(K, dim)))  # [K, C]
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._new_keys: list[Tensor] = []

    def forward(
        self,
        views: Sequence[Tensor],
        index: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of this rank's batch.

        Args:
            views: query view and key view, each [B, 3, H, W].
            index: unused.
            progress: position in the run; seeds the shuffle.
        """
        pairs = [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]  # query view, key view
        found, keys = [], {}
        for direction, (query, key) in enumerate(pairs):
            q = normalize(self.encoder_q(views[query]))  # [B, C]
            keys[key] = k = self.keys(views[key], progress, *[direction] * direction)  # [W B, C]
            own = k[distributed.rank() * len(q) :][: len(q)]
            with torch.autocast(q.device.type, enabled=False):
                found.append(self.contrast(q, own, progress, direction))
        self._new_keys += [keys[view] for view in sorted(keys)]
        losses, metrics = zip(*found, strict=True)
        return torch.stack(losses).sum(), {
            name: torch.stack([one[name] for one in metrics]).mean() for name in metrics[0]
        }

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the key encoder's momentum, and the settings of the loss that change."""
        changing = self.loss.schedules(progress.epoch, progress.epochs)
        return {**super().schedules(progress), **changing}

    def contrast(
        self, q: Tensor, k: Tensor, progress: Progress, direction: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of one direction: by default InfoNCE (MoCo, equation 1).

        Args:
            q: normalized queries, [B, C].
            k: their normalized keys, [B, C].
            progress: position in the run.
            direction: index of the pair of views, so that each draws its own random numbers.
        """
        loss, config = self.loss.at(progress.epoch, progress.epochs), self.synthetic.at(progress)
        counters = [direction] * direction
        return contrast(q, k, self.queue, self.T, loss, config, progress, *counters)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the key encoder, and add this step's keys to the queue."""
        super().after_step()
        for keys in self._new_keys:
            self.enqueue(keys)
        self._new_keys.clear()

    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest entries of the queue with `keys` [n, C]."""
        enqueue(self.queue, self.queue_ptr, keys)
