"""SupCon, the supervised contrastive loss (Khosla et al., arXiv 2004.11362).

The positives of an anchor are all features of its class in the joint batch, not only the other view
of its image. The loss uses labels, and is an upper bound for the methods that do not.
"""

import torch
from torch import Tensor

from moco.loss.global_contrastive import Pairs


def supervised_losses(pairs: Pairs, same_class: Tensor, temperature: float) -> Tensor:
    """Return SupCon's loss of each anchor, [2, n] (L_out of equation 2).

    The loss of an anchor is the mean over its positives of -log softmax. The softmax is over all
    features of the joint batch except the anchor itself. If each image has a class of its own, this
    is SimCLR's NT-Xent. The factor T / T_base of the authors' code is left out: the paper's
    equation does not have it.

    Args:
        pairs: similarities of n anchors, in each of two views, to the m images of the joint batch.
        same_class: [n, m] True if an image of the joint batch has the anchor's class. It is True
            for the anchor's own image.
        temperature: divides every similarity, > 0.
    """
    # The softmax leaves out only the anchor itself, which is among the features of its own view.
    m = same_class.shape[1]
    itself = torch.cat([pairs.own[:, :m], torch.zeros_like(same_class)], 1)  # [n, 2m]
    positive = torch.cat([same_class, same_class], 1) & ~itself

    logits = pairs.others / temperature  # [2, n, 2m]
    log_sum = logits.masked_fill(itself, -torch.inf).logsumexp(2)
    return log_sum - logits.masked_fill(~positive, 0).sum(2) / positive.sum(1)
