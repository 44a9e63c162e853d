"""Compare SogCLR and SimCLR with slow versions in float64: loss, gradient, u, and two ranks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from torch import nn

from moco import distributed
from moco.builder.sogclr import SogCLR
from moco.loss.global_contrastive import compare, dynamic_loss
from moco.rng import Progress

B, DIM, N, T = 5, 4, 40, 0.1


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def negatives(z, view, i):
    """The features of the other images in both views."""
    return [z[other][j] for other in (view, 1 - view) for j in range(z.shape[1]) if j != i]


def slow_sogclr(z, u, gamma, images=None):
    """Loss and new u, one anchor after the other; u 0 where an image comes for the first time.

    The anchors are the views of `images`, by default of all.
    """
    loss, new = 0, []
    images = range(z.shape[1]) if images is None else images
    for i in images:
        own = []
        for view in (0, 1):
            others = negatives(z, view, i)
            assert len(others) == 2 * z.shape[1] - 2
            anchor = z[view][i]
            g = sum(
                math.exp(float(anchor.detach() @ other.detach()) / T) for other in others
            ) / len(others)
            own.append(g if u[i] == 0 else (1 - gamma) * float(u[i]) + gamma * g)
            term = -anchor @ z[1 - view][i]
            for other in others:
                term = term + math.exp(float(anchor.detach() @ other.detach()) / T) / own[-1] * (
                    anchor @ other
                ) / len(others)
            loss = loss + term / len(images)
        new.append(sum(own) / 2)
    return loss, torch.tensor(new, dtype=torch.float64)


def slow_nt_xent(z, images=None):
    loss = 0
    images = range(z.shape[1]) if images is None else images
    for view in (0, 1):
        for i in images:
            logits = torch.stack(
                [z[view][i] @ other for other in (z[1 - view][i], *negatives(z, view, i))]
            )
            loss = loss + F.cross_entropy(logits[None] / T, torch.tensor([0])) / len(images)
    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [0.1, 0.9, 1.0])
def test_sogclr_is_the_slow_one(seed, gamma):
    torch.manual_seed(seed)
    z = unit_rows(2, B, DIM).requires_grad_()
    u = torch.rand(B, dtype=torch.float64) * 5
    u[seed] = 0
    loss, new = dynamic_loss(compare(z, z, 0), u, T, gamma)
    slow, slow_new = slow_sogclr(z, u, gamma)
    torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(new, slow_new, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, z)[0], torch.autograd.grad(slow, z)[0], rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("seed", range(3))
def test_with_gamma_1_the_gradient_is_that_of_the_mini_batch(seed):
    """Compare with tau (-z_i.z_i+ / tau + log mean_j exp(z_i.z_j / tau)), summed over the views.

    The positive is not among the j.
    """
    torch.manual_seed(seed)
    z = unit_rows(2, B, DIM).requires_grad_()
    loss, _ = dynamic_loss(compare(z, z, 0), torch.rand(B, dtype=torch.float64), T, 1.0)
    estimator = 0
    for view in (0, 1):
        for i in range(B):
            others = torch.stack([z[view][i] @ other for other in negatives(z, view, i)])
            estimator += (
                -(z[view][i] @ z[1 - view][i]) + T * torch.exp(others / T).mean().log()
            ) / B
    torch.testing.assert_close(
        *(torch.autograd.grad(x, z)[0] for x in (loss, estimator)), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("seed", range(3))
def test_simclr_is_nt_xent(seed):
    torch.manual_seed(seed)
    z = unit_rows(2, B, DIM).requires_grad_()
    loss, slow = nt_xent(compare(z, z, 0), T), slow_nt_xent(z)
    torch.testing.assert_close(loss, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, z)[0], torch.autograd.grad(slow, z)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "loss_of", [lambda p: nt_xent(p, 0.02), lambda p: dynamic_loss(p, torch.zeros(2), 0.02, 0.9)[0]]
)
def test_losses_are_finite_in_float32_at_the_least_temperature(loss_of):
    one = F.normalize(torch.ones(2, 2, 4), dim=-1)  # every similarity 1
    apart = one * torch.tensor([1.0, -1.0])[None, :, None]  # every negative's -1
    for z in (one, apart):
        z.requires_grad_()
        loss = loss_of(compare(z, z, 0))
        assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


# the whole method


def build(gamma=0.9, images=N, local=False):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.BatchNorm1d(8),
    )
    return SogCLR(lambda: net.append(nn.Linear(8, DIM)), images, T, gamma, local).double()


def images(step, n=B):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, 3, 9, 9, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_u_is_kept_by_image_over_steps():
    model, u = build(), torch.zeros(N, dtype=torch.float64)
    for step in range(4):
        index = torch.randperm(8, generator=torch.Generator().manual_seed(step))[
            :B
        ]  # images come again
        with torch.no_grad():
            encoder = copy.deepcopy(model.base_encoder)
            z = torch.stack([F.normalize(encoder(view), dim=1) for view in images(step)])
        slow, u[index] = slow_sogclr(z, u[index], 0.9)
        loss, metrics = model(images(step), index, Progress(step=step))
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        torch.testing.assert_close(model.u, u, rtol=1e-12, atol=0)
        torch.testing.assert_close(metrics["u"], u[index].mean())
        model.after_step()
    assert (model.u[:8] > 0).sum() >= B and not model.u[8:].any()
    assert "u" in model.state_dict() and "u" not in build(gamma=None).state_dict()


def test_accuracy_counts_negatives_of_both_views():
    model = build()
    z = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)
    assert model.contrast(z, torch.arange(4))[1]["acc1"] == 1
    z[1, 0] = z[1, 1]  # images 0 and 1 are alike in view 1
    assert model.contrast(z, torch.arange(4))[1]["acc1"] == pytest.approx(
        7 / 8
    )  # the one anchor whose positive is apart from it


# two ranks


def part(x, rank):
    return x if rank is None else x[rank * len(x) // 2 : (rank + 1) * len(x) // 2]


def three_steps(rank, gamma, local=False):
    """Return the losses, gradients and u of three steps.

    They run on this rank's part of the joint batch, or (rank None) on all of it. Batch norm is over
    the full batch.
    """
    model, found = build(gamma, local=local), []
    distributed.sync_batch_norm(model, torch.device("cpu"))
    ddp = distributed.data_parallel(model)
    for step in range(3):
        index = torch.randperm(16, generator=torch.Generator().manual_seed(step))[: 2 * B]
        loss, metrics = ddp(
            [part(view, rank) for view in images(step, 2 * B)],
            part(index, rank),
            Progress(step=step),
        )
        loss.backward()
        with torch.no_grad():
            gradients = [p.grad.clone() for p in model.parameters()]
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found.append(
            {"loss": loss.detach(), "acc1": metrics["acc1"], "gradients": gradients, "state": state}
        )
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    checks = {"sogclr": (three_steps, 0.9), "simclr": (three_steps, None)}
    checks |= {f"{name}, local": (*check, True) for name, check in checks.items()}
    return on_two_ranks(checks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("method", "gamma"), [("sogclr", 0.9), ("simclr", None)])
def test_two_ranks_are_one_with_the_joint_batch(ranks, method, gamma):
    for first, second, joint in zip(*ranks(method), three_steps(None, gamma), strict=True):
        for name in ("loss", "acc1"):
            torch.testing.assert_close(
                (first[name] + second[name]) / 2, joint[name], rtol=0, atol=1e-10, check_dtype=False
            )
        for mine, both in zip(first["gradients"], joint["gradients"], strict=True):
            torch.testing.assert_close(mine, both, rtol=0, atol=1e-10)
        for name, tensor in joint["state"].items():  # weights, u, and what batch norm has seen
            assert torch.equal(first["state"][name], second["state"][name])
            torch.testing.assert_close(first["state"][name], tensor, rtol=1e-10, atol=1e-10)
    assert ("u" in joint["state"]) == (gamma is not None)


@pytest.mark.parametrize(("method", "gamma"), [("sogclr", 0.9), ("simclr", None)])
def test_with_local_gradient_other_ranks_features_are_constants(ranks, method, gamma):
    """Compare with slow losses of each half, in which the features of the other half are detached.

    The gradients of the two losses are averaged, and batch norm is over the joint batch.
    """
    model, u = build(gamma), torch.zeros(N, dtype=torch.float64)
    for step, (first, second, exact) in enumerate(
        zip(*ranks(f"{method}, local"), ranks(method)[0], strict=True)
    ):
        index = torch.randperm(16, generator=torch.Generator().manual_seed(step))[: 2 * B]
        z = torch.stack(
            [F.normalize(model.base_encoder(view), dim=1) for view in images(step, 2 * B)]
        )
        losses, new = [], []
        for half in (range(B), range(B, 2 * B)):
            own = torch.tensor([i in half for i in range(2 * B)])
            features = torch.where(own[None, :, None], z, z.detach())
            if gamma is None:
                losses.append(slow_nt_xent(features, half))
            else:
                loss, values = slow_sogclr(features, u[index], gamma, half)
                losses.append(loss)
                new.append(values)
        if gamma is not None:
            u[index] = torch.cat(new)
            torch.testing.assert_close(first["state"]["u"], u, rtol=1e-10, atol=0)
        (sum(losses) / 2).backward()
        for rank, loss in zip((first, second), losses, strict=True):
            torch.testing.assert_close(rank["loss"], loss.detach(), rtol=0, atol=1e-10)
        difference = 0
        for mine, other, p in zip(
            first["gradients"], exact["gradients"], model.parameters(), strict=True
        ):
            torch.testing.assert_close(mine, p.grad, rtol=0, atol=1e-10)
            difference += (mine - other).abs().sum()
        assert difference > 0.01  # from the exact gradient
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
