"""Synthetic hard negatives in closed form: SynCo's six types (arXiv 2410.02401, section 3).

`TYPES` in `moco/loss/settings.py` is the table of the types. To add a type, add an entry. The
draws, the similarities and their gradient follow from it. `moco/builder/negatives.py` uses this
file.

A synthetic negative h is made for a query q from entries n and n' of the bank, drawn among the
negatives most similar to q:

    h = v / |v|,  v = A q + B n + D n' + E sign(q) + e,  e ~ N(0, size^2 I)

A type sets the coefficients A, B, D and E, and whether there is noise e. No gradient passes through
h, so the gradient of q.h with respect to q is h.

No tensor of vectors h is needed for the similarity q.h. It is a sum of the scalars q.q, q.n, q.n',
|q|_1 = q.sign(q) and q.e, divided by |v|. The norm of v = A q + B n follows from scalars, too:

    |v|^2 = A^2 q.q + B^2 + 2 A B q.n

The vectors v of the other types are computed once, without gradient, for their norms.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.loss.settings import ONE, TYPES, Coefficient, Synthetic, Type

_TINY = 1e-12  # the smallest norm to divide by


@dataclass(frozen=True)
class _Columns:
    """The columns of one type's negatives in the tensors of `Draws` and `Mixture`.

    `all` are its columns in tensors of all negatives. Each other slice is for tensors of the
    negatives that have the item of that name, and is empty if the type lacks it.
    """

    type: Type
    all: slice
    weight: slice
    second: slice  # of n' in `Mixture.indices`, after the columns of n
    sign: slice
    noise: slice


def _layout(counts: tuple[int, ...]) -> tuple[list[_Columns], dict[str, int]]:
    """Return the columns of each type with negatives, and the ends of all slices."""
    layout, ends = [], {"all": 0, "weight": 0, "second": sum(counts), "sign": 0, "noise": 0}
    for type_, count in zip(TYPES, counts, strict=True):
        has = {
            "all": True,
            "weight": type_.weight is not None,
            "second": type_.second is not None,
            "sign": type_.sign is not None,
            "noise": type_.noise,
        }
        starts, ends = ends, {name: ends[name] + count * has[name] for name in has}
        if count:
            columns = {name: slice(starts[name], ends[name]) for name in has}
            layout.append(_Columns(type_, **columns))
    return layout, ends


@dataclass(frozen=True)
class Draws:
    """The random part of a batch's synthetic negatives, type by type in the order of `TYPES`.

    Indices refer to a query's hard negatives; 0 is the hardest. M is the number of negatives of the
    types that have the item in question.
    """

    first: Tensor  # [N, total] index of n
    second: Tensor  # [N, M] index of n'
    weight: Tensor  # [N, M] weight w
    noise: Tensor  # [N, M, C] noise e, already scaled by the type's size


def draw(
    config: Synthetic,
    n: int,
    dim: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Draws:
    """Draw the random part of the synthetic negatives of `n` queries with `dim` features.

    Entries are drawn uniformly, with replacement. The draws are on the generator's device.
    """
    layout, ends = _layout(config.counts)
    on = {"generator": generator, "device": generator.device}
    first = torch.randint(config.n_hard, (n, config.total), **on)
    second = torch.randint(config.n_hard, (n, ends["second"] - config.total), **on)

    # One call per type: the numbers of a type do not depend on the types after it.
    weights = [torch.empty(n, 0, dtype=dtype, device=generator.device)]
    for c in layout:
        if c.type.weight is not None:
            low, high = c.type.weight
            u = torch.rand(n, c.weight.stop - c.weight.start, dtype=dtype, **on)
            weights.append(u if (low, high) == (0, 1) else u.mul_(high - low).add_(low))

    noise = torch.randn(n, ends["noise"], dim, dtype=dtype, **on)
    for c in layout:
        if c.type.noise:
            noise[:, c.noise].mul_(config.size(c.type))
    return Draws(first, second, torch.cat(weights, 1), noise)


@dataclass(frozen=True)
class Mixture:
    """The synthetic negatives of a batch, as coefficients of the vectors they are made of.

    The coefficients are those of h: they are already divided by |v|. M is the number of negatives
    of the types that have the vector in question.
    """

    indices: Tensor  # [N, total + M] of the bank entries: all n, then all n'
    coefficients: Tensor  # [N, total + M] of these entries
    of_q: Tensor  # [N, total] coefficient of q
    of_sign: Tensor  # [N, M] coefficient of sign(q)
    of_noise: Tensor  # [N, M] coefficient of e
    noise: Tensor  # [N, M, C] noise e
    layout: list[_Columns]
    weight: float  # factor of the exponentials of the negatives' logits
    similarity: Tensor | None = None  # [N, total] q.h without gradient, see `dot`

    def dot(self, q: Tensor, similarity: Tensor) -> Tensor:
        """Return q.h [N, total], differentiable in both arguments.

        Args:
            q: normalized queries [N, C].
            similarity: similarity of each query to the bank, [N, K].
        """
        fixed = q.detach()  # h has no gradient, and neither has the q in it
        of_entries = self.coefficients * similarity.gather(1, self.indices)
        of_q = self.of_q * (q * fixed).sum(1, keepdim=True)
        y = of_entries[:, : of_q.shape[1]] + of_q
        for c in self.layout:
            if c.type.second is not None:
                y[:, c.all].add_(of_entries[:, c.second])
            if c.type.sign is not None:
                y[:, c.all].add_(self.of_sign[:, c.sign] * (q * fixed.sign()).sum(1, keepdim=True))
            if c.type.noise:
                q_e = torch.bmm(self.noise[:, c.noise], q[:, :, None]).squeeze(2)
                y[:, c.all].add_(self.of_noise[:, c.noise] * q_e)
        return y

    def backward(self, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over m of weight_m h_m in two parts.

        Args:
            q: normalized queries [N, C].
            weight: factor of each synthetic negative, [N, total].

        Returns:
            coefficients [N, total + M] of the bank entries `indices`;
            the sum of the other vectors, [N, C].
        """
        seconds = [weight[:, c.all] for c in self.layout if c.type.second is not None]
        of_entries = torch.cat([weight, *seconds], 1) * self.coefficients
        rest = (weight * self.of_q).sum(1, keepdim=True) * q
        for c in self.layout:
            if c.type.sign is not None:
                total = (weight[:, c.all] * self.of_sign[:, c.sign]).sum(1, keepdim=True)
                rest += total * q.sign()
        for c in self.layout:
            if c.type.noise:
                factors = weight[:, c.all] * self.of_noise[:, c.noise]
                rest += torch.bmm(factors[:, None, :], self.noise[:, c.noise]).squeeze(1)
        return of_entries, rest


@torch.no_grad()
def mix(
    q: Tensor, bank: Tensor, similarity: Tensor, hard: Tensor, config: Synthetic, draws: Draws
) -> Mixture:
    """Return the synthetic negatives of a batch of queries.

    Args:
        q: normalized queries [N, C].
        bank: normalized entries [K, C].
        similarity: q @ bank.T, [N, K].
        hard: indices of the hardest entries of each query, [N, H] with H >= `config.n_hard`; the
            draws choose among the first `config.n_hard` columns.
        config: the number of negatives of each type, and their sizes.
        draws: their random part, from `draw`.
    """
    n, total = len(q), config.total
    layout, ends = _layout(config.counts)
    indices = hard.gather(1, torch.cat([draws.first, draws.second], 1))
    mixture = Mixture(
        indices,
        coefficients=torch.ones_like(indices, dtype=q.dtype),
        of_q=q.new_zeros(n, total),
        of_sign=q.new_empty(n, ends["sign"]),
        of_noise=q.new_empty(n, ends["noise"]),
        noise=draws.noise,
        layout=layout,
        weight=config.weight,
    )

    # The norms of A q + B n, in one pass for all types in the plane of q and n. The other columns
    # still have A = 0 and B = 1, and keep them.
    for c in layout:
        if c.type.in_plane:
            _fill(mixture, c, config, draws)
    A, B = mixture.of_q, mixture.coefficients[:, :total]
    s = similarity.gather(1, indices[:, :total])
    square = A.square() * (q * q).sum(1, keepdim=True) + B.square() + 2 * A * B * s
    norm = square.clamp_min(_TINY**2).sqrt()
    A.div_(norm)
    B.div_(norm)

    # The other types need the vectors for their norms: one type at a time, to save memory.
    for c in layout:
        if not c.type.in_plane:
            coefficients = _fill(mixture, c, config, draws)
            norm = torch.linalg.vector_norm(_vectors(mixture, c, q, bank), dim=2)
            inverse = norm.clamp_min_(_TINY).reciprocal_()
            for coefficient in coefficients:
                coefficient.mul_(inverse)
    return replace(mixture, similarity=mixture.dot(q, similarity))


def _fill(mixture: Mixture, c: _Columns, config: Synthetic, draws: Draws) -> list[Tensor]:
    """Write the coefficients of a type's v to the mixture, and return views [N, M] of them."""
    w, size = draws.weight[:, c.weight], config.size(c.type)
    views = []
    for coefficient, tensor, columns in (
        (c.type.q, mixture.of_q, c.all),
        (c.type.n, mixture.coefficients, c.all),
        (c.type.second, mixture.coefficients, c.second),
        (c.type.sign, mixture.of_sign, c.sign),
        (ONE if c.type.noise else None, mixture.of_noise, c.noise),
    ):
        if coefficient is not None:
            views.append(tensor[:, columns])
            _write(coefficient, views[-1], w, size)
    return views


def _vectors(mixture: Mixture, c: _Columns, q: Tensor, bank: Tensor) -> Tensor:
    """Return the vectors v [N, M, C] of a type, whose coefficients are not yet divided by |v|."""
    first, B = mixture.indices[:, c.all], mixture.coefficients[:, c.all]
    if c.type.second is not None:
        # embedding_bag adds B n + D n' without a tensor for either.
        pairs = torch.stack([first, mixture.indices[:, c.second]], 2).view(-1, 2)
        factors = torch.stack([B, mixture.coefficients[:, c.second]], 2).view(-1, 2)
        v = F.embedding_bag(pairs, bank, per_sample_weights=factors, mode="sum")
        v = v.view(*B.shape, q.shape[1])
    else:
        v = F.embedding(first, bank)
        if c.type.n != ONE:
            v.mul_(B[:, :, None])
    if c.type.q is not None:
        v.addcmul_(mixture.of_q[:, c.all, None], q[:, None, :])
    if c.type.sign is not None:
        v.addcmul_(mixture.of_sign[:, c.sign, None], q.sign()[:, None, :])
    if c.type.noise:
        v.add_(mixture.noise[:, c.noise])
    return v


def similarities(
    q: Tensor, bank: Tensor, similarity: Tensor, hard: Tensor, config: Synthetic, draws: Draws
) -> Tensor:
    """Return the similarity of each query to its synthetic negatives, type by type: [N, total].

    The arguments are those of `mix`. The result is differentiable in `q` and in `similarity`.
    """
    return mix(q.detach(), bank, similarity.detach(), hard, config, draws).dot(q, similarity)


def _write(coefficient: Coefficient, out: Tensor, w: Tensor, size: float) -> None:
    """Write the factors of the negatives to `out` [N, M], for weights `w` of the same shape.

    A type without a random weight has no slope, and `w` is not read.
    """
    scale = size if coefficient.sized else 1.0
    if coefficient.slope:
        # a scalar on the CPU, which no device has to wait for
        constant = torch.tensor(coefficient.constant * scale, dtype=w.dtype)
        torch.add(constant, w, alpha=coefficient.slope * scale, out=out)
    else:
        out.fill_(coefficient.constant * scale)
