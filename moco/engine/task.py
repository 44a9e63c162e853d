"""The interface between the training loop and what it trains.

The tasks are in moco/engine/pretrain.py and moco/evaluate/classifier.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moco import rng
from moco.config import Training
from moco.data import loader
from moco.data.images import Images
from moco.engine import checkpoint
from moco.engine.log import Metrics, RunLog


class Run(Protocol):
    """The part of a `Trainer` that a task uses.

    Attributes:
        steps_per_epoch: number of steps of an epoch.
        seconds: the training time of the run, over all starts, once it is done.
        log: the log of this start.
    """

    steps_per_epoch: int
    seconds: float | None
    log: RunLog | None

    def save(self, name: str, epoch: int, step: int | None = None) -> Path:
        """Write a checkpoint; see `Trainer.save`."""


class Task(ABC):
    """A task for a `Trainer`: a module, its parameter groups, and the loss of a batch.

    Args:
        config: the settings of the run.
        module: the module to train and save, on `device`.
        images: the training set.
        device: the device of this process.
    """

    images_before_epoch_0 = 0  # number of images to train on before epoch 0, in steps below 0
    keep_last = 0  # minimum images per rank in a smaller last batch; 0: leave it out
    may_diverge = False  # whether the run continues if the loss or a weight is NaN or infinite
    scales_gradient = True  # whether --amp fp16 scales the gradient

    def __init__(self, config: Training, module: nn.Module, images: Images, device: torch.device):
        self.config, self.module, self.images, self.device = config, module, images, device

    @property
    def trained_module(self) -> nn.Module:
        """Return the submodule that is trained and that `loss` calls; by default all of it."""
        return self.module

    @property
    def grad_norm_modules(self) -> dict[str, nn.Module]:
        """Return the modules whose gradient norms are logged, by name."""
        return {}

    @property
    def grad_clip_modules(self) -> Iterable[nn.Module]:
        """Return the modules whose gradients are clipped separately; by default only the module."""
        return [self.module]

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, each with `params`, `lr` and `weight_decay`.

        A group with `"scheduled": False` keeps its learning rate for the full run.
        """

    @abstractmethod
    def loss(
        self, net: nn.Module, views: list[Tensor], batch: loader.Batch, progress: rng.Progress
    ) -> tuple[Tensor, Metrics]:
        """Return the loss of this rank's batch, a scalar, and the metrics of one pass.

        Args:
            net: `trained_module`, wrapped in DDP if there are several processes.
            views: the augmented views, each [B, 3, H, W].
            batch: the batch, with labels and indices.
            progress: the position of the pass in the run; its generators draw random numbers.
        """

    def scheduled(self, progress: rng.Progress) -> dict[str, float]:  # noqa: ARG002
        """Return quantities to log that follow a schedule, in addition to the learning rate."""
        return {}

    def start_epoch(self) -> None:
        """Set the module to the mode in which it trains; by default training mode."""
        self.module.train()

    # B027: the methods without a body are optional hooks

    def load_images(self) -> None:  # noqa: B027
        """Decode the images that every epoch reads into memory, if --cache-images allows it."""

    def after_step(self) -> None:  # noqa: B027
        """Update what depends on the new weights. Called after each step of the optimizer."""

    def gather_state(self) -> None:  # noqa: B027
        """Copy shards of buffers to all ranks. Called on all ranks before each save."""

    def start_run(self) -> dict[str, float]:
        """Evaluate before the first step of a new run. Return metrics to log."""
        return {}

    def end_epoch(self, trainer: Run, done: int) -> dict[str, float]:  # noqa: ARG002
        """Evaluate and save after `done` epochs. Return metrics to log."""
        return {}

    @abstractmethod
    def save_mid_epoch(self, trainer: Run, epoch: int, step: int) -> Path:
        """Save inside epoch `epoch`, after `step` steps of the run. Return the path of the file."""

    def finish(self, trainer: Run) -> None:  # noqa: B027
        """Print or check results. Called after the last epoch."""

    def notes(self) -> list[str]:
        """Return lines to print at the start of the run."""
        return []

    def state(self) -> dict[str, Any]:
        """Return the task's entries in a checkpoint: plain values by key."""
        return {}

    def restore(self, state: checkpoint.State) -> None:  # noqa: B027
        """Restore the task's entries in a checkpoint. Raises InputError if they do not fit."""

    def check_restored(self) -> None:  # noqa: B027
        """Raise InputError if the restored weights do not fit the options."""
