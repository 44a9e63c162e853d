"""LARS against its definition, one tensor at a time in float64, and the learning-rate schedules."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from moco.config import Training
from moco.engine import optim
from moco.engine.trainer import Trainer
from moco.errors import InputError
from moco.sections import Schedule

SHAPES = ((4, 3, 2, 2), (5, 4), (5,), (3, 3), ())


def lars_by_hand(weights, gradients, momenta, lr, decay, momentum, trust):
    """One step of what SimCLR's appendix and MoCo v3 describe, in place."""
    for w, g, v in zip(weights, gradients, momenta, strict=True):
        g = g.clone()
        if w.dim() > 1:
            g += decay * w
            length, slope = w.square().sum().sqrt(), g.square().sum().sqrt()
            if length > 0 and slope > 0:
                g *= trust * length / slope
        v.copy_(momentum * v + g)
        w.sub_(lr * v)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_its_definition(seed, decay):
    torch.manual_seed(seed)
    params = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    with torch.no_grad():
        params[3].zero_()  # a length of 0 scales nothing
    mine = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in mine]
    optimizer = optim.LARS(
        [{"params": params, "lr": 0.3, "weight_decay": decay}], momentum=0.8, trust=0.01
    )
    for step in range(20):
        gradients = [torch.randn_like(p) for p in mine]
        gradients[1] *= step != 2  # nor does a gradient of 0
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        lars_by_hand(mine, gradients, momenta, 0.3, decay, 0.8, 0.01)
        for p, g, want in zip(params, gradients, mine, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=1e-11, atol=1e-11)
            assert torch.equal(p.grad, g)


def lars_tf_by_hand(weights, gradients, momenta, lr, decay, momentum, trust, adapt):
    """One step of SimCLR's TensorFlow code, in place: the rate is in the momentum."""
    for w, g, v in zip(weights, gradients, momenta, strict=True):
        rate = lr
        if w.dim() > 1 and adapt:
            g = g + decay * w
            length, slope = w.square().sum().sqrt(), g.square().sum().sqrt()
            if length > 0 and slope > 0:
                rate = lr * trust * length / slope
        v.copy_(momentum * v + rate * g)
        w.sub_(v)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_tf_is_its_definition(decay):
    """The first half of the parameters is adapted, the second, a classifier, is not."""
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in 2 * SHAPES]
    with torch.no_grad():
        params[3].zero_()
    mine = [p.detach().clone() for p in params]
    momenta, half = [torch.zeros_like(p) for p in mine], len(SHAPES)
    groups = [
        {"params": params[:half], "lr": 0.3, "weight_decay": decay},
        {"params": params[half:], "lr": 0.2, "weight_decay": decay, "adapt": False},
    ]
    optimizer = optim.make(groups, Schedule(optimizer="lars_tf", momentum=0.8), "off")
    for step in range(20):
        factor = 1 + math.cos(step)  # of a schedule: it enters the momentum
        for group, lr in zip(optimizer.param_groups, (0.3, 0.2), strict=True):
            group["lr"] = lr * factor
        gradients = [torch.randn_like(p) for p in mine]
        gradients[1] *= step != 2
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for part, lr, adapt in ((slice(half), 0.3, True), (slice(half, None), 0.2, False)):
            by_hand = (lr * factor, decay, 0.8, 0.001, adapt)
            lars_tf_by_hand(mine[part], gradients[part], momenta[part], *by_hand)
        for p, g, want in zip(params, gradients, mine, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=1e-11, atol=1e-11)
            assert torch.equal(p.grad, g)


def test_restore_tells_the_two_kinds_of_lars_apart():
    """Their states look the same, but only one has the learning rate inside the momentum."""

    def made(name, adapt):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        groups = [{"params": list(net.parameters()), "lr": 0.5, "weight_decay": 0.1}]
        groups[0]["adapt"] = adapt
        optimizer = optim.make(groups, Schedule(optimizer=name), "off")
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return net, optimizer

    kinds = list(itertools.product(("lars", "lars_tf"), (True, False)))
    for saved, mine in itertools.product(kinds, repeat=2):
        (_, old), (net, new) = made(*saved), made(*mine)
        if saved == mine or saved[0] == mine[0] == "lars":  # which has nothing to adapt
            new.state[net.weight]["momentum_buffer"].zero_()
            optim.restore(new, old.state_dict(), "a file")
            kept = old.state[old.param_groups[0]["params"][0]]["momentum_buffer"]
            assert kept.any() and torch.equal(new.state[net.weight]["momentum_buffer"], kept)
        else:
            with pytest.raises(InputError, match=r"a file: its optimizer is not this run's"):
                optim.restore(new, old.state_dict(), "a file")


def test_lars_leaves_what_has_no_gradient_alone():
    used, unused = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    used.grad = torch.ones(2, 2)
    optim.LARS([used, unused], lr=1.0).step()
    assert torch.equal(unused, torch.ones(2, 2)) and not torch.equal(used, torch.ones(2, 2))


def test_lars_goes_on_from_its_state():
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    second.load_state_dict(first.state_dict())
    one, two = (optim.LARS(net.parameters(), lr=0.5, weight_decay=0.1) for net in (first, second))
    for optimizer, net in ((one, first), (two, second)):
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    fresh = optim.LARS(second.parameters(), lr=9.0)
    fresh.load_state_dict(two.state_dict())
    one.step(), fresh.step()
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_lars_takes_the_gradient_of_one_dimensional_parameters_as_it_is():
    weight, bias = (torch.full(shape, 3.0, requires_grad=True) for shape in ((2, 2), (2,)))
    weight.grad, bias.grad = torch.full((2, 2), 0.5), torch.full((2,), 0.5)
    optim.LARS([weight, bias], lr=0.1, weight_decay=10.0, trust=0.001).step()
    assert torch.equal(bias.detach(), torch.full((2,), 2.95))
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 3 - 0.1 * 0.001 * 3.0))


def test_adamw_decays_matrices_only():
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Conv1d(1, 2, 3)
    )
    (group,) = groups = [{"params": list(net.parameters()), "lr": 0.1, "weight_decay": 0.2}]
    optimizer = optim.make(groups, Schedule(optimizer="adamw"), "off")
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay.keys() == set(group["params"])
    assert all(decay[p] == (0.2 if p.dim() > 1 else 0) for p in net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.2) if p.dim() > 1 else old)


def options(**changed) -> Schedule:
    return Schedule(**{"epochs": 100, **changed})


def test_step_schedule():
    args = options(schedule=(60, 80))
    assert [
        optim.scheduled_lr(args, 30.0, epoch) for epoch in (0, 59, 60, 79, 80, 99)
    ] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])


def test_cosine_ends_at_the_final_rate():
    args = options(cos=True, lr_final=0.01)
    for epoch in (0, 1, 50, 99, 100):
        want = 0.01 + (10 - 0.01) * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert optim.scheduled_lr(args, 10.0, epoch) == pytest.approx(want)
    assert optim.scheduled_lr(args, 10.0, 0) == 10 and optim.scheduled_lr(
        args, 10.0, 100
    ) == pytest.approx(0.01)


def test_cosine_begins_anew_with_sgdr():
    args = options(sgdr=True)
    rates = [optim.scheduled_lr(args, 5.0, epoch) for epoch in range(36)]
    assert (
        rates[:12] == rates[12:24] == rates[24:]
        and rates[0] == 5
        and rates[6] == pytest.approx(2.5)
    )
    assert all(a > b for a, b in itertools.pairwise(rates[:12]))


def test_warm_up_is_linear_and_ends_at_the_rate():
    args = options(lr_warmup_epochs=4, schedule=(50,))
    assert [optim.scheduled_lr(args, 1.0, epoch) for epoch in range(5)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )


def test_by_step_the_warm_up_begins_at_0_and_the_cosine_at_its_end():
    args = options(lr_by="step", cos=True, lr_warmup_epochs=10, lr_final=0.1)
    assert [
        optim.scheduled_lr(args, 2.0, epoch, 0.5) for epoch in (0, 2.5, 7.5, 10)
    ] == pytest.approx([0, 0.5, 1.5, 2.0])
    assert optim.scheduled_lr(args, 2.0, 55, 0.5) == pytest.approx(
        (2.0 + 0.05) / 2
    )  # half of the 90 epochs that are left
    assert optim.scheduled_lr(args, 2.0, 100, 0.5) == pytest.approx(0.05)


def test_by_epoch_end_the_rates_are_those_of_the_demo_on_cifar10():
    """Count the cosine's epochs from 1: the log of 200 epochs begins with .059996."""
    args = options(lr_by="epoch-end", cos=True, epochs=200)
    trainer = Trainer.__new__(Trainer)
    trainer.config = Training(optimizer=args)
    trainer.steps_per_epoch, trainer.lr_scale = 97, 1.0
    trainer.base_lrs, trainer.scheduled = [0.06, 0.06], [True, False]
    trainer.optimizer = SimpleNamespace(param_groups=[{}, {}])
    found = [trainer._set_lr(step) for step in (0, 96, 97, 199 * 97)]
    assert trainer.optimizer.param_groups[1]["lr"] == 0.06  # not scheduled
    assert found[0] == found[1] == pytest.approx(0.059996, abs=5e-7) and found[3] == pytest.approx(
        0
    )
    assert found == pytest.approx(
        [0.03 * (1 + math.cos(math.pi * epoch / 200)) for epoch in (1, 1, 2, 200)]
    )


@pytest.mark.parametrize("name", ["sgd", "lars", "lars_tf", "adamw"])
def test_every_optimizer_knows_the_parameters_without_a_schedule(name):
    """AdamW divides each group into parameters with and without weight decay."""
    fixed, scheduled = (
        [torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)] for _ in range(2)
    )
    shared = {"lr": 0.1, "weight_decay": 0.01}
    groups = [
        {"params": scheduled, **shared},
        {"params": fixed, "scheduled": False, **shared},
    ]
    optimizer = optim.make(groups, Schedule(optimizer=name), "off")
    found = {
        p: group.get("scheduled", True) for group in optimizer.param_groups for p in group["params"]
    }
    assert all(found[p] is True for p in scheduled) and all(found[p] is False for p in fixed)


def test_restarts_by_step_begin_after_the_warm_up():
    args = options(lr_by="step", sgdr=True, lr_warmup_epochs=5)
    assert [optim.scheduled_lr(args, 1.0, epoch) for epoch in (5, 11, 17, 29)] == pytest.approx(
        [1, 0.5, 1, 1]
    )


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("sqrt", 32), ("linear", 4)])
def test_rates_are_scaled_by_the_total_batch(scaling, factor):
    assert optim.lr_scale(scaling, 1024) == factor


def made(device: str, **changed) -> torch.optim.Optimizer:
    """Return the optimizer of a small network on `device`, with some options changed."""
    net = torch.nn.Linear(3, 2).to(device)
    amp = changed.pop("amp", "off")
    groups = [{"params": list(net.parameters()), "lr": 0.1, "weight_decay": 0.1}]
    return optim.make(groups, Schedule(**changed), amp)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizers_are_fused_on_devices_that_support_it(optimizer):
    """On others torch chooses (None); False would mean one kernel per parameter."""
    for device, fused in (("cpu", True), ("meta", None)):
        assert {group["fused"] for group in made(device, optimizer=optimizer).param_groups} == {
            fused
        }
    if optimizer == "sgd":  # see optim.make
        assert {group["fused"] for group in made("cpu", amp="fp16").param_groups} == {None}


def test_step_counts_of_adamw_are_moved_to_the_device_that_its_optimizer_needs():
    """A run may be resumed on another device. The fused optimizer needs the count on the device."""
    for device, fused, expected in (
        ("meta", True, "meta"),
        ("meta", None, "cpu"),
        ("cpu", True, "cpu"),
    ):
        optimizer = made("cpu" if device == "cpu" else "meta", optimizer="adamw")
        for group in optimizer.param_groups:
            group["fused"] = fused
            for p in group["params"]:
                optimizer.state[p]["step"] = torch.tensor(7.0)
        optim._place_counts(optimizer)
        assert {state["step"].device.type for state in optimizer.state.values()} == {expected}
