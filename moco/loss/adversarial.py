"""AdCo's loss and the ascent of its learned negatives (Hu et al., arXiv 2011.08435, section 3).

The encoder descends on the contrastive loss at one temperature. The bank of negatives W ascends on
the same loss at another. Only the directions w = W / |W| of its entries enter the loss.
`moco/builder/adco.py` uses this file. Each rank calls it with its shard of the bank.

The bank and its velocity are larger than the caches of most CPUs. So `bank_log_sums` and `ascend`
work on one block after the other, and read each block from the memory once. Neither needs a tensor
of the size of the bank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.loss.bank import can_overflow, in_blocks


@dataclass(frozen=True)
class Ascent:
    """The settings of the bank's training: its SGD, and the temperature T of its loss."""

    lr: float = 3.0
    T: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4


def keys_and_bank_nce(near: Tensor, label: Tensor, of_bank: Tensor, temperature: float) -> Tensor:
    """Return the mean cross entropy of each query's key among all keys and the bank (section 3).

    Args:
        near: similarity of each query to every key of the joint batch, [N, B], with gradient.
        label: index of each query's own key in the joint batch, [N] in [0, B).
        of_bank: log-sum-exp of each query's logits with the bank, [N], with gradient; see
            `bank_log_sums`.
        temperature: divides every similarity, > 0.

    Returns:
        scalar: the mean over N.
    """
    logits = near / temperature
    of_keys = torch.logsumexp(logits, 1)
    own = logits.gather(1, label[:, None]).squeeze(1)
    return (torch.logaddexp(of_keys, of_bank) - own).mean()


class BankLogSums(NamedTuple):
    """Sums over a bank of K entries for each of N queries; see `bank_log_sums`.

    Attributes:
        of_encoder: log-sum-exp at the encoder's temperature, [N], differentiable in the queries.
        of_ascent: log-sum-exp at the temperature of the bank's ascent, [N].
        above: number of entries that are more similar to the query than its key, as floats [N].
        hardest: the largest similarity, [N].
        inverse: 1 / |W| of each entry, [K].
        similarity: the similarity of each entry to each query, [K, N]; None if it is not kept.
    """

    of_encoder: Tensor
    of_ascent: Tensor
    above: Tensor
    hardest: Tensor
    inverse: Tensor
    similarity: Tensor | None


def bank_log_sums(
    q: Tensor,
    positive: Tensor,
    bank: Tensor,
    temperature: float,
    ascent_temperature: float,
    keep: bool = False,
) -> BankLogSums:
    """Return the log-sum-exps over the bank at both temperatures, and numbers for metrics.

    The bank is read once, or twice if exponentials can overflow in q's type.

    Args:
        q: normalized queries [N, C].
        positive: similarity of each query to its key, [N].
        bank: entries W [K, C], of any norm, without gradient.
        temperature: divides every similarity in the encoder's loss, > 0.
        ascent_temperature: divides every similarity in the bank's loss, > 0.
        keep: whether to keep the similarities for `ascend`.
    """
    found = _LogSums.apply(q, positive.detach(), bank, temperature, ascent_temperature, keep)
    return BankLogSums(*found)


class _LogSums(torch.autograd.Function):
    """The items of `BankLogSums`."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        positive: Tensor,
        bank: Tensor,
        temperature: float,
        ascent_temperature: float,
        keep: bool,
    ):
        """Return the items of `BankLogSums`."""
        ctx.set_materialize_grads(False)  # otherwise `similarity` has one of zeros, as large
        (N, C), K = q.shape, len(bank)
        similarity, inverse = q.new_empty(K, N) if keep else None, q.new_empty(K, 1)
        # added to the logits, so that no exponential overflows
        offset, ascent_offset = q.new_zeros(2, N)
        if can_overflow(q, K, min(temperature, ascent_temperature)):
            top = _largest(q, bank)
            offset, ascent_offset = top / -temperature, top / -ascent_temperature
        total, ascent_total, above, weighted = *q.new_zeros(3, N), q.new_zeros(C, N)
        maxima = []
        stacks = in_blocks(bank, N + C)
        kept = _memory(similarity, q, stacks)
        inverses = in_blocks(inverse, N + C)
        for blocks, inverse_norms, similarities in zip(stacks, inverses, kept, strict=True):
            _, parts, n, _ = blocks.shape
            each, ones = q.T.expand(parts, C, N), q.new_ones(parts, 1, n)
            counts, ascent_sums, sums = q.new_zeros(3, parts, 1, N)
            products, e = q.new_zeros(parts, C, N), q.new_empty(parts, n, N)
            for block, inverse_norm, s in zip(blocks, inverse_norms, similarities, strict=True):
                _compare(block, each, inverse_norm, s)
                maxima.append(s.amax(1))
                # a product with ones is faster than `sum`
                counts.baddbmm_(ones, torch.gt(s, positive, out=e))
                torch.add(ascent_offset, s, alpha=1 / ascent_temperature, out=e).exp_()
                ascent_sums.baddbmm_(ones, e)
                torch.add(offset, s, alpha=1 / temperature, out=e).exp_()
                sums.baddbmm_(ones, e)
                if ctx.needs_input_grad[0]:
                    products.baddbmm_(block.mT, e.mul_(inverse_norm))
            above += counts.sum((0, 1))
            ascent_total += ascent_sums.sum((0, 1))
            total += sums.sum((0, 1))
            weighted += products.sum(0)

        ctx.save_for_backward((weighted / (temperature * total)).T)
        hardest = torch.cat(maxima).amax(0)
        ascent_log_sum = ascent_total.log_().sub_(ascent_offset)
        others = ascent_log_sum, above, hardest, inverse.squeeze(1), similarity
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        return total.log_().sub_(offset), *others

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_: Tensor):
        """Return the gradient of q."""
        return ctx.saved_tensors[0] * gradient[:, None], None, None, None, None, None


def _compare(block: Tensor, each: Tensor, inverse: Tensor, similarity: Tensor) -> None:
    """Compute 1 / |W| and the similarities of a block.

    Args:
        block: entries W [parts, n, C].
        each: the transposed queries, the same for each part, [parts, C, N].
        inverse: overwritten with 1 / |W|, [parts, n, 1].
        similarity: overwritten with the similarities, [parts, n, N].
    """
    torch.linalg.vector_norm(block, dim=2, keepdim=True, out=inverse)
    inverse.clamp_min_(1e-12).reciprocal_()
    torch.bmm(block, each, out=similarity).mul_(inverse)


def _memory(similarity: Tensor | None, q: Tensor, stacks: list[Tensor]) -> list[Tensor]:
    """Return memory for the similarities of the blocks of each stack, [blocks, parts, n, N] each.

    Args:
        similarity: keeps the similarities of all entries, [K, N]. None: all blocks of a stack use
            the same memory.
        q: the queries [N, C].
        stacks: the bank, as `in_blocks` returns it.
    """
    if similarity is None:
        shapes = [(parts, n, len(q)) for _, parts, n, _ in (stack.shape for stack in stacks)]
        return [
            q.new_empty(shape).expand(len(stack), *shape)
            for stack, shape in zip(stacks, shapes, strict=True)
        ]
    entries = similarity.split([stack.shape[:3].numel() for stack in stacks])
    return [x.view(*stack.shape[:3], -1) for x, stack in zip(entries, stacks, strict=True)]


def _largest(q: Tensor, bank: Tensor) -> Tensor:
    """Return the largest similarity of each query [N, C] to the entries of the bank, [N]."""
    stacks, maxima = in_blocks(bank, sum(q.shape)), []
    for blocks, memory in zip(stacks, _memory(None, q, stacks), strict=True):
        each, inverse = q.T.expand(blocks.shape[1], *q.T.shape), q.new_empty(*blocks.shape[1:3], 1)
        for block, similarity in zip(blocks, memory, strict=True):
            _compare(block, each, inverse, similarity)
            maxima.append(similarity.amax(1))
    return torch.cat(maxima).amax(0)


@torch.no_grad()
def ascend(
    bank: Tensor,
    velocity: Tensor,
    inverse: Tensor,
    q: Tensor,
    log_sum: Tensor,
    weight: Tensor,
    settings: Ascent,
    similarity: Tensor | None = None,
) -> None:
    """Make one SGD step of the bank W, in place, which raises the loss.

    The loss is the weighted sum of the cross entropies of the queries, at the temperature T of
    `settings`. If p is the softmax over all keys and the bank, the gradient of the negated loss
    with respect to an entry's direction w is g = -sum_i weight_i p_i q_i / T. The gradient with
    respect to W is (g - (g.w) w) / |W|, because the norm of W does not enter the loss. The step is

        v <- momentum v + gradient + weight_decay W, then W <- W - lr v.

    Args:
        bank: entries of W [K, C].
        velocity: v [K, C].
        inverse: 1 / |W| of each entry, [K].
        q: normalized queries of all ranks, [N, C].
        log_sum: log-sum-exp of the logits of each query with all keys and the full bank, [N].
        weight: weight of each query's loss, [N]; 1 / N for the mean.
        settings: the temperature, and the settings of SGD.
        similarity: the similarity of each entry to each query, [K, N]; None: compute it again.
    """
    (N, C), T = q.shape, settings.T
    # weight p / T is exp(similarity / T + shift), at most weight / T
    shift, negative_q = (weight / T).log() - log_sum, -q
    numbers = 2 * (N + C)  # W, v, similarities and exponentials
    stacks = in_blocks(bank, numbers)
    others = in_blocks(velocity, numbers), in_blocks(inverse[:, None], numbers)
    kept = _memory(similarity, q, stacks)
    for blocks, velocities, inverses, similarities in zip(stacks, *others, kept, strict=True):
        _, parts, n, _ = blocks.shape
        each, e = q.T.expand(parts, C, N), q.new_empty(parts, n, N)
        negative = negative_q.expand(parts, N, C)
        for block, v, one, s in zip(blocks, velocities, inverses, similarities, strict=True):
            if similarity is None:
                torch.bmm(block, each, out=s).mul_(one)
            torch.add(shift, s, alpha=1 / T, out=e).exp_().mul_(one)
            v.baddbmm_(e, negative, beta=settings.momentum)
            along = e.mul_(s).sum(2, keepdim=True).mul_(one)  # -(g.w) / |W|^2
            v.addcmul_(block, along.add_(settings.weight_decay))
            block.sub_(v, alpha=settings.lr)
