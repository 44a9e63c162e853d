"""MoCo v3: the keys of the batch as negatives, and a predictor (Chen et al., arXiv 2104.02057)."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import Method, rising_momentum
from moco.builder.negatives import batch_mixture
from moco.loss.contrastive import (
    contrast_accuracy,
    feature_statistics,
    normalize,
    synthetic_hardness,
)
from moco.loss.in_batch import in_batch_info_nce
from moco.rng import Progress
from moco.sections_negatives import Schedule


class MoCoV3(Method):
    """MoCo v3: the queries of each view against the keys of the other view in the joint batch.

    The queries come from the encoder and a predictor, the keys from the encoder's moving average.
    The modules have the names of the authors' code, so checkpoints are exchangeable.

    Args:
        encoder: the encoder [B, 3, H, W] -> [B, C]; its last layer is the projection head.
        predictor: the prediction head [B, C] -> [B, C]. It has no moving average.
        m: momentum of the moving average, in [0, 1].
        rises: whether the momentum rises from m along a half cosine, to 1 after the last step.
        T: softmax temperature.
        synthetic: synthetic negatives, made from the hardest keys of the batch.
    """

    sync_batch_norm = True

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        m: float = 0.99,
        rises: bool = False,
        T: float = 1.0,
        synthetic: Schedule = Schedule(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.m, self.rises, self.T, self.synthetic = m, rises, T, synthetic
        self.base_encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor
        self._progress = Progress()

    @property
    def encoder(self) -> nn.Module:
        """Return the encoder to evaluate."""
        return self.base_encoder

    @property
    def query_and_key(self) -> tuple[nn.Module, nn.Module]:
        """Return the encoder with its predictor, and the encoder's moving average."""
        return nn.Sequential(self.base_encoder, self.predictor), self.momentum_encoder

    @staticmethod
    def negatives_of_batch(images: int) -> int:
        """Return the number of keys of the other images."""
        return images - 1

    @property
    def grad_norm_modules(self) -> dict[str, nn.Module]:
        """Return the trainable modules, by their names in the log."""
        return {"encoder": self.base_encoder, "predictor": self.predictor}

    def parameter_groups(self, lr: float, wd: float) -> list[dict[str, Any]]:
        """Return one parameter group. With AdamW, biases and norms decay, too, as in the paper."""
        return [{**group, "decay_all": True} for group in super().parameter_groups(lr, wd)]

    def forward(
        self, views: Sequence[Tensor], index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both directions' losses, and their mean metrics.

        Args:
            views: two views, each [B, 3, H, W].
            index: unused.
            progress: position in the run; fixes the momentum, and seeds random numbers.
        """
        self._progress = progress
        q = [normalize(self.predictor(self.base_encoder(view))) for view in views]
        with torch.no_grad():
            k = [normalize(self.momentum_encoder(view)) for view in views]
        with torch.autocast(q[0].device.type, enabled=False):
            loss_1, metrics_1 = self.direction(q[0], k[1], progress, 0)
            loss_2, metrics_2 = self.direction(q[1], k[0], progress, 1)
        metrics = {name: (metrics_1[name] + metrics_2[name]) / 2 for name in metrics_1}
        return loss_1 + loss_2, metrics

    def direction(
        self, q: Tensor, k: Tensor, progress: Progress, counter: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of one direction.

        Accuracy and hardness count only keys as negatives. Each type of synthetic negative has a
        hardness of its own.

        Args:
            q: normalized queries of one view, [B, C].
            k: normalized keys of the other view, [B, C], without gradient.
            progress: position in the run.
            counter: index of the direction, so that each draws its own random numbers.
        """
        first = distributed.rank() * len(q)
        keys = distributed.all_gather(k)
        similarity = q @ keys.T  # [B, W B]
        mixture, synthetic = None, None
        if config := self.synthetic.at(progress):
            own = torch.zeros_like(similarity, dtype=torch.bool)
            own.diagonal(first).fill_(True)
            mixture = batch_mixture(config, q, keys, similarity, own, progress, counter)
            synthetic = mixture.dot(q, similarity) / self.T + math.log(mixture.weight)
        with torch.no_grad():
            positive = similarity.diagonal(first)  # [B], of each query and its key
            negative = similarity.clone()
            negative.diagonal(first).fill_(-torch.inf)
            metrics = {
                **contrast_accuracy(positive, negative),
                **feature_statistics(q, positive, negative.amax(1)),
                **synthetic_hardness(mixture),
            }
        return in_batch_info_nce(similarity, first, self.T, synthetic), metrics

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the momentum after the step, and the numbers of synthetic negatives per query."""
        momentum = rising_momentum(self.m, progress) if self.rises else self.m
        return {"momentum": momentum, **self.synthetic.values(progress)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the weights of the moving average. Its batch norm keeps its own statistics.

        The authors' code updates them at the start of a step, between queries and keys. Both give
        the same keys: this update has the momentum of the next step, and the keys of that step are
        the first to use its weights.
        """
        average = list(self.momentum_encoder.parameters())
        online = list(self.base_encoder.parameters())
        m = self.schedules(self._progress)["momentum"]
        torch._foreach_lerp_(average, online, 1 - m)

    def reset_copies(self) -> None:
        """Copy the encoder to its moving average."""
        self.momentum_encoder.load_state_dict(self.base_encoder.state_dict())
