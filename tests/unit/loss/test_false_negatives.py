"""Compare FNC's loss and the false negatives that it finds with a slow version."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fnc_helpers import DIM, T, slow_loss, unit_rows

from moco.loss.contrastive import info_nce
from moco.loss.false_negatives import (
    Cancellation,
    cancelled_nt_xent,
    find_false_negatives,
    same_class_entries,
)
from moco.loss.global_contrastive import compare
from moco.loss.settings import MODES


def our_loss(z, bank, own, how, chunk):
    return cancelled_nt_xent(
        z, bank, own, find_false_negatives(bank.detach(), own, how, chunk), how.mode, T, chunk
    )[0]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("V", "rows"), [(2, 30), (5, 60), (2, 12), (4, 16)], ids=str)
def test_with_memory_it_is_the_slow_one(V, rows, mode, seed):
    torch.manual_seed(seed)
    how, n = Cancellation(mode, 6, 0.85), rows // (2 * V)
    z, bank = unit_rows(V, n, DIM).requires_grad_(), unit_rows(rows, DIM)
    own = torch.randperm(rows)[: V * n].view(V, n)
    slow = slow_loss(z, bank, own, how)
    for chunk in (1, 2, n, 100):
        loss = our_loss(z, bank, own, how, chunk)
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, slow)),
            rtol=0,
            atol=1e-10,
        )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("V", "n", "first"), [(2, 3, 0), (4, 5, 5), (2, 4, 4), (3, 1, 2)], ids=str)
def test_without_memory_it_is_the_slow_one(V, n, first, mode, seed):
    """Use the joint batch as bank, with gradients through it.

    The images of this rank start at `first`.
    """
    torch.manual_seed(seed)
    how, joint = Cancellation(mode, 6, 0.85), first + n + 1
    features = torch.randn(V, joint, DIM, dtype=torch.float64, requires_grad=True)
    rows = F.normalize(features, dim=2)
    own = torch.arange(V * joint).view(V, joint)[:, first : first + n]
    inputs = (rows[:, first : first + n], rows.flatten(0, 1), own, how)
    slow = slow_loss(*inputs)
    for chunk in (1, 100):
        loss = our_loss(*inputs, chunk)
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, features, retain_graph=True)[0] for x in (loss, slow)),
            rtol=0,
            atol=1e-10,
        )


def test_threshold_and_topk_both_cut_in_these_tests():
    torch.manual_seed(0)
    own = torch.randperm(60)[:30].view(5, 6)
    counts = find_false_negatives(
        unit_rows(60, DIM), own, Cancellation("attract", 6, 0.85), 4
    ).mask.sum(1)
    assert 0 < counts.min() < counts.max() == 6


@pytest.mark.parametrize("seed", range(3))
def test_two_views_alone_are_nt_xent(seed):
    torch.manual_seed(seed)
    for n, first, m in ((5, 0, 5), (3, 4, 9)):
        features = torch.randn(2, m, DIM, requires_grad=True)
        z = F.normalize(features, dim=2)
        mine, own = z[:, first : first + n], torch.arange(2 * m).view(2, m)[:, first : first + n]
        ours = our_loss(mine, z.flatten(0, 1), own, Cancellation("off"), 2)
        pairs = compare(mine, z, first)
        others = pairs.others.masked_fill(pairs.own, -torch.inf)
        theirs = sum(info_nce(pairs.positive[view], [others[view]], T) for view in (0, 1))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, features, retain_graph=True)[0] for x in (ours, theirs))
        )


def planted(similarity):
    """Return a bank with images 0, 1, 2 in two views, orthogonal to each other.

    It also has an entry of another image, similar to view 1 of image 1.
    """
    bank = torch.eye(10, dtype=torch.float64)[:9]
    own = torch.tensor([[0, 1, 2], [3, 4, 5]])
    bank[7] = (
        similarity * bank[4] + (1 - similarity**2) ** 0.5 * torch.eye(10, dtype=torch.float64)[9]
    )
    return bank, own


@pytest.mark.parametrize("mode", ["attract", "eliminate"])
def test_a_planted_false_negative_is_found_and_cancelled(mode):
    how = Cancellation(mode, 10, 0.7)
    for similarity in (1.0, 0.71, 0.69):
        bank, own = planted(similarity)
        found = find_false_negatives(bank, own, how, 2)
        pairs = [(i, int(row)) for i in range(3) for row in found.indices[i][found.mask[i]]]
        assert pairs == ([(1, 7)] if similarity > 0.7 else [])
        for i in range(3):
            assert not set(found.indices[i].tolist()) & set(
                own[:, i].tolist()
            )  # its own views are no candidates
        z = unit_rows(2, 3, 10).requires_grad_()
        losses = [our_loss(z, bank, own, which, 2) for which in (how, Cancellation("off"))]
        torch.testing.assert_close(losses[0], slow_loss(z, bank, own, how), rtol=0, atol=1e-10)
        found, off = (torch.autograd.grad(loss, z)[0] for loss in losses)
        assert torch.equal(found[:, [0, 2]], off[:, [0, 2]])
        push = {
            True: found[:, 1, 9],
            False: off[:, 1, 9],
        }  # along the axis that the planted row alone has a part of
        if similarity == 0.69:
            assert torch.equal(found, off)
        elif similarity == 0.71:
            assert (push[False] > 0).all() and (
                push[True] < 0 if mode == "attract" else push[True] == 0
            ).all()


def test_an_eliminated_row_is_as_if_it_were_not_there():
    bank, own = planted(0.9)
    bank[7] = bank[4]
    z = unit_rows(2, 3, 10).requires_grad_()
    loss = our_loss(z[:, 1:2], bank, own[:, 1:2], Cancellation("eliminate", 10, 0.7), 1)
    rest = torch.cat([bank[:7], bank[8:]])
    torch.testing.assert_close(loss, our_loss(z[:, 1:2], rest, own[:, 1:2], Cancellation("off"), 1))


def test_no_candidates_where_there_is_no_other_row():
    bank, own = unit_rows(4, DIM), torch.arange(4)[:, None]
    found = find_false_negatives(bank, own, Cancellation("attract", 10, -1.0), 8)
    assert found.indices.shape == found.mask.shape == (1, 0)
    assert our_loss(
        unit_rows(4, 1, DIM), bank, own, Cancellation("attract", 10, -1.0), 8
    ).isfinite()
    found = find_false_negatives(unit_rows(6, DIM), own, Cancellation("attract", 10, -1.0), 8)
    assert sorted(found.indices[0].tolist()) == [4, 5] and found.mask.all()


@pytest.mark.parametrize("temperature", [0.001, 0.1, 10.0])
def test_the_loss_is_finite_in_float32_where_all_is_alike_or_opposite(temperature):
    one = F.normalize(torch.ones(1, DIM), dim=1)
    for sign in (1.0, -1.0):
        bank = torch.cat([one.expand(4, -1), sign * one.expand(8, -1)])
        z = one.expand(2, 2, DIM).clone().requires_grad_()
        own = torch.arange(4).view(2, 2)
        for mode in MODES:
            how = Cancellation(mode, 3, 0.7)
            loss, *_ = cancelled_nt_xent(
                z, bank, own, find_false_negatives(bank, own, how, 1), mode, temperature, 1
            )
            assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


def test_enough_rows_stay_negatives_whatever_the_threshold():
    """With the largest --fn-topk that the script accepts, each anchor keeps one negative."""
    bank, own = unit_rows(9, DIM), torch.arange(6).view(2, 3)
    z = unit_rows(2, 3, DIM)
    for mode in ("attract", "eliminate"):
        how = Cancellation(mode, 9 - 2 - 1, -1.0)
        found = find_false_negatives(bank, own, how, 2)
        loss, nearest, (_, with_negatives) = cancelled_nt_xent(z, bank, own, found, mode, T, 2)
        assert loss.isfinite() and nearest.isfinite() and with_negatives == z.shape[0] * z.shape[1]


# how many classes the images have, and how many entries have none
CLASSES = {"few": (3, 0), "many": (40, 0), "one": (1, 0), "some unknown": (2, 9)}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", ["attract", "eliminate"])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(("V", "n", "more"), [(2, 6, 14), (3, 4, 0)], ids=str)
def test_by_labels_it_is_the_slow_one(V, n, more, classes, mode, seed):
    """With `more` 0, the bank is the batch. All entries can be of the image's class."""
    torch.manual_seed(seed)
    count, unknown = CLASSES[classes]
    how, rows = Cancellation(mode, source="labels"), V * n + more
    features = torch.randn(rows, DIM, dtype=torch.float64, requires_grad=True)
    bank, own = F.normalize(features, dim=1), torch.randperm(rows)[: V * n].view(V, n)
    labels = torch.randint(count, (n,))
    bank_labels = torch.randint(count, (rows,))
    bank_labels[torch.randperm(rows)[:unknown]] = -1
    bank_labels[own] = labels
    same = [[int(label) == int(other) for other in bank_labels] for label in labels]
    found = same_class_entries(labels, bank_labels, own)
    slow = slow_loss(bank[own], bank, own, how, same)
    wanted = torch.autograd.grad(slow, features, retain_graph=True)[0]
    for chunk in (1, 4, 100):
        loss, nearest, (hardness, count) = cancelled_nt_xent(
            bank[own], bank, own, found, mode, T, chunk
        )
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        gradient = torch.autograd.grad(loss, features, retain_graph=True)[0]
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)
        assert nearest.isfinite() and hardness.isfinite()
        others = [sum(not true for true in line) for line in same]
        assert count == V * sum(some > 0 for some in others)


@pytest.mark.parametrize("mode", ["attract", "eliminate"])
def test_by_labels_the_loss_is_finite_in_float32_at_the_least_temperature(mode):
    """The false negatives have the largest logits, and may leave the sum."""
    one = F.normalize(torch.ones(1, DIM), dim=1)
    bank = torch.cat([one, -one, one.expand(3, -1), -one.expand(3, -1)])
    z, own = torch.stack([one, -one]).requires_grad_(), torch.tensor([[0], [1]])
    found = same_class_entries(torch.tensor([0]), torch.tensor([0, 0, 0, 0, 0, 1, 1, -1]), own)
    loss, *_ = cancelled_nt_xent(z, bank, own, found, mode, 0.001, 1)
    assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_chunks_do_not_change_the_loss(mode):
    torch.manual_seed(0)
    how = Cancellation(mode, 10, 0.3)
    z, bank = (
        F.normalize(torch.randn(3, 40, 16), dim=2).requires_grad_(),
        F.normalize(torch.randn(2048, 16), dim=1),
    )
    own = torch.randperm(2048)[:120].view(3, 40)
    whole = our_loss(z, bank, own, how, 40)
    gradient = torch.autograd.grad(whole, z)[0]
    for chunk in (1, 7, 16):
        loss = our_loss(z, bank, own, how, chunk)
        torch.testing.assert_close(loss, whole, rtol=3e-7, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, z)[0], gradient, rtol=0, atol=1e-6)


def test_memory_grows_with_the_chunk_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import measure

    def peak(V, n, chunk):
        z, bank = (
            F.normalize(torch.randn(V, n, 16), dim=2).requires_grad_(),
            F.normalize(torch.randn(8192, 16), dim=1),
        )
        own = torch.arange(V * n).view(V, n)
        head = lambda: our_loss(z, bank, own, Cancellation(), chunk).backward()  # noqa: E731
        return measure.peak_memory(head, torch.device("cpu")) / (
            8192 * 4
        )  # in rows as wide as the bank

    small, base, wide, many = peak(2, 64, 8), peak(2, 64, 32), peak(8, 64, 32), peak(2, 256, 32)
    assert base < 2.5 * 32 and small < base / 3
    assert max(wide, many) < 1.2 * base
