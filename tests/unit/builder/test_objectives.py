"""Compare the losses of a batch and of MoCo's queue with slow versions in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from contrast_helpers import (
    SLOW,
    B,
    T,
    assert_ranks_equal_joint,
    build,
    images,
    slow_debiased,
    slow_infonce,
    three_steps,
    unit_rows,
)
from torch import nn

import main_sogclr
import main_synco
from moco import distributed, sections_methods
from moco.builder import objectives
from moco.builder.synco import SynCo
from moco.errors import InputError
from moco.loss import synthetic
from moco.loss.debiased import Debiased
from moco.loss.global_contrastive import compare
from moco.rng import Progress
from moco.sections_negatives import Schedule


def of_batch(name, z, **settings):
    """The loss of the batch `z` by the method of `--loss`."""
    return build(name, **settings).loss_of(compare(z, z, 0), torch.arange(B), Progress())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SLOW)
def test_a_loss_and_its_gradient_are_the_slow_ones(name, seed):
    torch.manual_seed(seed)
    z = unit_rows(2, B, 6).requires_grad_()
    settings, slow = SLOW[name]
    loss, wanted = of_batch(name, z, **settings)[0], slow(z, range(B))
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, z)[0] for x in (loss, wanted)), rtol=0, atol=1e-10
    )


def test_the_floor_of_the_debiased_loss_has_no_gradient():
    """Check a case in which some anchors are at the floor, and some are not."""
    torch.manual_seed(2)
    z = unit_rows(2, B, 6).requires_grad_()
    loss, metrics = of_batch("debiased", z, tau_plus=0.3)
    assert 0 < metrics["at_floor"] < 1
    wanted = slow_debiased(z, range(B), 0.3)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, z)[0] for x in (loss, wanted)), rtol=0, atol=1e-10
    )


def test_without_correction_hcl_is_half_of_simclr():
    """The authors average both views; SimCLR's loss here adds them."""
    z = unit_rows(2, B, 6)
    loss = of_batch("hcl", z, tau_plus=0.0, beta=0.0)[0]
    torch.testing.assert_close(2 * loss, slow_infonce(z, range(B)), rtol=0, atol=1e-10)


def test_the_effective_fraction_of_negatives_falls_with_beta():
    z = unit_rows(2, B, 6)
    found = [
        of_batch("hcl", z, beta=beta)[1]["effective_negatives"] for beta in (1e-6, 0.5, 2.0, 50.0)
    ]
    assert found == sorted(found, reverse=True)
    torch.testing.assert_close(found[0], torch.tensor(1.0).double(), rtol=0, atol=1e-4)
    assert 1 / (2 * B - 2) <= found[-1] < 0.3


@pytest.mark.parametrize("name", SLOW)
def test_losses_are_finite_in_float32_at_the_least_temperature(name):
    one = F.normalize(torch.ones(2, 2, 4), dim=-1)  # every similarity 1
    apart = one * torch.tensor([1.0, -1.0])[None, :, None]  # every negative's -1
    settings = {"beta": 100.0} if name == "hcl" else {}
    loss_of = objectives.create(sections_methods.BatchLoss(loss=name, **settings))
    for z in (one, apart):
        z.requires_grad_()
        losses = loss_of(compare(z, z, 0).anchors(0.02))[0]
        gradient = torch.autograd.grad(losses.sum(), z)[0]
        assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("script", [main_sogclr, main_synco])
def test_only_an_annealed_beta_depends_on_the_number_of_epochs(script):
    hcl = script.parser().parse(["photos", "--loss", "hcl"])
    assert not hcl.depends_on_epochs
    assert script.parser().parse(["photos", "--loss", "hcl", "--anneal", "down"]).depends_on_epochs


def test_beta_is_annealed_in_nine_steps():
    loss = Debiased(0.1, 2.0, anneal=True)
    found = [loss.schedules(epoch, 20)["beta"] for epoch in range(20)]
    assert found[:4] == [2, 2, 1.75, 1.75] and found[14:] == [0.25, 0.25, 0, 0, 0, 0]
    assert loss.at(3, 20) == Debiased(0.1, 1.75, anneal=True)
    constant = Debiased(0.1, 2.0)
    assert constant.at(3, 20) is constant
    settings = sections_methods.BatchLoss(loss="hcl", anneal="down", beta=2.0)
    objectives.check_anneal(settings, 9)
    with pytest.raises(InputError, match="--anneal down"):
        objectives.check_anneal(settings, 8)


# two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    checks = {name: (three_steps, name, settings) for name, (settings, _) in SLOW.items()}
    checks |= {f"{name}, queue": (queue_steps, name) for name in QUEUE}
    return on_two_ranks(checks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SLOW)
def test_two_ranks_are_one_with_the_joint_batch(ranks, name):
    assert_ranks_equal_joint(ranks(name), three_steps(None, name, SLOW[name][0]))


# MoCo's queue

K = 12
QUEUE = {
    "infonce": {},
    "dcl": {},
    "dclw": {"dclw_sigma": 0.3},
    "debiased": {"tau_plus": 0.05},
    "hcl": {"tau_plus": 0.02, "beta": 0.7},
}


def moco(name, counts=(0,) * 6):
    """Return MoCo with the loss `name`, without batch norm, so that keys are not shuffled."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(243, 6), nn.Tanh(), nn.Linear(6, 4))
    settings = sections_methods.Loss(loss=name, **QUEUE[name])
    config = synthetic.Synthetic(4, counts, 0.1, 0.1, 0.1)
    method = SynCo(
        lambda: net,
        dim=4,
        K=K,
        m=0.9,
        T=T,
        synthetic=Schedule(config),
        loss=objectives.create(settings),
    )
    return method.double()


def slow_queue(name, q, k, queue):
    """The mean over the queries, one after the other."""
    losses, settings = [], QUEUE[name]
    positives = (q * k).sum(1)
    for i in range(len(q)):
        pos, neg = positives[i] / T, torch.stack([q[i] @ n for n in queue]) / T
        if name == "infonce":
            losses.append(-torch.log(pos.exp() / (pos.exp() + neg.exp().sum())))
        elif name in ("dcl", "dclw"):
            w = 1
            if name == "dclw":
                weights = torch.exp(positives / settings["dclw_sigma"])
                w = 2 - weights[i] / weights.mean()
            losses.append(-w * pos + neg.exp().sum().log())
        else:
            importance = neg.exp() ** settings.get("beta", 0)
            hard = (importance * neg.exp()).sum() / importance.mean()
            tau = settings["tau_plus"]
            corrected = (hard - tau * len(neg) * pos.exp()) / (1 - tau)
            corrected = corrected.clamp(min=len(neg) * torch.exp(torch.tensor(-1 / T)).double())
            losses.append(-torch.log(pos.exp() / (pos.exp() + corrected)))
    return torch.stack(losses).mean()


def features(model, views):
    """The normalized queries and keys of two views."""
    nets = zip((model.encoder_q, model.encoder_k), views, strict=True)
    q, k = (F.normalize(net(view), dim=1) for net, view in nets)
    return q, k.detach()


@pytest.mark.parametrize("name", QUEUE)
def test_a_loss_of_the_queue_is_the_slow_one(name):
    model = moco(name)
    for step in range(3):  # the queue wraps around
        before = copy.deepcopy(model)
        wanted = slow_queue(name, *features(before, images(step)), before.queue)
        gradients = torch.autograd.grad(wanted, list(before.encoder_q.parameters()))
        loss, _ = model(images(step), torch.arange(B), Progress(step=step))
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
        found = torch.autograd.grad(loss, list(model.encoder_q.parameters()))
        for mine, slow in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, slow, rtol=0, atol=1e-10)
        model.after_step()


def queue_steps(rank, name):
    """Return the loss, gradients and queue of three steps; rank None: of the joint batch."""
    model, found = moco(name), []
    ddp = distributed.data_parallel(model)
    for step in range(3):
        views = [
            view if rank is None else view[rank * B : (rank + 1) * B]
            for view in images(step, 2 * B)
        ]
        loss, _ = ddp(views, torch.arange(len(views[0])), Progress(step=step))
        loss.backward()
        gradients = [p.grad.clone() for p in model.encoder_q.parameters()]
        with torch.no_grad():
            for p in model.encoder_q.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        model.after_step()
        found.append({"loss": loss.detach(), "gradients": gradients, "queue": model.queue.clone()})
    return found


@pytest.mark.parametrize("name", QUEUE)
def test_two_ranks_with_a_queue_are_one_with_the_joint_batch(ranks, name):
    pairs = zip(*ranks(f"{name}, queue"), queue_steps(None, name), strict=True)
    for first, second, joint in pairs:
        mean = (first["loss"] + second["loss"]) / 2
        torch.testing.assert_close(mean, joint["loss"], rtol=0, atol=1e-10)
        for mine, both in zip(first["gradients"], joint["gradients"], strict=True):
            torch.testing.assert_close(mine, both, rtol=0, atol=1e-10)
        assert torch.equal(first["queue"], second["queue"])
        torch.testing.assert_close(first["queue"], joint["queue"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["dcl", "dclw"])
def test_synthetic_negatives_join_the_denominator(name, monkeypatch):
    found = []  # similarities of the queries to the synthetic negatives
    dot = synthetic.Mixture.dot

    def recorded(mixture, q, similarity):
        found.append(dot(mixture, q, similarity))
        return found[-1].clone()

    monkeypatch.setattr(synthetic.Mixture, "dot", recorded)
    model = moco(name, counts=(2, 0, 3, 0, 0, 0))
    loss, _ = model(images(0), torch.arange(B), Progress())
    (more,) = found  # [B, 5]
    with torch.no_grad():
        q, k = features(model, images(0))
        real = q @ model.queue.T
        added = (torch.cat([real, more], 1) / T).logsumexp(1) - (real / T).logsumexp(1)
        wanted = slow_queue(name, q, k, model.queue) + added.mean()
    assert added.min() > 0.01
    torch.testing.assert_close(loss.detach(), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["debiased", "hcl"])
def test_losses_that_need_real_negatives_refuse_synthetic_ones(name):
    settings = sections_methods.Loss(loss=name)
    objectives.check_queue(settings, 0, 200)
    with pytest.raises(InputError, match=f"--loss {name}: .* synthetic"):
        objectives.check_queue(settings, 8, 200)
