"""The losses of SimCLR (arXiv 2002.05709) and SogCLR (Yuan et al., arXiv 2202.12387).

Both compare each image's feature in one view with those of all other images of the joint batch, in
both views. The normalizer of SimCLR's loss is a sum over the batch, so its gradient is biased if
the batch is small. SogCLR keeps a moving average of each image's normalizer over its visits.
`moco/builder/simclr.py` and `sogclr.py` use this file. SimCLR's NT-Xent (equation 1) is `InfoNCE`
of these similarities.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moco.loss.contrastive import Anchors


@dataclass(frozen=True)
class Pairs:
    """The similarities of this process's n anchors, in each of two views, to the joint batch."""

    positive: Tensor  # [2, n] to the other view of the same image
    others: Tensor  # [2, n, 2m] to all m images in the anchor's view, then in the other view
    own: Tensor  # [n, 2m] True for the anchor's own image, which is not a negative
    joint_positive: Tensor  # [m] between the two views of each image of the joint batch
    synthetic: Tensor | None = None  # [2, n, M] to synthetic negatives of each anchor
    weight: float = 1.0  # factor of the exponentials of the synthetic negatives' logits

    def anchors(self, T: float) -> Anchors:
        """Return the similarities for the losses that need only log-sum-exps of the negatives."""
        logits = (self.others / T).masked_fill(self.own, -torch.inf)

        def log_sum(power: float) -> Tensor:
            natural = logits if power == 1 else power * logits
            if self.synthetic is None:
                return natural.logsumexp(2)
            synthetic = power / T * self.synthetic + math.log(self.weight)
            return torch.cat([natural, synthetic], 2).logsumexp(2)

        def log_sums(*powers: float) -> list[Tensor]:
            return [log_sum(power) for power in powers]

        negatives = self.others.shape[2] - 2
        return Anchors(self.positive, T, log_sums, negatives, lambda: self.joint_positive)


def compare(z: Tensor, z_all: Tensor, first: int) -> Pairs:
    """Return the similarities of this process's features to those of the joint batch.

    Args:
        z: normalized features of both views, [2, n, C].
        z_all: normalized features of the joint batch, [2, m, C]; `z` is part of it.
        first: index in the joint batch of this process's first image.
    """
    n, m = z.shape[1], z_all.shape[1]
    same = z @ z_all.transpose(1, 2)  # [2, n, m] within the view
    cross = z @ z_all.flip(0).transpose(1, 2)  # to the other view
    own = torch.zeros(n, m, dtype=torch.bool, device=z.device)
    own.diagonal(first).fill_(True)
    others, own = torch.cat([same, cross], 2), torch.cat([own, own], 1)
    return Pairs(cross.diagonal(first, 1, 2), others, own, (z_all[0] * z_all[1]).sum(1))


def dynamic_loss(
    pairs: Pairs, u: Tensor, temperature: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return SogCLR's loss and the new moving averages (algorithm 1).

    The gradient of this loss is SogCLR's gradient estimator times the temperature.

    Args:
        pairs: similarities of n anchors to the joint batch.
        u: moving average of mean_j exp(z_i.z_j / temperature) of each anchor's image, [n]. It is 0
            before the image's first visit, which sets it.
        temperature: divides every similarity, > 0.
        gamma: weight of the new value in the moving average, in (0, 1].

    Returns:
        the loss: the sum over views of mean_i(-z_i.z_i+ + mean_j w_ij z_i.z_j). The weights
            w_ij = exp(z_i.z_j / temperature) / u_i have no gradient, and u_i is this view's update.
        the mean of the two views' updates of u, [n].
    """
    with torch.no_grad():
        e = torch.exp(pairs.others / temperature).masked_fill_(pairs.own, 0)  # [2, n, 2m]
        negatives = e.shape[2] - 2
        now = e.sum(2) / negatives  # [2, n]
        u = torch.where(u > 0, torch.lerp(u.expand_as(now), now, gamma), now)
        weight = e.div_(u[:, :, None] * negatives)
    return ((weight * pairs.others).sum(2) - pairs.positive).mean(1).sum(), u.mean(0)
