"""SogCLR (Yuan et al., arXiv 2202.12387): SimCLR with a moving average for each image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.simclr import SimCLR
from moco.loss.global_contrastive import Pairs, dynamic_loss
from moco.rng import Progress


class SogCLR(SimCLR):
    """SogCLR: two views are compared with the joint batch of all ranks.

    It keeps a moving average for each image in the buffer `u` [N], the same on all ranks. Its
    gradient approximates that of the loss against the full data set.

    Args:
        encoder: creates the encoder [B, 3, H, W] -> [B, C].
        images: number N of training images.
        T: softmax temperature.
        gamma: weight of a new value in the moving average, in (0, 1].
        local_gradient: see `SimCLR`.
    """

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        images: int,
        T: float = 0.1,
        gamma: float = 0.9,
        local_gradient: bool = False,
    ):
        super().__init__(encoder, T, local_gradient=local_gradient)
        self.gamma = gamma
        self.register_buffer("u", torch.zeros(images))  # 0 before an image's first visit

    def loss_of(
        self, pairs: Pairs, index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the mean of u; update `u` on every rank. See `SimCLR.loss_of`."""
        loss, u = dynamic_loss(pairs, self.u[index], self.T, self.gamma)
        self.u[distributed.all_gather(index)] = distributed.all_gather(u)
        return loss, {"u": u.mean()}
