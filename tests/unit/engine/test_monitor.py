"""Tests of `moco.engine.monitor`: RankMe, the online probe, and the encoder before training."""

import json

import numpy as np
import pytest
import torch
from conftest import on_two_ranks
from run_helpers import load, same, typed
from torch import nn

from moco.encoder.resnets import resnet
from moco.engine.monitor import OnlineProbe, rankme

RUN = typed("-a resnet18 --image-size 32 -b 16 -j 0 -p 1 --moco-k 64")


def plain_rankme(rows):
    """The definition: the exponential of the entropy of the normalized singular values."""
    values = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (64, 64)])
def test_rankme_equals_its_definition(shape):
    rows = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[1])
    assert rankme(rows) == pytest.approx(plain_rankme(rows), rel=1e-6)


def test_rankme_counts_the_dimensions_in_use():
    assert rankme(torch.eye(7)) == pytest.approx(7)
    assert rankme(torch.ones(20, 6)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(20, 6)) == pytest.approx(1)


def rows_of_both():
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(3))


def rankme_of_half(rank):
    return rankme(rows_of_both()[rank::2])


def learn_on_half(rank):
    """Take two steps of the probe on this rank's half of a batch; return its weights."""
    torch.manual_seed(0)
    probe = OnlineProbe(Encoder().train(), 3)
    for step in range(2):
        x = torch.randn(8, 512, generator=torch.Generator().manual_seed(step))
        probe._features = x[rank * 4 :][:4]
        probe.learn(torch.arange(8)[rank * 4 :][:4] % 3)
    return probe.weight.detach()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    checks = {"rankme": (rankme_of_half,), "probe": (learn_on_half,)}
    return on_two_ranks(checks, tmp_path_factory.mktemp("ranks"))


def test_two_processes_measure_as_one(ranks):
    assert ranks("rankme") == pytest.approx([plain_rankme(rows_of_both())] * 2, rel=1e-6)


def test_the_probes_of_two_processes_stay_equal(ranks):
    first, second = ranks("probe")
    assert torch.equal(first, second) and first.abs().max() > 0


class Encoder(nn.Module):
    """A method with an encoder alone."""

    def __init__(self):
        super().__init__()
        self.encoder = resnet("resnet18", 4)


def test_the_probe_learns_from_features_without_changing_their_gradient():
    method = Encoder().train()
    images, label = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    state = torch.random.get_rng_state()
    probe = OnlineProbe(method, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    method.encoder(images).sum().backward()
    gradient = method.encoder.conv1.weight.grad.clone()
    accuracies = []
    for _ in range(20):
        method.encoder(images)
        method.encoder(images.flip(0))  # a second view, whose features are not used
        accuracies.append(float(probe.learn(label)["probe_train"]))
    assert torch.equal(method.encoder.conv1.weight.grad, gradient)
    assert accuracies[-1] == 1 and probe.weight.abs().max() > 0


def test_the_probe_takes_the_steps_of_a_plain_loop():
    method = Encoder().double().train()
    probe = OnlineProbe(method, 3)
    probe.weight, probe.bias = (x.double().detach() for x in (probe.weight, probe.bias))
    probe.weight.requires_grad_(True), probe.bias.requires_grad_(True)
    probe.optimizer = torch.optim.SGD([probe.weight, probe.bias], lr=0.1, momentum=0.9)
    probe.norm.double()
    W, b = torch.zeros(3, 512).double(), torch.zeros(3).double()
    velocity = [torch.zeros_like(W), torch.zeros_like(b)]
    for _ in range(4):
        x, label = torch.randn(6, 512).double(), torch.randint(3, (6,))
        probe._features = x
        probe.learn(label)
        z = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        p = (z @ W.T + b).softmax(1)
        wrong = (p - nn.functional.one_hot(label, 3)) / 6
        for v, gradient, weight in zip(velocity, (wrong.T @ z, wrong.sum(0)), (W, b), strict=True):
            v.mul_(0.9).add_(gradient)
            weight.sub_(0.1 * v)
    assert torch.allclose(probe.weight, W, atol=1e-12) and torch.allclose(probe.bias, b, atol=1e-12)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measured(folder):
    """The measurements in the log of a run, without times."""
    names = ("step", "knn", "knn_gain", "probe", "probe_train", "rankme")
    return [{name: line[name] for name in names if name in line} for line in lines(folder)]


def test_the_log_begins_with_the_encoder_before_training(script, shared_images, tmp_path):
    words = (
        shared_images,
        *RUN,
        *typed("--epochs 2 --knn-every 1 --knn-k 5 --probe-online --rankme-every 2"),
    )
    status, out, err = script("main_synco", *words, "--save-dir", tmp_path / "whole")
    assert status == 0, err
    assert "before training: knn " in out and "(the encoder is randomly initialized)" in out
    log = lines(tmp_path / "whole")
    assert log[0]["step"] == 0 and {"knn", "rankme"} <= log[0].keys()
    tested = [line for line in log[1:] if "knn" in line]
    assert [line["knn_gain"] for line in tested] == [line["knn"] - log[0]["knn"] for line in tested]
    assert ["rankme" in line for line in tested] == [False, True]
    assert all(0 <= line["probe"] <= 1 for line in tested) and len(tested) == 2
    # a resumed run measures, and learns, as if it had not stopped
    file = tmp_path / "whole" / "checkpoint_0000.pth.tar"
    status, out, err = script(
        "main_synco", *words, "--resume", file, "--save-dir", tmp_path / "resumed"
    )
    assert status == 0 and "before training" not in out, err
    assert measured(tmp_path / "resumed") == measured(tmp_path / "whole")
    a, b = (load(tmp_path / name / "checkpoint_0001.pth.tar") for name in ("whole", "resumed"))
    assert same(a["probe"], b["probe"]) and a["before_training"] == b["before_training"]


def test_a_probe_starts_anew_if_the_checkpoint_has_none(script, shared_images, tmp_path):
    words = (shared_images, *RUN, "--save-dir", tmp_path / "run")
    assert script("main_synco", *words, "--epochs", 1)[0] == 0
    more = typed("--epochs 2 --probe-online --resume auto")
    status, out, err = script("main_synco", *words, *more)
    assert status == 0 and "the checkpoint has no probe, so a new one is trained" in out, err
    assert "probe" in lines(tmp_path / "run")[-1]
