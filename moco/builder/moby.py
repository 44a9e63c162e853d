"""Transformers that predict either view from the other: MoBY (Xie et al., arXiv 2105.04553), SynCo-v2, BYOL (arXiv 2006.07733).

An online encoder, projector and predictor train. A target encoder and projector are their moving average; its momentum rises to 1.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.momentum import enqueue
from moco.loss.contrastive import bank_info_nce, contrast_accuracy, spread, unit
from moco.loss.synthetic import Mixture, Synthetic, draw, hardest, mix
from moco.rng import NEGATIVES, Progress


class OnlineAndTarget(nn.Module, ABC):
    """What the three methods share.

    Args:
        encoder: the online backbone [B, 3, H, W] -> [B, D] without a head, which trains.
        encoder_k: the target's, which may differ in its stochastic depth; it takes the online one's weights.
        projector: the head D -> C; the target has a copy.
        predictor: the online head C -> C.
        m: momentum of the target at the first step, in [0, 1]; by a half cosine it is 1 at the last.
    """

    def __init__(self, encoder: nn.Module, encoder_k: nn.Module, projector: nn.Module, predictor: nn.Module, m: float = 0.99):
        super().__init__()
        self.m = m
        self.encoder, self.projector, self.predictor = encoder, projector, predictor
        self.encoder_k, self.projector_k = encoder_k, copy.deepcopy(projector)
        self.encoder_k.load_state_dict(encoder.state_dict())
        for target in (self.encoder_k, self.projector_k):
            target.requires_grad_(False)
        self._progress = Progress()

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What trains, by the names that the log has for it."""
        return {"encoder": self.encoder, "projector": self.projector, "predictor": self.predictor}

    @property
    def embedding(self) -> nn.Module:
        """Return the encoder followed by the projection head."""
        return nn.Sequential(self.encoder, self.projector)

    def forward(self, views: Sequence[Tensor], index: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of this rank's batch.

        Args:
            views: two, each [B, 3, H, W]; either is predicted from the other.
            index: unused.
            progress: where in the run this pass stands: fixes the momentum and the draws.
        """
        self._progress = progress
        p = [unit(self.predictor(self.projector(self.encoder(view)))) for view in views]  # [B, C] each
        with torch.no_grad():
            k = [unit(self.projector_k(self.encoder_k(view))) for view in views]
        with torch.autocast(p[0].device.type, enabled=False):
            return self.contrast(p, k, progress)

    @abstractmethod
    def contrast(self, p: list[Tensor], k: list[Tensor], progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the two views' predictions and target features, unit rows [B, C] each."""

    def momentum(self) -> float:
        """The target's, after the step that the last pass belongs to."""
        steps = self._progress.steps_per_epoch * self._progress.epochs
        passed = self._progress.step / max(1, steps - 1)
        return 1 - (1 - self.m) * (1 + math.cos(math.pi * passed)) / 2

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the target follows."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = [*self.encoder_k.parameters(), *self.projector_k.parameters()]
        torch._foreach_lerp_(target, online, 1 - self.momentum())


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
            self.register_buffer(f"queue{view}", unit(torch.randn(K, dim)))  # [K, C], of this view's keys
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._new_keys: list[list[Tensor]] = []

    def contrast(self, p: list[Tensor], k: list[Tensor], progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        self._new_keys.append([distributed.all_gather(keys) for keys in k])
        one, of_one = self.direction(p[0], k[1], self.queue2, progress, 0)
        other, of_other = self.direction(p[1], k[0], self.queue1, progress, 1)
        return one + other, {name: (of_one[name] + of_other[name]) / 2 for name in of_one}

    def direction(self, q: Tensor, k: Tensor, queue: Tensor, progress: Progress, counter: int) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE and metrics of queries and their keys [B, C] against one queue; `counter` tells the directions' draws apart."""
        positive = (q * k).sum(1)  # [B]
        with torch.no_grad():
            similarity = q @ queue.T  # [B, K]
            mixture = self.synthetic(q, queue, similarity, progress, counter)
            metrics = {**contrast_accuracy(positive, similarity), **spread(q, positive, similarity.amax(1))}
        return bank_info_nce(q, positive, queue, similarity, self.T, mixture), metrics

    def synthetic(self, q: Tensor, queue: Tensor, similarity: Tensor, progress: Progress, counter: int) -> Mixture | None:
        """The negatives that join the queue's in this epoch."""
        if not self.kind.total or progress.epoch not in self.epochs:
            return None
        generator = progress.generator(NEGATIVES, q.device, distributed.rank(), counter)
        hard = hardest(similarity, self.kind.n_hard)
        return mix(q, queue, similarity, hard, self.kind, draw(self.kind, *q.shape, generator, q.dtype))

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the target follows, either view's keys enter its queue."""
        super().after_step()
        for keys in self._new_keys:
            pointer = self.queue_ptr.clone()
            enqueue(self.queue1, pointer, keys[0])
            enqueue(self.queue2, self.queue_ptr, keys[1])
        self._new_keys.clear()


class BYOL(OnlineAndTarget):
    """Predictions come near the other view's target features; there are no negatives."""

    def contrast(self, p: list[Tensor], k: list[Tensor], progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over both directions of 2 - 2 cos (BYOL, equation 2)."""
        cosine = torch.cat([(p[0] * k[1]).sum(1), (p[1] * k[0]).sum(1)])
        return 2 - 2 * cosine.mean(), {"cosine": cosine.detach().mean(), **spread(torch.cat(p), cosine)}
