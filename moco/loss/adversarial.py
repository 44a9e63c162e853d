"""AdCo's loss and the ascent of its learned negatives (Hu et al., arXiv 2011.08435, section 3).

The encoder descends on the contrastive loss at one temperature. The bank of negatives W ascends on
the same loss at another. Only the directions w = W / |W| of its entries enter the loss.
`moco/builder/adco.py` uses this file.
"""

import torch
from torch import Tensor

from moco.loss.bank import mixed_log_sum


def keys_and_bank_nce(
    q: Tensor, near: Tensor, label: Tensor, bank: Tensor, similarity: Tensor, temperature: float
) -> Tensor:
    """Return the mean cross entropy of each query's key among all keys and the bank (section 3).

    Args:
        q: normalized queries [N, C], with gradient.
        near: similarity of each query to every key of the joint batch, [N, B], with gradient.
        label: index of each query's own key in the joint batch, [N] in [0, B).
        bank: normalized entries w [K, C], without gradient.
        similarity: q @ bank.T, [N, K], without gradient. It is overwritten, as in `bank_info_nce`.
        temperature: divides every similarity, > 0.

    Returns:
        scalar: the mean over N.
    """
    logits = near / temperature
    of_keys = torch.logsumexp(logits, 1)
    of_bank = mixed_log_sum(q, bank, similarity, temperature)
    own = logits.gather(1, label[:, None]).squeeze(1)
    return (torch.logaddexp(of_keys, of_bank) - own).mean()


@torch.no_grad()
def add_bank_gradient(
    gradient: Tensor,
    q: Tensor,
    near: Tensor,
    bank: Tensor,
    norm: Tensor,
    similarity: Tensor,
    temperature: float,
    scale: float = 1.0,
) -> None:
    """Add the gradient of -`keys_and_bank_nce` with respect to W to `gradient`.

    Gradient descent with it raises the loss. If p is the softmax over all keys and the bank, the
    gradient with respect to w is g = -p^T q / (N temperature). The gradient with respect to W is
    (g - (g.w) w) / |W|, because the norm of W does not enter the loss.

    Args:
        gradient: [K, C], changed in place, because allocating this much memory is slow.
        q: normalized queries [N, C].
        near: similarity of each query to every key of the joint batch, [N, B].
        bank: normalized entries w [K, C].
        norm: norms |W| of the entries, [K, 1].
        similarity: q @ bank.T, [N, K].
        temperature: divides every similarity, > 0.
        scale: factor of the gradient.
    """
    # Softmax without its denominator; subtract the largest similarity, so that no term overflows.
    top = torch.maximum(near.amax(1, keepdim=True), similarity.amax(1, keepdim=True))
    p = torch.sub(similarity, top).div_(temperature).exp_()  # [N, K]
    total = p.sum(1, keepdim=True) + ((near - top) / temperature).exp().sum(1, keepdim=True)
    factor = scale / (total * len(q))  # [N, 1]

    p.div_(-temperature * norm.T)
    gradient.addmm_(p.T, q * factor)
    along = p.mul_(similarity).T @ factor  # [K, 1]: g.w / |W|
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
    """Make one SGD step of the bank W [K, C], in place.

    v <- momentum v + gradient + weight_decay W, then W <- W - lr v, where v is `velocity` [K, C].
    This is ascent on the loss, because `gradient` is the gradient of the negated loss.
    """
    velocity.mul_(momentum).add_(gradient).add_(bank, alpha=weight_decay)
    bank.sub_(velocity, alpha=lr)
