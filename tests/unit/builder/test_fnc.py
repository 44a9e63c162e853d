"""Compare FNC with slow loops in float64, over anchors and memory entries.

The tests cover the loss, the gradient, the false negatives found, the memory, and two ranks.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, on_two_ranks
from torch import nn

from moco import distributed
from moco.builder.fnc import FNC
from moco.launch import launch
from moco.loss import global_contrastive
from moco.loss.false_negatives import MODES, Cancellation, cancelled_nt_xent, find_false_negatives
from moco.rng import Progress

T, DIM = 0.1, 4


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def slow_candidates(bank, own, image, how):
    """Return the entries found as false negatives of an image, one similarity after the other."""
    mine = own[:, image].tolist()
    score = {
        row: max(float(bank[me] @ bank[row]) for me in mine)
        for row in range(len(bank))
        if row not in mine
    }
    best = sorted(score, key=score.get, reverse=True)[: how.topk]
    return [row for row in best if score[row] > how.threshold] if how.mode != "off" else []


def slow_loss(z, bank, own, how):
    V, n, _ = z.shape
    total = 0
    for i in range(n):
        false = slow_candidates(bank.detach(), own, i, how)
        for a in range(V):
            logit = {row: z[a, i] @ bank[row] / T for row in range(len(bank)) if row != own[a, i]}
            positives = [int(own[v, i]) for v in range(V) if v != a]
            below = list(logit)
            if how.mode == "attract":
                positives += false
            if how.mode == "eliminate":
                below = [row for row in below if row not in false]
            denominator = torch.stack([logit[row] for row in below]).exp().sum().log()
            total = (
                total + (denominator - torch.stack([logit[row] for row in positives]).mean()) / n
            )
    return total * 2 / V


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
        theirs = global_contrastive.nt_xent(global_contrastive.compare(mine, z, first), T)
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
        for value in cancelled_nt_xent(
            z, bank, own, find_false_negatives(bank, own, how, 2), mode, T, 2
        ):
            assert value.isfinite()


SCRIPT = (
    "-a",
    "resnet18",
    "--image-size",
    32,
    "-b",
    8,
    "-j",
    0,
    "--epochs",
    1,
    "-p",
    1,
    "--support-size",
    1,
)


@pytest.mark.parametrize("mode", ["attract", "eliminate"])
@pytest.mark.parametrize(
    ("options", "most", "said"),
    [
        (("--memory-multiplier", 4), 28, "the memory (--memory-multiplier) has 29 entries"),
        (
            ("--memory-multiplier", 2, "--accumulation-steps", 2),
            28,
            "the memory (--memory-multiplier) has 29 entries",
        ),
        (("--memory-multiplier", 0), 20, "the batch (--batch-size) has 21 entries"),
    ],
)
def test_so_many_false_negatives_that_no_negative_is_left_are_refused(
    mode, options, most, said, script, monkeypatch, shared_images
):
    monkeypatch.setattr(launch, "launch", lambda worker, args: None)
    command = (
        "main_fnc",
        shared_images,
        *SCRIPT,
        *options,
        "--fn-mode",
        mode,
        "--fn-threshold",
        -1,
    )
    status, _, err = script(*command, "--fn-topk", most + 1)
    assert status == 2 and err.count("\n") == 1
    assert (
        f"--fn-topk {most + 1}: {said} of other images" in err
        and f"give {most} or fewer, or --fn-mode off" in err
    )
    assert script(*command, "--fn-topk", most)[0] == 0


def test_as_many_false_negatives_as_may_be_train_and_are_logged_as_json(
    script, shared_images, tmp_path
):
    options = (
        "--memory-multiplier",
        4,
        "--fn-topk",
        28,
        "--fn-threshold",
        -1,
        "--fn-mode",
        "eliminate",
        "--save-dir",
        tmp_path,
    )
    status, _, err = script("main_fnc", shared_images, *SCRIPT, *options)
    assert status == 0, err
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        entry = json.loads(line, parse_constant=lambda word: pytest.fail(word))
        assert math.isfinite(entry["loss"]) and math.isfinite(entry["hardness"])


# chunks


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


# the whole method


def build(rows, mode="attract", topk=3, N=40, labels=False):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.BatchNorm1d(8),
    )
    classes = torch.arange(N) % 3 if labels else None
    return FNC(
        lambda: net.append(nn.Linear(8, DIM)),
        DIM,
        rows,
        0.9,
        T,
        Cancellation(mode, topk, 0.6),
        2,
        classes,
    ).double()


def batch(step, V, n):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(n, 3, 9, 9, generator=generator, dtype=torch.float64) for _ in range(V)]
    return views, torch.randperm(40, generator=generator)[:n]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("V", [2, 4])
def test_the_memory_holds_the_latest_features_of_the_average(mode, V):
    n, rows = 3, 29  # the memory wraps around in the middle of a batch
    model = build(rows, mode, labels=True)
    kept = [(model.memory[i].clone(), -1) for i in range(rows)]  # oldest first
    average = copy.deepcopy(model.encoder_k)
    for step in range(6):
        views, index = batch(step, V, n)
        with torch.no_grad():
            keys = [F.normalize(average(view), dim=1) for view in views]
        kept = [*kept, *((keys[v][i], int(index[i])) for v in range(V) for i in range(n))][-rows:]
        bank, own = (
            torch.stack([row for row, _ in kept]),
            torch.arange(rows - V * n, rows).view(V, n),
        )
        encoder = copy.deepcopy(model.encoder_q)
        z = torch.stack([F.normalize(encoder(view), dim=1) for view in views])
        slow = slow_loss(z, bank, own, model.cancellation)
        slow.backward()
        loss, metrics = model(views, index, Progress(step=step))
        loss.backward()
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        for mine, theirs in zip(model.encoder_q.parameters(), encoder.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)
        if mode == "off":
            assert not {"fn_found", "fn_precision"} & metrics.keys()
        else:
            false = [
                (i, row)
                for i in range(n)
                for row in slow_candidates(bank, own, i, model.cancellation)
            ]
            assert float(metrics["fn_found"]) == pytest.approx(len(false) / n)
            false = [(i, row) for i, row in false if kept[row][1] != int(index[i])]
            right = [
                whose % 3 == int(index[i]) % 3
                for i, row in false
                for whose in [kept[row][1]]
                if whose >= 0
            ]
            found, count = metrics["fn_precision"]
            assert (int(found), int(count)) == (sum(right), len(false))
        hardest = {
            (a, i): max(
                (z[a, i] @ bank[r]).item()
                for r in range(rows)
                if r not in own[:, i].tolist() + dropped
            )
            for i in range(n)
            for dropped in [slow_candidates(bank, own, i, model.cancellation)]
            for a in range(V)
        }
        nearest = [
            z[a, i] @ bank[own[v, i]] > hard
            for (a, i), hard in hardest.items()
            for v in range(V)
            if v != a
        ]
        assert float(metrics["hardness"]) == pytest.approx(sum(hardest.values()) / len(hardest))
        assert float(metrics["acc1"]) == pytest.approx(sum(map(bool, nearest)) / len(nearest))
        with torch.no_grad():
            for p in model.encoder_q.parameters():
                p -= 0.05 * p.grad
                p.grad = None
        model.after_step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.encoder_q.parameters(), strict=True):
                old.copy_(0.9 * old + 0.1 * new)
    assert {
        "memory",
        "memory_index",
        "memory_ptr",
    } < model.state_dict().keys() and "labels" not in model.state_dict()


def test_without_memory_there_is_one_encoder():
    model = build(0, "off")
    assert not any(name.startswith(("memory", "encoder_k")) for name in model.state_dict())
    views, index = batch(0, 2, 5)
    encoder = copy.deepcopy(model.encoder_q)
    z = torch.stack([F.normalize(encoder(view), dim=1) for view in views])
    loss, metrics = model(views, index, Progress())
    torch.testing.assert_close(
        loss, global_contrastive.nt_xent(global_contrastive.compare(z, z, 0), T), rtol=0, atol=1e-12
    )
    assert not {"fn_found", "fn_precision"} & metrics.keys()
    model.after_step()


# two ranks


def three_steps(rank, rows, mode):
    """Return the losses, gradients and state of three steps.

    They run on this rank's half of the joint batch, or (rank None) on all of it. Batch norm is over
    the full batch.
    """
    model, found = build(rows, mode, labels=True), []
    distributed.sync_batch_norm(model, torch.device("cpu"))
    ddp = distributed.data_parallel(model)
    mine = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    for step in range(3):
        views, index = batch(step, 3, 6)
        loss, metrics = ddp([view[mine] for view in views], index[mine], Progress(step=step))
        loss.backward()
        metrics["right"], metrics["count"] = (
            x.double() for x in metrics.pop("fn_precision", (loss * 0, loss * 0))
        )
        with torch.no_grad():
            gradients = [p.grad.clone() for p in model.encoder_q.parameters()]
            for p in model.encoder_q.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        model.after_step()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        values = {name: value.detach().clone() for name, value in {"loss": loss, **metrics}.items()}
        found.append({"values": values, "gradients": gradients, "state": state})
    return found


KINDS = {
    "memory": (40, "attract"),
    "wrapped": (31, "eliminate"),
    "batch": (0, "attract"),
    "nt-xent": (0, "off"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(
        {kind: (three_steps, *how) for kind, how in KINDS.items()}, tmp_path_factory.mktemp("ranks")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_with_the_joint_batch(ranks, kind):
    for first, second, joint in zip(*ranks(kind), three_steps(None, *KINDS[kind]), strict=True):
        for name in joint["values"].keys() - {
            "feature_std",
            "uniformity",
        }:  # of a rank's features among themselves
            value = joint["values"][name]
            parts = first["values"][name] + second["values"][name]
            torch.testing.assert_close(
                parts if name in ("right", "count") else parts / 2, value, rtol=0, atol=1e-10
            )
        for mine, other, both in zip(
            first["gradients"], second["gradients"], joint["gradients"], strict=True
        ):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, both, rtol=0, atol=1e-10)
        for name, tensor in joint[
            "state"
        ].items():  # weights, memory, whose it is, and what batch norm has seen
            assert torch.equal(first["state"][name], second["state"][name])
            torch.testing.assert_close(first["state"][name], tensor, rtol=1e-10, atol=1e-10)
