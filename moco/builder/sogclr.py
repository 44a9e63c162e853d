"""SimCLR (Chen et al., arXiv 2002.05709) and SogCLR (Yuan et al., arXiv 2202.12387): one encoder, the batch as negatives."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import Method
from moco.loss.contrastive import contrast_accuracy, feature_statistics, normalize
from moco.loss.global_contrastive import Pairs, compare, dynamic_loss, nt_xent
from moco.rng import Progress


class SogCLR(Method):
    """Contrast of two views with the joint batch of all ranks; with `gamma`, as if the batch were the whole data set.

    Args:
        encoder: makes the encoder [B, 3, H, W] -> [B, C].
        images: in the data set, N; each has its moving average in the buffer `u` [N], equal on all ranks.
        T: softmax temperature.
        gamma: weight of a visit's new value in u, in (0, 1]; None trains on SimCLR's NT-Xent instead, without u.
    """

    sync_batch_norm = True

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        images: int,
        T: float = 0.1,
        gamma: float | None = 0.9,
    ):
        super().__init__()
        self.T, self.gamma = T, gamma
        self.base_encoder = encoder()
        if gamma is not None:
            self.register_buffer("u", torch.zeros(images))  # 0 before an image's first visit

    @property
    def encoder(self) -> nn.Module:
        """The encoder that evaluation uses."""
        return self.base_encoder

    def forward(
        self, views: Sequence[Tensor], index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of this rank's batch.

        Args:
            views: two, each [B, 3, H, W].
            index: each sample's place in the data set, [B] in [0, N).
            progress: unused.
        """
        z = torch.stack([normalize(self.base_encoder(view)) for view in views])  # [2, B, C]
        with torch.autocast(z.device.type, enabled=False):
            return self.contrast(z, index)

    def contrast(self, z: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, metrics and mean u of this rank's unit features z [2, B, C]; what was seen goes into u, on every rank."""
        first = distributed.rank() * z.shape[1]
        z_all = distributed.all_gather_with_gradient(z.transpose(0, 1).contiguous()).transpose(
            0, 1
        )  # [2, W B, C]
        pairs = compare(z, z_all, first)
        metrics = contrast_metrics(z, pairs)
        if self.gamma is None:
            return nt_xent(pairs, self.T), metrics
        loss, u = dynamic_loss(pairs, self.u[index], self.T, self.gamma)
        self.u[distributed.all_gather(index)] = distributed.all_gather(u)
        return loss, {**metrics, "u": u.mean()}


@torch.no_grad()
def contrast_metrics(z: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """`contrast_accuracy` of either view's anchors z [2, B, C] among their negatives, and the first view's `spread`."""
    others = pairs.others.masked_fill(pairs.own, -torch.inf)
    accuracy = contrast_accuracy(pairs.positive.flatten(), others.flatten(0, 1))
    return {**accuracy, **feature_statistics(z[0], pairs.positive[0], others[0].amax(1))}
