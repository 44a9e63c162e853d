"""AdCo's contrast with negatives that are learned against the encoder (Hu et al., arXiv 2011.08435).

The encoder descends on the contrastive loss at one temperature; the bank of negatives W ascends on the same loss at another
(section 3). Rows of W count by their direction alone: w = W / |W|.
"""

import torch
from torch import Tensor

from moco.loss.contrastive import bank_log_sum_exp


def keys_and_bank_nce(
    q: Tensor, near: Tensor, label: Tensor, bank: Tensor, similarity: Tensor, temperature: float
) -> Tensor:
    """Mean cross entropy of each query's key among the keys of the whole batch and the bank (section 3).

    Args:
        q: unit queries [N, C], with gradient.
        near: similarity of each query to every key of the batch, [N, B], with gradient.
        label: which of them is its own, [N] in [0, B).
        bank: unit rows [K, C], without gradient.
        similarity: q @ bank.T [N, K], without gradient. Used up, as in `bank_info_nce`.
        temperature: > 0.
    """
    logits = near / temperature
    of_bank = bank_log_sum_exp(q, bank, similarity, temperature)
    own = logits.gather(1, label[:, None]).squeeze(1)
    return (torch.logaddexp(torch.logsumexp(logits, 1), of_bank) - own).mean()


@torch.no_grad()
def add_bank_gradient(
    gradient: Tensor,
    q: Tensor,
    near: Tensor,
    bank: Tensor,
    length: Tensor,
    similarity: Tensor,
    temperature: float,
    scale: float = 1.0,
) -> None:
    """Add `scale` times the gradient of the negated `keys_and_bank_nce` in W: where W descends, the loss rises.

    With p the softmax over keys and bank, and s = q.w: of w it is -p^T q / (N temperature); of W = |W| w what of that is at right
    angles to w, which takes the mean of p s times w away, over |W|.

    Args:
        gradient: [K, C], added to in place: memory of this size is slow to come by.
        bank, length: W's unit rows [K, C] and their lengths [K, 1] in W.
        q, near, similarity, temperature: as in `keys_and_bank_nce`; nothing is used up.
    """
    top = torch.maximum(near.amax(1, keepdim=True), similarity.amax(1, keepdim=True))
    p = torch.sub(similarity, top).div_(temperature).exp_()  # [N, K], not yet over its sum
    total = p.sum(1, keepdim=True) + ((near - top) / temperature).exp().sum(1, keepdim=True)
    share = scale / (total * len(q))  # [N, 1]
    p.div_(-temperature * length.T)
    gradient.addmm_(p.T, q * share)
    along = p.mul_(similarity).T @ share  # [K, 1]
    gradient.addcmul_(bank, along, value=-1)


@torch.no_grad()
def ascend(
    bank: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One SGD step of W [K, C] and its velocity, in place: v <- momentum v + g + weight_decay W, W <- W - lr v."""
    velocity.mul_(momentum).add_(gradient).add_(bank, alpha=weight_decay)
    bank.sub_(velocity, alpha=lr)
