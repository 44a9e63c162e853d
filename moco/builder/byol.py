"""BYOL: predict the target's features, without negatives (Grill et al., arXiv 2006.07733)."""

import torch
from torch import Tensor

from moco.builder.base import OnlineAndTarget
from moco.loss.contrastive import feature_statistics
from moco.rng import Progress


class BYOL(OnlineAndTarget):
    """Predictions come near the other view's target features; there are no negatives."""

    def contrast(
        self, p: list[Tensor], k: list[Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over both directions of 2 - 2 cos (BYOL, equation 2)."""
        cosine = torch.cat([(p[0] * k[1]).sum(1), (p[1] * k[0]).sum(1)])
        return 2 - 2 * cosine.mean(), {
            "cosine": cosine.detach().mean(),
            **feature_statistics(torch.cat(p), cosine),
        }
