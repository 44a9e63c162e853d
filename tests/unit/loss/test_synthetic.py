"""Synthetic negatives against the explicit vectors of the papers, in float64, and their draws."""

import pytest
import torch
from synthetic_helpers import explicit_negatives

from moco.loss import settings, synthetic
from moco.loss.contrastive import bank_info_nce, info_nce, normalize
from moco.loss.hardest import hardest
from moco.loss.settings import ONE, ONE_MINUS_W, SIZE, TYPES, Coefficient, Synthetic, Type, W
from moco.loss.synthetic import draw, mix, similarities

T = 0.2
ALONE = [tuple(5 if i == j else 0 for j in range(6)) for i in range(6)]
TOGETHER = (4, 3, 5, 2, 6, 1)
SIZES = [
    (3, 8, 20, 6),
    (5, 16, 32, 32),
    (2, 7, 9, 1),
    (1, 4, 3, 2),
]  # queries, features, bank entries, hard entries


def batch(sizes, seed, zeros=False, dtype=torch.float64):
    """Return unit queries that require a gradient, and the unit entries of a bank."""
    n, dim, entries, _ = sizes
    generator = torch.Generator().manual_seed(1000 + seed)
    q = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    bank = torch.randn(entries, dim, generator=generator, dtype=torch.float64)
    if zeros:
        q[:, ::3] = 0
    return normalize(q).to(dtype).requires_grad_(), normalize(bank).to(dtype)


def config_of(counts, sizes, size=0.01):
    return Synthetic(n_hard=sizes[3], counts=counts, sigma=size, delta=3 * size, eta=2 * size)


def loss_and_gradient(q, queue_similarity, synthetic_similarity):
    key = normalize(q.detach().roll(1, 1) + q.detach())
    positive = (q * key).sum(1)
    loss = info_nce(positive, [queue_similarity, synthetic_similarity], T)
    return loss.detach(), torch.autograd.grad(loss, q)[0]


def assert_closed_form_is_explicit(counts, sizes, seed, zeros=False, size=0.01, seventh=None):
    q, bank = batch(sizes, seed, zeros)
    config = config_of(counts, sizes, size)
    draws = draw(config, *q.shape, torch.Generator().manual_seed(seed), torch.float64)
    similarity = q @ bank.T
    hard = hardest(similarity, config.n_hard)
    closed = similarities(q, bank, similarity, hard, config, draws)

    h = explicit_negatives(q, bank, hard, config, draws, seventh)
    explicit = torch.einsum("nc,nmc->nm", q, h)
    assert closed.shape == (len(q), config.total)
    torch.testing.assert_close(closed, explicit, rtol=0, atol=1e-10)

    loss, gradient = loss_and_gradient(q, q @ bank.T, closed)
    expected_loss, expected_gradient = loss_and_gradient(q, q @ bank.T, explicit)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
    return q, bank, hard, config, draws, h


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("counts", [*ALONE, TOGETHER, (4, 0, 4, 0, 0, 0), (0, 2, 0, 2, 0, 2)])
def test_similarities_and_gradient_are_those_of_the_explicit_vectors(counts, sizes, zeros):
    for seed in range(3):
        assert_closed_form_is_explicit(counts, sizes, seed, zeros)


@pytest.mark.parametrize("size", [0.0, 0.1, 0.5])
def test_similarities_are_exact_for_large_perturbations(size):
    assert_closed_form_is_explicit(TOGETHER, SIZES[0], 7, size=size)


# types after the six: an entry of the table, its vector v, and the size that config_of gives it
SEVENTH = {
    "every vector": (
        Type(
            "seventh",
            "this test",
            weight=(0.2, 0.7),
            size="eta",
            q=SIZE,
            n=W,
            second=ONE_MINUS_W,
            sign=Coefficient(0.1, slope=-2.0, sized=True),
            noise=True,
        ),
        lambda q, n, other, w, e: (
            0.02 * q + w * n + (1 - w) * other + 0.02 * (0.1 - 2 * w) * q.sign() + e
        ),
    ),
    "in the plane": (
        Type("seventh", "this test", weight=(0.0, 2.0), q=Coefficient(-0.5), n=ONE_MINUS_W),
        lambda q, n, other, w, e: (1 - w) * n - 0.5 * q,
    ),
    "the sum of two": (
        Type("seventh", "this test", second=ONE, n=Coefficient(3.0)),
        lambda q, n, other, w, e: 3 * n + other,
    ),
    "a scaled entry with noise": (
        Type("seventh", "this test", size="delta", n=Coefficient(2.0), noise=True),
        lambda q, n, other, w, e: 2 * n + e,
    ),
    "a random step": (
        Type(
            "seventh",
            "this test",
            weight=(1.0, 3.0),
            size="delta",
            sign=Coefficient(slope=-1.0, sized=True),
        ),
        lambda q, n, other, w, e: n - 0.03 * w * q.sign(),
    ),
}


def add_to_table(monkeypatch, entry):
    for module in (settings, synthetic):
        monkeypatch.setattr(module, "TYPES", (*TYPES, entry))


@pytest.mark.parametrize("counts", [(0,) * 6 + (5,), (4, 3, 5, 2, 6, 1, 3)])
@pytest.mark.parametrize(("entry", "vector"), SEVENTH.values(), ids=SEVENTH)
def test_one_entry_of_the_table_adds_a_type(entry, vector, counts, monkeypatch):
    add_to_table(monkeypatch, entry)
    for seed, sizes in enumerate(SIZES):
        made = assert_closed_form_is_explicit(counts, sizes, seed, zeros=seed == 1, seventh=vector)
        q, bank, hard, config, draws, h = made

        # the loss that the methods use, whose backward pass is written by hand
        positive = torch.full((len(q),), 0.3, dtype=torch.float64)
        mixture = mix(q.detach(), bank, (q @ bank.T).detach(), hard, config, draws)
        loss = bank_info_nce(q, positive, bank, (q @ bank.T).detach(), T, mixture)
        expected = info_nce(positive, [q @ bank.T, torch.einsum("nc,nmc->nm", q, h)], T)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        gradient, expected_gradient = (torch.autograd.grad(x, q)[0] for x in (loss, expected))
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


def test_a_type_added_at_the_end_changes_no_weight_of_the_others(monkeypatch):
    counts = (4, 3, 5, 0, 6, 1)
    before = draw(Synthetic(10, (*counts,)), 3, 8, torch.Generator().manual_seed(0))
    add_to_table(monkeypatch, SEVENTH["every vector"][0])
    after = draw(Synthetic(10, (*counts, 0)), 3, 8, torch.Generator().manual_seed(0))
    for name, tensor in vars(before).items():
        assert torch.equal(tensor, getattr(after, name)), name


def test_each_type_has_a_name_a_source_and_a_known_size():
    names = [type_.name for type_ in TYPES]
    assert names == ["interpolated", "extrapolated", "mixup", "noise", "perturbed", "adversarial"]
    assert [type_.size for type_ in TYPES] == [None, None, None, "sigma", "delta", "eta"]
    assert [type_.in_plane for type_ in TYPES] == [True, True, False, False, True, False]
    assert all("arXiv" in type_.source for type_ in TYPES)


def test_counts_of_another_length_are_refused():
    with pytest.raises(ValueError, match="5 counts for 6 types"):
        Synthetic(n_hard=10, counts=(1, 2, 3, 4, 5))


def test_gradient_of_a_similarity_is_the_negative_itself():
    q, bank = batch(SIZES[0], 4)
    config = config_of(TOGETHER, SIZES[0])
    draws = draw(config, *q.shape, torch.Generator().manual_seed(4), torch.float64)
    similarity = q @ bank.T
    hard = hardest(similarity, config.n_hard)
    closed = similarities(q, bank, similarity, hard, config, draws)
    h = explicit_negatives(q, bank, hard, config, draws)
    for m in range(config.total):
        (gradient,) = torch.autograd.grad(closed[:, m].sum(), q, retain_graph=True)
        torch.testing.assert_close(gradient, h[:, m], rtol=0, atol=1e-10)


@pytest.mark.parametrize("counts", [*ALONE, TOGETHER])
def test_float32_is_close_to_float64(counts):
    sizes = (6, 128, 400, 50)
    config = config_of(counts, sizes)
    q, bank = batch(sizes, 0)
    hard = hardest(q @ bank.T, config.n_hard)
    draws = draw(config, *q.shape, torch.Generator().manual_seed(0))
    assert draws.weight.dtype == draws.noise.dtype == torch.float32

    def cast_to(dtype):
        queries, entries = q.detach().to(dtype).requires_grad_(), bank.to(dtype)
        cast = type(draws)(
            **{k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(draws).items()}
        )
        found = similarities(queries, entries, queries @ entries.T, hard, config, cast)
        return queries, entries, found

    narrow_q, narrow_bank, narrow = cast_to(torch.float32)
    wide_q, wide_bank, wide = cast_to(torch.float64)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-6)
    gradient = loss_and_gradient(narrow_q, narrow_q @ narrow_bank.T, narrow)[1]
    expected = loss_and_gradient(wide_q, wide_q @ wide_bank.T, wide)[1]
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5)


def test_draws_lie_in_their_ranges_and_fill_them():
    config = Synthetic(n_hard=10, counts=(300, 301, 302, 64, 5, 6), sigma=0.3)
    draws = draw(config, 8, 32, torch.Generator().manual_seed(0))
    shapes = {name: tuple(t.shape) for name, t in vars(draws).items()}
    assert shapes == {
        "first": (8, 978),
        "second": (8, 302),
        "weight": (8, 300 + 301 + 302),
        "noise": (8, 64, 32),
    }
    a, b, g = draws.weight.split((300, 301, 302), 1)
    for weight, low, high in [(a, 0, 0.5), (b, 1, 1.5), (g, 0, 1)]:
        assert low <= weight.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < weight.max() <= high
        assert weight.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    for indices in (draws.first, draws.second):
        counted = indices.flatten().bincount(minlength=10)
        assert len(counted) == 10
        assert (counted / indices.numel() - 0.1).abs().max() < 0.02
    assert draws.noise.std().item() == pytest.approx(0.3, rel=0.03)
    assert abs(draws.noise.mean().item()) < 0.01


def test_draws_come_in_a_fixed_order():
    """A seed gives the same negatives for ever: entries, then weights, then noise."""
    config = Synthetic(n_hard=10, counts=(4, 3, 5, 2, 6, 1), sigma=0.3)
    draws = draw(config, 3, 8, torch.Generator().manual_seed(0))
    again = {"generator": torch.Generator().manual_seed(0)}
    assert torch.equal(draws.first, torch.randint(10, (3, 21), **again))
    assert torch.equal(draws.second, torch.randint(10, (3, 5), **again))
    a, b, g = (torch.rand(3, n, **again) for n in (4, 3, 5))
    assert torch.equal(draws.weight, torch.cat([a * 0.5, 1 + b * 0.5, g], 1))
    assert torch.equal(draws.noise, torch.randn(3, 2, 8, **again) * 0.3)


def test_each_query_has_its_own_draws():
    draws = draw(Synthetic(n_hard=50, counts=(8,) * 6), 2, 4, torch.Generator().manual_seed(0))
    for name, tensor in vars(draws).items():
        assert not torch.equal(tensor[0], tensor[1]), name


def test_draws_repeat_for_the_same_seed_and_differ_for_another():
    config = Synthetic(n_hard=50, counts=(8,) * 6)
    one, same, other = (
        vars(draw(config, 3, 4, torch.Generator().manual_seed(seed))) for seed in (5, 5, 6)
    )
    for name in one:
        assert torch.equal(one[name], same[name]), name
        assert not torch.equal(one[name], other[name]), name


def test_every_hard_entry_can_be_drawn_and_no_other_entry():
    q, bank = batch((1, 8, 30, 4), 0)
    # with delta 0, perturbed negatives are the hard entries themselves
    config = Synthetic(n_hard=4, counts=(0, 0, 0, 0, 200, 0), delta=0.0)
    draws = draw(config, *q.shape, torch.Generator().manual_seed(0), torch.float64)
    similarity = q @ bank.T
    drawn = similarities(q, bank, similarity, hardest(similarity, 4), config, draws)
    distinct = drawn.detach().flatten().sort().values.unique_consecutive()
    top = similarity.detach().flatten().sort().values[-4:]
    distinct = distinct[torch.cat([torch.tensor([True]), distinct.diff() > 1e-9])]
    torch.testing.assert_close(distinct, top, rtol=0, atol=1e-12)
