"""AdCo: negatives that are learned as adversaries of the encoder (Hu et al., arXiv 2011.08435)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import QueryAndKey
from moco.builder.moco import contrast
from moco.loss.adversarial import add_bank_gradient, ascend, keys_and_bank_nce
from moco.loss.contrastive import InfoNCE, contrast_accuracy, feature_statistics, normalize
from moco.loss.hardest import hardest
from moco.rng import Progress


@dataclass(frozen=True)
class Ascent:
    """The settings of the bank's training: its SGD, and the temperature T of its loss."""

    lr: float = 3.0
    T: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4


class AdCo(QueryAndKey):
    """InfoNCE against the keys of the joint batch and a bank of negatives that learns to be hard.

    The encoder minimizes the loss and the bank maximizes it. Both gradients are computed from the
    same queries, before the encoder and the bank are updated.

    Args:
        encoder, m, bn_splits, bn_splits_query: see `QueryAndKey`.
        dim: feature size C.
        K: entries of the bank.
        T: softmax temperature of the encoder's loss.
        ascent: the settings of the bank's training.
        symmetric: whether each of the first two views has keys. The loss is then the mean over
            both directions.
        multi_crop: whether all views except the key view are queries, whose losses are added.
            Otherwise only the first of two views is a query.
        fill: whether to fill the bank with keys in extra training steps before epoch 0. Otherwise
            it starts from the standard normal distribution.
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
        self.K, self.T, self.ascent = K, T, ascent
        self.symmetric, self.multi_crop = symmetric, multi_crop
        self.images_before_epoch_0 = K if fill else 0  # images that train before epoch 0
        self.register_buffer("bank", torch.randn(K, dim))  # W [K, C]
        self.register_buffer("bank_velocity", torch.zeros(K, dim))
        self._progress, self._passes = Progress(), 0
        # [K, C] from the first pass on; kept because allocating that much memory is slow
        self._unit = self._gradient = torch.empty(0)
        self._new_keys: list[Tensor] = []

    @property
    def learned_negatives(self) -> Tensor:
        """Return the normalized entries of the bank, [K, C]."""
        return normalize(self.bank)

    def pairs(self, views: int) -> list[tuple[int, int]]:
        """Return the pairs (query view, key view) to compare, given the number of views."""
        if self.multi_crop:
            keys = (0, 1) if self.symmetric else (0,)
            return [(query, key) for key in keys for query in range(views) if query != key]
        return [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the bank's learning rate, and the momentum of the key encoder."""
        return {"bank lr": self.ascent.lr, **super().schedules(progress)}

    def forward(
        self,
        views: Sequence[Tensor],
        index: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of this rank's batch.

        Args:
            views: each [B, 3, S, S]: a query view and a key view. With `multi_crop`, the key view
                comes first (if symmetric, both key views do); other views may have other sizes.
            index: unused.
            progress: position in the run; seeds the shuffle. Steps below 0 fill the bank.
        """
        self._progress = progress
        if progress.step < 0:
            return self.contrast_to_fill(views[0], views[-1], progress, len(views) - 1)
        pairs = self.pairs(len(views))
        query_views, key_views = (sorted(set(one)) for one in zip(*pairs, strict=True))
        q = {view: normalize(self.encoder_q(views[view])) for view in query_views}  # [B, C] each
        k = {view: self.keys(views[view], progress, view) for view in key_views}  # [W B, C] each
        with torch.autocast(views[0].device.type, enabled=False):
            return self.contrast([(q[query], k[key]) for query, key in pairs])

    def contrast_to_fill(
        self, query_view: Tensor, key_view: Tensor, progress: Progress, view: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of a step that fills the bank, and keep its keys.

        As in the authors' code, the negatives are the bank's entries alone, without the other keys
        of the batch. The loss has one direction, also if `symmetric`.

        Args:
            query_view: the first view, [B, 3, S, S].
            key_view: the last view, [B, 3, S', S'].
            progress: position in the run.
            view: index of the key view.
        """
        q = normalize(self.encoder_q(query_view))  # [B, C]
        k = self.keys(key_view, progress, view)  # [W B, C]
        self._new_keys.append(k)
        own = k[distributed.rank() * len(q) :][: len(q)]
        with torch.autocast(q.device.type, enabled=False):
            return contrast(q, own, normalize(self.bank), self.T, InfoNCE(), None, progress)

    def contrast(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of pairs of queries and keys; accumulate the bank's gradient.

        Args:
            pairs: normalized queries of this rank [B, C], and keys of all ranks [W B, C].
        """
        q = torch.cat([queries for queries, _ in pairs])  # [P B, C]
        near = torch.cat([queries @ keys.T for queries, keys in pairs])  # [P B, W B]
        B = len(q) // len(pairs)
        label = (distributed.rank() * B + torch.arange(B, device=q.device)).repeat(len(pairs))
        # the mean over queries times this scale is the sum over views and the mean over directions
        scale = len(pairs) / (1 + self.symmetric)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.bank, dim=1, keepdim=True).clamp_min_(1e-12)
            if not len(self._unit):
                self._unit = torch.empty_like(self.bank)
                self._gradient = torch.zeros_like(self.bank)
            bank = torch.div(self.bank, norm, out=self._unit)
            similarity = q @ bank.T  # [P B, K]
            positive = near.gather(1, label[:, None]).squeeze(1)
            nearest = similarity.gather(1, hardest(similarity, min(5, self.K)))
            metrics = contrast_accuracy(positive, near, nearest)
            metrics |= feature_statistics(pairs[0][0], positive[:B], nearest[:B, 0])
            add_bank_gradient(self._gradient, q, near, bank, norm, similarity, self.ascent.T, scale)
            self._passes += 1
        return keys_and_bank_nce(q, near, label, bank, similarity, self.T) * scale, metrics

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the key encoder, and take a step of the bank's ascent or fill the bank."""
        super().after_step()
        if self._progress.step < 0:
            self._fill()
            return
        gradient = distributed.all_reduce_sum(self._gradient)
        gradient.div_(self._passes * distributed.world_size())
        lr, momentum, decay = self.ascent.lr, self.ascent.momentum, self.ascent.weight_decay
        ascend(self.bank, self.bank_velocity, gradient, lr, momentum, decay)
        gradient.zero_()
        self._passes = 0

    def _fill(self) -> None:
        """Copy this step's keys into the bank.

        After the last filling step, reset the key encoder to the query encoder.
        """
        keys = torch.cat(self._new_keys)
        steps = -(-self.K // len(keys))
        # earlier steps have filled the entries before these
        entries = self.bank[(self._progress.step + steps) * len(keys) :]
        entries[: len(keys)] = keys[: len(entries)]
        self._new_keys.clear()
        if self._progress.step == -1:
            torch._foreach_copy_(
                list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
            )
