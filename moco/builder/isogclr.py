"""iSogCLR (Qiu et al., arXiv 2305.11965): SogCLR with a learned temperature for each image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.sogclr import SogCLR
from moco.errors import InputError
from moco.loss.global_contrastive import Pairs
from moco.loss.individual_temperatures import TemperatureStep, individual_loss
from moco.rng import Progress
from moco.sections_methods import Temperatures


class ISogCLR(SogCLR):
    """iSogCLR: each image has a moving average `u`, a temperature and its momentum.

    The buffers `u`, `tau` and `tau_momentum` [N] are the same on all ranks. A step's loss
    uses the temperatures that the previous step left. Images that are not in the batch keep their
    values.

    Args:
        encoder, images, gamma, local_gradient: see `SogCLR`.
        T: the initial temperature of every image.
        step: settings of the temperatures' steps.
        set_first: whether the first visit of an image sets its u; see `individual_loss`.
    """

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        images: int,
        T: float = 0.1,
        gamma: float = 0.8,
        local_gradient: bool = False,
        step: TemperatureStep | None = None,
        set_first: bool = False,
    ):
        super().__init__(encoder, images, T, gamma, local_gradient)
        self.step, self.set_first = step or TemperatureStep(), set_first
        self.register_buffer("tau", torch.full((images,), T))
        self.register_buffer("tau_momentum", torch.zeros(images))

    def loss_of(
        self, pairs: Pairs, index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and metrics of u and the temperatures; update the buffers on every rank.

        `tau` is the mean over the batch; `tau_min` and `tau_max` are over all images. See
        `SimCLR.loss_of`.
        """
        tau = self.tau[index]
        loss, u, gradient = individual_loss(pairs, self.u[index], tau, self.gamma, self.set_first)
        tau, momentum = self.step(tau, self.tau_momentum[index], gradient)
        joint = distributed.all_gather(torch.stack([u, tau, momentum], 1))  # [W B, 3]
        everyone = distributed.all_gather(index)
        for buffer, new in zip((self.u, self.tau, self.tau_momentum), joint.unbind(1), strict=True):
            buffer[everyone] = new
        extremes = {"tau_min": self.tau.min(), "tau_max": self.tau.max()}
        return loss, {"u": u.mean(), "tau": tau.mean(), **extremes}


def temperature_step(settings: Temperatures, t: float) -> TemperatureStep:
    """Return the step of the temperatures, which start at `t`.

    Raises InputError if `t` is not in the range of temperatures.
    """
    least, most = settings.t_range
    if not least <= t <= most:
        wrong = "the first number must be the smaller one" if least > most else f"--t is {t:g}"
        raise InputError(f"--t-range {least:g} {most:g}: {wrong}; give a range that --t lies in")
    limits = least, most
    return TemperatureStep(settings.rho, settings.eta, settings.beta_u, limits, settings.t_clip)
