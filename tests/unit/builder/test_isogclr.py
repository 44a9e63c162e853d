"""Compare iSogCLR with a slow version in float64: loss, gradient, u, temperatures, two ranks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from contrast_helpers import (
    B,
    N,
    T,
    assert_ranks_equal_joint,
    build,
    images,
    indices,
    logits,
    three_steps,
    unit_rows,
)

from moco.builder.isogclr import temperature_step
from moco.errors import InputError
from moco.loss.global_contrastive import compare
from moco.loss.individual_temperatures import TemperatureStep, individual_loss
from moco.rng import Progress
from moco.sections_methods import Temperatures

AUTHORS = {"rho": 0.4, "eta": 0.03, "beta_u": 0.5, "t_range": (0.05, 1.0), "t_clip": 3.0}
LIBAUC = {"rho": 0.3, "eta": 0.01, "beta_u": 0.9, "t_range": (0.05, 0.7), "t_clip": 0.0}
LIBAUC |= {"set_first": True}
# both parametrisations, and settings that reach the limits
SETTINGS = {
    "authors": {"gamma": 0.8, "step": AUTHORS},
    "libauc": {"gamma": 0.9, "step": LIBAUC},
    "limits": {"gamma": 0.8, "step": {**AUTHORS, "rho": 6.0, "t_clip": 1.0, "eta": 0.1}},
}


def slow_step(z, index, state, gamma, step):
    """Return the loss of a step of the features `z` of the images `index`, and the new state.

    The state is u, the temperatures and their momenta, each a list with a number for each image.
    """
    u, tau, momentum = (list(values) for values in state)
    loss = 0
    for i, image in enumerate(index):
        old_u, old_tau, updates, gradients = u[image], tau[image], [], []
        for view in (0, 1):
            positive, negatives = logits(z, view, i, old_tau)
            e = negatives.detach().exp().tolist()
            g = sum(e) / len(e)
            first = old_u == 0 and step.get("set_first")
            s = g if first else (1 - gamma) * old_u + gamma * g
            term = -positive * old_tau
            for weight, one in zip(e, negatives, strict=True):
                term = term + weight / s * one * old_tau / len(e)
            loss = loss + term / len(index)
            expected = sum(w / s * math.log(w) for w in e) / len(e)
            gradients.append(math.log(s) + step["rho"] - expected)
            updates.append(s)
        gradient, clip = sum(gradients) / 2, step["t_clip"]
        if clip:
            gradient = max(-clip, min(clip, gradient))
        momentum[image] = (1 - step["beta_u"]) * momentum[image] + step["beta_u"] * gradient
        least, most = step["t_range"]
        tau[image] = max(least, min(most, old_tau - step["eta"] * momentum[image]))
        u[image] = sum(updates) / 2
    return loss, (u, tau, momentum)


@pytest.mark.parametrize("name", SETTINGS)
def test_isogclr_is_the_slow_one(name):
    """Train for a few steps, in which images come again. Others keep their values."""
    model, step = build("isogclr", **SETTINGS[name]), SETTINGS[name]["step"]
    start = float(model.tau[0])  # T in float32
    assert start == pytest.approx(T)
    state, hit = ([0.0] * N, [start] * N, [0.0] * N), set()
    for number in range(4):
        index = indices(number)[:B]
        before = copy.deepcopy(model)
        z = torch.stack([F.normalize(before.base_encoder(view), dim=1) for view in images(number)])
        wanted, state = slow_step(z, index.tolist(), state, SETTINGS[name]["gamma"], step)
        loss, metrics = model(images(number), index, Progress(step=number))
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
        gradients = (
            torch.autograd.grad(value, list(net.parameters()))
            for value, net in ((loss, model), (wanted, before))
        )
        for mine, slow in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, slow, rtol=0, atol=1e-10)
        for buffer, values in zip((model.u, model.tau, model.tau_momentum), state, strict=True):
            slow = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(buffer, slow, rtol=1e-10, atol=1e-10)
        assert metrics["tau_min"] == model.tau.min() and metrics["tau_max"] == model.tau.max()
        hit |= {tau for tau in state[1] if tau in step["t_range"]}
    assert not model.u[16:].any() and (model.u[:16] > 0).sum() > B
    assert {"u", "tau", "tau_momentum"} <= model.state_dict().keys()
    assert bool(hit) == (name == "limits")


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_a_temperature_is_that_of_the_objective(seed):
    """With gamma 1, it is that of tau log mean_j exp(z_i.z_j / tau) + tau rho by autograd."""
    torch.manual_seed(seed)
    z = unit_rows(2, B, 6)
    tau = (torch.rand(B, dtype=torch.float64) + 0.1).requires_grad_()
    objective = 0
    for view in (0, 1):
        for i in range(B):
            negatives = logits(z, view, i, tau[i])[1]
            objective = objective + (tau[i] * negatives.exp().mean().log() + 0.4 * tau[i]) / 2
    (wanted,) = torch.autograd.grad(objective, tau)
    u = torch.rand(B, dtype=torch.float64)
    _, _, gradient = individual_loss(compare(z, z, 0), u, tau.detach(), 1.0)
    step = TemperatureStep(rho=0.4, eta=1.0, beta=1.0, limits=(-100, 100), clip=0.0)
    new, momentum = step(tau.detach(), torch.zeros(B).double(), gradient)
    torch.testing.assert_close(momentum, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(new, tau.detach() - wanted, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    checks = {name: (three_steps, "isogclr", settings) for name, settings in SETTINGS.items()}
    return on_two_ranks(checks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_are_one_with_the_joint_batch(ranks, name):
    joint = three_steps(None, "isogclr", SETTINGS[name])
    assert_ranks_equal_joint(ranks(name), joint)
    assert joint[-1]["state"]["tau"].unique().numel() > B


@pytest.mark.parametrize(
    ("limits", "said"),
    [((0.5, 0.2), "must be the smaller one"), ((0.2, 0.7), "--t is 0.1")],
)
def test_a_range_that_does_not_fit_is_refused(limits, said):
    with pytest.raises(InputError, match=said):
        temperature_step(Temperatures(t_range=limits), 0.1)


def test_the_options_have_the_defaults_of_the_loss():
    assert temperature_step(Temperatures(), 0.1) == TemperatureStep()
