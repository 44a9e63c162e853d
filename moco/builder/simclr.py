"""SimCLR (Chen et al., arXiv 2002.05709), and the other losses of a batch on its encoder.

There is one encoder. The negatives are the other images of the batch, in both views.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import Method
from moco.builder.negatives import batch_mixture
from moco.loss.contrastive import (
    InfoNCE,
    contrast_accuracy,
    feature_statistics,
    normalize,
    synthetic_hardness,
)
from moco.loss.global_contrastive import Pairs, compare
from moco.loss.synthetic import Synthetic
from moco.rng import Progress
from moco.sections_negatives import Schedule


class SimCLR(Method):
    """SimCLR: two views are compared with the joint batch of all ranks.

    Args:
        encoder: creates the encoder [B, 3, H, W] -> [B, C].
        T: softmax temperature.
        loss: the loss of an anchor: `InfoNCE` is SimCLR's NT-Xent; also DCL, debiased, HCL.
        local_gradient: whether features get the gradient of their own rank's loss only, as in
            SogCLR's PyTorch code. Otherwise, they get that of all ranks' losses.
        synthetic: synthetic negatives, made from the hardest negatives of the batch. The loss must
            be `InfoNCE` or `Decoupled`.
    """

    sync_batch_norm = True

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        T: float = 0.1,
        loss: InfoNCE | None = None,
        local_gradient: bool = False,
        synthetic: Schedule = Schedule(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.T, self.loss, self.local_gradient = T, loss or InfoNCE(), local_gradient
        self.synthetic = synthetic
        self.base_encoder = encoder()

    @property
    def encoder(self) -> nn.Module:
        """Return the encoder to evaluate."""
        return self.base_encoder

    @property
    def query_and_key(self) -> tuple[nn.Module, nn.Module]:
        """Return the encoder twice: queries and keys come from the same network."""
        return self.base_encoder, self.base_encoder

    @staticmethod
    def negatives_of_batch(images: int) -> int:
        """Return the number of features of both views of the other images."""
        return 2 * images - 2

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the settings of the loss that change, and the numbers of synthetic negatives."""
        changing = self.loss.schedules(progress.epoch, progress.epochs)
        return {**changing, **self.synthetic.values(progress)}

    def forward(
        self,
        views: Sequence[Tensor],
        index: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of this rank's batch.

        Args:
            views: two views, each [B, 3, H, W].
            index: index of each image in the training set, [B], in [0, N).
            progress: position in the run; fixes the settings of the loss that change, and seeds the
                synthetic negatives.
        """
        z = torch.stack([normalize(self.base_encoder(view)) for view in views])  # [2, B, C]
        with torch.autocast(z.device.type, enabled=False):
            return self.contrast(z, index, progress)

    def contrast(
        self, z: Tensor, index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of this rank's features.

        Args:
            z: normalized features of both views, [2, B, C].
            index: index of each image in the training set, [B].
            progress: position in the run.
        """
        mine = z.transpose(0, 1).contiguous()
        z_all = distributed.all_gather_with_gradient(mine, self.local_gradient)
        z_all = z_all.transpose(0, 1)  # [2, W B, C]
        pairs, hardness = compare(z, z_all, first=distributed.rank() * z.shape[1]), {}
        if config := self.synthetic.at(progress):
            pairs, hardness = add_synthetic(config, pairs, z, z_all.detach(), progress)
        loss, metrics = self.loss_of(pairs, index, progress)
        return loss, {**contrast_metrics(z, pairs), **hardness, **metrics}

    def loss_of(
        self, pairs: Pairs, index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this rank's anchors, and its own metrics.

        Args:
            pairs: similarities of the anchors to the joint batch.
            index: index of each anchor's image in the training set, [B].
            progress: position in the run.
        """
        loss = self.loss.at(progress.epoch, progress.epochs)
        losses, metrics = loss(pairs.anchors(self.T))  # [2, B]
        losses = losses.mean(1)
        return losses.sum() if loss.adds_views else losses.mean(), metrics


def add_synthetic(
    config: Synthetic, pairs: Pairs, z: Tensor, z_all: Tensor, progress: Progress
) -> tuple[Pairs, dict[str, Tensor]]:
    """Return `pairs` with synthetic negatives of each anchor, and the hardness of each type.

    They are made from the anchor's negatives in the batch. The gradient passes through them to the
    anchor, but not to the negatives that they are made from, as with MoCo's queue.

    Args:
        config: the number of negatives of each type, and their sizes.
        pairs: similarities of the anchors to the joint batch.
        z: normalized features of both views, [2, B, C].
        z_all: normalized features of the joint batch, [2, W B, C], without gradient.
        progress: position in the run.
    """
    found, hardness = [], []
    for view in (0, 1):
        bank = torch.cat([z_all[view], z_all[1 - view]])  # [2 W B, C], in the order of `others`
        others = pairs.others[view]
        mixture = batch_mixture(config, z[view], bank, others, pairs.own, progress, view)
        found.append(mixture.dot(z[view], z[view] @ bank.T))
        hardness.append(synthetic_hardness(mixture))
    pairs = replace(pairs, synthetic=torch.stack(found), weight=config.weight)
    return pairs, {name: (hardness[0][name] + hardness[1][name]) / 2 for name in hardness[0]}


@torch.no_grad()
def contrast_metrics(z: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """Return the contrast accuracy of both views, and the feature statistics of the first.

    Args:
        z: normalized features of both views, [2, B, C].
        pairs: their similarities to the joint batch.
    """
    others = pairs.others.masked_fill(pairs.own, -torch.inf)
    accuracy = contrast_accuracy(pairs.positive.flatten(), others.flatten(0, 1))
    return {**accuracy, **feature_statistics(z[0], pairs.positive[0], others[0].amax(1))}
