"""The search for the hardest negatives against a full sort."""

import pytest
import torch

from moco.loss.hardest import hardest


@pytest.mark.parametrize("n_hard", [1, 7, 40])
def test_hardest_are_the_most_similar_entries_hardest_first(n_hard):
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
    similarity[1] = similarity[1].sort().values  # the hardest are neighbours
    similarity[2].view(-1)[:: max(1, K // (2 * n_hard))] += 9  # the hardest at equal distances
    assert torch.equal(hardest(similarity, n_hard), similarity.topk(n_hard, 1).indices)
