"""Compare AdCo's loss and the ascent of its bank with slow versions in float64 autograd."""

import pytest
import torch
import torch.nn.functional as F

from moco.loss import bank as blocks
from moco.loss.adversarial import Ascent, ascend, bank_log_sums, keys_and_bank_nce

DOUBLE = torch.float64
BLOCKS = [1, 1 << 15, 1 << 28]  # bytes: the smallest blocks, some, and one block


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=DOUBLE), dim=-1)


def slow_loss(q, keys, label, W, temperature):
    """Cross entropy of each query's key among all keys and the bank, query by query: [N]."""
    losses = []
    for query, own in zip(q, label, strict=True):
        logits = [query @ key for key in keys] + [query @ w / w.norm() for w in W]
        losses.append(F.cross_entropy(torch.stack(logits)[None] / temperature, own[None]))
    return torch.stack(losses)


def batch(seed, n=6, dim=5, entries=17, world_size=1, rank=0):
    """Return queries, the keys of all ranks, the indices of the queries' keys, and a bank."""
    torch.manual_seed(seed)
    q, keys = unit_rows(n, dim), unit_rows(world_size * n, dim)
    W = torch.randn(entries, dim, dtype=DOUBLE)  # entries of any norm
    return q, keys, rank * n + torch.arange(n), W


def step(q, keys, W, velocity, weight, settings, keep=False):
    """Make a step of the ascent."""
    sums = bank_log_sums(q, torch.zeros_like(q[:, 0]), W, 1.0, settings.T, keep)
    assert (sums.similarity is not None) == keep
    of_keys = (q @ keys.T / settings.T).logsumexp(1)
    log_sum = torch.logaddexp(of_keys, sums.of_ascent)
    ascend(W, velocity, sums.inverse, q, log_sum, weight, settings, sums.similarity)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (3, 4)])
def test_loss_and_its_gradient_are_the_slow_ones(seed, rank, world_size):
    q, keys, label, W = batch(seed, world_size=world_size, rank=rank)
    q.requires_grad_()
    of_bank = bank_log_sums(q, (q @ keys.T)[:, 0], W, 0.2, 0.1).of_encoder
    loss = keys_and_bank_nce(q @ keys.T, label, of_bank, 0.2)
    slow = slow_loss(q, keys, label, W, 0.2).mean()
    torch.testing.assert_close(loss, slow, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(x, q)[0] for x in (loss, slow))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("entries", [1, 4, 7, 48, 256, 4099, 5000])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("T", [(0.12, 0.02), (0.02, 0.12), (1.0, 0.0005), (0.0005, 1.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 3e-4)])
def test_sums_are_those_of_all_similarities(block, entries, keep, T, dtype, tolerance, monkeypatch):
    """The smallest temperature makes exponentials that are no float32."""
    monkeypatch.setattr(blocks, "_BLOCK_ON_CPU", block)
    q, _, _, W = batch(entries, 3, 12, entries)
    W[-1] = 3 * q[0]  # a similarity of 1, in the last block
    positive = torch.tensor([1.1, -1.1, 0.123], dtype=DOUBLE)
    narrow = (x.to(dtype) for x in (q, positive, W))
    sums = bank_log_sums(*(x.requires_grad_(x.shape == q.shape) for x in narrow), *T, keep)

    exact = q.clone().requires_grad_()
    similarity = exact @ (W / W.norm(dim=1, keepdim=True)).T
    true, of_ascent = ((similarity / one).logsumexp(1) for one in T)
    close = {"rtol": tolerance, "check_dtype": False}
    for found, expected, scale in (
        (sums.of_encoder, true, 1 / T[0]),
        (sums.of_ascent, of_ascent, 1 / T[1]),
        (sums.above, (similarity > positive[:, None]).sum(1), 1),
        (sums.hardest, similarity.amax(1), 1),
        (sums.inverse, 1 / W.norm(dim=1), 1),
    ):
        torch.testing.assert_close(found, expected, atol=tolerance * max(1, scale / 100), **close)
    if keep:
        torch.testing.assert_close(sums.similarity, similarity.T, atol=tolerance, **close)
    given = [x for x in sums if x is not None]
    assert [x.requires_grad for x in given] == [True] + [False] * (4 + keep)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("entries", [1, 17, 1000])
def test_the_gradient_of_the_queries_is_autograds(block, entries, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_ON_CPU", block)
    q, _, _, W = batch(entries, 6, 12, entries)
    factor = torch.linspace(-1, 2, len(q), dtype=DOUBLE)
    q.requires_grad_()
    log_sum = bank_log_sums(q, factor, W, 0.03, 0.1).of_encoder
    found = torch.autograd.grad((factor * log_sum).sum(), q)
    true = (q @ (W / W.norm(dim=1, keepdim=True)).T / 0.03).logsumexp(1)
    expected = torch.autograd.grad((factor * true).sum(), q)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("entries", [1, 17, 100])
@pytest.mark.parametrize("keep", [False, True])
def test_the_ascent_is_sgd_on_autograds_gradient(block, momentum, entries, keep, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_ON_CPU", block)
    settings = Ascent(lr=0.7, T=0.07, momentum=momentum, weight_decay=0.05)
    *_, W = batch(0, entries=entries)
    slow, velocity = W.clone().requires_grad_(), torch.zeros_like(W)
    sgd = torch.optim.SGD([slow], lr=0.7, momentum=momentum, weight_decay=0.05)
    for number in range(4):
        q, keys, label, _ = batch(number + 1)
        weight = torch.rand(len(q), dtype=DOUBLE)
        slow.grad = torch.zeros_like(slow)
        (weight * -slow_loss(q, keys, label, slow, settings.T)).sum().backward()
        step(q, keys, W, velocity, weight, settings, keep)
        sgd.step()
        torch.testing.assert_close(W, slow.detach(), rtol=0, atol=1e-10)


def test_the_ascent_is_finite_where_float32_exponentials_would_not_be():
    q, keys, label, W = batch(0)
    W[0] = q[0] * 3  # similarity 1: exp(1 / .005) is no float32
    settings, weight = (
        Ascent(lr=0.1, T=0.005, momentum=0.0, weight_decay=0.0),
        torch.full((6,), 1 / 6),
    )
    slow, narrow = W.clone().requires_grad_(), W.float()
    slow_loss(q, keys, label, slow, settings.T).mean().backward()
    step(q.float(), keys.float(), narrow, torch.zeros_like(narrow), weight, settings)
    expected = 0.1 * slow.grad
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(narrow.double() - W, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("lr", "steps"), [(3.0, 1), (0.1, 5)])
def test_the_loss_on_fixed_features_rises_with_the_banks_steps(seed, lr, steps):
    """Take one step at the published lr, or several small ones, at the published temperature."""
    q, keys, label, W = batch(seed, 32, 16, 256)
    velocity, weight, losses = torch.zeros_like(W), torch.full((32,), 1 / 32, dtype=DOUBLE), []
    for _ in range(steps + 1):
        losses.append(slow_loss(q, keys, label, W, 0.02).mean())
        step(q, keys, W, velocity, weight, Ascent(lr=lr, T=0.02))
    assert losses == sorted(losses) and losses[-1] > losses[0] + 0.1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    q, keys, label, W = batch(1, 5, 8, 1000)
    slow, settings = W.clone().requires_grad_(), Ascent(lr=2.0, T=0.05, momentum=0, weight_decay=0)
    slow_loss(q, keys, label, slow, 0.05).sum().backward()
    expected = W + 2 * slow.grad
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step(q, keys, W, torch.zeros_like(W), torch.ones(5, dtype=DOUBLE), settings)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(W, expected, rtol=0, atol=1e-11)


def test_non_finite_queries_have_non_finite_log_sums():
    """A diverged run then ends with the error about its loss, not with one of this code."""
    q, _, _, W = batch(3, 5, 8, 2048)
    for value in (torch.nan, torch.inf):
        bad = q.float()
        bad[2] = value
        sums = bank_log_sums(bad, bad[:, 0], W.float(), 0.1, 0.05)
        for log_sum in (sums.of_encoder, sums.of_ascent):
            assert log_sum.isfinite().tolist() == [True, True, False, True, True]
