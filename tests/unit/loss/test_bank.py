"""Log-sum-exps over a bank, in blocks, against torch.logsumexp in float64."""

import pytest
import torch

from moco.loss import bank as module
from moco.loss.bank import BankSum, bank_log_sum, mixed_log_sum
from moco.loss.contrastive import normalize

DOUBLE = torch.float64


def inputs(n, dim, entries, seed, dtype=DOUBLE):
    """Return unit queries that require a gradient, their similarities to keys, and a bank."""
    generator = torch.Generator().manual_seed(seed)
    q, bank = (
        normalize(torch.randn(size, dim, generator=generator, dtype=DOUBLE)).to(dtype)
        for size in (n, entries)
    )
    # most entries are below the first key, and few below the last one
    positive = torch.linspace(0.6, -0.6, n, dtype=dtype)
    return q.requires_grad_(), positive, bank


def exact(q, positive, bank, temperature):
    """Return the items of `BankSum`, and the gradient of the log-sum-exps, in float64 autograd."""
    q = q.detach().double().requires_grad_()
    similarity = q @ bank.double().T
    log_sum = torch.logsumexp(similarity / temperature, 1)
    factor = torch.linspace(-1, 2, len(q), dtype=DOUBLE)
    (gradient,) = torch.autograd.grad((factor * log_sum).sum(), q)
    above = (similarity > positive.double()[:, None]).sum(1)
    return BankSum(log_sum.detach(), above, similarity.detach().amax(1)), gradient


def check(q, positive, bank, temperature, found, tolerance):
    """Compare a `BankSum`, or a log-sum-exp alone, and its gradient with the exact ones."""
    found = found if isinstance(found, tuple) else (found,)
    factor = torch.linspace(-1, 2, len(q), dtype=q.dtype)
    (gradient,) = torch.autograd.grad((factor * found[0]).sum(), q)
    true, true_gradient = exact(q, positive, bank, temperature)
    relative = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(gradient * temperature, true_gradient * temperature, **relative)
    for mine, other in zip(found, true, strict=False):
        torch.testing.assert_close(mine.detach(), other, **relative)


@pytest.mark.parametrize("temperature", [0.0005, 0.01, 0.07, 1.0])
@pytest.mark.parametrize("entries", [1, 4, 7, 96, 256, 4099, 5000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("block", [1, 1 << 15, 1 << 28])
def test_log_sums_and_gradients_are_those_of_logsumexp(
    entries, temperature, dtype, tolerance, block, monkeypatch
):
    """Blocks of one group, of a few, and of the full bank, with and without a rest."""
    monkeypatch.setattr(module, "_BLOCK_ON_CPU", block)
    q, positive, bank = inputs(3, 12, entries, entries, dtype)
    # a large logit has a large rounding error
    tolerance *= max(1, 0.01 / temperature)
    found = bank_log_sum(q, positive, bank, temperature)
    assert all(x.dtype == dtype for x in found)
    assert [x.requires_grad for x in found] == [True, False, False]
    check(q, positive, bank, temperature, found, tolerance)
    log_sum = mixed_log_sum(q, bank, (q @ bank.T).detach(), temperature)
    check(q, positive, bank, temperature, log_sum, tolerance)


@pytest.mark.parametrize("temperature", [0.001, 0.2])
def test_all_entries_above_a_key_are_counted(temperature):
    """Their exponentials may be 0, next to that of the nearest entry."""
    q, _, bank = inputs(4, 6, 640, 0, torch.float32)
    bank[:7] = q[1].detach()
    positive = torch.tensor([1.0, 0.99, -0.99, 0.0])
    above = bank_log_sum(q, positive, bank, temperature).above
    assert above[:2].tolist() == [0, 7]
    assert torch.equal(above, ((q @ bank.T) > positive[:, None]).sum(1))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, positive, bank = inputs(5, 8, 1000, 1)
        check(q, positive, bank, 0.1, bank_log_sum(q, positive, bank, 0.1), 1e-12)
    finally:
        torch.set_num_threads(before)


def test_queries_without_gradient_have_a_log_sum_without_gradient():
    q, positive, bank = inputs(5, 8, 100, 2)
    log_sum = bank_log_sum(q.detach(), positive, bank, 0.1).log_sum
    assert not log_sum.requires_grad
    torch.testing.assert_close(log_sum, exact(q, positive, bank, 0.1)[0].log_sum)
    assert not mixed_log_sum(q.detach(), bank, (q @ bank.T).detach(), 0.1).requires_grad


def test_non_finite_queries_have_a_non_finite_log_sum():
    """A diverged run then ends with the error about its loss, not with one of this code."""
    q, positive, bank = inputs(5, 8, 2048, 3, torch.float32)
    for value in (torch.nan, torch.inf):
        bad = q.detach().clone()
        bad[2] = value
        log_sum = bank_log_sum(bad, positive, bank, 0.1).log_sum
        assert log_sum.isfinite().tolist() == [True, True, False, True, True]
