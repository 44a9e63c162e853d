"""Log-sum-exps over a bank, in blocks, against torch.logsumexp in float64."""

import pytest
import torch

from moco.loss import bank as module
from moco.loss.bank import bank_log_sum, mixed_log_sum
from moco.loss.contrastive import normalize

DOUBLE = torch.float64


def inputs(n, dim, entries, seed, dtype=DOUBLE):
    """Return unit queries that require a gradient, and a bank."""
    generator = torch.Generator().manual_seed(seed)
    q, bank = (
        normalize(torch.randn(size, dim, generator=generator, dtype=DOUBLE)).to(dtype)
        for size in (n, entries)
    )
    return q.requires_grad_(), bank


def exact(q, bank, temperature):
    """Return log-sum-exps, their gradient, and the nearest entries, in float64 autograd."""
    q = q.detach().double().requires_grad_()
    similarity = q @ bank.double().T
    log_sum = torch.logsumexp(similarity / temperature, 1)
    factor = torch.linspace(-1, 2, len(q), dtype=DOUBLE)
    (gradient,) = torch.autograd.grad((factor * log_sum).sum(), q)
    return log_sum.detach(), gradient, similarity.detach().sort(1, descending=True).values[:, :5]


def check(q, bank, temperature, log_sum, nearest, tolerance):
    factor = torch.linspace(-1, 2, len(q), dtype=q.dtype)
    (gradient,) = torch.autograd.grad((factor * log_sum).sum(), q)
    true_sum, true_gradient, true_nearest = exact(q, bank, temperature)
    relative = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(log_sum.detach(), true_sum, **relative)
    torch.testing.assert_close(gradient * temperature, true_gradient * temperature, **relative)
    if nearest is not None:
        torch.testing.assert_close(nearest, true_nearest, **relative)


@pytest.mark.parametrize("temperature", [0.0005, 0.01, 0.07, 1.0])
@pytest.mark.parametrize("entries", [1, 4, 7, 96, 256, 4099, 5000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("block", [1, 1 << 15, 1 << 28])
def test_log_sums_and_gradients_are_those_of_logsumexp(
    entries, temperature, dtype, tolerance, block, monkeypatch
):
    """Blocks of one group, of a few, and of the full bank, with and without a rest."""
    monkeypatch.setattr(module, "_BLOCK_ON_CPU", block)
    q, bank = inputs(3, 12, entries, entries, dtype)
    # a large logit has a large rounding error
    tolerance *= max(1, 0.01 / temperature)
    log_sum, nearest = bank_log_sum(q, bank, temperature)
    assert log_sum.dtype == nearest.dtype == dtype and not nearest.requires_grad
    check(q, bank, temperature, log_sum, nearest, tolerance)
    log_sum = mixed_log_sum(q, bank, (q @ bank.T).detach(), temperature)
    check(q, bank, temperature, log_sum, None, tolerance)


def test_the_nearest_entries_may_be_neighbours_or_equal():
    q, bank = inputs(4, 6, 640, 0)
    order = (q @ bank.T)[0].argsort()
    bank = bank[order]  # the nearest entries of the first query are in one group
    bank[:7] = q[1].detach()
    _, nearest = bank_log_sum(q, bank, 0.2)
    torch.testing.assert_close(nearest, (q @ bank.T).detach().topk(5, 1).values)
    torch.testing.assert_close(nearest[1], torch.ones(5, dtype=DOUBLE))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, bank = inputs(5, 8, 1000, 1)
        check(q, bank, 0.1, *bank_log_sum(q, bank, 0.1), 1e-12)
    finally:
        torch.set_num_threads(before)


def test_queries_without_gradient_have_a_log_sum_without_gradient():
    q, bank = inputs(5, 8, 100, 2)
    log_sum, _ = bank_log_sum(q.detach(), bank, 0.1)
    assert not log_sum.requires_grad
    torch.testing.assert_close(log_sum, exact(q, bank, 0.1)[0])
    assert not mixed_log_sum(q.detach(), bank, (q @ bank.T).detach(), 0.1).requires_grad


def test_non_finite_queries_have_a_non_finite_log_sum():
    """A diverged run then ends with the error about its loss, not with one of this code."""
    q, bank = inputs(5, 8, 2048, 3, torch.float32)
    for value in (torch.nan, torch.inf):
        bad = q.detach().clone()
        bad[2] = value
        log_sum, _ = bank_log_sum(bad, bank, 0.1)
        assert log_sum.isfinite().tolist() == [True, True, False, True, True]
