"""InfoNCE over a bank of negatives (He et al., arXiv 1911.05722, equation 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.loss.synthetic import Mixture


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


def bank_info_nce(
    q: Tensor,
    positive: Tensor,
    bank: Tensor,
    similarity: Tensor,
    temperature: float,
    mixture: Mixture | None = None,
) -> Tensor:
    """`info_nce` against a bank without gradient, in the memory of one [N, K] buffer: what MoCo and SynCo train on.

    Args:
        q: unit queries [N, C], with gradient.
        positive: similarity of each query to its key, [N], with gradient.
        bank: unit rows [K, C].
        similarity: q @ bank.T, [N, K], without gradient. Used up: it holds exponentials afterwards, and the gradient's
            coefficients after the backward pass, which can run once.
        temperature: > 0.
        mixture: synthetic negatives that join the bank's.
    """
    l_pos = positive / temperature
    return (
        torch.logaddexp(l_pos, bank_log_sum_exp(q, bank, similarity, temperature, mixture)) - l_pos
    ).mean()


def bank_log_sum_exp(
    q: Tensor, bank: Tensor, similarity: Tensor, temperature: float, mixture: Mixture | None = None
) -> Tensor:
    """log-sum-exp of the logits over all negatives, [N]; the arguments are `bank_info_nce`'s."""
    return _BankLogSumExp.apply(q, bank, similarity, temperature, mixture)


class _BankLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, bank: Tensor, similarity: Tensor, temperature: float, more: Mixture | None
    ):
        top = similarity.amax(1, keepdim=True)
        if more is not None:
            synthetic = more.dot(q, similarity)
            top = torch.maximum(top, synthetic.amax(1, keepdim=True))
            ctx.of_more = torch.exp((synthetic - top) / temperature)
        ctx.of_bank = torch.add(
            -top / temperature, similarity, alpha=1 / temperature, out=similarity
        ).exp_()
        total = ctx.of_bank.sum(1, keepdim=True)
        if more is not None:
            total += ctx.of_more.sum(1, keepdim=True)
        ctx.more, ctx.temperature = more, temperature
        ctx.save_for_backward(q, bank, total)
        return (top / temperature + total.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        q, bank, total = ctx.saved_tensors
        weight, ctx.of_bank = ctx.of_bank, None
        if weight is None:
            raise RuntimeError(
                "bank_info_nce: the first backward pass used up its memory; compute the loss again"
            )
        rest = 0.0
        if ctx.more is not None:
            coefficients, rest = ctx.more.backward(q, ctx.of_more)
            weight.scatter_add_(1, ctx.more.indices, coefficients)
        return (
            (weight @ bank + rest) * (gradient[:, None] / (total * ctx.temperature)),
            None,
            None,
            None,
            None,
        )


@torch.no_grad()
def contrast_accuracy(positive: Tensor, *negatives: Tensor) -> dict[str, Tensor]:
    """How often the positive [N] is first (`acc1`) or among the first five (`acc5`) beside its negatives, any number of [N, K_i].

    Scalars in [0, 1]. Counts the negatives above the positive in one pass over K; no sort.
    """
    above = sum((part > positive[:, None]).sum(1) for part in negatives)
    return {"acc1": (above < 1).float().mean(), "acc5": (above < 5).float().mean()}


@torch.no_grad()
def feature_statistics(
    q: Tensor, positive: Tensor, negative: Tensor | None = None
) -> dict[str, Tensor]:
    """How the features lie, which the loss alone does not tell; scalars.

    Args:
        q: unit queries [N, C], N at least 2.
        positive: similarity of each query to its key, [N].
        negative: similarity of each query to its hardest negative, [N].

    Returns:
        `feature_std`: mean over dimensions of the standard deviation, times sqrt(C): about 1 where features are spread over the
            whole sphere, 0 where all of them are the same, which is a collapse;
        `alignment`: mean squared distance of the positive pairs, in [0, 4], and `uniformity`: log of the mean of exp(-2 d^2) over
            the distances d of all pairs of queries, in [-8, 0] (Wang & Isola, arXiv 2005.10242, section 4.1);
        `hardness`: mean of `negative`, in [-1, 1].
    """
    n, C = q.shape
    pairs = torch.exp(4 * (q @ q.T) - 4)  # d^2 = 2 - 2 q.q'
    found = {
        "feature_std": q.std(0).mean() * C**0.5,
        "alignment": 2 - 2 * positive.mean(),
        "uniformity": ((pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))).log(),
    }
    return found if negative is None else {**found, "hardness": negative.mean()}


def normalize(x: Tensor) -> Tensor:
    """Rows of `x` [..., C] scaled to length 1, in float32 or wider whatever the autocast state."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
