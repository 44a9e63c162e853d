"""InfoNCE over a bank of negatives (He et al., arXiv 1911.05722, equation 1), and its metrics.

`bank_info_nce` is the loss for users' own programs (docs/python.md). `info_nce` is the same formula
in plain autograd, for tests that compare the two. MoCo, SynCo and MoBY call `contrast` in
`moco/builder/moco.py`, which also returns metrics. The log-sum-exps are in `moco/loss/bank.py`, the
synthetic negatives in `moco/loss/synthetic.py`.

`InfoNCE` is the first of the losses that depend on the negatives of an anchor only through the
log-sum-exp of their logits. The others are in `decoupled.py` and `debiased.py`. They work on the
batch (`moco/builder/simclr.py`) and on the queue (`moco/builder/moco.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.loss.bank import bank_log_sum, mixed_log_sum
from moco.loss.synthetic import Mixture


@dataclass(frozen=True)
class Anchors:
    """The similarities of n anchors to their positives and negatives.

    Attributes:
        positive: similarity of each anchor to its positive, [..., n].
        T: softmax temperature, > 0. A similarity / T is a logit l.
        log_sums: called once, with one or more powers above 0. Returns a list with the log of the
            sum over the negatives of exp(power l) of each anchor, [..., n], for each power.
        negatives: number of negatives of each anchor.
        joint_positive: returns the similarity of the two views of each image of the joint batch of
            all ranks, [m]. Every rank must call it, or none.
    """

    positive: Tensor
    T: float
    log_sums: Callable[..., list[Tensor]]
    negatives: int
    joint_positive: Callable[[], Tensor]


class InfoNCE:
    """The cross entropy of the positive among all logits: the loss of SimCLR and MoCo.

    A loss of this interface is a frozen dataclass of its settings.

    Attributes:
        adds_views: whether the mean losses of SimCLR's two views are added, or averaged.
    """

    adds_views: ClassVar[bool] = True

    def __call__(self, anchors: Anchors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each anchor [..., n], and metrics to log, without gradient."""
        l_pos = anchors.positive / anchors.T
        (l_neg,) = anchors.log_sums(1)
        return torch.logaddexp(l_pos, l_neg) - l_pos, {}

    def schedules(self, epoch: int, epochs: int) -> dict[str, float]:  # noqa: ARG002
        """Return the settings that change during a run of `epochs` epochs, in epoch `epoch`."""
        return {}

    def at(self, epoch: int, epochs: int) -> "InfoNCE":
        """Return the loss with its settings of epoch `epoch`."""
        changed = self.schedules(epoch, epochs)
        return replace(self, **changed) if changed else self


def info_nce(positive: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    """Return the mean cross entropy of the positive among all logits.

    Args:
        positive: similarity of each query to its key, [N].
        negatives: similarities of each query to its negatives, in blocks [N, K_i].
        temperature: divides every similarity, > 0.

    Returns:
        scalar: mean over N of log(exp(l+) + sum exp(l-)) - l+, with l = similarity / temperature.
    """
    l_pos = positive / temperature
    parts = [l_pos] + [torch.logsumexp(s / temperature, 1) for s in negatives]
    return (torch.logsumexp(torch.stack(parts, 1), 1) - l_pos).mean()


def bank_info_nce(
    q: Tensor,
    positive: Tensor,
    bank: Tensor,
    similarity: Tensor | None,
    temperature: float,
    mixture: Mixture | None = None,
) -> Tensor:
    """Return `info_nce` against a bank that has no gradient, with at most one [N, K] tensor.

    Args:
        q: normalized queries [N, C], with gradient.
        positive: similarity of each query to its key, [N], with gradient.
        bank: normalized entries [K, C].
        similarity: q @ bank.T, [N, K], without gradient. It is overwritten. If it is None, the
            similarities are computed in blocks, which is faster; a mixture needs them all.
        temperature: divides every similarity, > 0.
        mixture: synthetic negatives in addition to the bank.

    Returns:
        scalar: the mean over N.
    """
    l_pos = positive / temperature
    if similarity is None:
        l_neg = bank_log_sum(q, positive, bank, temperature).log_sum
    else:
        l_neg = mixed_log_sum(q, bank, similarity, temperature, mixture)
    return (torch.logaddexp(l_pos, l_neg) - l_pos).mean()


@torch.no_grad()
def contrast_accuracy(positive: Tensor, *negatives: Tensor) -> dict[str, Tensor]:
    """Return how often the positive ranks first (`acc1`) and among the first five (`acc5`).

    The negatives above the positive are counted in one pass, without a sort.

    Args:
        positive: similarity of each query to its key, [N].
        *negatives: similarities of each query to its negatives, in blocks [N, K_i].

    Returns:
        two scalars in [0, 1].
    """
    return rank_accuracy(sum((part > positive[:, None]).sum(1) for part in negatives))


def rank_accuracy(above: Tensor) -> dict[str, Tensor]:
    """Return `acc1` and `acc5` from the number of negatives above each positive, [N]."""
    return {f"acc{n}": (above < n).mean(dtype=torch.float32) for n in (1, 5)}


@torch.no_grad()
def feature_statistics(
    q: Tensor, positive: Tensor, negative: Tensor | None = None
) -> dict[str, Tensor]:
    """Return scalars that describe the features, and that show a collapse when the loss does not.

    Args:
        q: normalized queries [N, C], N at least 2.
        positive: similarity of each query to its key, [N].
        negative: similarity of each query to its hardest negative, [N].

    Returns:
        `feature_std`: sqrt(C) times the mean over dimensions of the standard deviation. It is about
            1 if the features cover the sphere evenly, and 0 if all are equal, which is a collapse.
        `alignment`: mean squared distance of the positive pairs, in [0, 4].
        `uniformity`: log of the mean of exp(-2 d^2) over the distances d of all pairs of queries,
            in [-8, 0]. Both are from Wang & Isola, arXiv 2005.10242, section 4.1.
        `hardness`: mean of `negative`, in [-1, 1]; only if it is given.
    """
    n, C = q.shape
    pairs = (q @ q.T).sub_(1).mul_(4).exp_()  # d^2 = 2 - 2 q.q'
    deviation = torch.linalg.vector_norm(q - q.mean(0), dim=0) / (n - 1) ** 0.5  # faster than std
    found = {
        "feature_std": deviation.mean() * C**0.5,
        "alignment": 2 - 2 * positive.mean(),
        "uniformity": ((pairs.sum() - pairs.trace()) / (n * (n - 1))).log(),
    }
    return found if negative is None else {**found, "hardness": negative.mean()}


@torch.no_grad()
def synthetic_hardness(mixture: Mixture | None) -> dict[str, Tensor]:
    """Return the mean similarity of the queries to their synthetic negatives, for each type.

    Args:
        mixture: the synthetic negatives, if any.

    Returns:
        a scalar in [-1, 1] for each type with negatives: `hardness_interpolated`, ...
    """
    if mixture is None:
        return {}
    found = mixture.similarity
    return {f"hardness_{c.type.name}": found[:, c.all].mean() for c in mixture.layout}


def normalize(x: Tensor) -> Tensor:
    """Return `x` [..., C] scaled to norm 1 along its last dimension.

    The result is float64 if `x` is float64, otherwise float32, also under autocast.
    """
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
