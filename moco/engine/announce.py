"""Print the lines that a training run shows at its start."""

from typing import Protocol

import torch

from moco import devices, distributed
from moco.config import Training
from moco.data.images import Images
from moco.data.loader import TrainBatchSampler
from moco.engine import decoding, record
from moco.errors import InputError
from moco.messages import counted, print_rank0


class Start(Protocol):
    """The attributes of a `Trainer` that `announce` reads."""

    config: Training
    device: torch.device
    batch: int  # images in a step, over all processes
    steps_per_epoch: int
    order: TrainBatchSampler
    first_epoch: int
    base_lrs: list[float]

    def lrs_of_step(self, step: int) -> list[float]:
        """Return the learning rate of each parameter group in a step of the run."""


def too_few(images: int, batch: int) -> str:
    """Return the message that the images do not fill one batch of all processes."""
    few = counted(images, "image does", "images do")
    return f"{few} not fill one batch of {batch}; lower --batch-size"


def announce(start: Start, images: Images, notes: list[str]) -> None:
    """Print the data, device, batch size, learning rate and folder of the run, and then `notes`.

    Args:
        start: the trainer of the run.
        images: the training set.
        notes: further lines.

    Raises InputError if the images do not fill one batch.
    """
    config, per_epoch = start.config, start.steps_per_epoch
    schedule, size, batch = config.optimizer, distributed.world_size(), start.batch
    if not per_epoch:
        raise InputError(f"{images.root}: {too_few(len(images), batch)}")
    classes = counted(len(images.classes), "class", "classes")
    labels = f"of {classes}" if images.labelled else "without labels"
    if distributed.rank() == 0:
        facts = {"steps": start.order.stop, "steps_per_epoch": per_epoch, "processes": size}
        facts |= {"images": len(images), "classes": len(images.classes)}
        record.add(config.run.save_dir, **facts, device=devices.describe(start.device))
    print_rank0(
        f"{config.run.method} {config.network.arch}: {counted(len(images), 'image')} {labels} in "
        f"{images.root}"
    )
    print_rank0(
        f"views {config.views.recipe} at {config.views.image_size} pixels; "
        f"{start.device.type}, amp {config.compute.amp}"
    )
    if config.compute.grad_compress != "off":
        print_rank0(f"the processes exchange gradients in {config.compute.grad_compress}")
    if given := decoding.options(config.input):
        print_rank0(f"images are decoded with {given}")
    warm_up = counted(schedule.lr_warmup_epochs, "epoch")
    lrs = ", ".join(dict.fromkeys(f"{lr:g}" for lr in start.base_lrs))
    scaling = schedule.learning_rate_scaling
    scaling = "taken as given" if scaling == "none" else f"{scaling} scaling"
    print_rank0(
        f"total batch {batch} = {config.input.batch_per_process} per process x "
        f"{counted(size, 'process', 'processes')} x {schedule.accumulation_steps} accumulation; "
        f"lr after scaling {lrs} ({scaling}), lr warm-up {warm_up}; "
        f"{counted(schedule.epochs, 'epoch')} x {counted(per_epoch, 'step')}"
        f"{_last_step(start.order)}"
    )
    gpus = devices.count(start.device.type)
    if start.device.type == "cuda" and size == 1 < gpus and config.launch.gpu is None:
        print_rank0(
            f"one of {gpus} GPUs trains; --multiprocessing-distributed starts a process on each"
        )
    if start.order.start < 0:
        before = -start.order.start
        print_rank0(
            f"{counted(before, 'step')} before epoch 0, numbered from -{before} in log.jsonl: "
            f"{before / per_epoch:.3g} times as many images as in an epoch"
        )
    if schedule.lr_warmup_epochs >= schedule.epochs:
        print_rank0(
            f"the warm-up (--lr-warmup-epochs {schedule.lr_warmup_epochs}) outlasts the run: the "
            "full learning rate is not reached"
        )
    if schedule.lr_by == "epoch-end" and schedule.epochs == 1 and not max(start.lrs_of_step(0)):
        print_rank0(
            "--lr-by epoch-end: the only epoch uses the learning rate at its end, which is 0, so "
            "nothing is trained"
        )
    if config.log.resume:
        inside = start.order.start - start.first_epoch * per_epoch
        print_rank0(
            f"resumed from {config.log.resume} at epoch {start.first_epoch}"
            + f", after {inside} of its steps" * bool(inside)
        )
        print_if_done(start)
    print_rank0(f"run folder {config.run.save_dir}")
    for line in notes:
        print_rank0(line)


def _last_step(order: TrainBatchSampler) -> str:
    """Return text about the smaller last step of each epoch; empty if there is none."""
    if not order.last:
        return ""
    again = f", of which {order.repeated} are repeated" * bool(order.repeated)
    images = sum(order.last) * distributed.world_size()
    return f", the last with {counted(images, 'image')}{again}"


def print_if_done(start: Start) -> None:
    """Print a line if no epochs are left to train."""
    done, epochs = start.first_epoch, start.config.optimizer.epochs
    if done >= epochs:
        print_rank0(
            f"no epochs are left: {done} are done, and --epochs is {epochs}; "
            "raise it to train longer"
        )
