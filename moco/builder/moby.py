"""Transformers that predict either view from the other: MoBY (Xie et al., arXiv 2105.04553), SynCo-v2, BYOL (arXiv 2006.07733).

An online encoder, projector and predictor train. A target encoder and projector are their moving average; its momentum rises to 1.
"""

import torch
from torch import Tensor

from moco import distributed
from moco.builder.base import OnlineAndTarget, enqueue
from moco.loss.contrastive import bank_info_nce, contrast_accuracy, feature_statistics, normalize
from moco.loss.synthetic import Mixture, Synthetic, draw, hardest, mix
from moco.rng import NEGATIVES, Progress


class MoBY(OnlineAndTarget):
    """InfoNCE of either view's predictions and the other's target features, against a queue of the latter; both losses add up.

    With `kind`, it is SynCo-v2: synthetic negatives join either queue's from epoch `first` to before epoch `last`.

    Args:
        online_and_target: `OnlineAndTarget`'s arguments.
        dim: feature size C.
        K: rows of each queue.
        T: softmax temperature.
        kind: the synthetic negatives.
        first, last: epochs between which there are any.
    """

    def __init__(
        self,
        *online_and_target,
        dim: int = 256,
        K: int = 4096,
        T: float = 0.2,
        kind: Synthetic = Synthetic(),  # noqa: B008 (frozen)
        first: int = 30,
        last: int = 100,
    ):
        super().__init__(*online_and_target)
        self.T, self.kind, self.epochs = T, kind, range(first, last)
        for view in (1, 2):
            self.register_buffer(
                f"queue{view}", normalize(torch.randn(K, dim))
            )  # [K, C], of this view's keys
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._new_keys: list[list[Tensor]] = []

    def contrast(
        self, p: list[Tensor], k: list[Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._new_keys.append([distributed.all_gather(keys) for keys in k])
        one, of_one = self.direction(p[0], k[1], self.queue2, progress, 0)
        other, of_other = self.direction(p[1], k[0], self.queue1, progress, 1)
        return one + other, {name: (of_one[name] + of_other[name]) / 2 for name in of_one}

    def direction(
        self, q: Tensor, k: Tensor, queue: Tensor, progress: Progress, counter: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE and metrics of queries and their keys [B, C] against one queue; `counter` tells the directions' draws apart."""
        positive = (q * k).sum(1)  # [B]
        with torch.no_grad():
            similarity = q @ queue.T  # [B, K]
            mixture = self.synthetic(q, queue, similarity, progress, counter)
            metrics = {
                **contrast_accuracy(positive, similarity),
                **feature_statistics(q, positive, similarity.amax(1)),
            }
        return bank_info_nce(q, positive, queue, similarity, self.T, mixture), metrics

    def synthetic(
        self, q: Tensor, queue: Tensor, similarity: Tensor, progress: Progress, counter: int
    ) -> Mixture | None:
        """The negatives that join the queue's in this epoch."""
        if not self.kind.total or progress.epoch not in self.epochs:
            return None
        generator = progress.generator(NEGATIVES, q.device, distributed.rank(), counter)
        hard = hardest(similarity, self.kind.n_hard)
        return mix(
            q, queue, similarity, hard, self.kind, draw(self.kind, *q.shape, generator, q.dtype)
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the target follows, either view's keys enter its queue."""
        super().after_step()
        for keys in self._new_keys:
            pointer = self.queue_ptr.clone()
            enqueue(self.queue1, pointer, keys[0])
            enqueue(self.queue2, self.queue_ptr, keys[1])
        self._new_keys.clear()
