"""Compute, tabulate and draw the quantities of a run that follow a schedule.

The values come from the same functions as in training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from moco.builder.base import Method
from moco.config import Evaluation, Training, flat
from moco.data.loader import TrainBatchSampler
from moco.engine.announce import too_few
from moco.engine.lr_schedule import lr_of_step, lr_scale
from moco.engine.pretrain import PretrainingTask
from moco.errors import InputError
from moco.evaluate.classifier import ClassifierTask
from moco.evaluate.voc_layer import EpochSampler, lr_of_epoch
from moco.launch.processes import batch_per_process
from moco.messages import counted
from moco.report.plots import COLORS, INK, printable
from moco.rng import Progress
from moco.sections_negatives import COUNTS

POINTS = 2000  # evenly spaced points of a curve, in addition to the first and last steps of epochs


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run on one node.

    Attributes:
        images: number of training images.
        processes: number of processes.
        batch_per_process: images in a pass of a process.
        accumulation: passes in a step.
        epochs: number of epochs.
        steps_per_epoch: number of steps in an epoch.
        at: returns the value of each quantity in a step of the run, by name.
    """

    images: int
    processes: int
    batch_per_process: int
    accumulation: int
    epochs: int
    steps_per_epoch: int
    at: Callable[[int], dict[str, float]]

    @property
    def batch(self) -> int:
        """Return the number of images in a step."""
        return self.batch_per_process * self.processes * self.accumulation

    @property
    def steps(self) -> int:
        """Return the number of steps of the run."""
        return self.steps_per_epoch * self.epochs

    def turns(self) -> list[int]:
        """Return the epochs before and after which a quantity changes in another direction."""
        starts = [
            list(self.at(epoch * self.steps_per_epoch).values()) for epoch in range(self.epochs)
        ]
        directions = np.sign(np.diff(starts, axis=0))  # [epochs - 1, quantities]
        return [int(e) + 1 for e in np.flatnonzero(np.diff(directions, axis=0).any(1))]


def of_trainer(config: Training, images: int, processes: int, method: Method | None) -> Schedules:
    """Return the schedules of a run that `moco.engine.trainer.Trainer` trains.

    Args:
        config: the settings of the run.
        images: number of training images.
        processes: number of processes.
        method: the method of a pre-training; None for an evaluation.

    Raises InputError if the images do not fill one batch.
    """
    schedule, seed = config.optimizer, config.run.seed
    each, passes = batch_per_process(config.input, processes), schedule.accumulation_steps
    keep_last = (PretrainingTask if method else ClassifierTask).keep_last
    order = TrainBatchSampler(images, each * processes, passes, seed, keep_last=keep_last)
    per_epoch = order.steps_per_epoch
    if not per_epoch:
        raise InputError(too_few(images, each * processes * passes))
    scale = lr_scale(schedule.learning_rate_scaling, each * processes * passes)
    base_lrs = _base_lrs(config, method)

    def at(step: int) -> dict[str, float]:
        values = {}
        for name, (lr, scheduled) in base_lrs.items():
            lr *= scale
            values[name] = lr_of_step(schedule, lr, step, per_epoch, scale) if scheduled else lr
        if method:
            epoch = step // per_epoch
            values |= method.schedules(Progress(seed, epoch, step, 0, per_epoch, schedule.epochs))
        return values

    return Schedules(images, processes, each, passes, schedule.epochs, per_epoch, at)


def of_voc_layer(
    config: Evaluation, images: int, processes: int, epochs: int, lr: float
) -> Schedules:
    """Return the schedule of the linear layer of main_voc07.py.

    Args:
        config: the settings of the evaluation.
        images: number of training images.
        processes: number of processes.
        epochs: number of epochs.
        lr: learning rate of the first epoch.
    """
    each = batch_per_process(config.input, processes)
    per_epoch = len(EpochSampler(images, each * processes, config.run.seed, 0))
    at = lambda step: {"lr": lr_of_epoch(lr, step // per_epoch)}  # noqa: E731
    return Schedules(images, processes, each, 1, epochs, per_epoch, at)


def _base_lrs(config: Training, method: Method | None) -> dict[str, tuple[float, bool]]:
    """Return each learning rate before scaling, and whether it follows the schedule, by name."""
    settings = flat(config)
    if method:
        groups = method.parameter_groups(settings["lr"], settings["wd"])
        pairs = dict.fromkeys((group["lr"], group.get("scheduled", True)) for group in groups)
        return {f"lr {i}" if i > 1 else "lr": pair for i, pair in enumerate(pairs, 1)}
    found = {}
    for name in ("lr", "lr_classifier", "lr_backbone"):
        value = settings.get(name)
        if isinstance(value, list) and len(value) > 1:
            found |= {f"lr {one:g}": (one, True) for one in value}
        elif value is not None and (name != "lr_backbone" or settings["weights"] == "finetune"):
            one = value[0] if isinstance(value, list) else value
            found[name.replace("_", " ")] = (one, True)
    return found


def summary(schedules: Schedules) -> str:
    """Return a line about the images, the batch and the steps of a run."""
    s = schedules
    return (
        f"{counted(s.images, 'image')}; total batch {s.batch} = {s.batch_per_process} per process "
        f"x {counted(s.processes, 'process', 'processes')} x {s.accumulation} accumulation; "
        f"{counted(s.epochs, 'epoch')} x {counted(s.steps_per_epoch, 'step')}"
    )


def table(schedules: Schedules, rows: int) -> str:
    """Return a table of all quantities: a row for the first step of epochs, and one for the last.

    Args:
        schedules: the schedules of the run.
        rows: number of evenly spaced epochs. The epochs at which a quantity turns are added.
    """
    epochs, per_epoch = schedules.epochs, schedules.steps_per_epoch
    even = {i * epochs // rows for i in range(rows)}
    steps = [epoch * per_epoch for epoch in sorted(even | set(schedules.turns()))]
    steps += [schedules.steps - 1] * (steps[-1] < schedules.steps - 1)
    lines = [["epoch", "step", *schedules.at(0)]]
    for step in steps:
        values = (f"{value:.6g}" for value in schedules.at(step).values())
        lines.append([str(step // per_epoch), str(step), *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def figure(schedules: Schedules, title: str) -> Figure:
    """Return a picture with a curve of each quantity; the synthetic negatives share one axis."""
    per_epoch, total = schedules.steps_per_epoch, schedules.steps
    starts = np.arange(0, total, per_epoch)
    steps = np.unique([*np.linspace(0, total - 1, POINTS).astype(int), *starts, *(starts[1:] - 1)])
    columns = [schedules.at(int(step)) for step in steps]
    curves = {name: np.array([values[name] for values in columns]) for name in columns[0]}
    counts = {name: curves.pop(name) for name in COUNTS if name in curves}
    picture = Figure(
        figsize=(7, 0.4 + 2.2 * (len(curves) + bool(counts))), dpi=110, layout="constrained"
    )
    axes = picture.subplots(len(curves) + bool(counts), 1, sharex=True, squeeze=False)[:, 0]
    x = steps / per_epoch
    for axis, (name, y) in zip(axes, curves.items(), strict=False):
        axis.plot(x, y, color=COLORS[0], linewidth=1.5, drawstyle="steps-post")
        axis.set_ylabel(name, fontsize=9, color=INK)
    if counts:
        look = {"colors": COLORS, "alpha": 0.8, "linewidth": 0, "step": "post"}
        axes[-1].stackplot(x, *counts.values(), labels=counts, **look)
        axes[-1].set_ylabel("synthetic negatives", fontsize=9, color=INK)
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    for axis in axes:
        axis.ticklabel_format(useOffset=False)
        axis.tick_params(labelsize=8, colors=INK)
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("epoch", fontsize=9, color=INK)
    picture.suptitle(printable(title), fontsize=10, color=INK, parse_math=False)
    return picture
