"""DCL and DCLW: losses without the positive in the denominator (Yeh et al., arXiv 2110.06848).

The gradient of InfoNCE has a factor that is small if the positive is easy or the batch is small.
Without the positive in the denominator, this factor is 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moco.loss.contrastive import Anchors, InfoNCE


@dataclass(frozen=True)
class Decoupled(InfoNCE):
    """DCL: -w l+ + log of the sum over the negatives of exp(l), with w = 1.

    DCLW, with `sigma`, has w_i = 2 - exp(s_i / sigma) / mean_j exp(s_j / sigma), in which s_j is
    the similarity of the two views of image j, and the mean is over the joint batch.
    The gradient passes through w, as in the code that the recipes follow, which is not the
    authors'.

    Attributes:
        sigma: DCLW's sigma, > 0; None: DCL.
    """

    sigma: float | None = None

    def __call__(self, anchors: Anchors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each anchor [..., n], and with `sigma` the standard deviation of w."""
        l_pos = anchors.positive / anchors.T
        (l_neg,) = anchors.log_sums(1)
        if self.sigma is None:
            return l_neg - l_pos, {}
        joint = anchors.joint_positive() / self.sigma
        log_mean = joint.logsumexp(0) - math.log(len(joint))
        weight = 2 - torch.exp(anchors.positive / self.sigma - log_mean)
        std = weight.detach().std(unbiased=False)
        return l_neg - weight * l_pos, {"positive_weight_std": std}
