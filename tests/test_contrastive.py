import math

import pytest
import torch
import torch.nn.functional as F

from moco.loss.contrastive import contrast_accuracy, info_nce, unit

ROWS = 6


def similarities(sizes, seed):
    """Random similarities in [-1, 1], float64, that want a gradient: the positive [N] and blocks of negatives [N, K_i]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()

    return uniform(ROWS), [uniform(ROWS, size) for size in sizes]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("sizes", [(1,), (37,), (37, 11), (5, 1, 8)])
def test_info_nce_is_cross_entropy_with_the_positive_in_column_0(sizes, temperature, seed):
    positive, negatives = similarities(sizes, seed)
    loss = info_nce(positive, negatives, temperature)
    gradients = torch.autograd.grad(loss, [positive, *negatives])

    logits = torch.cat([positive[:, None], *negatives], 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(ROWS, dtype=torch.long))
    expected_gradients = torch.autograd.grad(expected, [positive, *negatives])

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


def test_info_nce_stays_finite_where_an_exponential_would_overflow():
    positive, negatives = torch.tensor([1.0, -1.0]), torch.tensor([[-1.0, 0.0], [1.0, 1.0]])
    loss = info_nce(positive, [negatives], 0.001)  # logits of up to 1000: losses 0 and 2000 + log 2
    torch.testing.assert_close(loss, torch.tensor(1000 + math.log(2) / 2))


@pytest.mark.parametrize("columns", [4, 5, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_contrast_accuracy_counts_the_positives_that_topk_finds(columns, seed):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(200, generator=generator) * 0.3 + 0.7
    negatives = torch.rand(200, columns, generator=generator)
    logits = torch.cat([positive[:, None], negatives], 1)
    found = logits.topk(min(5, columns + 1), 1).indices == 0

    accuracy = contrast_accuracy(positive, negatives)
    assert accuracy["acc1"].item() == pytest.approx(found[:, :1].any(1).double().mean().item())
    assert accuracy["acc5"].item() == pytest.approx(found.any(1).double().mean().item())
    assert accuracy["acc1"] < 1  # the rows are not all alike


def test_contrast_accuracy_of_known_ranks():
    negatives = torch.arange(10.0).repeat(4, 1)
    positive = torch.tensor([9.5, 8.5, 4.5, 5.5])  # with 0, 1, 5 and 4 negatives above
    accuracy = contrast_accuracy(positive, negatives)
    assert accuracy["acc1"].item() == 0.25
    assert accuracy["acc5"].item() == 0.75


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_unit_never_computes_below_float32(given, expected):
    x = (torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 40).to(given)
    rows = unit(x)
    assert rows.dtype == expected
    torch.testing.assert_close(rows.double().norm(dim=-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.double(), x.double() / x.double().norm(dim=-1, keepdim=True), rtol=0, atol=1e-6)


def test_unit_is_float32_under_autocast():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rows = unit(x)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5), rtol=0, atol=1e-6)
