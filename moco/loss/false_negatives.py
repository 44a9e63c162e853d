"""FNC's loss: find false negatives, then attract or eliminate them (arXiv 2011.11765).

An image has V views. The feature z of each view is an anchor. It is compared with a bank M of
normalized entries, which contains the image's own views. An entry that is similar to an image is
assumed to show the same class, and is then a false negative. With labels, the false negatives are
the entries of the image's class. `moco/builder/fnc.py` uses this file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.loss.hardest import hardest


@dataclass(frozen=True)
class Cancellation:
    """The settings of FNC: how to find and how to use false negatives (sections 3.1 to 3.3)."""

    mode: str = "attract"  # one of MODES of moco/loss/settings.py
    topk: int = 10  # maximum number of false negatives per image
    threshold: float = 0.7  # minimum similarity, in [-1, 1]
    source: str = "similarity"  # one of SOURCES; with labels, `topk` and `threshold` are unused


@dataclass(frozen=True)
class FalseNegatives:
    """The false negatives of n images: a mask over k candidates of each image, or over the bank."""

    indices: Tensor | None  # [n, k] in the bank; None: the mask is over the full bank
    mask: Tensor  # [n, k] or [n, R] True for a false negative


@torch.no_grad()
def find_false_negatives(
    bank: Tensor, own: Tensor, config: Cancellation, chunk: int
) -> FalseNegatives:
    """Return the false negatives of n images (section 3.2).

    They are the `topk` bank entries with the largest maximum similarity to the views of the image,
    if it is above the threshold. The image's own views are excluded.

    Args:
        bank: normalized entries [R, C].
        own: indices in the bank of the V views of the images, [V, n].
        config: `topk` is lowered to the number of other entries. With mode "off", k is 0.
        chunk: images compared with the bank at a time, with two [chunk, R] buffers.
    """
    k = min(config.topk, len(bank) - len(own)) if config.mode != "off" else 0
    if k == 0:
        none = own.new_empty(own.shape[1], 0)
        return FalseNegatives(none, none.bool())
    indices, masks = [], []
    for own_part in own.split(chunk, 1):
        score = bank[own_part[0]] @ bank.T  # [c, R]
        for view in own_part[1:]:
            torch.maximum(score, bank[view] @ bank.T, out=score)
        score.scatter_(1, own_part.T, -torch.inf)
        indices.append(hardest(score, k))
        masks.append(score.gather(1, indices[-1]) > config.threshold)
    return FalseNegatives(torch.cat(indices), torch.cat(masks))


def same_class_entries(labels: Tensor, bank_labels: Tensor, own: Tensor) -> FalseNegatives:
    """Return all bank entries of the classes of n images, except the images' own views.

    Args:
        labels: class of each image, [n].
        bank_labels: class of each bank entry, [R]; -1 if it has none.
        own: indices in the bank of the V views of the images, [V, n].
    """
    same = labels[:, None] == bank_labels  # [n, R]
    return FalseNegatives(None, same.scatter(1, own.T, False))


def cancelled_nt_xent(
    z: Tensor,
    bank: Tensor,
    own: Tensor,
    found: FalseNegatives,
    mode: str,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return FNC's loss and two metrics, with a single [chunk, R] buffer.

    If the mask of the false negatives covers the full bank, a few such buffers are needed.

    An anchor has a logit for each bank entry except its own. Its positives are the V - 1 other
    views of its image. With mode "attract", the false negatives are positives, too. The loss is the
    log-sum-exp of all logits minus the mean logit of the positives. With mode "eliminate", the
    log-sum-exp leaves out the false negatives. Without false negatives and with V = 2 this is
    SimCLR's NT-Xent.

    Args:
        z: normalized anchors [V, n, C], with gradient.
        bank: normalized entries [R, C]; they receive a gradient if they require one.
        own: indices in the bank of the V views of the images, [V, n].
        found: the false negatives of the images.
        mode: one of `MODES`.
        temperature: divides every similarity, > 0.
        chunk: images compared with the bank at a time.

    Returns:
        the loss: 2 / V times the sum over views of the mean over images.
        the fraction, in [0, 1], of pairs of an anchor and another view of its image that are more
            similar than the anchor and every negative. False negatives do not count as negatives.
            No gradient.
        the sum of the similarities of the anchors to their hardest negative, and the number of
            anchors that have a negative. No gradient.
    """
    loss, nearest, *hardness = _CancelledNTXent.apply(z, bank, own, found, mode, temperature, chunk)
    return loss, nearest, tuple(hardness)


class _CancelledNTXent(torch.autograd.Function):
    """The loss, whose forward pass also computes the gradient.

    Therefore no tensor as wide as the bank is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        bank: Tensor,
        own: Tensor,
        found: FalseNegatives,
        mode: str,
        temperature: float,
        chunk: int,
    ):
        """Return the loss and the metrics of `cancelled_nt_xent`."""
        V, n, _ = z.shape
        to_z = torch.empty_like(z)
        to_bank = torch.zeros_like(bank) if ctx.needs_input_grad[1] else None
        wide = torch.float32 if z.device.type == "mps" else torch.float64  # mps lacks float64
        loss, nearest = z.new_zeros((), dtype=wide), z.new_zeros(())
        hardness, with_negatives = z.new_zeros(()), z.new_zeros(())
        buffer = z.new_empty(min(chunk, n), len(bank))
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            own_part = own[:, part].T  # [c, V]
            false = None if found.indices is None else found.indices[part]  # [c, k]
            mask = found.mask[part]  # [c, k], or [c, R] if `false` is None
            attracted = mask if mode == "attract" else torch.zeros_like(mask)
            # the weight of each positive in their mean, [c, 1]
            share = 1 / (V - 1 + attracted.sum(1, keepdim=True).to(z.dtype))
            for a in range(V):
                q = z[a, part]  # [c, C]
                others = torch.cat([own_part[:, :a], own_part[:, a + 1 :]], 1)  # [c, V - 1]

                # `weight` holds the logits, then their exponentials, then the gradient. [c, R]
                weight = torch.mm(q / temperature, bank.T, out=buffer[: len(q)])
                positive = weight.gather(1, others)

                # Leave only negatives in `weight`: mask the own views and the false negatives.
                weight.scatter_(1, own_part, -torch.inf)
                if false is None:
                    of_false = weight.masked_fill(~attracted, -torch.inf)
                    weight.masked_fill_(mask, -torch.inf)
                else:
                    of_false = weight.gather(1, false)
                    weight.scatter_(1, false, of_false.masked_fill(mask, -torch.inf))
                    of_false.masked_fill_(~attracted, -torch.inf)
                mean = positive.sum(1, keepdim=True)
                mean = share * (mean + of_false.masked_fill(~attracted, 0).sum(1, keepdim=True))

                # Subtract the largest logit, so that no exponential overflows.
                negative = weight.amax(1, keepdim=True)
                top = torch.cat([negative, positive], 1).amax(1, keepdim=True)
                if of_false.shape[1]:
                    top = torch.maximum(top, of_false.amax(1, keepdim=True))
                weight.sub_(top).exp_()
                e_positive = (positive - top).exp_()
                e_false = of_false.sub_(top).exp_()
                total = weight.sum(1, keepdim=True)
                total = total + e_positive.sum(1, keepdim=True) + e_false.sum(1, keepdim=True)

                loss += (top + total.log() - mean).sum()
                nearest += (positive > negative).sum()
                # an anchor has no negative if all other entries are false negatives
                some = negative > -torch.inf
                hardness += negative.masked_fill(~some, 0).sum()
                with_negatives += some.sum()

                # The gradient with respect to the logits, times `total`: softmax minus `share`.
                e_false.sub_(share * total * attracted)
                weight.add_(e_false) if false is None else weight.scatter_add_(1, false, e_false)
                weight.scatter_(1, others, e_positive - share * total)
                to_z[a, part] = weight @ bank / total
                if to_bank is not None:
                    to_bank.addmm_(weight.T, q / total)
        scale = 2 / (V * n)
        ctx.save_for_backward(to_z, to_bank)
        ctx.scale = scale / temperature
        nearest /= V * (V - 1) * n
        hardness *= temperature
        ctx.mark_non_differentiable(nearest, hardness, with_negatives)
        return (loss * scale).to(z.dtype), nearest, hardness, with_negatives

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        """Scale the gradients that the forward pass computed."""
        to_z, to_bank = ctx.saved_tensors
        gradient = gradient * ctx.scale
        to_bank = None if to_bank is None else to_bank * gradient
        return to_z * gradient, to_bank, None, None, None, None, None
