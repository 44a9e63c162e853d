"""SynCo's six kinds of synthetic hard negatives (arXiv 2410.02401, section 3) in closed form.

A synthetic negative h is a unit vector made of a query q and of rows n, n' among the query's hardest negatives; no gradient
passes through h, so d(q.h)/dq = h. With ^ for unit length:

    1 interpolated  ^(a q + (1-a) n)     a ~ U(0, .5)       4 noise        ^(n + e)               e ~ N(0, sigma^2 I)
    2 extrapolated  ^(q + b (n - q))     b ~ U(1, 1.5)      5 perturbed    ^(n + delta q)
    3 mixup         ^(g n + (1-g) n')    g ~ U(0, 1)        6 adversarial  ^(n + eta sign(q))

Types 1, 2 and 5 are all ^(A q + B n): their similarity (A q.q + B q.n) / |A q + B n| follows from q.n alone. Types 3, 4 and 6 are
made once, without gradient, for their lengths; the rest follows from q.n, q.n', q.e and q.sign(q). MoCHI (arXiv 2010.01028) is
types 1 and 3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12  # the least length by which a vector is divided


@dataclass(frozen=True)
class Synthetic:
    """How many of each type per query, from how many hard negatives, and the perturbations' sizes."""

    n_hard: int = 0
    counts: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    sigma: float = 0.01
    delta: float = 0.01
    eta: float = 0.01

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Draws:
    """The random part of one batch's synthetic negatives: which hard rows (places in [0, n_hard)) and with what weight."""

    first: Tensor  # [N, total] place of n, by type in order
    second: Tensor  # [N, n3] place of n'
    a: Tensor  # [N, n1]
    b: Tensor  # [N, n2]
    g: Tensor  # [N, n3]
    noise: Tensor  # [N, n4, C], already scaled by sigma


def draw(
    kind: Synthetic,
    n: int,
    dim: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Draws:
    """Draw for `n` queries of `dim` features, on the generator's device; rows uniformly with replacement."""
    n1, n2, n3, n4, _, _ = kind.counts
    on = {"generator": generator, "device": generator.device}

    def rand(count: int) -> Tensor:
        return torch.rand(n, count, dtype=dtype, **on)

    return Draws(
        first=torch.randint(kind.n_hard, (n, kind.total), **on),
        second=torch.randint(kind.n_hard, (n, n3), **on),
        a=rand(n1) * 0.5,
        b=1 + rand(n2) * 0.5,
        g=rand(n3),
        noise=torch.randn(n, n4, dim, dtype=dtype, **on) * kind.sigma,
    )


def hardest(similarity: Tensor, n_hard: int) -> Tensor:
    """Rows of the bank most similar to each query, hardest first: indices [N, n_hard] from similarity [N, K].

    Exact. On a CPU in two levels (the n_hard most similar rows lie in the n_hard groups with the largest maxima), and by
    NumPy, which selects faster than torch.topk where the processor has AVX2 or AVX-512.
    """
    similarity = similarity.detach()
    n, K = similarity.shape
    members = (
        1 << ((K // n_hard).bit_length() - 1) // 2
    )  # of a group, about sqrt(K / n_hard): two levels of like size
    two_levels = members > 1 and K % members == 0
    if (
        similarity.device.type != "cpu"
        or similarity.dtype not in (torch.float32, torch.float64)
        or not two_levels
    ):
        return similarity.topk(n_hard, 1).indices
    groups = K // members  # group j holds the rows j, j + groups, j + 2 groups, ...
    grouped = similarity.view(n, members, groups)
    best = _largest(grouped.amax(1), n_hard)
    candidates = grouped.gather(2, best[:, None, :].expand(n, members, n_hard)).flatten(1)
    place = _largest(candidates, n_hard)
    place = place.gather(1, torch.from_numpy(candidates.gather(1, place).neg_().numpy().argsort(1)))
    member = place.div(n_hard, rounding_mode="floor")
    return best.gather(1, place.sub_(member, alpha=n_hard)).add_(member, alpha=groups)


def _largest(x: Tensor, k: int) -> Tensor:
    """Places of the k largest values in each row of x, in no order."""
    return torch.from_numpy(x.neg().numpy().argpartition(k - 1, 1)[:, :k])


@dataclass(frozen=True)
class Mixture:
    """Synthetic negatives as what they are made of; no vector h stands in memory.

    h_m = sum of `weights` x bank rows `rows` + `of_q` q + (type 4) `of_noise` e + (type 6) `of_sign` sign(q), in which
    a type 3 has a second row, kept in the last n3 columns.
    """

    rows: Tensor  # [N, total + n3]
    weights: Tensor  # [N, total + n3]
    of_q: Tensor  # [N, total]
    of_noise: Tensor  # [N, n4]
    of_sign: Tensor  # [N, n6]
    noise: Tensor  # [N, n4, C]
    counts: tuple[int, int, int, int, int, int]

    def dot(self, q: Tensor, similarity: Tensor) -> Tensor:
        """q.h [N, total] from q and its similarity to the bank, differentiable in both."""
        fixed = q.detach()
        of_rows = self.weights * similarity.gather(1, self.rows)
        first, second = of_rows.tensor_split((self.of_q.shape[1],), 1)
        y1, y2, y3, y4, y5, y6 = (first + self.of_q * (q * fixed).sum(1, keepdim=True)).split(
            self.counts, 1
        )
        y4 = y4 + self.of_noise * torch.bmm(self.noise, q[:, :, None]).squeeze(2)
        y6 = y6 + self.of_sign * (q * fixed.sign()).sum(1, keepdim=True)
        return torch.cat([y1, y2, y3 + second, y4, y5, y6], 1)

    def backward(self, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over m of weight_m h_m, with weight [N, total], in two parts.

        Returns coefficients [N, total + n3] of the bank rows `rows`, and the rest as vectors [N, C].
        """
        _, _, w3, w4, _, w6 = weight.split(self.counts, 1)
        rest = (weight * self.of_q).sum(1, keepdim=True) * q + (w6 * self.of_sign).sum(
            1, keepdim=True
        ) * q.sign()
        rest += torch.bmm((w4 * self.of_noise)[:, None, :], self.noise).squeeze(1)
        return torch.cat([weight, w3], 1) * self.weights, rest


@torch.no_grad()
def mix(
    q: Tensor, bank: Tensor, similarity: Tensor, hard: Tensor, kind: Synthetic, draws: Draws
) -> Mixture:
    """Make synthetic negatives of unit queries q [N, C] and their hard rows.

    Args:
        bank: unit rows [K, C].
        similarity: q @ bank.T, [N, K].
        hard: indices of each query's hard rows, [N, >= n_hard]; the draws pick from the first n_hard columns.
        kind, draws: what to make of them.
    """
    n, (n1, n2, n3, n4, n5, n6) = len(q), kind.counts
    rows = hard.gather(1, torch.cat([draws.first, draws.second], 1))  # [N, total + n3]
    rows1, rows2, rows3, rows4, rows5, rows6, other3 = rows.split((*kind.counts, n3), 1)
    s = similarity.gather(1, torch.cat([rows1, rows2, rows5], 1))  # q.n of types 1, 2 and 5
    ones = q.new_ones(n, n5)
    a, b, g, noise = draws.a, draws.b, draws.g, draws.noise

    # types 1, 2 and 5 are all ^(of_q q + of_n n)
    of_q, of_n = torch.cat([a, 1 - b, kind.delta * ones], 1), torch.cat([1 - a, b, ones], 1)
    square = of_q.square() * (q * q).sum(1, keepdim=True) + of_n.square() + 2 * of_q * of_n * s
    root = square.clamp_min(_TINY**2).sqrt()
    (q1, q2, q5), (w1, w2, w5) = ((of / root).split((n1, n2, n5), 1) for of in (of_q, of_n))
    # the others' lengths are those of vectors that have to be made
    pairs, weights = (
        torch.stack([rows3, other3], 2).view(-1, 2),
        torch.stack([g, 1 - g], 2).view(-1, 2),
    )
    mixed = F.embedding_bag(pairs, bank, per_sample_weights=weights, mode="sum").view(
        n, n3, q.shape[1]
    )
    w3, w4, w6 = (
        1 / torch.linalg.vector_norm(h, dim=2).clamp_min_(_TINY)
        for h in (
            mixed,
            F.embedding(rows4, bank) + noise,
            F.embedding(rows6, bank) + kind.eta * q.sign()[:, None, :],
        )
    )
    zero = q.new_zeros(n, 1)
    return Mixture(
        rows=rows,
        weights=torch.cat([w1, w2, g * w3, w4, w5, w6, (1 - g) * w3], 1),
        of_q=torch.cat([q1, q2, zero.expand(n, n3 + n4), q5, zero.expand(n, n6)], 1),
        of_noise=w4,
        of_sign=kind.eta * w6,
        noise=noise,
        counts=kind.counts,
    )


def similarities(
    q: Tensor, bank: Tensor, similarity: Tensor, hard: Tensor, kind: Synthetic, draws: Draws
) -> Tensor:
    """Similarity of each query to its synthetic negatives, by type in order: [N, total].

    The arguments are `mix`'s; differentiable in q and in `similarity`.
    """
    return mix(q.detach(), bank, similarity.detach(), hard, kind, draws).dot(q, similarity)
