"""Compare SogCLR and SimCLR with slow versions in float64: loss, gradient, u, and two ranks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from contrast_helpers import (
    DIM,
    B,
    N,
    T,
    assert_ranks_equal_joint,
    build,
    images,
    indices,
    negatives,
    slow_infonce,
    three_steps,
    unit_rows,
)

from moco.loss.contrastive import InfoNCE
from moco.loss.global_contrastive import compare, dynamic_loss
from moco.rng import Progress


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


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda p: InfoNCE()(p.anchors(0.02))[0].sum(),
        lambda p: dynamic_loss(p, torch.zeros(2), 0.02, 0.9)[0],
    ],
)
def test_losses_are_finite_in_float32_at_the_least_temperature(loss_of):
    one = F.normalize(torch.ones(2, 2, 4), dim=-1)  # every similarity 1
    apart = one * torch.tensor([1.0, -1.0])[None, :, None]  # every negative's -1
    for z in (one, apart):
        z.requires_grad_()
        loss = loss_of(compare(z, z, 0))
        assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


# the whole method


def test_u_is_kept_by_image_over_steps():
    model, u = build("sogclr"), torch.zeros(N, dtype=torch.float64)
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
    assert "u" in model.state_dict() and "u" not in build("simclr").state_dict()


def test_accuracy_counts_negatives_of_both_views():
    model = build("simclr")
    z = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)
    assert model.contrast(z, torch.arange(4), Progress())[1]["acc1"] == 1
    z[1, 0] = z[1, 1]  # images 0 and 1 are alike in view 1
    assert model.contrast(z, torch.arange(4), Progress())[1]["acc1"] == pytest.approx(
        7 / 8
    )  # the one anchor whose positive is apart from it


# two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    checks = {name: (three_steps, name, {}) for name in ("sogclr", "simclr")}
    checks |= {f"{name}, local": (*check, True) for name, check in checks.items()}
    return on_two_ranks(checks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", ["sogclr", "simclr"])
def test_two_ranks_are_one_with_the_joint_batch(ranks, method):
    joint = three_steps(None, method, {})
    assert_ranks_equal_joint(ranks(method), joint)
    assert ("u" in joint[0]["state"]) == (method == "sogclr")


@pytest.mark.parametrize("method", ["sogclr", "simclr"])
def test_with_local_gradient_other_ranks_features_are_constants(ranks, method):
    """Compare with slow losses of each half, in which the features of the other half are detached.

    The gradients of the two losses are averaged, and batch norm is over the joint batch.
    """
    model, u = build(method), torch.zeros(N, dtype=torch.float64)
    for step, (first, second, exact) in enumerate(
        zip(*ranks(f"{method}, local"), ranks(method)[0], strict=True)
    ):
        index = indices(step)
        z = torch.stack(
            [F.normalize(model.base_encoder(view), dim=1) for view in images(step, 2 * B)]
        )
        losses, new = [], []
        for half in (range(B), range(B, 2 * B)):
            own = torch.tensor([i in half for i in range(2 * B)])
            features = torch.where(own[None, :, None], z, z.detach())
            if method == "simclr":
                losses.append(slow_infonce(features, half))
            else:
                loss, values = slow_sogclr(features, u[index], 0.9, half)
                losses.append(loss)
                new.append(values)
        if method == "sogclr":
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
