"""Compare FNC with slow loops in float64, over anchors and memory entries.

The tests cover the loss, the gradient, the false negatives found, the memory, and two ranks.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from fnc_helpers import DIM, T, of_class, slow_candidates, slow_loss
from run_helpers import typed
from torch import nn

from moco import distributed
from moco.builder.fnc import FNC
from moco.launch import launch
from moco.loss.contrastive import info_nce
from moco.loss.false_negatives import Cancellation
from moco.loss.global_contrastive import compare
from moco.loss.settings import MODES
from moco.rng import Progress

SCRIPT = typed("-a resnet18 --image-size 32 -b 8 -j 0 --epochs 1 -p 1 --support-size 1")


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
        *typed("--fn-mode {} --fn-threshold -1", mode),
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
        *typed("--memory-multiplier 4 --fn-topk 28 --fn-threshold -1 --fn-mode eliminate"),
        "--save-dir",
        tmp_path,
    )
    status, _, err = script("main_fnc", shared_images, *SCRIPT, *options)
    assert status == 0, err
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        entry = json.loads(line, parse_constant=lambda word: pytest.fail(word))
        assert math.isfinite(entry["loss"]) and math.isfinite(entry["hardness"])


# the whole method
def build(rows, mode="attract", topk=3, N=40, labels=False, source="similarity"):
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
        Cancellation(mode, topk, 0.6, source),
        2,
        classes,
    ).double()


def batch(step, V, n):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(n, 3, 9, 9, generator=generator, dtype=torch.float64) for _ in range(V)]
    return views, torch.randperm(40, generator=generator)[:n]


HOW = [(mode, "similarity") for mode in MODES]
HOW += [("attract", "labels"), ("eliminate", "labels"), ("off", "labels")]


@pytest.mark.parametrize(("mode", "source"), HOW)
@pytest.mark.parametrize("V", [2, 4])
def test_the_memory_holds_the_latest_features_of_the_average(mode, source, V):
    n, rows = 3, 29  # the memory wraps around in the middle of a batch
    model = build(rows, mode, labels=True, source=source)
    by_labels = source == "labels" and mode != "off"
    kept = [(model.memory[i].clone(), -1) for i in range(rows)]  # oldest first
    average = copy.deepcopy(model.encoder_k)
    for step in range(6):
        views, index = batch(step, V, n)
        with torch.no_grad():
            keys = F.normalize(average(torch.cat(views)), dim=1).split(n)
        kept = [*kept, *((keys[v][i], int(index[i])) for v in range(V) for i in range(n))][-rows:]
        bank, own = (
            torch.stack([row for row, _ in kept]),
            torch.arange(rows - V * n, rows).view(V, n),
        )
        encoder = copy.deepcopy(model.encoder_q)
        z = torch.stack(F.normalize(encoder(torch.cat(views)), dim=1).split(n))
        same = [
            [whose >= 0 and whose % 3 == int(index[i]) % 3 for _, whose in kept] for i in range(n)
        ]
        slow = slow_loss(z, bank, own, model.cancellation, same if by_labels else None)
        slow.backward()
        candidates = [
            of_class(same, own, i)
            if by_labels
            else slow_candidates(bank, own, i, model.cancellation)
            for i in range(n)
        ]
        loss, metrics = model(views, index, Progress(step=step))
        loss.backward()
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        for mine, theirs in zip(model.encoder_q.parameters(), encoder.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)
        if mode == "off":
            assert not {"fn_found", "fn_precision"} & metrics.keys()
        else:
            false = [(i, row) for i in range(n) for row in candidates[i]]
            assert float(metrics["fn_found"]) == pytest.approx(len(false) / n)
            false = [(i, row) for i, row in false if kept[row][1] != int(index[i])]
            right = [
                whose % 3 == int(index[i]) % 3
                for i, row in false
                for whose in [kept[row][1]]
                if whose >= 0
            ]
            if by_labels:  # it is 1
                assert "fn_precision" not in metrics and all(right)
            else:
                found, count = metrics["fn_precision"]
                assert (int(found), int(count)) == (sum(right), len(false))
        hardest = {
            (a, i): max(
                (z[a, i] @ bank[r]).item()
                for r in range(rows)
                if r not in own[:, i].tolist() + candidates[i]
            )
            for i in range(n)
            for a in range(V)
        }
        nearest = [
            z[a, i] @ bank[own[v, i]] > hard
            for (a, i), hard in hardest.items()
            for v in range(V)
            if v != a
        ]
        hardness, count = metrics["hardness"]
        assert float(hardness) == pytest.approx(sum(hardest.values())) and count == len(hardest)
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
    z = torch.stack(F.normalize(encoder(torch.cat(views)), dim=1).split(5))
    loss, metrics = model(views, index, Progress())
    pairs = compare(z, z, 0)
    others = pairs.others.masked_fill(pairs.own, -torch.inf)
    nt_xent = sum(info_nce(pairs.positive[view], [others[view]], T) for view in (0, 1))
    torch.testing.assert_close(loss, nt_xent, rtol=0, atol=1e-12)
    assert not {"fn_found", "fn_precision"} & metrics.keys()
    model.after_step()


def test_batch_norm_normalizes_all_views_together():
    model = build(0, "off")
    views, index = batch(0, 4, 5)
    convolution, norm = model.encoder_q[0], model.encoder_q[1]
    x = torch.stack([convolution(image[None])[0] for view in views for image in view])
    seen = []
    norm.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(views, index, Progress())
    by_hand = (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt()
    (found,) = seen
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)), rtol=0, atol=1e-10)
    assert norm.num_batches_tracked == 1


# two ranks
def three_steps(rank, rows, mode, source="similarity"):
    """Return the losses, gradients and state of three steps.

    They run on this rank's half of the joint batch, or (rank None) on all of it. Batch norm is over
    the full batch.
    """
    model, found = build(rows, mode, labels=True, source=source), []
    if model.sync_batch_norm:
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
        hardness, count = metrics.pop("hardness")
        metrics["hardness"] = hardness / count  # all anchors have negatives
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
    "labels, wrapped": (31, "attract", "labels"),
    "labels, batch": (0, "eliminate", "labels"),
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
