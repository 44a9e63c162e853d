"""SynCo's six kinds of synthetic hard negatives (arXiv 2410.02401, section 3) in closed form.

A synthetic negative h is a unit vector made of a query q and of rows n, n' among the query's hardest negatives; no gradient
passes through h, so d(q.h)/dq = h. With ^ for unit length:

    1 interpolated  ^(a q + (1-a) n)     a ~ U(0, .5)       4 noise        ^(n + e)               e ~ N(0, sigma^2 I)
    2 extrapolated  ^(q + b (n - q))     b ~ U(1, 1.5)      5 perturbed    ^(n + delta q)
    3 mixup         ^(g n + (1-g) n')    g ~ U(0, 1)        6 adversarial  ^(n + eta sign(q))

Types 1, 2 and 5 are all ^(A q + B n): their similarity (A q.q + B q.n) / |A q + B n| follows from q.n alone. Type 3 also needs
n.n', type 4 the noise, type 6 n.sign(q). MoCHI (arXiv 2010.01028) is types 1 and 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def draw(kind: Synthetic, n: int, dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Draws:
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
    """Rows of the bank most similar to each query, hardest first: indices [N, n_hard] from similarity [N, K]."""
    return similarity.detach().topk(n_hard, dim=1).indices


def similarities(q: Tensor, bank: Tensor, similarity: Tensor, hard: Tensor, kind: Synthetic, draws: Draws) -> Tensor:
    """Similarity of each query to its synthetic negatives, by type in order: [N, total].

    Args:
        q: unit queries [N, C], with gradient.
        bank: unit rows [K, C], without.
        similarity: q @ bank.T, [N, K], with gradient.
        hard: indices of each query's hard rows, [N, n_hard].
        kind, draws: what to make of them.
    """
    n1, n2, n3, n4, n5, n6 = kind.counts
    fixed = q.detach()
    rows = hard.gather(1, draws.first)  # [N, total] rows of the bank
    s = similarity.gather(1, rows)  # q.n
    s1, s2, s3, s4, s5, s6 = s.split(kind.counts, 1)
    _, _, rows3, rows4, _, rows6 = rows.split(kind.counts, 1)
    qq = (q * fixed).sum(1, keepdim=True)  # [N, 1]: 1 in value, q in gradient
    out = []

    if n1 or n2 or n5:
        weight_q = torch.cat([draws.a, 1 - draws.b, torch.full_like(s5, kind.delta).detach()], 1)
        weight_n = torch.cat([1 - draws.a, draws.b, torch.ones_like(s5).detach()], 1)
        linear = torch.cat([s1, s2, s5], 1)
        square = weight_q.square() * qq.detach() + weight_n.square() + 2 * weight_q * weight_n * linear.detach()
        y1, y2, y5 = ((weight_q * qq + weight_n * linear) / _root(square)).split((n1, n2, n5), 1)
    else:
        y1, y2, y5 = s1, s2, s5
    out += [y1, y2]

    if n3:
        other = hard.gather(1, draws.second)
        g = draws.g
        between = (bank[rows3] * bank[other]).sum(2)  # n.n'
        square = g.square() + (1 - g).square() + 2 * g * (1 - g) * between
        out.append((g * s3 + (1 - g) * similarity.gather(1, other)) / _root(square))

    if n4:
        noise = draws.noise
        square = 1 + 2 * (bank[rows4] * noise).sum(2) + noise.square().sum(2)
        out.append((s4 + torch.einsum("nc,nmc->nm", q, noise)) / _root(square))

    out.append(y5)

    if n6:
        sign = fixed.sign()
        toward = torch.einsum("nmc,nc->nm", bank[rows6], sign)  # n.sign(q)
        square = 1 + 2 * kind.eta * toward + kind.eta**2 * sign.square().sum(1, keepdim=True)
        out.append((s6 + kind.eta * (q * sign).sum(1, keepdim=True)) / _root(square))

    return torch.cat(out, 1)


def _root(square: Tensor) -> Tensor:
    return square.clamp_min(1e-24).sqrt()
