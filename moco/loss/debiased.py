"""The debiased contrastive loss (Chuang et al., arXiv 2007.00224) and HCL (arXiv 2010.04592).

Some negatives of an anchor have its class. The debiased loss estimates the sum over the true
negatives: it subtracts the expected sum over the false ones. HCL (Robinson et al.) also gives a
negative more weight if it is more similar to the anchor.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moco.loss.contrastive import Anchors, InfoNCE
from moco.loss.settings import ANNEAL_STEPS


@dataclass(frozen=True)
class Debiased(InfoNCE):
    """The debiased loss, with hard negatives (HCL) if `beta` is above 0.

    For an anchor with the positive's logit l+ and the logits l_j of its N negatives:

        hard = N sum_j exp((1 + beta) l_j) / sum_j exp(beta l_j)    # sum_j exp(l_j) with beta 0
        Ng = max((hard - tau_plus N exp(l+)) / (1 - tau_plus), N exp(-1 / T))
        loss = -log(exp(l+) / (exp(l+) + Ng))

    The gradient passes through the weights exp(beta l_j), as in the authors' code. With
    `tau_plus` and `beta` 0, the loss of an anchor is InfoNCE. As in the authors' code, the loss is
    the mean over the anchors of both views, so half of SimCLR's sum over views.

    Attributes:
        tau_plus: the assumed probability that a negative has the anchor's class, in [0, 1).
        beta: concentration on hard negatives, >= 0. It multiplies logits, not similarities.
        anneal: whether beta falls linearly to 0 during the run, in 9 steps (--anneal down of HCL).
    """

    adds_views: ClassVar[bool] = False

    tau_plus: float = 0.1
    beta: float = 0.0
    anneal: bool = False

    def __call__(self, anchors: Anchors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each anchor [..., n], and metrics.

        The metrics are `at_floor`, the fraction of anchors whose Ng is at its lower bound and has
        no gradient, and with beta `effective_negatives`, the effective fraction of the negatives,
        (sum w)^2 / (N sum w^2) with the weights w, in (0, 1].
        """
        N, metrics = anchors.negatives, {}
        l_pos = anchors.positive / anchors.T
        if self.beta:
            powers = (1 + self.beta, self.beta, 2 * self.beta)
            numerator, weights, squares = anchors.log_sums(*powers)
            l_neg = numerator - weights + math.log(N)
            effective = torch.exp(2 * weights - squares).detach() / N
            metrics["effective_negatives"] = effective.mean()
        else:
            (l_neg,) = anchors.log_sums(1)
        # Subtract the largest logarithm, so that no exponential overflows.
        top = torch.maximum(l_pos, l_neg).detach()
        pos, neg = torch.exp(l_pos - top), torch.exp(l_neg - top)
        debiased = (neg - self.tau_plus * N * pos) / (1 - self.tau_plus)
        floor = torch.exp(math.log(N) - 1 / anchors.T - top)
        metrics["at_floor"] = (debiased <= floor).float().mean()
        return torch.log(pos + torch.maximum(debiased, floor)) + top - l_pos, metrics

    def schedules(self, epoch: int, epochs: int) -> dict[str, float]:
        """Return beta in epoch `epoch` of `epochs`, at least 9, if it is annealed.

        Each of 9 values, from beta to 0, holds for a ninth of the epochs, rounded down. The last
        one holds until the end.
        """
        if not self.anneal:
            return {}
        step = min(max(epoch, 0) // (epochs // ANNEAL_STEPS), ANNEAL_STEPS - 1)
        return {"beta": self.beta * (1 - step / (ANNEAL_STEPS - 1))}
