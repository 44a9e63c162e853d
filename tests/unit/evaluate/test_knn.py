"""Test the k-NN evaluation against its definition, on one process and on several."""

import numpy as np
import pytest
import torch
from feature_helpers import Sizes, on_ranks
from torch import nn

from moco.engine import features

KS = [1, 10, 20, 100, 200]


def clouds(bank=2000, queries=500, classes=12, width=24, seed=0):
    """Return normalized features and labels of a bank and of queries.

    Features lie around one direction per class; the classes overlap.
    """
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, width, generator=draw)
    splits = []
    for n in (bank, queries):
        label = torch.randint(0, classes, (n,), generator=draw)
        rows = nn.functional.normalize(
            centre[label] + 2 * torch.randn(n, width, generator=draw), dim=1
        )
        splits.append((rows, label))
    return splits


def by_hand(bank, bank_labels, queries, labels, classes, k, temperature):
    """Return the fraction of queries classified correctly in float64.

    Also return the fraction that rounding may decide.
    """
    right = unclear = 0
    for row, label in zip(queries.double().numpy(), labels.tolist(), strict=True):
        similarity = bank.double().numpy() @ row
        order = np.argsort(-similarity)
        votes = np.zeros(classes)
        for i in order[:k]:
            votes[bank_labels[i]] += np.exp(similarity[i] / temperature)
        second, first = np.sort(votes)[-2:]
        at_k = similarity[order[k - 1 : k + 1]]
        unclear += first - second < 1e-4 * first or (len(at_k) == 2 and at_k[0] - at_k[1] < 1e-6)
        right += votes.argmax() == label
    return right / len(labels), unclear / len(labels)


def agrees(found, bank, queries, classes, temperature):
    for k, top1 in found.items():
        want, unclear = by_hand(*bank, *queries, classes, k, temperature)
        assert unclear < 0.02
        assert abs(top1 - want) <= unclear + 1e-9, k


def in_blocks(monkeypatch, bank, queries=37):
    monkeypatch.setattr(features, "BANK", bank)
    monkeypatch.setattr(features, "QUERIES", queries)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(
    "rows", [64, 333, 65_536]
)  # 200 neighbours are more than a block of 64 holds
def test_knn_is_its_definition(rows, temperature, monkeypatch):
    in_blocks(monkeypatch, rows)
    bank, queries = clouds()
    found = features.knn(*bank, *queries, 12, KS, temperature)
    assert list(found) == KS and found[20] > found[1] > 0.3
    agrees(found, bank, queries, 12, temperature)


@pytest.mark.parametrize("rows", [7, 65_536])
def test_k_may_be_more_than_the_bank_has(rows, monkeypatch):
    in_blocks(monkeypatch, rows)
    bank, queries = clouds(bank=30, queries=60)
    found = features.knn(*bank, *queries, 12, [5, 30, 200], 0.07)
    agrees({5: found[5], 30: found[30]}, bank, queries, 12, 0.07)
    assert found[200] == found[30]


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_nearest_are_the_first_of_all_sorted(rows, monkeypatch):
    in_blocks(monkeypatch, rows)
    (bank, labels), (queries, _) = clouds(bank=700, queries=90)
    labels = torch.arange(len(bank))  # tells which row was found
    similarity, place = features.nearest(bank, labels, queries, 100)
    every = queries.double() @ bank.double().T
    torch.testing.assert_close(
        similarity.double(), every.sort(1, descending=True).values[:, :100], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(similarity.double(), every.gather(1, place), rtol=0, atol=1e-6)
    assert all(len(set(row)) == 100 for row in place.tolist())


def test_a_small_temperature_leaves_the_votes_finite():
    bank, queries = clouds()
    (first, *_), (one, *_) = (
        features.knn(*bank, *queries, 12, [k], t).values() for k, t in ((20, 0.001), (1, 1.0))
    )
    assert first == pytest.approx(
        one, abs=0.05
    )  # the nearest one decides, but where others are as near


def test_no_more_is_kept_than_one_block_of_similarities(monkeypatch):
    in_blocks(monkeypatch, 64)
    bank, queries = clouds(width=8)
    with Sizes() as sizes:
        features.nearest(*bank, queries[0], 10)
    inputs = {x.untyped_storage().data_ptr() for x in (*bank, *queries)}
    made = [n for at, n in sizes.memory.items() if at not in inputs]
    assert (
        max(made) == 500 * 10
    )  # what is found; a block has 37 * 64, all similarities would be 500 * 2000


# Ranks: threads of this process that exchange what they hold.
@pytest.mark.parametrize(("world_size", "rows"), [(2, 64), (3, 5), (2, 65_536)])
@pytest.mark.parametrize("n", [2000, 301])  # 301: of three ranks none holds 200
def test_knn_over_ranks_is_its_definition(world_size, rows, n, monkeypatch):
    in_blocks(monkeypatch, rows)
    bank, queries = clouds(bank=n, queries=101)
    share = [[x[rank::world_size] for x in (*bank, *queries)] for rank in range(world_size)]
    found = on_ranks(world_size, lambda rank: features.knn(*share[rank], 12, KS, 0.07), monkeypatch)
    assert all(one == found[0] for one in found)
    agrees(found[0], bank, queries, 12, 0.07)


@pytest.mark.parametrize(("n", "world_size"), [(15, 2), (7, 3), (1, 2), (6, 2)])
def test_shares_come_back_in_order(n, world_size, monkeypatch):
    x = torch.randn(n, 4)
    for found in on_ranks(
        world_size, lambda rank: features.gather_in_order(x[rank::world_size]), monkeypatch
    ):
        assert torch.equal(found, x)
    assert torch.equal(features.gather_in_order(x), x)
