"""SimCLR's loss (Chen et al., arXiv 2002.05709) and SogCLR's (Yuan et al., arXiv 2202.12387), over one joint batch.

Both compare every image's feature in one view with all others' in both views. SimCLR's is exact for its batch only: its
gradient is biased where the batch is small. SogCLR keeps a moving average of each anchor's normalizer over its visits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Similarities of this process's n anchors to the m images of the joint batch, for each of the two views as anchor."""

    positive: Tensor  # [2, n] to the same image's other view
    others: Tensor  # [2, n, 2m] to every image in its own view, then in the other
    own: Tensor  # [n, 2m] True where that is the anchor's image itself, which is no negative


def compare(z: Tensor, z_all: Tensor, first: int) -> Pairs:
    """Compare the anchors z [2, n, C], images `first` to first + n of the joint batch, with z_all [2, m, C]; unit rows."""
    n, m = z.shape[1], z_all.shape[1]
    same = z @ z_all.transpose(1, 2)  # [2, n, m] within the view
    cross = z @ z_all.flip(0).transpose(1, 2)  # to the other view
    own = torch.zeros(n, m, dtype=torch.bool, device=z.device)
    own.diagonal(first).fill_(True)
    return Pairs(cross.diagonal(first, 1, 2), torch.cat([same, cross], 2), torch.cat([own, own], 1))


def nt_xent(pairs: Pairs, temperature: float) -> Tensor:
    """SimCLR's NT-Xent (equation 1 there): mean cross entropy of the positive among it and the negatives, views summed."""
    positive, others = (
        pairs.positive / temperature,
        (pairs.others / temperature).masked_fill(pairs.own, -torch.inf),
    )
    return (torch.logaddexp(positive, others.logsumexp(2)) - positive).mean(1).sum()


def dynamic_loss(
    pairs: Pairs, u: Tensor, temperature: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """SogCLR's loss, whose gradient is its estimator's times the temperature, and the new u (algorithm 1).

    Args:
        u: each anchor image's moving average [n] of mean_j exp(z_i.z_j / temperature); 0 before its first visit, which sets it.
        gamma: weight of the new value, in (0, 1].

    Returns:
        the sum over views of mean_i(-z_i.z_i+ + mean_j w_ij z_i.z_j), w_ij = exp(z_i.z_j / temperature) / u_i without gradient,
        where u_i is what this view made of it; and the mean of the two views' u, [n].
    """
    with torch.no_grad():
        e = torch.exp(pairs.others / temperature).masked_fill_(pairs.own, 0)  # [2, n, 2m]
        negatives = e.shape[2] - 2
        now = e.sum(2) / negatives  # [2, n]
        u = torch.where(u > 0, torch.lerp(u.expand_as(now), now, gamma), now)
        weight = e.div_(u[:, :, None] * negatives)
    return ((weight * pairs.others).sum(2) - pairs.positive).mean(1).sum(), u.mean(0)
