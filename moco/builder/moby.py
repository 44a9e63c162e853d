"""Transformers that predict either view from the other: MoBY (Xie et al., arXiv 2105.04553), SynCo-v2, BYOL (arXiv 2006.07733).

An online encoder, projector and predictor train. A target encoder and projector are their moving average; its momentum rises to 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moco import distributed
from moco.builder.base import OnlineAndTarget, enqueue
from moco.builder.synco import SyntheticNegatives
from moco.loss.contrastive import bank_info_nce, contrast_accuracy, feature_statistics, normalize
from moco.loss.synthetic import Mixture, Synthetic, draw, hardest, mix
from moco.rng import NEGATIVES, Progress
from moco.sections import AVERAGE, ENTRIES, LAYERS, NATURAL, TEMPERATURE, WIDTH, option


@dataclass(frozen=True)
class Networks:
    """The online and the target network."""

    TITLE: ClassVar[str] = "online and target network"
    moco_m: float | None = option(
        None,
        "momentum of the target at the first step; 1 at the last",
        range=AVERAGE,
        unset="the method's own",
    )
    online_drop_path: float | None = option(
        None,
        "stochastic depth of the online encoder",
        range="[0, 1)",
        metavar="P",
        unset="0.2 of the ViTs and Swins by short name, else 0",
    )
    target_drop_path: float = option(
        0.0, "stochastic depth of the target encoder", range="[0, 1)", metavar="P"
    )
    stop_grad_conv1: bool = option(False, "keep the patch projection as it begins")
    proj_layers: int = option(2, "linear layers of the projector", range=LAYERS)
    pred_layers: int = option(2, "linear layers of the predictor", range=LAYERS)
    mlp_dim: int = option(4096, "hidden width of projector and predictor", range=WIDTH)
    moco_dim: int = option(256, "feature size", range=WIDTH)


@dataclass(frozen=True)
class Contrast:
    """The negatives of MoBY and SynCo-v2."""

    TITLE: ClassVar[str] = "contrast (moby, synco)"
    queue: int = option(4096, "entries in each view's queue", range=ENTRIES, metavar="K")
    moco_t: float = option(0.2, "softmax temperature", range=TEMPERATURE, metavar="T")


@dataclass(frozen=True)
class Synthetics(SyntheticNegatives):
    """The synthetic negatives, and in which epochs there are any."""

    TITLE: ClassVar[str] = "synthetic negatives (synco)"
    synthetic_first: int = option(
        30, "first epoch with synthetic negatives", range=NATURAL, metavar="EPOCH"
    )
    synthetic_last: int = option(
        100, "first epoch without them again", range=NATURAL, metavar="EPOCH"
    )


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
