"""AdCo's loss and the ascent of its learned negatives (Hu et al., arXiv 2011.08435, section 3).

The encoder descends on the contrastive loss at one temperature. The bank of negatives W ascends on
the same loss at another. Only the directions w = W / |W| of its entries enter the loss.
`moco/builder/adco.py` uses this file. Each rank calls it with its shard of the bank.
"""

import torch
from torch import Tensor
from torch.optim.sgd import sgd


def keys_and_bank_nce(near: Tensor, label: Tensor, of_bank: Tensor, temperature: float) -> Tensor:
    """Return the mean cross entropy of each query's key among all keys and the bank (section 3).

    Args:
        near: similarity of each query to every key of the joint batch, [N, B], with gradient.
        label: index of each query's own key in the joint batch, [N] in [0, B).
        of_bank: log-sum-exp of each query's logits with the bank, [N], with gradient; see
            `mixed_log_sum`.
        temperature: divides every similarity, > 0.

    Returns:
        scalar: the mean over N.
    """
    logits = near / temperature
    of_keys = torch.logsumexp(logits, 1)
    own = logits.gather(1, label[:, None]).squeeze(1)
    return (torch.logaddexp(of_keys, of_bank) - own).mean()


@torch.no_grad()
def shard_softmax(similarity: Tensor, top: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the numerators of each query's softmax over a shard of the bank.

    Args:
        similarity: similarity of each query to each entry of the shard, [N, K].
        top: the largest similarity of each query, [N, 1]. It is subtracted so that no exponential
            overflows.
        temperature: divides every similarity, > 0.

    Returns:
        exponentials: exp((similarity - top) / temperature), [N, K].
        shift: top / temperature, [N]. The log-sum-exp of the logits of the shard is log(sum of the
            exponentials) + shift.
    """
    shift = top / temperature
    return torch.add(-shift, similarity, alpha=1 / temperature).exp_(), shift.squeeze(1)


@torch.no_grad()
def bank_gradient(
    gradient: Tensor,
    q: Tensor,
    bank: Tensor,
    norm: Tensor,
    similarity: Tensor,
    exponentials: Tensor,
    factor: Tensor,
    add: bool = False,
) -> None:
    """Compute the gradient of -`keys_and_bank_nce` with respect to a shard of W.

    Gradient descent with it raises the loss. If p is the softmax over all keys and the bank, the
    gradient with respect to w is g = -p^T q / (N temperature). The gradient with respect to W is
    (g - (g.w) w) / |W|, because the norm of W does not enter the loss.

    Args:
        gradient: [K, C], overwritten. It is an argument because allocating this much memory is
            slow.
        q: normalized queries of all ranks, [N, C].
        bank: normalized entries w of the shard, [K, C].
        norm: norms |W| of the entries, [K].
        similarity: q @ bank.T, [N, K].
        exponentials: of `shard_softmax`, [N, K]. It is overwritten.
        factor: p / (N temperature) of each query is its exponentials times this factor, [N].
        add: whether to add to `gradient` instead of overwriting it.
    """
    weight = exponentials.mul_(factor[:, None]).div_(-norm)  # [N, K]
    gradient.addmm_(weight.T, q, beta=float(add))  # with beta 0, it is not read
    along = weight.mul_(similarity).sum(0)  # (g.w) / |W|, [K]
    gradient.addcmul_(bank, along[:, None], value=-1)


@torch.no_grad()
def ascend(
    bank: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Make one SGD step of the bank W [K, C], in place, in a single pass over the memory.

    v <- momentum v + gradient + weight_decay W, then W <- W - lr v, where v is `velocity` [K, C].
    This is ascent on the loss, because `gradient` is the gradient of the negated loss. Without
    momentum, `velocity` is not used.
    """
    sgd(
        [bank],
        [gradient],
        [velocity],
        fused=True if bank.device.type in ("cpu", "cuda") else None,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
