"""BYOL: predict the target's features, without negatives (Grill et al., arXiv 2006.07733)."""

import torch
from torch import Tensor

from moco.builder.base import OnlineAndTarget
from moco.loss.contrastive import feature_statistics
from moco.rng import Progress


class BYOL(OnlineAndTarget):
    """BYOL: the predictions of each view are trained to match the target features of the other."""

    def contrast(
        self,
        p: list[Tensor],
        k: list[Tensor],
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean of 2 - 2 cos over both directions (BYOL, equation 2), and metrics.

        Args:
            p: normalized predictions of the two views, each [B, C].
            k: normalized target features of the two views, each [B, C].
            progress: unused.
        """
        cosine = torch.cat([(p[0] * k[1]).sum(1), (p[1] * k[0]).sum(1)])
        return 2 - 2 * cosine.mean(), {
            "cosine": cosine.detach().mean(),
            **feature_statistics(torch.cat(p), cosine),
        }
