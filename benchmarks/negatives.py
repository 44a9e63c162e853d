#!/usr/bin/env python
"""Measure time and memory of the contrastive head, next to slower ways to compute the same loss.

Forward and backward are measured. moco and synco are our code, without and with synthetic
negatives. They also compute the metrics.

plain     MoCo with concatenated logits and F.cross_entropy
explicit  SynCo with every synthetic negative as a vector, gathered in one batch
loop      SynCo as in published code: one autograd call per perturbed or adversarial negative
step      moco, and the update of the queue
lightly   MoCo with lightly's NTXentLoss and memory bank, if lightly is installed; it also updates
          the memory bank, so compare it with step; it computes no accuracy
solo      MoCo with solo-learn's moco_loss_func, if solo-learn is installed; no queue, no accuracy

The floor is the arithmetic that any head must do: the product of queries and bank, one pass for the
exponentials, one for their sums, and the product of exponentials and bank for the gradient. It has
no maxima, metrics or autograd. floor does each on the full [N, K] matrix. blocks does all four on
one block of the bank after the other. moco_over_floor compares with the faster one.

Parts of synco are measured on their own: the random draws (draw), the search for the hardest
negatives (topk), and the norms and similarities of the synthetic negatives (mix). Next to them are
two passes over the similarities of the bank: the row maxima (amax), which read them once, and the
product that computes them (product). synco_parts_over_moco is the time of moco, draw, mix and amax
together over that of moco: SynCo needs them even if its search took one pass, and the exponentials
and the gradient of its synthetic negatives took no time.
"""

import copy
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from functools import cached_property
from unittest import mock

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.builder.synco import SynCo
from moco.loss import synthetic
from moco.loss.bank import in_blocks
from moco.loss.contrastive import normalize
from moco.loss.hardest import hardest
from moco.rng import NEGATIVES, Progress
from moco.sections_negatives import Schedule

try:
    from lightly.loss import NTXentLoss
except ImportError:
    NTXentLoss = None


def solo_learn() -> Callable[..., Tensor] | None:
    """Return solo-learn's loss of MoCo; None if solo-learn is not installed.

    Only the file of the loss is loaded, because the rest needs packages of 2021.
    """
    try:
        files = importlib.metadata.files("solo-learn") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    file = next(file for file in files if file.match("solo/losses/moco.py"))
    spec = importlib.util.spec_from_file_location("solo_moco", file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.moco_loss_func


SOLO = solo_learn()

T = 0.2
PARTS = ("draw", "topk", "mix", "product", "amax")  # of synco, and to compare with them
AFTER_WARMUP = Progress(epoch=1)


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--n", type=measure.at_least(1), default=32, help="number of queries")
    parser.add_argument("--k", type=measure.at_least(1), default=65536, help="entries in the queue")
    parser.add_argument("--dim", type=measure.at_least(1), default=128)
    parser.add_argument("--n-hard", type=measure.at_least(1), default=1024)
    parser.add_argument(
        "--counts",
        type=measure.at_least(0),
        nargs=6,
        default=(256, 256, 256, 64, 64, 64),
        metavar="N",
    )
    measure.add_device(parser)
    args = parser.parse_args()
    if not any(args.counts):
        parser.error("--counts: at least one of the six numbers must be above 0")
    if args.n_hard > args.k:
        parser.error(f"--n-hard {args.n_hard} is larger than the queue (--k {args.k}); lower it")
    device = torch.device(args.device)
    heads = Heads(args, device)

    check(heads)
    names = ["moco", "plain", "floor", "synco", "explicit", "blocks", "loop", "step"]
    names += ["lightly"] * bool(NTXentLoss) + ["solo"] * bool(SOLO)
    candidates = {name: getattr(heads, name) for name in [*names, *PARTS]}
    times = measure.side_by_side(candidates, args.rounds, device)
    seconds = measure.medians(times)
    memory = {name: measure.peak_memory(run, device) for name, run in candidates.items()}
    table = [
        {"head": name, "ms": 1e3 * seconds[name], "MiB": memory[name] / 2**20}
        for name in candidates
    ]
    floor = times[min("floor", "blocks", key=seconds.get)]
    parts = (times[name] for name in ("moco", "draw", "mix", "amax"))
    together = [sum(one_round) for one_round in zip(*parts, strict=True)]
    ratios = {
        "moco_over_floor": measure.ratio(times["moco"], floor),
        "moco_over_plain_moco": measure.ratio(times["moco"], times["plain"]),
        "synco_over_moco": measure.ratio(times["synco"], times["moco"]),
        "synco_parts_over_moco": measure.ratio(together, times["moco"]),
        "synco_over_plain_moco": measure.ratio(times["synco"], times["plain"]),
        "loop_extra_over_ours_extra": measure.extra(times["loop"], times["plain"])
        / measure.extra(times["synco"], times["moco"]),
        "explicit_memory_over_ours": memory["explicit"] / memory["synco"],
        "topk_over_pass": measure.ratio(times["topk"], times["amax"]),
        "topk_over_product": measure.ratio(times["topk"], times["product"]),
    }
    if NTXentLoss:
        ratios["lightly_over_step"] = measure.ratio(times["lightly"], times["step"])
        ratios["lightly_memory_over_step"] = memory["lightly"] / memory["step"]
    if SOLO:
        ratios["solo_over_moco"] = measure.ratio(times["solo"], times["moco"])
    targets = {
        "moco_over_floor": measure.Target(1.3),
        "synco_over_moco": measure.Target(1.35),
        "topk_over_pass": measure.Target(1.2),
    }
    sizes = {
        "N": args.n,
        "K": args.k,
        "C": args.dim,
        "n_hard": args.n_hard,
        "counts": list(args.counts),
    }
    facts = {"device": str(device), **sizes, **floor_work(args.n, args.k, args.dim)}
    measure.report("negatives", table, ratios, facts, args.json, targets)


def floor_work(n: int, k: int, dim: int) -> dict[str, float]:
    """Return the operations of the floor, and the bytes it reads and writes at least.

    It reads the bank once if both products of a block find it in the cache, and q once, and writes
    the gradient. A multiplication and an addition are two operations.
    """
    return {
        "floor_GFLOP": 2 * 2 * n * k * dim / 1e9,
        "floor_exponentials": n * k,
        "floor_MiB": 4 * (k * dim + 2 * n * dim) / 2**20,
    }


class Heads:
    """All heads on one batch.

    Each call draws the same synthetic negatives again, and leaves a gradient in q.
    """

    def __init__(self, args, device: torch.device):
        self.config = synthetic.Synthetic(args.n_hard, tuple(args.counts))
        self.model = SynCo(
            nn.Identity, args.dim, args.k, T=T, synthetic=Schedule(self.config, first=1)
        ).to(device)
        self.bank = self.model.queue
        self.q, self.k = (normalize(torch.randn(args.n, args.dim, device=device)) for _ in range(2))
        self.q.requires_grad_()
        self.labels = torch.zeros(args.n, dtype=torch.long, device=device)
        self.columns = self.bank.T.contiguous()  # [C, K]
        if NTXentLoss:
            self.theirs = NTXentLoss(T, memory_bank_size=(args.k, args.dim)).to(device)
            self.theirs.memory_bank.bank.copy_(self.bank)

    def draw(self) -> synthetic.Draws:
        """Return the random draws of the synthetic negatives."""
        return synthetic.draw(
            self.config, *self.q.shape, AFTER_WARMUP.generator(NEGATIVES, self.q.device, 0)
        )

    def largest(self, similarity: Tensor) -> Tensor:
        """Return the indices of the hardest negatives, by torch.topk."""
        return similarity.topk(self.config.n_hard, 1).indices

    def moco(self) -> Tensor:
        """Return the loss of our MoCo."""
        return self._ours(Progress(epoch=0))

    def synco(self) -> Tensor:
        """Return the loss of our SynCo."""
        return self._ours(AFTER_WARMUP)

    def _ours(self, progress: Progress) -> Tensor:
        loss, _ = self.model.contrast(self.q, self.k, progress)
        return self._backward(loss)

    def step(self) -> Tensor:
        """Return the loss of our MoCo, and add the keys to the queue."""
        loss = self.moco()
        self.model.enqueue(self.k)
        return loss

    def floor(self) -> Tensor:
        """Return the gradient of q with as little work as possible."""
        threads = torch.get_num_threads() if self.q.device.type == "cpu" else 1
        parts = math.gcd(len(self.bank), threads)
        return self._gradient([self.bank.view(1, parts, -1, self.bank.shape[1])])

    def blocks(self) -> Tensor:
        """Return the gradient of q in blocks that stay in the cache."""
        return self._gradient(in_blocks(self.bank, sum(self.q.shape)))

    def _gradient(self, stacks: list[Tensor]) -> Tensor:
        """Return the gradient of q, given blocks [blocks, parts, n, C]."""
        q = (self.q.detach() / T).T.contiguous()
        total, weighted = 0.0, 0.0
        for stack in stacks:
            _, parts, n, _ = stack.shape
            each = q.expand(parts, *q.shape)
            e, ones = q.new_empty(parts, n, q.shape[1]), q.new_ones(parts, 1, n)
            sums, products = q.new_zeros(parts, 1, q.shape[1]), q.new_zeros(parts, *q.shape)
            for block, columns in zip(stack, stack.mT, strict=True):
                torch.bmm(block, each, out=e).exp_()
                sums.baddbmm_(ones, e)
                products.baddbmm_(columns, e)
            total, weighted = total + sums.sum((0, 1)), weighted + products.sum(0)
        return (weighted / (T * total)).T

    @cached_property
    def similarity(self) -> Tensor:
        """Return the similarities of the queries to the bank, [N, K]."""
        return self.product()

    @cached_property
    def hard(self) -> Tensor:
        """Return the indices of the hardest negatives, by our search."""
        return self.topk()

    @cached_property
    def drawn(self) -> synthetic.Draws:
        """Return random draws."""
        return self.draw()

    @torch.no_grad()
    def product(self) -> Tensor:
        """Compute the similarities of the queries to the bank, [N, K]."""
        return self.q @ self.bank.T

    def topk(self) -> Tensor:
        """Search for the hardest negatives."""
        return hardest(self.similarity, self.config.n_hard)

    def mix(self) -> synthetic.Mixture:
        """Compute the norms and similarities of the synthetic negatives."""
        return synthetic.mix(
            self.q.detach(), self.bank, self.similarity, self.hard, self.config, self.drawn
        )

    def amax(self) -> Tensor:
        """Read all similarities once."""
        return self.similarity.amax(1)

    def plain(self) -> Tensor:
        """Return the loss of MoCo with concatenated logits."""
        similarity = self.q @ self.bank.T
        return self._cross_entropy([similarity])

    def explicit(self) -> Tensor:
        """Return the loss of SynCo with all synthetic negatives as vectors in one batch."""
        draws, config = self.draw(), self.config
        similarity = self.q @ self.bank.T
        q, near, mixed = self._hard_vectors(similarity, draws)
        near[4] = near[4] + config.delta * q
        near[5] = near[5] + config.eta * q.sign()
        vectors = F.normalize(torch.cat([*mixed, *near[3:]], 1), dim=2)
        return self._cross_entropy([similarity, torch.einsum("nc,nmc->nm", self.q, vectors)])

    def loop(self) -> Tensor:
        """Return the loss of SynCo with an autograd call for each negative of types 5 and 6."""
        draws, config = self.draw(), self.config
        similarity = self.q @ self.bank.T
        q, near, mixed = self._hard_vectors(similarity, draws)
        for i, size, shape in ((4, config.delta, lambda g: g), (5, config.eta, torch.sign)):
            moved = []
            for m in range(near[i].shape[1]):
                row = near[i][:, m].clone().requires_grad_()
                (gradient,) = torch.autograd.grad((q.squeeze(1) * row).sum(), row)
                moved.append(row.detach() + size * shape(gradient))
            near[i] = torch.stack(moved, 1) if moved else near[i]
        logits = [similarity]
        for vectors in (*mixed, *near[3:]):
            logits.append(torch.einsum("nc,nmc->nm", self.q, F.normalize(vectors, dim=2)))
        return self._cross_entropy(logits)

    def lightly(self) -> Tensor:
        """Return the loss of lightly's MoCo."""
        return self._backward(self.theirs(self.q, self.k))

    def solo(self) -> Tensor:
        """Return the loss of solo-learn's MoCo."""
        return self._backward(SOLO(self.q, self.k, self.columns, T))

    @torch.no_grad()
    def _hard_vectors(
        self, similarity: Tensor, draws: synthetic.Draws
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return q, the drawn negatives of each type, and the vectors of types 1, 2 and 3.

        q is [N, 1, C], the others are lists of [N, n, C]. The noise of type 4 is added.
        """
        hard = self.largest(similarity)
        q = self.q.detach()[:, None, :]
        near = list(self.bank[hard.gather(1, draws.first)].split(self.config.counts, 1))
        other = self.bank[hard.gather(1, draws.second)]
        a, b, g = draws.weight[:, :, None].split(self.config.counts[:3], 1)
        near[3] = near[3] + draws.noise
        return (
            q,
            near,
            [a * q + (1 - a) * near[0], q + b * (near[1] - q), g * near[2] + (1 - g) * other],
        )

    def _cross_entropy(self, negatives: list[Tensor]) -> Tensor:
        logits = torch.cat([(self.q * self.k).sum(1, keepdim=True), *negatives], 1) / T
        logits.detach().topk(5, 1)  # to compute the accuracy, as ours does
        return self._backward(F.cross_entropy(logits, self.labels))

    def _backward(self, loss: Tensor) -> Tensor:
        self.q.grad = None
        loss.backward()
        return loss.detach()


def check(heads: Heads) -> None:
    """Check that all heads have the same loss and gradient, to 1e-5.

    First check that our hardest negatives are as hard as those of torch.topk. Then give all heads
    the same hardest negatives, because rounding may change the order of equally hard ones. Each
    head is compared with float64 and may differ by half of 1e-5.
    """
    similarity = heads.q.detach() @ heads.bank.T
    hard = hardest(similarity, heads.config.n_hard)
    assert torch.equal(
        similarity.gather(1, hard), similarity.gather(1, heads.largest(similarity))
    ), "these are not the hardest negatives"
    with (
        mock.patch("moco.builder.moco.hardest", lambda *_: hard),
        mock.patch.object(heads, "largest", lambda _: hard),
    ):
        exact = copy.copy(heads)
        exact.q = heads.q.detach().double().requires_grad_()
        exact.k, exact.bank = heads.k.double(), heads.bank.double()
        for truth, names in (
            (exact.plain, ["moco", "plain"]),
            (exact.explicit, ["synco", "explicit", "loop"]),
        ):
            loss = truth()
            for name in names:
                pairs = {
                    "loss": (getattr(heads, name)(), loss),
                    "gradient": (heads.q.grad, exact.q.grad),
                }
                for what, (mine, true) in pairs.items():
                    off = (mine - true).abs().max().item()
                    assert off <= 5e-6, (
                        f"{name}: its {what} differs by {off:.1e} from that in float64"
                    )
        for name in ["lightly"] * bool(NTXentLoss) + ["solo"] * bool(SOLO):
            theirs = getattr(heads, name)().double()
            torch.testing.assert_close(theirs, exact.plain(), rtol=0, atol=1e-5)
    log_sum = torch.logsumexp(exact.q @ exact.bank.T / T, 1).sum()
    (true,) = torch.autograd.grad(log_sum, exact.q)
    for mine in (heads.floor(), heads.blocks()):
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=5e-6)


if __name__ == "__main__":
    measure.main(main)
