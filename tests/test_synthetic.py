import pytest
import torch

from moco.loss.contrastive import info_nce, normalize
from moco.loss.synthetic import Synthetic, draw, hardest, similarities

T = 0.2
ALONE = [tuple(5 if i == j else 0 for j in range(6)) for i in range(6)]
TOGETHER = (4, 3, 5, 2, 6, 1)
SIZES = [
    (3, 8, 20, 6),
    (5, 16, 32, 32),
    (2, 7, 9, 1),
    (1, 4, 3, 2),
]  # queries, features, bank rows, hard rows


def batch(sizes, seed, zeros=False, dtype=torch.float64):
    """Unit queries that want a gradient, and unit rows of a bank."""
    n, dim, rows, _ = sizes
    generator = torch.Generator().manual_seed(1000 + seed)
    q = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    bank = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    if zeros:
        q[:, ::3] = 0
    return normalize(q).to(dtype).requires_grad_(), normalize(bank).to(dtype)


def kind_of(counts, sizes, size=0.01):
    return Synthetic(n_hard=sizes[3], counts=counts, sigma=size, delta=3 * size, eta=2 * size)


def explicit_negatives(q, bank, hard, kind, draws):
    """The paper's definitions one vector at a time: [N, total, C], without gradient."""
    q = q.detach()
    everything = []
    for i, query in enumerate(q):
        place = iter(draws.first[i].tolist())

        def row(place, i=i):
            return bank[hard[i, place]]

        vectors = []
        for a in draws.a[i]:
            vectors.append(a * query + (1 - a) * row(next(place)))
        for b in draws.b[i]:
            vectors.append(query + b * (row(next(place)) - query))
        for g, second in zip(draws.g[i], draws.second[i].tolist(), strict=True):
            vectors.append(g * row(next(place)) + (1 - g) * row(second))
        for noise in draws.noise[i]:
            vectors.append(row(next(place)) + noise)
        for _ in range(kind.counts[4]):
            vectors.append(row(next(place)) + kind.delta * query)
        for _ in range(kind.counts[5]):
            vectors.append(row(next(place)) + kind.eta * torch.sign(query))
        assert next(place, None) is None
        everything.append(torch.stack([v / v.norm() for v in vectors]))
    return torch.stack(everything)


def loss_and_gradient(q, queue_similarity, synthetic_similarity):
    key = normalize(q.detach().roll(1, 1) + q.detach())
    positive = (q * key).sum(1)
    loss = info_nce(positive, [queue_similarity, synthetic_similarity], T)
    return loss.detach(), torch.autograd.grad(loss, q)[0]


def assert_closed_form_is_explicit(counts, sizes, seed, zeros=False, size=0.01):
    q, bank = batch(sizes, seed, zeros)
    kind = kind_of(counts, sizes, size)
    draws = draw(kind, *q.shape, torch.Generator().manual_seed(seed), torch.float64)
    similarity = q @ bank.T
    hard = hardest(similarity, kind.n_hard)
    closed = similarities(q, bank, similarity, hard, kind, draws)

    h = explicit_negatives(q, bank, hard, kind, draws)
    explicit = torch.einsum("nc,nmc->nm", q, h)
    assert closed.shape == (len(q), kind.total)
    torch.testing.assert_close(closed, explicit, rtol=0, atol=1e-10)

    loss, gradient = loss_and_gradient(q, q @ bank.T, closed)
    expected_loss, expected_gradient = loss_and_gradient(q, q @ bank.T, explicit)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("counts", [*ALONE, TOGETHER, (4, 0, 4, 0, 0, 0), (0, 2, 0, 2, 0, 2)])
def test_similarities_and_gradient_are_those_of_the_explicit_vectors(counts, sizes, zeros):
    for seed in range(3):
        assert_closed_form_is_explicit(counts, sizes, seed, zeros)


@pytest.mark.parametrize("size", [0.0, 0.1, 0.5])
def test_similarities_are_exact_for_large_perturbations_too(size):
    assert_closed_form_is_explicit(TOGETHER, SIZES[0], 7, size=size)


def test_gradient_of_a_similarity_is_the_negative_itself():
    q, bank = batch(SIZES[0], 4)
    kind = kind_of(TOGETHER, SIZES[0])
    draws = draw(kind, *q.shape, torch.Generator().manual_seed(4), torch.float64)
    similarity = q @ bank.T
    hard = hardest(similarity, kind.n_hard)
    closed = similarities(q, bank, similarity, hard, kind, draws)
    h = explicit_negatives(q, bank, hard, kind, draws)
    for m in range(kind.total):
        (gradient,) = torch.autograd.grad(closed[:, m].sum(), q, retain_graph=True)
        torch.testing.assert_close(gradient, h[:, m], rtol=0, atol=1e-10)


@pytest.mark.parametrize("counts", [*ALONE, TOGETHER])
def test_float32_is_close_to_float64(counts):
    sizes = (6, 128, 400, 50)
    kind = kind_of(counts, sizes)
    q, bank = batch(sizes, 0)
    hard = hardest(q @ bank.T, kind.n_hard)
    draws = draw(kind, *q.shape, torch.Generator().manual_seed(0))
    assert draws.a.dtype == draws.noise.dtype == torch.float32

    def of(dtype):
        near, rows = q.detach().to(dtype).requires_grad_(), bank.to(dtype)
        cast = type(draws)(
            **{k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(draws).items()}
        )
        return near, rows, similarities(near, rows, near @ rows.T, hard, kind, cast)

    narrow_q, narrow_bank, narrow = of(torch.float32)
    wide_q, wide_bank, wide = of(torch.float64)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-6)
    gradient = loss_and_gradient(narrow_q, narrow_q @ narrow_bank.T, narrow)[1]
    expected = loss_and_gradient(wide_q, wide_q @ wide_bank.T, wide)[1]
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5)


def test_draws_lie_in_their_ranges_and_fill_them():
    kind = Synthetic(n_hard=10, counts=(300, 301, 302, 64, 5, 6), sigma=0.3)
    draws = draw(kind, 8, 32, torch.Generator().manual_seed(0))
    shapes = {name: tuple(t.shape) for name, t in vars(draws).items()}
    assert shapes == {
        "first": (8, 978),
        "second": (8, 302),
        "a": (8, 300),
        "b": (8, 301),
        "g": (8, 302),
        "noise": (8, 64, 32),
    }
    for weight, low, high in [(draws.a, 0, 0.5), (draws.b, 1, 1.5), (draws.g, 0, 1)]:
        assert low <= weight.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < weight.max() <= high
        assert weight.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    for places in (draws.first, draws.second):
        counted = places.flatten().bincount(minlength=10)
        assert len(counted) == 10
        assert (counted / places.numel() - 0.1).abs().max() < 0.02
    assert draws.noise.std().item() == pytest.approx(0.3, rel=0.03)
    assert abs(draws.noise.mean().item()) < 0.01


def test_queries_have_draws_of_their_own():
    draws = draw(Synthetic(n_hard=50, counts=(8,) * 6), 2, 4, torch.Generator().manual_seed(0))
    for name, tensor in vars(draws).items():
        assert not torch.equal(tensor[0], tensor[1]), name


def test_draws_repeat_for_the_same_seed_and_differ_for_another():
    kind = Synthetic(n_hard=50, counts=(8,) * 6)
    one, same, other = (
        vars(draw(kind, 3, 4, torch.Generator().manual_seed(seed))) for seed in (5, 5, 6)
    )
    for name in one:
        assert torch.equal(one[name], same[name]), name
        assert not torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("n_hard", [1, 7, 40])
def test_hardest_are_the_most_similar_rows_hardest_first(n_hard):
    similarity = torch.randn(
        6, 40, generator=torch.Generator().manual_seed(n_hard), requires_grad=True
    )
    hard = hardest(similarity, n_hard)
    assert torch.equal(hard, similarity.argsort(1, descending=True)[:, :n_hard])


@pytest.mark.parametrize(
    ("K", "n_hard"),
    [(4096, 64), (4096, 1), (4000, 10), (4099, 16), (512, 128), (512, 127), (65536, 1024)],
)
def test_hardest_are_exact_for_large_banks(K, n_hard):
    similarity = torch.randn(
        3, K, generator=torch.Generator().manual_seed(K + n_hard), dtype=torch.float64
    )
    similarity[1] = similarity[1].sort().values  # the hardest side by side
    similarity[2].view(-1)[:: max(1, K // (2 * n_hard))] += 9  # the hardest spread out evenly
    assert torch.equal(hardest(similarity, n_hard), similarity.topk(n_hard, 1).indices)


def test_every_hard_row_can_be_drawn_and_no_other_row():
    q, bank = batch((1, 8, 30, 4), 0)
    kind = Synthetic(
        n_hard=4, counts=(0, 0, 0, 0, 200, 0), delta=0.0
    )  # with delta 0 the hard rows themselves
    draws = draw(kind, *q.shape, torch.Generator().manual_seed(0), torch.float64)
    similarity = q @ bank.T
    drawn = similarities(q, bank, similarity, hardest(similarity, 4), kind, draws)
    distinct = drawn.detach().flatten().sort().values.unique_consecutive()
    top = similarity.detach().flatten().sort().values[-4:]
    distinct = distinct[torch.cat([torch.tensor([True]), distinct.diff() > 1e-9])]
    torch.testing.assert_close(distinct, top, rtol=0, atol=1e-12)
