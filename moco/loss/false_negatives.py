"""FNC's loss: find false negatives, then attract or eliminate them (arXiv 2011.11765).

An image has V views. The feature z of each view is an anchor. It is compared with a bank M of
normalized entries, which contains the image's own views. An entry that is similar to an image is
assumed to show the same class, and is then a false negative. `moco/builder/fnc.py` uses this file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.loss.hardest import hardest

MODES = ("attract", "eliminate", "off")


@dataclass(frozen=True)
class Cancellation:
    """The settings of FNC: how to find and how to use false negatives (sections 3.1 to 3.3)."""

    mode: str = "attract"  # one of MODES
    topk: int = 10  # maximum number of false negatives per image
    threshold: float = 0.7  # minimum similarity, in [-1, 1]


@dataclass(frozen=True)
class FalseNegatives:
    """The most similar bank entries of n images, and which of them are false negatives."""

    indices: Tensor  # [n, k] in the bank
    mask: Tensor  # [n, k] True if the similarity is above the threshold


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


def cancelled_nt_xent(
    z: Tensor,
    bank: Tensor,
    own: Tensor,
    found: FalseNegatives,
    mode: str,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return FNC's loss and two metrics, with a single [chunk, R] buffer.

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
        the mean similarity of the anchors to their hardest negative, in [-1, 1]. No gradient.
    """
    return _CancelledNTXent.apply(z, bank, own, found, mode, temperature, chunk)


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
        """Return the loss and the two metrics of `cancelled_nt_xent`."""
        V, n, _ = z.shape
        to_z = torch.empty_like(z)
        to_bank = torch.zeros_like(bank) if ctx.needs_input_grad[1] else None
        wide = torch.float32 if z.device.type == "mps" else torch.float64  # mps lacks float64
        loss, nearest, hardness = z.new_zeros((), dtype=wide), z.new_zeros(()), z.new_zeros(())
        buffer = z.new_empty(min(chunk, n), len(bank))
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            own_part = own[:, part].T  # [c, V]
            false, mask = found.indices[part], found.mask[part]  # [c, k]
            attracted = mask.to(z.dtype) * (mode == "attract")
            # the weight of each positive in their mean, [c, 1]
            share = 1 / (V - 1 + attracted.sum(1, keepdim=True))
            for a in range(V):
                q = z[a, part]  # [c, C]
                others = torch.cat([own_part[:, :a], own_part[:, a + 1 :]], 1)  # [c, V - 1]

                # `weight` holds the logits, then their exponentials, then the gradient. [c, R]
                weight = torch.mm(q / temperature, bank.T, out=buffer[: len(q)])
                positive, of_false = weight.gather(1, others), weight.gather(1, false)

                # Leave only negatives in `weight`: mask the own views and the false negatives.
                masked = of_false.masked_fill(mask, -torch.inf)
                weight.scatter_(1, own_part, -torch.inf).scatter_(1, false, masked)

                # Subtract the largest logit, so that no exponential overflows.
                negative = weight.amax(1, keepdim=True)
                top = torch.cat([negative, positive, of_false], 1).amax(1, keepdim=True)
                weight.sub_(top).exp_()
                e_positive = (positive - top).exp_()
                e_false = (of_false - top).exp_() * attracted
                total = weight.sum(1, keepdim=True)
                total = total + e_positive.sum(1, keepdim=True) + e_false.sum(1, keepdim=True)

                of_attracted = (of_false * attracted).sum(1, keepdim=True)
                mean = share * (positive.sum(1, keepdim=True) + of_attracted)
                loss += (top + total.log() - mean).sum()
                nearest += (positive > negative).sum()
                hardness += negative.sum()

                # The gradient with respect to the logits, times `total`: softmax minus `share`.
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
        """Scale the gradients that the forward pass computed."""
        to_z, to_bank = ctx.saved_tensors
        gradient = gradient * ctx.scale
        to_bank = None if to_bank is None else to_bank * gradient
        return to_z * gradient, to_bank, None, None, None, None, None
