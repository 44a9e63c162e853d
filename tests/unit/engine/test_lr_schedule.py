"""The learning rate of each step, against formulas, timm's scheduler and PyTorch's."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from moco.config import Training
from moco.engine.lr_schedule import curve, lr_of_step, lr_scale
from moco.engine.trainer import Trainer
from moco.sections import Schedule


def options(**changed) -> Schedule:
    return Schedule(**{"epochs": 100, **changed})


def optimizer(*lrs: float) -> torch.optim.SGD:
    """Return an optimizer with a float64 parameter for each learning rate."""
    return torch.optim.SGD(
        {"params": [torch.zeros(1, dtype=torch.float64, requires_grad=True)], "lr": lr}
        for lr in lrs
    )


def test_step_schedule():
    args = options(schedule=(60, 80))
    found = [curve(args, 30.0, epoch) for epoch in (0, 59, 60, 79, 80, 99)]
    assert found == pytest.approx([30, 30, 3, 3, 0.3, 0.3])


def test_cosine_ends_at_the_final_rate():
    args = options(cos=True, lr_final=0.01)
    for epoch in (0, 1, 50, 99, 100):
        want = 0.01 + (10 - 0.01) * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert curve(args, 10.0, epoch) == pytest.approx(want)
    assert curve(args, 10.0, 0) == 10 and curve(args, 10.0, 100) == pytest.approx(0.01)


def test_cos_2_is_a_quarter_of_a_cosine():
    """It ends at 0, whatever --lr-final is; epoch 50 of 100 has lr / sqrt(2)."""
    args = options(cos=2, lr_final=0.01)
    found = [curve(args, 3.0, epoch) for epoch in (0, 25, 50, 100)]
    want = [3.0, 3.0 * math.cos(math.pi / 8), 3.0 / math.sqrt(2), 0]
    assert found == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("level", "period"), [(1, 12), (2, 10)])
def test_sgdr_is_pytorchs_scheduler_at_every_step(level, period):
    """Without --sgdr-t0, the period depends on the level: 12 or 10 epochs."""
    steps = 7
    args, mine = options(sgdr=level), optimizer(5.0)
    if level == 1:  # rises again after T_max
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(mine, T_max=period * steps)
    else:
        theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(mine, T_0=period * steps)
    rates = []
    for step in range(40 * steps):
        rates.append(lr_of_step(args, 5.0, step, steps))
        assert rates[-1] == pytest.approx(mine.param_groups[0]["lr"], abs=1e-9), step
        mine.step()
        theirs.step()
    rises = [step for step, (a, b) in enumerate(itertools.pairwise(rates), 1) if b > a]
    if level == 1:
        up = set(range(12 * steps + 1, 24 * steps + 1)) | set(range(36 * steps + 1, 40 * steps))
        assert set(rises) == up
    else:
        assert rises == [10 * steps, 20 * steps, 30 * steps]


def test_sgdr_ends_at_the_final_rate_in_periods_of_any_length():
    args = options(sgdr=1, sgdr_t0=3, lr_final=0.5)
    found = [curve(args, 4.0, epoch, 2.0) for epoch in (0, 1.5, 3, 4.5, 6, 9)]
    assert found == pytest.approx([4, 2.5, 1, 2.5, 4, 1])


def test_warm_up_is_linear_and_ends_at_the_rate():
    args = options(lr_warmup_epochs=4, schedule=(50,))
    found = [curve(args, 1.0, epoch) for epoch in range(5)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_by_step_the_warm_up_begins_at_0_and_the_cosine_at_its_end():
    args = options(lr_by="step", cos=True, lr_warmup_epochs=10, lr_final=0.1)
    found = [curve(args, 2.0, epoch, 0.5) for epoch in (0, 2.5, 7.5, 10)]
    assert found == pytest.approx([0, 0.5, 1.5, 2.0])
    # half of the 90 epochs that are left
    assert curve(args, 2.0, 55, 0.5) == pytest.approx((2.0 + 0.05) / 2)
    assert curve(args, 2.0, 100, 0.5) == pytest.approx(0.05)


@pytest.mark.parametrize("by", ["step", "epoch-end", "previous-step"])
def test_the_warm_up_begins_at_its_scaled_start(by):
    args = options(lr_by=by, cos=True, lr_warmup_epochs=4, lr_warmup_from=0.2)
    found = [curve(args, 3.0, epoch, 2.0) for epoch in (0, 1, 2, 3)]
    assert found == pytest.approx([0.4, 1.05, 1.7, 2.35])


@pytest.mark.parametrize("by", ["epoch", "epoch-end", "step", "previous-step"])
def test_a_warm_up_may_last_as_long_as_the_run(by):
    args = options(lr_by=by, cos=True, epochs=3, lr_warmup_epochs=3)
    rates = [lr_of_step(args, 1.0, step, 4) for step in range(12)]
    assert rates == sorted(rates) and rates[-1] > 0.6


@pytest.mark.parametrize("warmup", [0, 5])
def test_by_previous_step_the_rates_are_timms_over_a_run(warmup):
    """Swin-style code calls step_update(s) after step s, and timm sets the rate of step 0."""
    epochs, steps, scale, base = 30, 13, 2.0, (0.7, 0.2)
    args = options(
        epochs=epochs,
        cos=True,
        lr_by="previous-step",
        lr_warmup_epochs=warmup,
        lr_warmup_from=0.01,
        lr_final=0.005,
    )
    theirs = optimizer(*(lr * scale for lr in base))
    scheduler = CosineLRScheduler(
        theirs,
        t_initial=epochs * steps,
        lr_min=0.005 * scale,
        warmup_t=warmup * steps,
        warmup_lr_init=0.01 * scale,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    found = []
    for step in range(epochs * steps):
        found.append([lr_of_step(args, lr * scale, step, steps, scale) for lr in base])
        assert found[-1] == pytest.approx([g["lr"] for g in theirs.param_groups], rel=1e-13), step
        theirs.step()
        scheduler.step_update(step)
    first = [rates[0] for rates in found]
    assert first[0] == first[1] == (0.02 if warmup else 1.4)
    if warmup:  # the drop at its end
        top = first.index(max(first))
        assert top == warmup * steps and 0.9 < first[top + 1] / first[top] < 0.97


def test_by_step_or_previous_step_there_is_little_difference():
    """1.5 % of the top rate, with the published 300 epochs and 5 of warm-up."""
    both = [
        options(epochs=300, cos=True, lr_by=by, lr_warmup_epochs=5)
        for by in ("step", "previous-step")
    ]
    differences = [
        abs(lr_of_step(both[0], 1.0, step, 100) - lr_of_step(both[1], 1.0, step, 100))
        for step in range(300 * 100)
    ]
    assert max(differences) == pytest.approx(0.0152, abs=1e-4)


def trainer(schedule: Schedule, steps: int) -> Trainer:
    """Return a trainer of two parameter groups with rate .06; the second one is not scheduled."""
    made = Trainer.__new__(Trainer)
    made.config = Training(optimizer=schedule)
    made.steps_per_epoch, made.lr_scale = steps, 1.0
    made.base_lrs, made.scheduled = [0.06, 0.06], [True, False]
    made.optimizer = SimpleNamespace(param_groups=[{}, {}])
    return made


def test_by_epoch_end_the_rates_are_those_of_the_demo_on_cifar10():
    """Count the cosine's epochs from 1: the log of 200 epochs begins with .059996."""
    of = trainer(options(lr_by="epoch-end", cos=True, epochs=200), 97)
    found = [of._set_lr(step) for step in (0, 96, 97, 199 * 97)]
    assert of.optimizer.param_groups[1]["lr"] == 0.06  # not scheduled
    assert found[0] == found[1] == pytest.approx(0.059996, abs=5e-7)
    want = [0.03 * (1 + math.cos(math.pi * epoch / 200)) for epoch in (1, 1, 2, 200)]
    assert found == pytest.approx(want) and found[3] == pytest.approx(0)


@pytest.mark.parametrize("by", ["epoch", "step", "previous-step"])
def test_steps_before_epoch_0_use_the_full_rate(by):
    of = trainer(options(lr_by=by, cos=True, lr_warmup_epochs=3), 10)
    assert [of._set_lr(step) for step in (-20, -1)] == [0.06, 0.06]
    assert of._set_lr(0) < 0.06


def test_restarts_begin_after_the_warm_up():
    args = options(sgdr=2, sgdr_t0=12, lr_warmup_epochs=5)
    found = [curve(args, 1.0, epoch) for epoch in (0, 5, 11, 17, 29)]
    assert found == pytest.approx([0, 1, 0.5, 1, 1])


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("sqrt", 32), ("linear", 4)])
def test_rates_are_scaled_by_the_total_batch(scaling, factor):
    assert lr_scale(scaling, 1024) == factor
