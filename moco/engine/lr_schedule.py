"""Compute the learning rate of each step of a run."""

import math

from moco.sections import Schedule

PERIODS = {1: 12, 2: 10}  # epochs of a period of --sgdr, by its level


def lr_scale(scaling: str, batch: int) -> float:
    """Return the factor by which a total batch of `batch` images scales the learning rate.

    It is 1 if `scaling` is "none", sqrt(batch) if "sqrt", and batch / 256 if "linear".
    """
    return {"none": 1.0, "sqrt": math.sqrt(batch), "linear": batch / 256}[scaling]


def changes_by(schedule: Schedule) -> str:
    """Return the value of `--lr-by` that applies. With `--sgdr`, it is always "step"."""
    return "step" if schedule.sgdr else schedule.lr_by


def lr_of_step(
    schedule: Schedule, base_lr: float, step: int, steps_per_epoch: int, scale: float = 1.0
) -> float:
    """Return the learning rate of a step of the run.

    It is `curve` after a number of epochs that depends on `--lr-by`:

    - "epoch": at the start of the step's epoch;
    - "epoch-end": at the end of the step's epoch;
    - "step": before the step;
    - "previous-step": before the step that precedes it. Step 0 has the learning rate of step 1.
      Swin-style code has this delay, because it updates timm's schedulers after each step.

    Args:
        schedule: the settings of the schedule.
        base_lr: the learning rate after warm-up, already multiplied by `scale`.
        step: the step, from 0. Steps below 0, which fill AdCo's bank, use `base_lr`.
        steps_per_epoch: steps in an epoch.
        scale: the result of `lr_scale`.
    """
    if step < 0:
        return base_lr
    by = changes_by(schedule)
    if by == "step":
        passed = step / steps_per_epoch
    elif by == "previous-step":
        passed = max(0, step - 1) / steps_per_epoch
    else:
        passed = step // steps_per_epoch + (by == "epoch-end")
    return curve(schedule, base_lr, passed, scale)


def curve(schedule: Schedule, base_lr: float, epoch: float, scale: float = 1.0) -> float:
    """Return the value of the schedule after `epoch` epochs.

    It rises linearly from `schedule.lr_warmup_from` over `schedule.lr_warmup_epochs`. If it changes
    by epoch, it rises in equal steps from 0, and epoch 0 has the value of the first step. After the
    warm-up, it follows one of:

    - `schedule.cos` 1: a half cosine from `base_lr` to `schedule.lr_final` at the end of the run;
    - `schedule.cos` 2 (main_adco.py): a quarter cosine from `base_lr` to 0 at the end of the run;
    - `schedule.sgdr` 1: a half cosine to `schedule.lr_final` in `schedule.sgdr_t0` epochs, the same
      way back up in as many, and so on;
    - `schedule.sgdr` 2: the same half cosine, restarted every `schedule.sgdr_t0` epochs (Loshchilov
      & Hutter, arXiv 1608.03983);
    - otherwise a factor of 0.1 at each epoch of `schedule.schedule`.

    With `schedule.lr_by` step or epoch-end, a cosine begins when the warm-up ends, as in SimCLR and
    MoCo v3. Otherwise it begins at epoch 0, and the warm-up replaces its first part. When the
    warm-up ends, the learning rate drops from nearly `base_lr` to the cosine's value.

    Args:
        schedule: the settings of the schedule.
        base_lr: the learning rate after warm-up, already multiplied by `scale`.
        epoch: epochs done, with a fraction within an epoch.
        scale: the result of `lr_scale`; `lr_warmup_from` and `lr_final` are multiplied by it.
    """
    warmup, by = schedule.lr_warmup_epochs, changes_by(schedule)
    if epoch < warmup:
        if by == "epoch":
            return base_lr * (epoch + 1) / (warmup + 1)
        start = schedule.lr_warmup_from * scale
        return start + (base_lr - start) * epoch / warmup
    first = warmup if by in ("step", "epoch-end") else 0
    final = schedule.lr_final * scale
    if schedule.sgdr:
        passed = (epoch - first) / (schedule.sgdr_t0 or PERIODS[schedule.sgdr])
        passed = passed % 1 if schedule.sgdr == 2 else passed
        return final + (base_lr - final) * 0.5 * (1 + math.cos(math.pi * passed))
    if schedule.cos:
        passed = (epoch - first) / max(1, schedule.epochs - first)
        if schedule.cos == 2:
            return base_lr * math.cos(math.pi / 2 * passed)
        return final + (base_lr - final) * 0.5 * (1 + math.cos(math.pi * passed))
    return base_lr * 0.1 ** sum(epoch >= milestone for milestone in schedule.schedule)
