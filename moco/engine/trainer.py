"""Run the training loop that all scripts share.

A `Task` defines the module to train and its loss; see moco/engine/task.py.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from moco import distributed, rng
from moco.augment import color, recipes
from moco.config import flat
from moco.data import loader
from moco.engine import checkpoint, health, lr_schedule, optim, precision, resume
from moco.engine.announce import announce
from moco.engine.log import Mean, Metrics, RunLog, write_options
from moco.engine.task import Task
from moco.errors import InputError
from moco.launch import interrupt
from moco.messages import counted, print_rank0


class Trainer:
    """The training loop of a task, run together by all processes of the run.

    A resumed run continues from its checkpoint as if it had never stopped.

    Args:
        task: the task, with the settings of the run.

    Raises InputError if the checkpoint of `--resume` cannot be read, or does not fit the task.
    """

    def __init__(self, task: Task):
        self.task, self.config, self.device = task, task.config, task.device
        config, schedule = self.config, self.config.optimizer
        self.recipe = recipes.from_settings(config.views)
        if config.compute.compile:
            color.compile_operations()
        per_pass = config.input.batch_per_process * distributed.world_size()
        self.batch = per_pass * schedule.accumulation_steps  # images in a step
        self.lr_scale = lr_schedule.lr_scale(schedule.learning_rate_scaling, self.batch)
        self.optimizer = optim.make(task.parameter_groups(), schedule, config.compute.amp)
        # read from the optimizer's groups, because it may split the task's groups; popped, because
        # checkpoints do not save it
        self.scheduled = [g.pop("scheduled", True) for g in self.optimizer.param_groups]
        # read before the schedule, or a checkpoint, changes them
        self.base_lrs = [group["lr"] * self.lr_scale for group in self.optimizer.param_groups]
        amp = config.compute.amp if task.scales_gradient else "off"
        self.scaler = precision.scaler(amp, self.device)
        # only rank 0 writes it to checkpoints and compares it
        self.image_digest = "" if distributed.rank() else task.images.digest()
        state = checkpoint.load(config.log.resume) if config.log.resume else None
        if state:
            self._restore(state)
        self.net = distributed.data_parallel(task.trained_module, config.compute.grad_compress)
        self.health = health.Health(config, task.images, task.may_diverge)
        self._find_start(state)
        self.log: RunLog | None = None  # of this start
        self.seconds: float | None = None  # training time of the run, over all starts
        self._saved = False  # whether this start has written a checkpoint

    def _find_start(self, state: checkpoint.State | None) -> None:
        """Set the first step and epoch. Raises InputError if they differ between ranks."""
        schedule, images = self.config.optimizer, self.task.images
        batch, seed = self.config.input.batch_per_process, self.config.run.seed
        self.order = loader.TrainBatchSampler(
            len(images), batch, schedule.accumulation_steps, seed, keep_last=self.task.keep_last
        )
        self.steps_per_epoch = self.order.steps_per_epoch
        self.order.stop = self.steps_per_epoch * schedule.epochs
        self.order.before = -(-self.task.images_before_epoch_0 // self.batch)
        self.order.start = self._step_of(state) if state else -self.order.before
        self.first_epoch = self.order.start // max(1, self.steps_per_epoch)
        if state:
            # an epoch is not done until it is evaluated, even if all its steps are
            self.first_epoch = min(self.first_epoch, state["epoch"])
        position = torch.tensor([[self.order.start, self.first_epoch]], device=self.device)
        if (distributed.all_gather(position) != position).any():
            raise InputError(
                "--resume: the processes do not read the same checkpoint; "
                "give one that all nodes see"
            )

    def train(self) -> None:
        """Train and log all remaining epochs.

        Raises InputError if training diverges or a file cannot be read or written, and Interrupted
        if a signal stops the run.
        """
        config, task = self.config, self.task
        announce(self, self.task.images, self.task.notes())
        if self.order.start < self.order.stop:
            task.load_images()
        before = {} if config.log.resume else task.start_run()
        log = self.log = RunLog(config, self.order.stop, self.order.start, self.device)
        if distributed.rank() == 0:
            checkpoint.tidy_folder(Path(config.run.save_dir), config.log.resume)
        crop = loader.RandomCrops(self.recipe, config.run.seed)
        skips = config.log.on_bad_image == "skip"
        batches = loader.batches(task.images, crop, self.order, config.input, self.device, skips)
        with (
            interrupt.Requests() as requests,
            contextlib.closing(log),
            contextlib.closing(batches),
        ):
            if before:
                log.line(self.first_epoch, self.order.start, before)
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
        """Train the remaining steps of an epoch.

        Raises Interrupted if a signal stops the run, after saving a checkpoint.
        """
        options, per_epoch, task = self.config.log, self.steps_per_epoch, self.task
        task.start_epoch()
        self.health.start_epoch(self.order.images(per_epoch))
        mean, means = Mean(), {}
        for step in range(max(epoch * per_epoch, self.order.start), (epoch + 1) * per_epoch):
            lr = self._set_lr(step)
            self._step(epoch, step, batches, mean, log)
            asked, ends = requests.agreed(), (step + 1) % per_epoch == 0
            prints = (step + 1) % options.print_freq == 0
            every = options.save_every_steps
            saves = asked or (every and (step + 1) % every == 0 and not ends)
            if saves or ends:
                task.gather_state()
            if saves or ends or prints:
                self.health.check(task.module, lr, per_epoch)
            if ends or asked or prints:
                means = mean.read()
                progress = self._progress(epoch, step)
                log.line(epoch, step + 1, {**means, "lr": lr, **task.scheduled(progress)})
            if saves:
                path = task.save_mid_epoch(self, epoch, step + 1)
            if asked:
                distributed.barrier()
                raise interrupt.Interrupted(
                    f"{asked}: saved {path} after step {step + 1}; "
                    "--resume auto continues from there"
                )
        if epoch >= 0:
            health.warn_if_collapsed(means, epoch)

    def _step(
        self, epoch: int, step: int, batches: Iterator[loader.Batch], mean: Mean, log: RunLog
    ) -> None:
        """Take one step of the optimizer, with the mean gradient of all passes of the step."""
        sizes = self.order.sizes(step)
        for micro, size in enumerate(sizes):
            before = time.perf_counter()
            batch = next(batches)
            log.wait(time.perf_counter() - before)
            self.health.note_unreadable(batch.unreadable)
            progress = self._progress(epoch, step, micro)
            found = self._pass(batch, progress, sum(sizes) / size, micro + 1 == len(sizes))
            self.health.note(step, found["loss"], batch.index)
            mean.add(found, size / self.config.input.batch_per_process)
        mean.add(self._clip_gradient())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        log.tick(sum(sizes) * distributed.world_size())

    def _progress(self, epoch: int, step: int, micro: int = 0) -> rng.Progress:
        """Return the position of a pass of a step."""
        seed, epochs = self.config.run.seed, self.config.optimizer.epochs
        return rng.Progress(seed, epoch, step, micro, self.steps_per_epoch, epochs)

    def _set_lr(self, step: int) -> float:
        """Set the learning rate of each parameter group for this step. Return the first one."""
        lrs = self.lrs_of_step(step)
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        return lrs[0]

    def lrs_of_step(self, step: int) -> list[float]:
        """Return the learning rate of each parameter group in a step of the run."""
        schedule, per_epoch = self.config.optimizer, self.steps_per_epoch
        return [
            lr_schedule.lr_of_step(schedule, base, step, per_epoch, self.lr_scale)
            if scheduled
            else base
            for base, scheduled in zip(self.base_lrs, self.scheduled, strict=True)
        ]

    def _pass(
        self, batch: loader.Batch, progress: rng.Progress, parts: float, last: bool
    ) -> Metrics:
        """Augment the views, compute the loss and its gradient, and return the metrics.

        The step has `parts` times as many images as this pass. The gradients of the ranks are
        averaged only in the `last` pass of a step, to save time.
        """
        amp, rank = self.config.compute.amp, distributed.rank()
        draws = [
            progress.generator(rng.COLOR, "cpu", rank, view) for view in range(len(self.recipe))
        ]
        augmented = color.augment_views(batch.views, self.recipe, draws)
        if self.log is not None:  # the training has begun
            self.log.views(augmented, self.recipe)
        views = list(map(precision.prepare_images, augmented))
        # layers such as stochastic depth draw from the global generator
        seed = rng.key(rng.LAYERS, self.config.run.seed, progress.step, progress.micro, rank)
        torch.manual_seed(seed >> 1)
        alone = last or distributed.world_size() == 1
        with contextlib.nullcontext() if alone else self.net.no_sync():
            with precision.autocast(amp, self.device):
                loss, metrics = self.task.loss(self.net, views, batch, progress)
            self.scaler.scale(loss / parts).backward()
        return {"loss": loss, **metrics}

    def _clip_gradient(self) -> Metrics:
        """Clip the gradient. Return the norms of the task's `grad_norm_modules` before clipping."""
        clip, parts = self.config.optimizer.clip_grad, self.task.grad_norm_modules
        if not clip and not parts:
            return {}
        self.scaler.unscale_(self.optimizer)
        norms = {}
        for name, part in parts.items():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            # leave out steps with a non-finite gradient, which the scaler skips under fp16
            counts = norm.isfinite()
            norms[f"grad_{name}"] = torch.where(counts, norm, 0.0), counts
        for module in self.task.grad_clip_modules if clip else []:
            params = [p for p in module.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(params, clip)
        return norms

    def _restore(self, state: checkpoint.State) -> None:
        """Restore the run from a checkpoint. Raises InputError if it does not fit."""
        config, task, path = self.config, self.task, self.config.log.resume
        tests = config.only_tests  # a run that only tests needs no optimizer
        checkpoint.check_origin(state, config)
        if not tests:
            resume.check_unchanged(config, state, self.batch)
        task.restore(state)
        images = state.get("images", len(task.images))
        if images != len(task.images):
            raise InputError(
                f"{path}: was trained on {counted(images, 'image')}, but {task.images.root} has "
                f"{len(task.images)}; resume with the data it was made with"
            )
        if not tests and state.get("image_digest", self.image_digest) != self.image_digest:
            print_rank0(
                f"warning: {path}: was trained on other images than those in {task.images.root}: "
                "their names, labels or order differ, so the run does not continue exactly; resume "
                "with the data it was made with"
            )
        checkpoint.restore(task.module, state, path, task.may_diverge)
        if not tests:
            optim.restore(self.optimizer, state["optimizer"], path, task.may_diverge)
            precision.restore(self.scaler, state.get("scaler", {}), path)
        task.check_restored()

    def _step_of(self, state: checkpoint.State) -> int:
        """Return the step to resume at, rescaled if the batch size changed."""
        progress, epoch = state["progress"], state["epoch"]
        inside = 0
        if "batch" in progress:
            begun = progress["step"] - epoch * progress.get("steps_per_epoch", 0)
            inside = begun * progress["batch"] // self.batch
        return epoch * self.steps_per_epoch + min(inside, self.steps_per_epoch)

    def save(self, name: str, epoch: int, step: int | None = None) -> Path:
        """Write a checkpoint on rank 0. Return its path on every rank.

        Args:
            name: name of the file in the run folder.
            epoch: number of epochs done.
            step: number of steps done, if the last epoch is unfinished.

        Raises InputError if the file cannot be written.
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
            "image_digest": self.image_digest,
            "state_dict": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {
                "step": step,
                "samples": self.order.images(step) * distributed.world_size(),
                "seed": config.run.seed,
                "batch": self.batch,
                "steps_per_epoch": self.steps_per_epoch,
            },
            **task.state(),
        }
        checkpoint.save(path, state)
        if config.log.resume and not self._saved:
            write_options(config)  # not earlier; see RunLog
        self._saved = True
        return path
