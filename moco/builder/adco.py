"""AdCo: the negatives are learned, as adversaries of the encoder (Hu et al., arXiv 2011.08435)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import QueryAndKey
from moco.loss.adversarial import add_bank_gradient, ascend, keys_and_bank_nce
from moco.loss.contrastive import contrast_accuracy, feature_statistics, normalize
from moco.rng import Progress


@dataclass(frozen=True)
class Ascent:
    """How the bank of negatives trains: its SGD and the temperature of the loss on which it ascends."""

    lr: float = 3.0
    T: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    cosine: bool = False  # from lr to 0 by epoch


class AdCo(QueryAndKey):
    """InfoNCE against the keys of the joint batch and a bank of negatives that learns to be hard.

    The encoder descends and the bank ascends, both from what a step's queries were before either moved.

    Args:
        encoder, m, bn_splits, bn_splits_query: `QueryAndKey`'s.
        dim: feature size C.
        K: rows of the bank.
        T: softmax temperature of the encoder's loss.
        ascent: the bank's training.
        symmetric: both of the first two views have keys, and the mean of both directions counts.
        multi_crop: all views but the key view are queries, and their losses add up; else the first of two is.
        fill: begin with a bank of keys, which steps before epoch 0 gather while the encoder trains.
    """

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.12,
        bn_splits: int = 8,
        *,
        ascent: Ascent,
        bn_splits_query: bool = False,
        symmetric: bool = False,
        multi_crop: bool = False,
        fill: bool = True,
    ):
        super().__init__(encoder, m, bn_splits, bn_splits_query)
        self.K, self.T, self.ascent, self.symmetric, self.multi_crop = (
            K,
            T,
            ascent,
            symmetric,
            multi_crop,
        )
        self.images_before = K if fill else 0  # images that train before epoch 0
        self.register_buffer("bank", normalize(torch.randn(K, dim)))  # W [K, C]
        self.register_buffer("bank_velocity", torch.zeros(K, dim))
        self._progress, self._passes = Progress(), 0
        self._unit = self._gradient = torch.empty(
            0
        )  # [K, C] from the first pass on, kept because such memory is slow to come by
        self._new_keys: list[Tensor] = []

    def pairs(self, views: int) -> list[tuple[int, int]]:
        """Which views are compared, as (query, key)."""
        if self.multi_crop:
            keys = (0, 1) if self.symmetric else (0,)
            return [(query, key) for key in keys for query in range(views) if query != key]
        return [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]

    def forward(
        self, views: Sequence[Tensor], index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of this rank's batch.

        Args:
            views: each [B, 3, S, S]. A query and a key view; with `multi_crop` the key view first (symmetric: both of them),
                the others after it, of any sizes.
            index: unused.
            progress: where in the run this pass stands; fixes the shuffle. Steps below 0 fill the bank.
        """
        pairs = self.pairs(len(views))
        q = {
            view: normalize(self.encoder_q(views[view]))
            for view in sorted({query for query, _ in pairs})
        }  # [B, C] each
        k = {
            view: self.keys(views[view], progress, view)
            for view in sorted({key for _, key in pairs})
        }  # [W B, C] each
        self._progress = progress
        if progress.step < 0:
            self._new_keys.append(k[pairs[0][1]])
        with torch.autocast(views[0].device.type, enabled=False):
            return self.contrast([(q[query], k[key]) for query, key in pairs])

    def contrast(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of pairs of this rank's queries [B, C] and all keys [W B, C], unit rows; keeps the bank's gradient."""
        q = torch.cat([queries for queries, _ in pairs])  # [P B, C]
        near = torch.cat([queries @ keys.T for queries, keys in pairs])  # [P B, W B]
        B = len(q) // len(pairs)
        label = (distributed.rank() * B + torch.arange(B, device=q.device)).repeat(len(pairs))
        scale = len(pairs) / (
            1 + self.symmetric
        )  # the rows' mean times this: views add up, directions are averaged
        with torch.no_grad():
            length = torch.linalg.vector_norm(self.bank, dim=1, keepdim=True).clamp_min_(1e-12)
            if not len(self._unit):
                self._unit, self._gradient = (
                    torch.empty_like(self.bank),
                    torch.zeros_like(self.bank),
                )
            bank = torch.div(self.bank, length, out=self._unit)
            similarity = q @ bank.T  # [P B, K]
            positive = near.gather(1, label[:, None]).squeeze(1)
            metrics = contrast_accuracy(positive, near, similarity)
            metrics |= feature_statistics(pairs[0][0], positive[:B], similarity[:B].amax(1))
            if self._progress.step >= 0:
                add_bank_gradient(
                    self._gradient, q, near, bank, length, similarity, self.ascent.T, scale
                )
                self._passes += 1
        return keys_and_bank_nce(q, near, label, bank, similarity, self.T) * scale, metrics

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the key encoder follows, the bank ascends or is filled."""
        super().after_step()
        if self._progress.step < 0:
            self._fill()
            return
        gradient = distributed.all_reduce_sum(self._gradient).div_(
            self._passes * distributed.world_size()
        )
        ascent = self.ascent
        share = (
            0.5 * (1 + math.cos(math.pi * self._progress.epoch / self._progress.epochs))
            if ascent.cosine
            else 1.0
        )
        ascend(
            self.bank,
            self.bank_velocity,
            gradient,
            ascent.lr * share,
            ascent.momentum,
            ascent.weight_decay,
        )
        gradient.zero_()
        self._passes = 0

    def _fill(self) -> None:
        """The step's keys become rows of the bank; after the last step of all the key encoder begins anew from the encoder."""
        keys = torch.cat(self._new_keys)
        steps = -(-self.K // len(keys))
        rows = self.bank[
            (self._progress.step + steps) * len(keys) :
        ]  # those that earlier steps have not filled
        rows[: len(keys)] = keys[: len(rows)]
        self._new_keys.clear()
        if self._progress.step == -1:
            torch._foreach_copy_(
                list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
            )
