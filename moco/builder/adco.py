"""AdCo: negatives that are learned as adversaries of the encoder (Hu et al., arXiv 2011.08435)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import QueryAndKey
from moco.builder.moco import contrast
from moco.errors import InputError
from moco.loss.adversarial import Ascent, BankLogSums, ascend, bank_log_sums, keys_and_bank_nce
from moco.loss.contrastive import InfoNCE, feature_statistics, normalize, rank_accuracy
from moco.rng import Progress


class _Pass(NamedTuple):
    """The queries of all ranks in a pass, for the bank's ascent after the optimizer's step.

    Attributes:
        q: normalized queries, [W N, C].
        log_sum: log-sum-exp of their logits with all keys and the bank, at the bank's temperature,
            [W N].
        weight: weight of each query's loss in the loss of the pass.
    """

    q: Tensor
    log_sum: Tensor
    weight: float


def check_bank(K: int, world_size: int) -> None:
    """Raise InputError if a process would have no entry of the bank."""
    if world_size > K:
        raise InputError(
            f"--cluster {K}: each of the {world_size} processes needs at least one entry of the "
            "bank; raise --cluster, or use fewer processes"
        )


class AdCo(QueryAndKey):
    """InfoNCE against the keys of the joint batch and a bank of negatives that learns to be hard.

    The encoder minimizes the loss and the bank maximizes it. Both gradients are computed from the
    same queries, before the encoder and the bank are updated.

    Each of several ranks trains a shard of the bank, about K / W entries, on the queries of all
    ranks. The ranks exchange queries and sums, but neither the bank nor its gradient, which are
    much larger. Every rank has the full buffers `bank` and `bank_velocity`. During training, only
    its own shard of them is current. `gather_state` copies the shards to all ranks.

    The bank's ascent after the optimizer's step needs the queries of the step. Each pass keeps
    those of all ranks, 4 (C + 2) bytes for each query. If a step has one pass with at most C
    queries on all ranks, it also keeps their similarities to the shard, [K / W, W N], which are
    never larger than the shard. Otherwise `after_step` computes them again.

    Raises InputError if there are fewer entries than ranks.

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
        check_bank(K, distributed.world_size())
        self._is_current = True  # whether all shards of the buffers are current on this rank
        self.register_state_dict_pre_hook(AdCo._check_current)
        self._progress = Progress()
        self._passes: list[_Pass] = []  # those of the current step
        self._inverse = torch.empty(0)  # 1 / norm of the shard's entries, [K / W]
        self._similarity: Tensor | None = None  # of the step's only pass, [K / W, W N]
        self._new_keys: list[Tensor] = []

    @property
    def learned_negatives(self) -> Tensor:
        """Return the normalized entries of the bank, [K, C]."""
        self._check_current()
        return normalize(self.bank)

    def shard(self, rank: int) -> slice:
        """Return the indices of the entries of the bank that a rank trains."""
        W = distributed.world_size()
        return slice(self.K * rank // W, self.K * (rank + 1) // W)

    def _check_current(self, *_: object) -> None:
        """Raise RuntimeError if only this rank's shard of the buffers is current."""
        if not self._is_current:
            raise RuntimeError("AdCo: call gather_state() on all ranks before reading the bank")

    @torch.no_grad()
    def gather_state(self) -> None:
        """Copy each rank's shard of the bank and of its velocity to all ranks."""
        if not self._is_current:
            for rank in range(distributed.world_size()):
                distributed.broadcast(self.bank[self.shard(rank)], rank)
                distributed.broadcast(self.bank_velocity[self.shard(rank)], rank)
        self._is_current = True

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
        """Return the loss and metrics of pairs, and keep the queries for the ascent.

        Args:
            pairs: normalized queries of this rank [B, C], and keys of all ranks [W B, C].
        """
        W, rank = distributed.world_size(), distributed.rank()
        q = torch.cat([queries for queries, _ in pairs])  # [N, C] with N = P B
        near = torch.cat([queries @ keys.T for queries, keys in pairs])  # [N, W B]
        B = len(q) // len(pairs)
        label = (rank * B + torch.arange(B, device=q.device)).repeat(len(pairs))
        # the mean over queries times this scale is the sum over views and the mean over directions
        scale = len(pairs) / (1 + self.symmetric)
        positive = near.detach().gather(1, label[:, None]).squeeze(1)  # [N]
        joint = distributed.all_gather_with_gradient(torch.cat([q, positive[:, None]], 1))
        joint_q, joint_positive = joint[:, :-1].contiguous(), joint[:, -1]  # [W N, C], [W N]
        bank = self.bank[self.shard(rank)]  # [K / W, C]
        # `ascend` is faster with the similarities; keep them unless they are larger than the bank
        keep = not self._passes and len(joint_q) <= bank.shape[1]
        sums = bank_log_sums(joint_q, joint_positive, bank, self.T, self.ascent.T, keep)

        above, hardest, of_bank = self._of_all_shards(sums)
        self._note_pass(joint_q, near, of_bank, sums, scale)
        with torch.no_grad():
            metrics = rank_accuracy(above + (near > positive[:, None]).sum(1))
            metrics |= feature_statistics(pairs[0][0], positive[:B], hardest[:B])
        of_bank = distributed.exchange(sums.of_encoder.view(W, -1)).logsumexp(0)  # [N]
        return keys_and_bank_nce(near, label, of_bank, self.T) * scale, metrics

    @torch.no_grad()
    def _of_all_shards(self, sums: BankLogSums) -> tuple[Tensor, Tensor, Tensor]:
        """Combine the sums over all shards for this rank's queries.

        Args:
            sums: those of the queries of all ranks over this rank's shard.

        Returns:
            the number of entries that are more similar to the query than its key, [N];
            the largest similarity, [N];
            the log-sum-exp at the bank's temperature, [N].
        """
        found = torch.stack([sums.above, sums.hardest, sums.of_ascent], 1)  # [W N, 3]
        found = distributed.exchange(found.unflatten(0, (distributed.world_size(), -1)))
        above, hardest, of_bank = found.unbind(2)  # [W, N] each
        return above.sum(0), hardest.amax(0), of_bank.logsumexp(0)

    @torch.no_grad()
    def _note_pass(
        self, joint_q: Tensor, near: Tensor, of_bank: Tensor, sums: BankLogSums, scale: float
    ) -> None:
        """Keep a pass for the bank's ascent.

        Args:
            joint_q: normalized queries of all ranks, [W N, C].
            near: similarity of this rank's queries to every key, [N, W B].
            of_bank: log-sum-exp of this rank's queries over the bank, [N].
            sums: those of the queries of all ranks over this rank's shard.
            scale: factor of the mean loss of the queries.
        """
        of_keys = torch.logsumexp(near / self.ascent.T, 1)
        log_sum = distributed.all_gather(torch.logaddexp(of_keys, of_bank))
        self._passes.append(_Pass(joint_q.detach(), log_sum, scale / len(log_sum)))
        self._inverse, self._similarity = sums.inverse, sums.similarity

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the key encoder, and take a step of the bank's ascent or fill the bank."""
        super().after_step()
        if self._progress.step < 0:
            self._fill()
            return
        own = self.shard(distributed.rank())
        q, log_sum = (
            torch.cat([getattr(one, x) for one in self._passes]) for x in ("q", "log_sum")
        )
        weights = [torch.full_like(one.log_sum, one.weight) for one in self._passes]
        weight = torch.cat(weights) / len(weights)  # the mean over the passes
        bank, velocity = self.bank[own], self.bank_velocity[own]
        ascend(bank, velocity, self._inverse, q, log_sum, weight, self.ascent, self._similarity)
        self._passes.clear()
        self._similarity = None
        self._is_current = distributed.world_size() == 1

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
