"""Log-sum-exps of the logits of queries against a bank of negatives that has no gradient.

`bank_log_sum` reads the bank in blocks. `mixed_log_sum` also has synthetic negatives, and needs the
similarities of all entries.

If entries b_j of the bank have similarities s_j = q.b_j to a query q, the gradient is

    d/dq log sum_j exp(s_j / T) = sum_j exp(s_j / T) b_j / (T sum_j exp(s_j / T))

The forward pass computes both sums, so the backward pass only scales the result.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.loss.synthetic import Mixture

# bytes of a block of the bank and its similarities
_BLOCK_ON_CPU, _BLOCK = 5 << 19, 1 << 28  # on a CPU, a block stays in the cache
_GROUP = 16  # entries in a group, in the search for the nearest entries


def bank_log_sum(q: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over the bank, and the similarities of the nearest entries.

    The bank is read in blocks, without a tensor of size [N, K].

    Args:
        q: normalized queries [N, C].
        bank: normalized entries [K, C], without gradient.
        temperature: divides every similarity, > 0.

    Returns:
        the log-sum-exp of the logits of each query, [N], differentiable in `q`;
        the largest similarities of each query, [N, min(5, K)] without gradient, largest first.
    """
    log_sum, top = _BankLogSum.apply(q, bank, temperature)
    with torch.no_grad():
        return log_sum, _nearest(q, bank, top, min(5, len(bank)))


def in_blocks(q: Tensor, bank: Tensor) -> list[Tensor]:
    """Return the bank as blocks that are processed one after the other.

    Args:
        q: the queries [N, C].
        bank: the entries [K, C].

    Returns:
        one or two views [blocks, parts, n, C] of the entries: the blocks of full size, and a
        smaller last block. A block has one part for each thread, because MKL uses all threads for
        several products, but not for one product with a small result.
    """
    bytes_ = _BLOCK_ON_CPU if q.device.type == "cpu" else _BLOCK
    unit = math.lcm(_GROUP, _threads(q))
    # an entry has C numbers, and N similarities
    size = max(bytes_ // (sum(q.shape) * q.element_size() * unit), 1) * unit
    full = len(bank) // size * size
    rest = bank[full:]
    stacks = [
        bank[:full].view(-1, _threads(q), size // _threads(q), bank.shape[1]),
        rest.view(1, math.gcd(len(rest), _threads(q)), -1, bank.shape[1]),
    ]
    return [stack for stack in stacks if stack.numel()]


def _nearest(q: Tensor, bank: Tensor, top: Tensor, n: int) -> Tensor:
    """Return the n largest similarities of each query [N, n], given the maxima of groups.

    The n largest values are in the n groups with the largest maxima. To find these groups, the same
    is done with groups of groups.

    Args:
        q: queries [N, C].
        bank: entries [K, C].
        top: largest similarity or logit in each group of K / M entries, [M, N].
        n: the number of similarities.
    """
    M = len(top)
    wide = top.unflatten(0, (-1, M // math.gcd(M, _GROUP)))  # [16, M / 16, N], if 16 divides M
    best = wide.amax(0).topk(min(n, wide.shape[1]), 0).indices  # [n, N]
    best = (torch.arange(0, M, wide.shape[1], device=q.device)[:, None, None] + best).flatten(0, 1)
    best = best.gather(0, top.gather(0, best).topk(min(n, M), 0).indices)  # [n, N] groups
    group = len(bank) // M
    entries = best.T[:, :, None] * group + torch.arange(group, device=q.device)  # [N, n, 16]
    similarity = torch.bmm(F.embedding(entries.flatten(1), bank), q[:, :, None]).squeeze(2)
    return similarity.topk(n, 1).values


def mixed_log_sum(
    q: Tensor, bank: Tensor, similarity: Tensor, temperature: float, mixture: Mixture | None = None
) -> Tensor:
    """Return the log-sum-exp of the logits of the bank and of synthetic negatives, [N].

    Args:
        q: normalized queries [N, C].
        bank: normalized entries [K, C], without gradient.
        similarity: q @ bank.T, [N, K], without gradient. It is overwritten.
        temperature: divides every similarity, > 0.
        mixture: the synthetic negatives, if any.
    """
    return _MixedLogSum.apply(q, bank, similarity, temperature, mixture)


class _BankLogSum(torch.autograd.Function):
    """The log-sum-exp over a bank."""

    @staticmethod
    def forward(ctx, q: Tensor, bank: Tensor, temperature: float):
        """Return the log-sum-exp [N], and the largest logit of each group of entries [K / n, N]."""
        (N, C), K = q.shape, len(bank)
        group = math.gcd(K, _GROUP)
        stacks = in_blocks(q, bank)
        top = q.new_empty(K // group, N)
        total, weighted = q.new_zeros(N), q.new_zeros(C, N)
        scaled, shift = (q / temperature).T, None
        if _can_overflow(q, K, temperature):
            maxima = [(block @ scaled).amax((0, 1)) for stack in stacks for block in stack]
            shift = torch.stack(maxima).amax(0)

        first = len(stacks[0]) * stacks[0].shape[1] * stacks[0].shape[2] // group
        for stack, tops in zip(stacks, (top[:first], top[first:]), strict=False):
            _, parts, n, _ = stack.shape
            logits, ones = q.new_empty(parts, n, N), q.new_ones(parts, 1, n)
            sums, products = q.new_zeros(parts, 1, N), q.new_zeros(parts, C, N)
            each = scaled.expand(parts, C, N)
            for block, maxima in zip(stack, tops.split(parts * n // group), strict=True):
                torch.bmm(block, each, out=logits)
                torch.amax(logits.view(-1, group, N), 1, out=maxima)
                e = (logits if shift is None else logits.sub_(shift)).exp_()
                sums.baddbmm_(ones, e)
                if ctx.needs_input_grad[0]:
                    products.baddbmm_(block.mT, e)
            total += sums.sum((0, 1))
            weighted += products.sum(0)

        ctx.save_for_backward((weighted / (temperature * total)).T)
        ctx.mark_non_differentiable(top)
        return total.log() if shift is None else total.log() + shift, top

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _: Tensor):
        """Return the gradient of q."""
        return ctx.saved_tensors[0] * gradient[:, None], None, None


class _MixedLogSum(torch.autograd.Function):
    """The log-sum-exp over a bank and synthetic negatives."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        bank: Tensor,
        similarity: Tensor,
        temperature: float,
        mixture: Mixture | None,
    ):
        """Return the log-sum-exp [N]."""
        shift = None
        logits = [similarity.mul_(1 / temperature)]
        if mixture is not None:
            logits.append(mixture.similarity / temperature)
        if _can_overflow(q, len(bank), temperature):
            shift = torch.stack([part.amax(1) for part in logits]).amax(0)
            for part in logits:
                part.sub_(shift[:, None])
        weight, total, rest = logits[0].exp_(), logits[0].sum(1), 0.0
        if mixture is not None:
            of_synthetic = logits[1].exp_().mul_(mixture.weight)
            total += of_synthetic.sum(1)
            # Synthetic negatives are sums of bank entries: add their weights to those of the
            # entries, so that one product with the bank serves all negatives.
            of_entries, rest = mixture.backward(q, of_synthetic)
            weight.scatter_add_(1, mixture.indices, of_entries)
        if ctx.needs_input_grad[0]:
            parts = math.gcd(len(bank), _threads(q))
            weight = weight.unflatten(1, (parts, -1)).transpose(0, 1)  # [parts, N, K / parts]
            weighted = torch.bmm(weight, bank.unflatten(0, (parts, -1))).sum(0) + rest
            ctx.save_for_backward(weighted / (temperature * total)[:, None])
        return total.log() if shift is None else total.log() + shift

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        """Return the gradient of q."""
        return ctx.saved_tensors[0] * gradient[:, None], None, None, None, None


def _can_overflow(q: Tensor, K: int, temperature: float) -> bool:
    """Return whether exponentials, or sums of them, may overflow or underflow in q's type.

    Similarities are in [-1, 1]. If nothing can overflow, no maximum has to be subtracted first.
    """
    return 1 / temperature + math.log(K) + 8 > math.log(torch.finfo(q.dtype).max)


def _threads(q: Tensor) -> int:
    """Return the number of parts of a product that can run at the same time."""
    return torch.get_num_threads() if q.device.type == "cpu" else 1
