"""Compare replicated with sharded versions of the queue, and of SogCLR's moving averages.

Real processes check that both give the same losses and gradients. Their process group counts the
bytes.

The sharded versions are here and not in moco/, because docs/scaling.md shows that they do not pay.
"""

from pathlib import Path

import scaling_counter
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scaling_counts import sharded_averages, sharded_queue, wire
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moco import distributed
from moco.builder.base import enqueue
from moco.builder.sogclr import SogCLR
from moco.loss.contrastive import bank_info_nce, normalize
from moco.loss.global_contrastive import Pairs, compare, dynamic_loss

DIM, T = 128, 0.2


# the queue: rank r keeps the entries i with i % W == r


class _ShardedLogSumExp(torch.autograd.Function):
    """The log-sum-exp over a queue of which each rank has a shard.

    Every rank compares the queries of all ranks with its shard, so the similarities are as many as
    those of its own queries with the full queue.
    """

    @staticmethod
    def forward(ctx, q: Tensor, shard: Tensor, temperature: float) -> Tensor:
        """Return the log-sum-exp of the logits of this rank's queries `q` [B, C], [B]."""
        everyone = distributed.all_gather(q)  # [W B, C]
        logits = everyone @ shard.T / temperature  # [W B, K / W]
        top = logits.amax(1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        weight = logits.sub_(top[:, None]).exp_()
        total = distributed.all_reduce_sum(weight.sum(1))
        ctx.temperature = temperature
        ctx.save_for_backward(weight, total, shard)
        return (top + total.log())[distributed.rank() * len(q) :][: len(q)]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of q: each rank adds the part of its shard."""
        weight, total, shard = ctx.saved_tensors
        scale = distributed.all_gather(gradient) / (total * ctx.temperature)  # [W B]
        of_all = (weight @ shard) * scale[:, None]  # [W B, C]
        own = torch.empty_like(of_all[: len(gradient)])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, of_all)
        return own, None, None


def sharded_info_nce(q: Tensor, positive: Tensor, shard: Tensor, temperature: float) -> Tensor:
    """Return `bank_info_nce` of this rank's queries, if each rank has a shard of the queue.

    Args:
        q: normalized queries [B, C], with gradient.
        positive: similarity of each query to its key, [B], with gradient.
        shard: this rank's entries [K / W, C].
        temperature: divides every similarity.
    """
    l_pos = positive / temperature
    l_neg = _ShardedLogSumExp.apply(q, shard, temperature)
    return (torch.logaddexp(l_pos, l_neg) - l_pos).mean()


def enqueue_shard(shard: Tensor, pointer: int, keys: Tensor) -> int:
    """Overwrite the oldest entries of the joint queue by `keys`; return the new pointer.

    Each rank writes the entries of its shard. `keys` [n, C] are the same on all ranks.
    """
    ranks = distributed.world_size()
    indices = (pointer + torch.arange(len(keys))) % (len(shard) * ranks)
    mine = indices % ranks == distributed.rank()
    shard[indices[mine] // ranks] = keys[mine]
    return int((pointer + len(keys)) % (len(shard) * ranks))


def joint(shard: Tensor, n: int) -> Tensor:
    """Return all `n` entries in order, from the shards of all ranks, as for a checkpoint."""
    return distributed.all_gather(shard[None]).transpose(0, 1).flatten(0, 1)[:n]


def compare_queues(entries: int, batch: int, steps: int) -> dict[str, object]:
    """Take steps with both queues on this rank; return their differences and their bytes."""
    rank, ranks = distributed.rank(), distributed.world_size()
    draw = torch.Generator().manual_seed(0)
    queue = normalize(torch.randn(entries, DIM, generator=draw, dtype=torch.float64))
    shard, pointer, of_shards = queue[rank::ranks].clone(), torch.zeros(1, dtype=torch.long), 0
    draw.manual_seed(1 + rank)
    found = {"loss": 0.0, "gradient": 0.0}
    sent = []
    for _ in range(steps):
        q, k = (
            normalize(torch.randn(batch, DIM, generator=draw, dtype=torch.float64))
            for _ in range(2)
        )
        results = []
        for sharded in (False, True):
            own = q.clone().requires_grad_()
            positive = (own * k).sum(1)
            before = scaling_counter.total()
            if sharded:
                loss = sharded_info_nce(own, positive, shard, T)
            else:
                similarity = (own @ queue.T).detach()
                loss = bank_info_nce(own, positive, queue, similarity, T)
            loss.backward()
            if sharded:
                sent.append(scaling_counter.total() - before)
            results.append((loss.detach(), own.grad))
        (loss_1, gradient_1), (loss_2, gradient_2) = results
        found["loss"] = max(found["loss"], float((loss_1 - loss_2).abs() / loss_1))
        relative = (gradient_1 - gradient_2).abs().max() / gradient_1.abs().max()
        found["gradient"] = max(found["gradient"], float(relative))
        keys = distributed.all_gather(k)
        enqueue(queue, pointer, keys)
        of_shards = enqueue_shard(shard, of_shards, keys)
    found["bytes_sent"] = sent[-1]
    moved = sharded_queue(batch, DIM, ranks, size=8)
    found["bytes_counted"] = sum(wire(c.op, c.payload, ranks) for c in moved)
    return {**found, "equal_queues": torch.equal(joint(shard, entries), queue)}


# the moving averages of SogCLR: rank r keeps those of the images i with i % W == r


class ShardedSogCLR(SogCLR):
    """SogCLR whose `u` [N / W] on each rank has the moving averages of every W-th image."""

    def loss_of(self, pairs: Pairs, index: Tensor, _: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the mean of u; update `u`. See `SogCLR.loss_of`."""
        ranks = distributed.world_size()
        everyone = distributed.all_gather(index)
        mine = everyone % ranks == distributed.rank()
        slots = everyone[mine] // ranks
        # the other ranks add zeros, so the sum has the same bits
        values = torch.zeros(len(everyone), dtype=self.u.dtype)
        values[mine] = self.u[slots]
        values = distributed.all_reduce_sum(values)[distributed.rank() * len(index) :]
        loss, u = dynamic_loss(pairs, values[: len(index)], self.T, self.gamma)
        self.u[slots] = distributed.all_gather(u)[mine]
        return loss, {"u": u.mean()}


def compare_averages(images: int, batch: int, steps: int) -> dict[str, object]:
    """Take steps with both versions of `u` on this rank; return their differences and costs."""
    rank, ranks = distributed.rank(), distributed.world_size()
    full = SogCLR(nn.Identity, images)
    part = ShardedSogCLR(nn.Identity, -(-images // ranks))
    draw = torch.Generator().manual_seed(0)
    found: dict[str, object] = {"equal_losses": True, "equal_gradients": True}
    sent = {}
    visited = torch.randint(images, (2 * ranks * batch,), generator=draw).unique()
    for _ in range(steps):
        # few images, so that each is visited several times
        order = torch.randperm(len(visited), generator=draw)[: ranks * batch]
        everyone = visited[order]
        index = everyone[rank * batch :][:batch]
        z_all = normalize(torch.randn(2, ranks * batch, DIM, generator=draw))
        results = []
        for name, method in (("replicated", full), ("sharded", part)):
            z = z_all[:, rank * batch :][:, :batch].clone().requires_grad_()
            before = scaling_counter.total()
            loss, _ = method.loss_of(compare(z, z_all, rank * batch), index, None)
            sent[name] = scaling_counter.total() - before
            loss.backward()
            results.append((loss.detach(), z.grad))
        (loss_1, gradient_1), (loss_2, gradient_2) = results
        found["equal_losses"] &= torch.equal(loss_1, loss_2)
        found["equal_gradients"] &= torch.equal(gradient_1, gradient_2)
    mine = full.u[rank::ranks]
    found["equal_averages"] = torch.equal(part.u[: len(mine)], mine)
    found["visited"] = int((full.u > 0).sum())
    more = sum(wire(c.op, c.payload, ranks) for c in sharded_averages(batch, ranks))
    found["bytes_counted_sharded"] = sent["replicated"] + more
    for name, method in (("replicated", full), ("sharded", part)):
        found[f"bytes_sent_{name}"] = sent[name]
        found[f"MB_{name}"] = method.u.numel() * method.u.element_size() / 1e6
    return found


def measure(ranks: int, folder: Path, entries: int, images: int) -> dict[str, dict]:
    """Return the results of both comparisons on so many processes.

    Args:
        ranks: number of processes W.
        folder: an empty folder.
        entries: entries K of the queue.
        images: images N of the training set.
    """
    mp.spawn(_process, (ranks, folder, entries, images), nprocs=ranks)
    results = [torch.load(folder / f"rank{r}.pt") for r in range(ranks)]
    found = {}
    for name in results[0]:
        rows = [one[name] for one in results]
        found[name] = {"ranks": ranks}
        for key, first in rows[0].items():
            values = [row[key] for row in rows if key in row]
            found[name][key] = all(values) if isinstance(first, bool) else max(values)
    return found


def agrees(found: dict[str, dict]) -> bool:
    """Return whether both versions agree, and whether the counted bytes are those of the formulas.

    The queues are compared in float64, within rounding. The moving averages must have the same
    bits.
    """
    queue, u = found["queue"], found["u"]
    same = queue["equal_queues"] and max(queue["loss"], queue["gradient"]) < 1e-12
    same &= u["equal_losses"] and u["equal_gradients"] and u["equal_averages"]
    same &= queue["bytes_sent"] == queue["bytes_counted"]
    return same and u["bytes_sent_sharded"] == u["bytes_counted_sharded"]


def _process(rank: int, ranks: int, folder: Path, entries: int, images: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group(scaling_counter.BACKEND, store=store, rank=rank, world_size=ranks)
    found = {
        "queue": {"entries": entries, "batch": 32, **compare_queues(entries, 32, steps=4)},
        "u": {"images": images, "batch": 256, **compare_averages(images, 256, steps=4)},
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
