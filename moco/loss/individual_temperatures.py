"""iSogCLR: SogCLR with a learned temperature for each image (Qiu et al., arXiv 2305.11965).

The objective of an image is tau log mean_j exp(h_j / tau) + tau rho over tau, with h_j the
similarity to negative j minus that to the positive. It is a distributionally robust loss: rho
limits how far the weights of the negatives may be from uniform. `moco/builder/isogclr.py` uses this
file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moco.loss.global_contrastive import Pairs


@dataclass(frozen=True)
class TemperatureStep:
    """The settings of a step of the temperatures. The defaults are those of the authors' README.

    Attributes:
        rho: the constraint, >= 0: the larger, the lower the temperatures.
        eta: learning rate of the temperatures.
        beta: weight of the new gradient in its moving average, in (0, 1].
        limits: least and largest temperature.
        clip: largest magnitude of a gradient; 0: no limit.
    """

    rho: float = 0.4
    eta: float = 0.03
    beta: float = 0.5
    limits: tuple[float, float] = (0.05, 1.0)
    clip: float = 3.0

    def __call__(self, tau: Tensor, momentum: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new temperatures and moving averages of their gradients, both [n].

        Args:
            tau: temperatures, [n].
            momentum: moving averages of their gradients, [n].
            gradient: gradients of the temperatures, without rho, [n].
        """
        gradient = gradient + self.rho
        if self.clip:
            gradient = gradient.clamp(-self.clip, self.clip)
        momentum = torch.lerp(momentum, gradient, self.beta)
        return (tau - self.eta * momentum).clamp(*self.limits), momentum


def individual_loss(
    pairs: Pairs, u: Tensor, tau: Tensor, gamma: float, set_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return iSogCLR's loss, the new moving averages, and the gradients of the temperatures.

    Args:
        pairs: similarities of n anchors to the joint batch.
        u: moving average of mean_j exp(z_i.z_j / tau_i) of each anchor's image, [n]; 0 before the
            image's first visit.
        tau: temperature of each anchor's image, [n].
        gamma: weight of the new value in the moving average, in (0, 1].
        set_first: whether an image's first visit sets u, as in `dynamic_loss`. Otherwise u starts
            at 0 and becomes gamma times the new value, as in the authors' code.

    Returns:
        the loss: the sum over views of mean_i(-z_i.z_i+ + mean_j w_ij z_i.z_j). The weights
            w_ij = exp(z_i.z_j / tau_i) / u_i have no gradient, and u_i is this view's update.
        the mean of the two views' updates of u, [n].
        log u_i - mean_j w_ij z_i.z_j / tau_i, the mean of the two views, [n]. With rho added, it is
            the gradient of the objective with respect to tau_i.
    """
    with torch.no_grad():
        e = torch.exp(pairs.others / tau[:, None]).masked_fill_(pairs.own, 0)  # [2, n, 2m]
        negatives = e.shape[2] - 2
        now = e.sum(2) / negatives  # [2, n]
        blended = torch.lerp(u.expand_as(now), now, gamma)
        u = torch.where(u > 0, blended, now) if set_first else blended
        weight = e.div_(u[:, :, None] * negatives)
    weighted = (weight * pairs.others).sum(2)  # [2, n]
    with torch.no_grad():
        gradient = (u.log() - weighted / tau).mean(0)
    return (weighted - pairs.positive).mean(1).sum(), u.mean(0), gradient
