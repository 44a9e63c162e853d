"""The training loop, one for every script. A `Task` says what is trained, and on which loss.

moco/engine/pretrain.py and moco/evaluate/classifier.py have the tasks.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed, rng
from moco.augment import color, recipes
from moco.config import Training, flat
from moco.data import loader
from moco.data.images import Images
from moco.engine import checkpoint, health, optim, precision, resume
from moco.engine.announce import announce
from moco.engine.log import Mean, Metrics, RunLog, write_options
from moco.errors import InputError
from moco.launch import interrupt


class Task(ABC):
    """What a `Trainer` trains: a module, its parameter groups, and the loss of a batch.

    Args:
        config: the settings of the run.
        module: what is trained and saved; already on `device`.
        images: what it is trained on.
        device: the device of this process.
    """

    images_before = 0  # images that train before epoch 0, in steps that are counted below 0
    may_diverge = False  # whether the run goes on if the loss or a weight is NaN or infinite
    scales_gradient = True  # whether --amp fp16 scales the gradient

    def __init__(self, config: Training, module: nn.Module, images: Images, device: torch.device):
        self.config, self.module, self.images, self.device = config, module, images, device

    @property
    def trained(self) -> nn.Module:
        """Return what `loss` calls: the module, or the part of it that trains."""
        return self.module

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Return the modules whose gradient norms are logged, by name."""
        return {}

    @property
    def independent(self) -> Iterable[nn.Module]:
        """Return the parts that train independently: the gradient of each is clipped by itself."""
        return [self.module]

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: params, lr and weight_decay.

        A group with `"scheduled": False` keeps its learning rate for the whole run.
        """

    @abstractmethod
    def loss(
        self, net: nn.Module, views: list[Tensor], batch: loader.Batch, progress: rng.Progress
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and the metrics of one pass. `net` is `trained`, in DDP if distributed."""

    def start_epoch(self) -> None:
        """Put the module into the mode that it trains in."""
        self.module.train()

    def load_images(self) -> None:
        """Decode the images that every epoch reads into memory, if --cache-images says so."""

    def after_step(self) -> None:  # noqa: B027 (a task may have nothing to add)
        """Do what follows the optimizer's step."""

    def end_epoch(self, trainer: "Trainer", done: int) -> dict[str, float]:
        """Evaluate and save after `done` epochs; return what to log."""
        return {}

    @abstractmethod
    def save_inside(self, trainer: "Trainer", epoch: int, step: int) -> Path:
        """Save before the end of an epoch, after `step` steps of the run; return the file's path."""

    def finish(self, trainer: "Trainer") -> None:  # noqa: B027
        """Do what follows the last epoch."""

    def notes(self) -> list[str]:
        """Return further lines to print at the start."""
        return []

    def state(self) -> dict[str, Any]:
        """Return further entries of a checkpoint: plain values by key."""
        return {}

    def restore(self, state: checkpoint.State) -> None:  # noqa: B027
        """Restore what `state` has saved. Raises InputError if it does not fit this task's data."""

    def restored(self) -> None:  # noqa: B027
        """Check the restored weights. Raises InputError if they do not fit the options."""


class Trainer:
    """Trains a task on this process, together with the other processes of the run.

    A resumed run continues from the checkpoint as if it had never stopped.
    """

    def __init__(self, task: Task):
        self.task, self.config, self.device = task, task.config, task.device
        config, schedule = self.config, self.config.optimizer
        self.recipe = recipes.of(config.views)
        if config.compute.compile:
            color.fuse()
        # images in a step
        per_pass = config.input.batch_per_process * distributed.world_size()
        self.batch = per_pass * schedule.accumulation_steps
        self.lr_scale = optim.scale(schedule.learning_rate_scaling, self.batch)
        self.optimizer = optim.make(task.groups(), schedule, config.compute.amp)
        # by group of the optimizer, which may divide the task's groups; checkpoints lack it
        self.scheduled = [g.pop("scheduled", True) for g in self.optimizer.param_groups]
        # before any schedule, and before those of a resumed run
        self.base_lrs = [group["lr"] * self.lr_scale for group in self.optimizer.param_groups]
        amp = config.compute.amp if task.scales_gradient else "off"
        self.scaler = precision.scaler(amp, self.device)
        state = checkpoint.load(config.log.resume) if config.log.resume else None
        if state:
            self._restore(state)
        self.net = distributed.data_parallel(task.trained)
        self.health = health.Health(config, task.images, task.may_diverge)
        self._find_start(state)
        self.seconds: float | None = None  # how long the run trained, over all starts
        self._saved = False  # whether this start has written a checkpoint

    def _find_start(self, state: checkpoint.State | None) -> None:
        """Find the step and the epoch to begin at. Raises InputError if the ranks differ."""
        schedule, images = self.config.optimizer, self.task.images
        self.order = loader.TrainBatchSampler(
            len(images),
            self.config.input.batch_per_process,
            schedule.accumulation_steps,
            self.config.run.seed,
        )
        self.steps_per_epoch = self.order.steps_per_epoch
        self.order.stop = self.steps_per_epoch * schedule.epochs
        before = -self.task.images_before // self.batch
        self.order.start = self._step_of(state) if state else before
        self.first_epoch = self.order.start // max(1, self.steps_per_epoch)
        if state:
            # all steps of an epoch may be done, but not what follows its last one
            self.first_epoch = min(self.first_epoch, state["epoch"])
        place = torch.tensor([[self.order.start, self.first_epoch]], device=self.device)
        if (distributed.all_gather(place) != place).any():
            raise InputError(
                "--resume: the processes do not read the same checkpoint; "
                "give one that all nodes see"
            )

    def train(self) -> None:
        """Train every epoch that is left, and log it."""
        config, task = self.config, self.task
        announce(self, self.task.images, self.task.notes())
        if self.order.start < self.order.stop:
            task.load_images()
        log = RunLog(config, self.order.stop, self.order.start, self.device)
        if distributed.rank() == 0:
            checkpoint.begin(Path(config.run.save_dir), config.log.resume)
        crop = loader.RandomCrops(self.recipe, config.run.seed)
        skips = config.log.on_bad_image == "skip"
        batches = loader.batches(task.images, crop, self.order, config.input, self.device, skips)
        with (
            interrupt.Requests() as requests,
            contextlib.closing(log),
            contextlib.closing(batches),
        ):
            for epoch in range(self.first_epoch, config.optimizer.epochs):
                self._train_epoch(epoch, batches, log, requests)
                if epoch < 0:
                    continue
                distributed.broadcast_buffers(task.module)
                if metrics := task.end_epoch(self, epoch + 1):
                    log.line(epoch, (epoch + 1) * self.steps_per_epoch, metrics)
        self.seconds = log.seconds()
        task.finish(self)

    def _train_epoch(
        self,
        epoch: int,
        batches: Iterator[loader.Batch],
        log: RunLog,
        requests: interrupt.Requests,
    ) -> None:
        """Train the steps of an epoch that are left. Raises Interrupted if a signal stops the run."""
        options, per_epoch = self.config.log, self.steps_per_epoch
        self.task.start_epoch()
        self.health.start_epoch(per_epoch * self.batch // distributed.world_size())
        mean, means = Mean(), {}
        for step in range(max(epoch * per_epoch, self.order.start), (epoch + 1) * per_epoch):
            lr = self._set_lr(step)
            self._step(epoch, step, batches, mean, log)
            asked, ends = requests.agreed(), (step + 1) % per_epoch == 0
            prints = (step + 1) % options.print_freq == 0
            every = options.save_every_steps
            saves = asked or (every and (step + 1) % every == 0 and not ends)
            if saves or ends or prints:
                self.health.check(self.task.module, lr, per_epoch)
            if ends or asked or prints:
                means = mean.read()
                log.line(epoch, step + 1, {**means, "lr": lr})
            if saves:
                path = self.task.save_inside(self, epoch, step + 1)
            if asked:
                distributed.barrier()
                raise interrupt.Interrupted(
                    f"{asked}: saved {path} after step {step + 1}; --resume auto goes on from there"
                )
        if epoch >= 0:
            health.warn_if_collapsed(means, epoch)

    def _step(
        self, epoch: int, step: int, batches: Iterator[loader.Batch], mean: Mean, log: RunLog
    ) -> None:
        """Take one step of the optimizer, on the gradient of one pass or of several."""
        schedule = self.config.optimizer
        for micro in range(schedule.accumulation_steps):
            before = time.perf_counter()
            batch = next(batches)
            log.wait(time.perf_counter() - before)
            self.health.note_unreadable(batch.unreadable)
            progress = rng.Progress(
                self.config.run.seed, epoch, step, micro, self.steps_per_epoch, schedule.epochs
            )
            found = self._pass(batch, progress)
            self.health.note(step, found["loss"], batch.index)
            mean.add(found)
        mean.add(self._clip_gradient())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        log.tick()

    def _set_lr(self, step: int) -> float:
        """Give each parameter group its learning rate for this step; return the first one's."""
        schedule = self.config.optimizer
        # steps before epoch 0 train at the learning rate that follows the warm-up
        passed = step / self.steps_per_epoch if step >= 0 else schedule.lr_warmup_epochs
        if schedule.lr_by != "step":
            passed = int(passed) + (schedule.lr_by == "epoch-end" and step >= 0)
        lrs = self.lrs_after(passed)
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        return lrs[0]

    def lrs_after(self, passed: float) -> list[float]:
        """Return the learning rate of each parameter group after `passed` epochs."""
        schedule = self.config.optimizer
        return [
            optim.rate(schedule, base, passed, self.lr_scale) if scheduled else base
            for base, scheduled in zip(self.base_lrs, self.scheduled, strict=True)
        ]

    def _pass(self, batch: loader.Batch, progress: rng.Progress) -> Metrics:
        """Compute the views, the loss and its gradient.

        The gradients of the ranks are averaged in the last pass of a step.
        """
        steps, amp = self.config.optimizer.accumulation_steps, self.config.compute.amp
        last = progress.micro + 1 == steps
        rank = distributed.rank()
        draws = [
            progress.generator(rng.COLOR, "cpu", rank, view) for view in range(len(self.recipe))
        ]
        augmented = color.augment_views(batch.views, self.recipe, draws)
        views = list(map(precision.layout, augmented))
        # for what layers draw by themselves, such as stochastic depth
        seed = rng.key(rng.LAYERS, self.config.run.seed, progress.step, progress.micro, rank)
        torch.manual_seed(seed >> 1)
        alone = last or distributed.world_size() == 1
        with contextlib.nullcontext() if alone else self.net.no_sync():
            with precision.autocast(amp, self.device):
                loss, metrics = self.task.loss(self.net, views, batch, progress)
            self.scaler.scale(loss / steps).backward()
        return {"loss": loss, **metrics}

    def _clip_gradient(self) -> Metrics:
        """Clip the gradient; return its norm before that, for each of the task's `parts`."""
        clip, parts = self.config.optimizer.clip_grad, self.task.parts
        if not clip and not parts:
            return {}
        self.scaler.unscale_(self.optimizer)
        norms = {}
        for name, part in parts.items():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            # under fp16 the scaler skips a step whose gradient is not finite
            counts = norm.isfinite()
            norms[f"grad_{name}"] = torch.where(counts, norm, 0.0), counts
        for together in self.task.independent if clip else []:
            gradients = [p for p in together.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(gradients, clip)
        return norms

    def _restore(self, state: checkpoint.State) -> None:
        """Restore the run from the checkpoint of `--resume`. Raises InputError if it does not fit."""
        config, task, path = self.config, self.task, self.config.log.resume
        tests = config.only_tests  # a test alone takes no step, by no optimizer
        checkpoint.check_origin(state, config)
        if not tests:
            resume.check_unchanged(config, state, self.batch)
        task.restore(state)
        images = state.get("images", len(task.images))
        if images != len(task.images):
            raise InputError(
                f"{path}: was trained on {images} images, but {task.images.root} has "
                f"{len(task.images)}; resume with the data it was made with"
            )
        checkpoint.restore(task.module, state, path, task.may_diverge)
        if not tests:
            optim.restore(self.optimizer, state["optimizer"], path, task.may_diverge)
            precision.restore(self.scaler, state.get("scaler", {}), path)
        task.restored()

    def _step_of(self, state: checkpoint.State) -> int:
        """Return the step to resume at, rescaled if the batch size changed."""
        progress, epoch = state["progress"], state["epoch"]
        inside = 0
        if "batch" in progress:
            begun = progress["step"] - epoch * progress.get("steps_per_epoch", 0)
            inside = begun * progress["batch"] // self.batch
        return epoch * self.steps_per_epoch + min(inside, self.steps_per_epoch)

    def save(self, name: str, epoch: int, step: int | None = None) -> Path:
        """Write the run's state, on rank 0; return the file's path.

        Args:
            name: of the file, in the run folder.
            epoch: how many epochs are done.
            step: how many steps are done, if the last epoch is unfinished.
        """
        config, task = self.config, self.task
        path = Path(config.run.save_dir) / name
        if distributed.rank() != 0:
            return path
        step = epoch * self.steps_per_epoch if step is None else step
        weights = {f"module.{key}": tensor for key, tensor in task.module.state_dict().items()}
        state = {
            "epoch": max(epoch, 0),
            "arch": config.network.arch,
            "method": config.run.method,
            "args": flat(config),
            "images": len(task.images),
            "state_dict": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {
                "step": step,
                "samples": step * self.batch,
                "seed": config.run.seed,
                "batch": self.batch,
                "steps_per_epoch": self.steps_per_epoch,
            },
            **task.state(),
        }
        checkpoint.save(path, state)
        if config.log.resume and not self._saved:
            write_options(config)  # see RunLog
        self._saved = True
        return path
