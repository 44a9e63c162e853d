"""SimCLR (Chen et al., arXiv 2002.05709) and SogCLR (Yuan et al., arXiv 2202.12387).

Both have one encoder. The negatives are the other images of the batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import Method
from moco.loss.contrastive import contrast_accuracy, feature_statistics, normalize
from moco.loss.global_contrastive import Pairs, compare, dynamic_loss, nt_xent
from moco.rng import Progress


class SogCLR(Method):
    """SimCLR or SogCLR: two views are compared with the joint batch of all ranks.

    SogCLR keeps a moving average for each image in the buffer `u` [N], the same on all ranks. Its
    gradient approximates that of the loss against the full data set.

    Args:
        encoder: creates the encoder [B, 3, H, W] -> [B, C].
        images: number N of training images.
        T: softmax temperature.
        gamma: weight of a new value in the moving average, in (0, 1]. None: SimCLR's NT-Xent loss.
        local_gradient: whether features get the gradient of their own rank's loss only, as in the
            authors' PyTorch code. Otherwise, they get that of all ranks' losses.
    """

    sync_batch_norm = True

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        images: int,
        T: float = 0.1,
        gamma: float | None = 0.9,
        local_gradient: bool = False,
    ):
        super().__init__()
        self.T, self.gamma, self.local_gradient = T, gamma, local_gradient
        self.base_encoder = encoder()
        if gamma is not None:
            self.register_buffer("u", torch.zeros(images))  # 0 before an image's first visit

    @property
    def encoder(self) -> nn.Module:
        """Return the encoder to evaluate."""
        return self.base_encoder

    def forward(
        self,
        views: Sequence[Tensor],
        index: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of this rank's batch.

        Args:
            views: two views, each [B, 3, H, W].
            index: index of each image in the training set, [B], in [0, N).
            progress: unused.
        """
        z = torch.stack([normalize(self.base_encoder(view)) for view in views])  # [2, B, C]
        with torch.autocast(z.device.type, enabled=False):
            return self.contrast(z, index)

    def contrast(self, z: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of this rank's features; update `u` on every rank.

        Args:
            z: normalized features of both views, [2, B, C].
            index: index of each image in the training set, [B].
        """
        mine = z.transpose(0, 1).contiguous()
        z_all = distributed.all_gather_with_gradient(mine, self.local_gradient)
        z_all = z_all.transpose(0, 1)  # [2, W B, C]
        pairs = compare(z, z_all, first=distributed.rank() * z.shape[1])
        metrics = contrast_metrics(z, pairs)
        if self.gamma is None:
            return nt_xent(pairs, self.T), metrics
        loss, u = dynamic_loss(pairs, self.u[index], self.T, self.gamma)
        self.u[distributed.all_gather(index)] = distributed.all_gather(u)
        return loss, {**metrics, "u": u.mean()}


@torch.no_grad()
def contrast_metrics(z: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """Return the contrast accuracy of both views, and the feature statistics of the first.

    Args:
        z: normalized features of both views, [2, B, C].
        pairs: their similarities to the joint batch.
    """
    others = pairs.others.masked_fill(pairs.own, -torch.inf)
    accuracy = contrast_accuracy(pairs.positive.flatten(), others.flatten(0, 1))
    return {**accuracy, **feature_statistics(z[0], pairs.positive[0], others[0].amax(1))}
