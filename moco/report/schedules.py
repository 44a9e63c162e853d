"""Compute, tabulate and draw the quantities of a run that follow a schedule.

The values come from the same functions as in training.
"""

import numpy as np
from matplotlib.figure import Figure

from moco.builder.base import Method
from moco.builder.synco import COUNTS
from moco.config import Training, flat
from moco.data.loader import TrainBatchSampler
from moco.engine.lr_schedule import lr_of_step, lr_scale
from moco.engine.pretrain import PretrainingTask
from moco.errors import InputError
from moco.evaluate.classifier import ClassifierTask
from moco.launch.processes import batch_per_process
from moco.report.plots import COLORS, INK, printable
from moco.rng import Progress

POINTS = 2000  # evenly spaced points of a curve, in addition to the first and last steps of epochs


class Schedules:
    """The schedules of a run on one node.

    Args:
        config: the settings of the run.
        images: number of training images.
        processes: number of processes.
        method: the method of a pre-training; None for an evaluation.

    Raises InputError if the images do not fill one batch.
    """

    def __init__(self, config: Training, images: int, processes: int, method: Method | None):
        self.config, self.images, self.processes, self.method = config, images, processes, method
        schedule = config.optimizer
        self.batch_per_process = batch_per_process(config.input, processes)
        per_pass = self.batch_per_process * processes
        self.batch = per_pass * schedule.accumulation_steps  # images in a step
        keep_last = (PretrainingTask if method else ClassifierTask).keep_last
        order = TrainBatchSampler(
            images, per_pass, schedule.accumulation_steps, config.run.seed, keep_last=keep_last
        )
        self.steps_per_epoch = order.steps_per_epoch
        if not self.steps_per_epoch:
            raise InputError(f"{images} images do not fill one batch of {self.batch}")
        self.steps = self.steps_per_epoch * schedule.epochs
        self.lr_scale = lr_scale(schedule.learning_rate_scaling, self.batch)
        self._base_lrs = _base_lrs(config, method)

    def at(self, step: int) -> dict[str, float]:
        """Return the value of each quantity in a step of the run, by name."""
        schedule, per_epoch, scale = self.config.optimizer, self.steps_per_epoch, self.lr_scale
        values = {
            name: lr_of_step(schedule, lr * scale, step, per_epoch, scale)
            if scheduled
            else lr * scale
            for name, (lr, scheduled) in self._base_lrs.items()
        }
        if self.method:
            seed, epoch = self.config.run.seed, step // per_epoch
            progress = Progress(seed, epoch, step, 0, per_epoch, schedule.epochs)
            values |= self.method.schedules(progress)
        return values

    def turns(self) -> list[int]:
        """Return the epochs at which a quantity begins to rise, to fall or to stay constant."""
        per_epoch = self.steps_per_epoch
        starts = [list(self.at(step).values()) for step in range(0, self.steps, per_epoch)]
        directions = np.sign(np.diff(starts, axis=0))  # [epochs - 1, quantities]
        return [int(e) + 1 for e in np.flatnonzero(np.diff(directions, axis=0).any(1))]


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
    s, schedule = schedules, schedules.config.optimizer
    return (
        f"{s.images} images; total batch {s.batch} = {s.batch_per_process} per process x "
        f"{s.processes} processes x {schedule.accumulation_steps} accumulation; "
        f"{schedule.epochs} epochs x {s.steps_per_epoch} steps"
    )


def table(schedules: Schedules, rows: int) -> str:
    """Return a table of all quantities: a row for the first step of epochs, and one for the last.

    Args:
        schedules: the schedules of the run.
        rows: number of evenly spaced epochs. The epochs at which a quantity turns are added.
    """
    epochs, per_epoch = schedules.config.optimizer.epochs, schedules.steps_per_epoch
    even = {round(i * epochs / rows) for i in range(rows)}
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
