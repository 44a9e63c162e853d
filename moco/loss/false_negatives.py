"""FNC's loss: contrast that looks for its false negatives and attracts or eliminates them (Huynh et al., arXiv 2011.11765).

An image has V views, each of them an anchor z. What it is compared with is a bank M of unit rows, among them the image's own views.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.loss.synthetic import hardest

MODES = ("attract", "eliminate", "off")


@dataclass(frozen=True)
class Cancellation:
    """Which rows of the bank are taken for false negatives, and what becomes of them (sections 3.1 to 3.3)."""

    mode: str = "attract"  # one of MODES
    topk: int = 10  # at most so many of an image
    threshold: float = 0.7  # least similarity, in [-1, 1]


@dataclass(frozen=True)
class Found:
    """The false negatives of n images: `rows` of the bank [n, k], of which those count where `counts` [n, k] is True."""

    rows: Tensor
    counts: Tensor


@torch.no_grad()
def find(bank: Tensor, own: Tensor, how: Cancellation, chunk: int) -> Found:
    """The topk rows of the bank that are most similar to any view of an image, where they are above the threshold.

    Args:
        bank: unit rows [R, C].
        own: where in the bank the V views of n images lie, [V, n]; these rows are no candidates.
        how: `topk` is lowered where the bank has fewer other rows; with mode "off" nothing is found.
        chunk: images that are compared with the bank at a time, in the memory of two [chunk, R].
    """
    k = min(how.topk, len(bank) - len(own)) if how.mode != "off" else 0
    if k == 0:
        none = own.new_empty(own.shape[1], 0)
        return Found(none, none.bool())
    rows, counts = [], []
    for mine in own.split(chunk, 1):
        score = bank[mine[0]] @ bank.T
        for view in mine[1:]:
            torch.maximum(score, bank[view] @ bank.T, out=score)
        score.scatter_(1, mine.T, -torch.inf)
        rows.append(hardest(score, k))
        counts.append(score.gather(1, rows[-1]) > how.threshold)
    return Found(torch.cat(rows), torch.cat(counts))


def cancelled_nt_xent(
    z: Tensor, bank: Tensor, own: Tensor, found: Found, mode: str, temperature: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, in the memory of one [chunk, R] buffer; how often a view is nearest to its image's others; how near negatives are.

    With l the logits of an anchor over the bank less its own row: log-sum-exp(l) less the mean of l over its image's other V - 1
    views and, to attract them, the false negatives; to eliminate them, they leave the log-sum-exp instead. Without false negatives
    and with V = 2 this is SimCLR's NT-Xent.

    Args:
        z: unit anchors [V, n, C], with gradient.
        bank, own, chunk: as in `find`; gradient goes into the bank too, if it requires one.
        found: their false negatives.
        mode: one of `MODES`.
        temperature: divides every similarity, > 0.

    Returns:
        2 / V times the sum over views of the mean over images; and the share, in [0, 1], of an image's pairs of views that are more
        similar than the anchor and any negative, of which false ones are none; and the mean similarity of the anchors and their
        hardest negative. All are scalars, the last two without gradient.
    """
    return _CancelledNTXent.apply(z, bank, own, found, mode, temperature, chunk)


class _CancelledNTXent(torch.autograd.Function):
    """The gradient is made along with the loss: nothing as wide as the bank outlives its chunk."""

    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        bank: Tensor,
        own: Tensor,
        found: Found,
        mode: str,
        temperature: float,
        chunk: int,
    ):
        V, n, _ = z.shape
        to_z, to_bank = (
            torch.empty_like(z),
            torch.zeros_like(bank) if ctx.needs_input_grad[1] else None,
        )
        wide = torch.float32 if z.device.type == "mps" else torch.float64  # mps lacks float64
        loss, nearest, hardness = z.new_zeros((), dtype=wide), z.new_zeros(()), z.new_zeros(())
        buffer = z.new_empty(min(chunk, n), len(bank))
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            mine, false, counts = (
                own[:, part].T,
                found.rows[part],
                found.counts[part],
            )  # [c, V], [c, k], [c, k]
            attracted = counts.to(z.dtype) * (mode == "attract")
            share = 1 / (
                V - 1 + attracted.sum(1, keepdim=True)
            )  # of each positive in their mean, [c, 1]
            for a in range(V):
                q, others = (
                    z[a, part],
                    torch.cat([mine[:, :a], mine[:, a + 1 :]], 1),
                )  # [c, C], [c, V - 1]
                weight = torch.mm(
                    q / temperature, bank.T, out=buffer[: len(q)]
                )  # logits, then the gradient's weights, [c, R]
                positive, of_false = weight.gather(1, others), weight.gather(1, false)
                weight.scatter_(1, mine, -torch.inf).scatter_(
                    1, false, of_false.masked_fill(counts, -torch.inf)
                )
                negative = weight.amax(1, keepdim=True)
                top = torch.cat([negative, positive, of_false], 1).amax(1, keepdim=True)
                weight.sub_(top).exp_()
                e_positive, e_false = (positive - top).exp_(), (of_false - top).exp_() * attracted
                total = (
                    weight.sum(1, keepdim=True)
                    + e_positive.sum(1, keepdim=True)
                    + e_false.sum(1, keepdim=True)
                )
                mean = share * (
                    positive.sum(1, keepdim=True) + (of_false * attracted).sum(1, keepdim=True)
                )
                loss += (top + total.log() - mean).sum()
                nearest += (positive > negative).sum()
                hardness += negative.sum()
                # the gradient of log-sum-exp and mean in the logits, times total
                weight.scatter_add_(1, false, e_false - share * total * attracted)
                weight.scatter_(1, others, e_positive - share * total)
                to_z[a, part] = weight @ bank / total
                if to_bank is not None:
                    to_bank.addmm_(weight.T, q / total)
        scale = 2 / (V * n)
        ctx.save_for_backward(to_z, to_bank)
        ctx.scale = scale / temperature
        nearest /= V * (V - 1) * n
        hardness *= temperature / (V * n)
        ctx.mark_non_differentiable(nearest, hardness)
        return (loss * scale).to(z.dtype), nearest, hardness

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        to_z, to_bank = ctx.saved_tensors
        gradient = gradient * ctx.scale
        return (
            to_z * gradient,
            None if to_bank is None else to_bank * gradient,
            None,
            None,
            None,
            None,
            None,
        )
