"""InfoNCE whose negatives are the other keys of the batch (MoCo v3, Chen et al., arXiv 2104.02057).

MoCo v3 has no queue. Its batches are large, and the keys of all processes are gathered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def in_batch_info_nce(
    similarity: Tensor, first: int, temperature: float, synthetic: Tensor | None = None
) -> Tensor:
    """Return 2 T times the mean cross entropy of each query's key among the joint batch's keys.

    This is one direction of MoCo v3's loss (algorithm 1, `ctr`). The factor 2 T keeps the gradient
    from growing as the temperature falls.

    Args:
        similarity: q.k of each query of this process and each key of the joint batch, [B, W B].
        first: index of the first query's own key. That of query i is `first` + i.
        temperature: T, divides every similarity, > 0.
        synthetic: logits of each query's synthetic negatives, [B, M].

    Returns:
        scalar: the mean over B.
    """
    own = torch.arange(first, first + len(similarity), device=similarity.device)
    logits = similarity / temperature
    if synthetic is not None:
        logits = torch.cat([logits, synthetic], 1)
    return 2 * temperature * F.cross_entropy(logits, own)
