"""SupCon (Khosla et al., arXiv 2004.11362): SimCLR with positives from labels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import Metric
from moco.builder.simclr import SimCLR
from moco.loss.contrastive import contrast_accuracy
from moco.loss.global_contrastive import Pairs
from moco.loss.supervised_contrastive import supervised_losses
from moco.rng import Progress


class SupCon(SimCLR):
    """SupCon: the other images of an anchor's class are positives, too.

    Args:
        encoder: creates the encoder [B, 3, H, W] -> [B, C].
        labels: class of each training image, [N].
        T: softmax temperature.
        local_gradient: see `SimCLR`.
    """

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        labels: Tensor,
        T: float = 0.1,
        local_gradient: bool = False,
    ):
        super().__init__(encoder, T, local_gradient=local_gradient)
        # not in checkpoints, because it is part of the data
        self.register_buffer("labels", labels, persistent=False)

    def loss_of(
        self, pairs: Pairs, index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return the mean loss of this rank's anchors in both views, and metrics.

        `positives` is the mean number of positives of an anchor. The negatives of `acc1`, `acc5`
        and `hardness` are the images of other classes. `hardness` is a sum and a count, without
        anchors that have no negatives. See `SimCLR.loss_of`.
        """
        joint = self.labels[distributed.all_gather(index)]  # [W B]
        same_class = self.labels[index][:, None] == joint  # [B, W B]
        losses = supervised_losses(pairs, same_class, self.T)
        return losses.mean(), _metrics(pairs, same_class)


@torch.no_grad()
def _metrics(pairs: Pairs, same_class: Tensor) -> dict[str, Metric]:
    """Return the metrics of `SupCon.loss_of`."""
    same = torch.cat([same_class, same_class], 1)
    negatives = pairs.others.masked_fill(same, -torch.inf)  # [2, B, 2 W B]
    accuracy = contrast_accuracy(pairs.positive.flatten(), negatives.flatten(0, 1))
    hardest, some = negatives[0].amax(1), ~same.all(1)
    return {
        **accuracy,
        "hardness": (hardest.masked_fill(~some, 0).sum(), some.sum()),
        "positives": (same.sum(1) - 1).to(pairs.others.dtype).mean(),
    }
