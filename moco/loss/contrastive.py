"""InfoNCE over a bank of negatives (He et al., arXiv 1911.05722, equation 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(positive: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    """Mean cross entropy of the positive among all logits.

    Args:
        positive: similarity of each query to its key, [N].
        negatives: similarities to the negatives, any number of [N, K_i]; they count as one long row.
        temperature: divides every similarity, > 0.

    Returns:
        scalar: mean over N of log(exp(l+) + sum exp(l-)) - l+, with l = similarity / temperature.
    """
    l_pos = positive / temperature
    parts = [l_pos] + [torch.logsumexp(s / temperature, 1) for s in negatives]
    return (torch.logsumexp(torch.stack(parts, 1), 1) - l_pos).mean()


@torch.no_grad()
def contrast_accuracy(positive: Tensor, negatives: Tensor) -> dict[str, Tensor]:
    """How often the positive [N] is first (`acc1`) or among the first five (`acc5`) beside its negatives [N, K].

    Scalars in [0, 1]. Counts the negatives above the positive in one pass over K; no sort.
    """
    above = (negatives > positive[:, None]).sum(1)
    return {"acc1": (above < 1).float().mean(), "acc5": (above < 5).float().mean()}


def unit(x: Tensor) -> Tensor:
    """Rows of `x` [..., C] scaled to length 1, in float32 or wider whatever the autocast state."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
