"""Log-sum-exps of the logits of queries against a bank of negatives that has no gradient.

`bank_log_sum` reads the bank in blocks. `mixed_log_sum` also has synthetic negatives, and needs the
similarities of all entries.

If entries b_j of the bank have similarities s_j = q.b_j to a query q, the gradient is

    d/dq log sum_j exp(s_j / T) = sum_j exp(s_j / T) b_j / (T sum_j exp(s_j / T))

The forward pass computes both sums, so the backward pass only scales the result.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.loss.synthetic import Mixture

# bytes of a block of the bank and its similarities
_BLOCK_ON_CPU, _BLOCK = 5 << 19, 1 << 28  # on a CPU, a block stays in the cache


class BankSum(NamedTuple):
    """The log-sum-exp over a bank, and numbers for metrics, of each query.

    Attributes:
        log_sum: log-sum-exp of the logits, [N], differentiable in the queries.
        above: number of entries that are more similar to the query than its key, as floats [N].
        hardest: the largest similarity, [N].
    """

    log_sum: Tensor
    above: Tensor
    hardest: Tensor


def bank_log_sum(q: Tensor, positive: Tensor, bank: Tensor, temperature: float) -> BankSum:
    """Return the log-sum-exp over the bank.

    The bank is read in blocks, without a tensor of size [N, K].

    Args:
        q: normalized queries [N, C].
        positive: similarity of each query to its key, [N]; only for `above`.
        bank: normalized entries [K, C], without gradient.
        temperature: divides every similarity, > 0.
    """
    return BankSum(*_BankLogSum.apply(q, positive.detach(), bank, temperature))


def in_blocks(bank: Tensor, numbers: int) -> list[Tensor]:
    """Return the bank as blocks that are processed one after the other.

    Args:
        bank: the entries [K, C].
        numbers: how many numbers there are for an entry in all tensors that a block needs: C and
            the similarities of N queries, for example.

    Returns:
        one or two views [blocks, parts, n, C] of the entries: the blocks of full size, and a
        smaller last block. A block has one part for each thread, because MKL uses all threads for
        several products, but not for one product with a small result.
    """
    bytes_ = _BLOCK_ON_CPU if bank.device.type == "cpu" else _BLOCK
    threads = _threads(bank)
    size = max(bytes_ // (numbers * bank.element_size() * threads), 1) * threads
    full = len(bank) // size * size
    rest = bank[full:]
    stacks = [
        bank[:full].view(-1, threads, size // threads, bank.shape[1]),
        rest.view(1, math.gcd(len(rest), threads), -1, bank.shape[1]),
    ]
    return [stack for stack in stacks if stack.numel()]


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
    """The log-sum-exp over a bank; see `BankSum`."""

    @staticmethod
    def forward(ctx, q: Tensor, positive: Tensor, bank: Tensor, temperature: float):
        """Return the items of `BankSum`."""
        ctx.set_materialize_grads(False)
        (N, C), stacks = q.shape, in_blocks(bank, sum(q.shape))
        scaled, of_key = (q / temperature).T.contiguous(), positive / temperature
        total, above, weighted = q.new_zeros(N), q.new_zeros(N), q.new_zeros(C, N)
        shift, largest = None, []
        if can_overflow(q, len(bank), temperature):
            shift, above = _first_pass(stacks, scaled, of_key)
        of_key.exp_()

        for stack in stacks:
            blocks, parts, n, _ = stack.shape
            logits, ones = q.new_empty(parts, n, N), q.new_ones(parts, 1, n)
            each, maxima = scaled.expand(parts, C, N), q.new_empty(blocks, parts, N)
            sums, counts = q.new_zeros(parts, 1, N), q.new_zeros(parts, 1, N)
            products = q.new_zeros(parts, C, N)
            for block, columns, maximum in zip(stack, stack.mT, maxima, strict=True):
                torch.bmm(block, each, out=logits)
                e = (logits if shift is None else logits.sub_(shift)).exp_()
                sums.baddbmm_(ones, e)  # faster than `sum`
                if ctx.needs_input_grad[0]:
                    products.baddbmm_(columns, e)
                if shift is None:  # the order of the exponentials is that of the similarities
                    torch.amax(e, 1, out=maximum)
                    counts.baddbmm_(ones, e.gt_(of_key))
            total += sums.sum((0, 1))
            above += counts.sum((0, 1))
            weighted += products.sum(0)
            largest.append(maxima.flatten(0, 1))

        ctx.save_for_backward((weighted / (temperature * total)).T)
        top = torch.cat(largest).amax(0).log_() if shift is None else shift  # logits
        hardest = top * temperature
        ctx.mark_non_differentiable(above, hardest)
        return total.log() if shift is None else total.log() + shift, above, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_: Tensor):
        """Return the gradient of q."""
        return ctx.saved_tensors[0] * gradient[:, None], None, None, None


def _first_pass(stacks: list[Tensor], scaled: Tensor, of_key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each query, and the number of logits above its key's, [N].

    Args:
        stacks: the entries, from `in_blocks`.
        scaled: queries / temperature, [C, N].
        of_key: the logit of each key, [N].
    """
    largest, above = [], torch.zeros_like(of_key)
    for stack in stacks:
        for block in stack:
            logits = block @ scaled  # [parts, n, N]
            largest.append(logits.amax((0, 1)))
            above += (logits > of_key).sum((0, 1))
    return torch.stack(largest).amax(0), above


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
        if can_overflow(q, len(bank), temperature):
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


def can_overflow(q: Tensor, K: int, temperature: float) -> bool:
    """Return whether exponentials, or sums of them, may overflow or underflow in q's type.

    Similarities are in [-1, 1]. If nothing can overflow, no maximum has to be subtracted first.
    """
    return 1 / temperature + math.log(K) + 8 > math.log(torch.finfo(q.dtype).max)


def _threads(x: Tensor) -> int:
    """Return the number of parts of a product that can run at the same time on x's device."""
    return torch.get_num_threads() if x.device.type == "cpu" else 1
