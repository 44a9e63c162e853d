"""The training loop: one for every script. What is trained, and on what loss, is a subclass's business."""

import contextlib
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed, rng
from moco.augment import color, recipes
from moco.data import loader
from moco.data.images import Images
from moco.engine import checkpoint, optim, precision
from moco.engine.log import Mean, Metrics, RunLog, say
from moco.errors import InputError


class Trainer(ABC):
    """One process's part of a run: a module, its optimizer, and where they stand.

    Args:
        args: the options of `cli.add_input`, `add_optimizer` and `add_run`, with `method` and `batch_per_process` set.
        module: what is trained and saved; already on `device`.
        images: what it is trained on.
    """

    def __init__(self, args: Namespace, module: nn.Module, images: Images, device: torch.device):
        self.args, self.module, self.images, self.device = args, module, images, device
        self.recipe = recipes.of_options(args)
        if args.compile:
            color.fuse()
        self.batch = args.batch_per_process * distributed.world() * args.accumulation_steps  # of a step
        self.lr_scale = optim.scale(args.learning_rate_scaling, self.batch)
        self.optimizer = optim.make(self.groups(), args)
        # before any schedule, and before a resumed one
        self.rates = [group["lr"] * self.lr_scale for group in self.optimizer.param_groups]
        self.scaler = precision.scaler(args.amp, device)
        self.first_epoch = self._resume(checkpoint.load(args.resume)) if args.resume else 0
        self.ddp = distributed.data_parallel(self.trained())
        self.order = loader.TrainOrder(len(images), args.batch_per_process, args.accumulation_steps, args.seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.order.stop = self.steps_per_epoch * args.epochs
        before = 0 if args.resume else -(-self.images_before() // self.batch)
        self.order.start = self.steps_per_epoch * self.first_epoch - before

    def trained(self) -> nn.Module:
        """What `forward` calls as `self.ddp`: the module, or the part of it that trains."""
        return self.module

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: what trains, at the one rate of `--lr`."""
        params = [p for p in self.module.parameters() if p.requires_grad]
        return [{"params": params, "lr": self.args.lr, "weight_decay": self.args.wd}]

    def images_before(self) -> int:
        """How many images train before epoch 0, in steps that are counted below 0."""
        return 0

    @abstractmethod
    def forward(self, views: list[Tensor], batch: loader.Batch, progress: rng.Progress) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one pass, through `self.ddp`."""

    def start_epoch(self) -> None:
        """Put the module into the mode it trains in."""
        self.module.train()

    def after_step(self) -> None:  # noqa: B027 (a subclass may have nothing to add)
        """What follows the optimizer's step."""

    def end_epoch(self, done: int) -> dict[str, float]:
        """Evaluate and save after `done` epochs; returns what to log."""
        return {}

    def train(self) -> None:
        """Every epoch that is left, with its log lines."""
        args, per_epoch = self.args, self.steps_per_epoch
        self._announce()
        log = RunLog(args, self.order.stop, self.order.start)
        cut = loader.RandomCrops(self.recipe, args.seed)
        batches = loader.batches(self.images, cut, self.order, args, self.device)
        for epoch in range(self.order.start // per_epoch, args.epochs):
            self._epoch(epoch, batches, log)
            if epoch < 0:
                continue
            distributed.broadcast_buffers(self.module)
            metrics = self.end_epoch(epoch + 1)
            if metrics:
                log.line(epoch, (epoch + 1) * per_epoch, metrics)
        log.close()

    def _epoch(self, epoch: int, batches: Iterator[loader.Batch], log: RunLog) -> None:
        args, per_epoch = self.args, self.steps_per_epoch
        self.start_epoch()
        mean = Mean()
        for step in range(max(epoch * per_epoch, self.order.start), (epoch + 1) * per_epoch):
            rate = self._set_rates(step)
            for micro in range(args.accumulation_steps):
                before = time.perf_counter()
                batch = next(batches)
                log.wait(time.perf_counter() - before)
                mean.add(self._pass(batch, rng.Progress(args.seed, epoch, step, micro, per_epoch, args.epochs)))
            mean.add(self._gradients())
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.after_step()
            log.tick()
            if (step + 1) % args.print_freq == 0 or (step + 1) % per_epoch == 0:
                log.line(epoch, step + 1, {**mean.read(), "lr": rate})

    def _set_rates(self, step: int) -> float:
        """Give each parameter group its rate for this step; returns the first one's."""
        passed = step / self.steps_per_epoch if step >= 0 else self.args.lr_warmup_epochs
        if self.args.lr_by == "epoch":
            passed = int(passed)
        rates = [optim.rate(self.args, base, passed, self.lr_scale) for base in self.rates]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates[0]

    def _pass(self, batch: loader.Batch, progress: rng.Progress) -> Metrics:
        """Views, loss, gradient. The ranks' gradients meet in the last pass of a step."""
        args, last = self.args, progress.micro + 1 == self.args.accumulation_steps
        views = [
            precision.layout(color.augment(crops, view, progress.generator(rng.COLOR, "cpu", distributed.rank(), i)))
            for i, (crops, view) in enumerate(zip(batch.views, self.recipe, strict=True))
        ]
        # what layers draw by themselves, such as which of them stochastic depth leaves out
        torch.manual_seed(rng.key(rng.LAYERS, args.seed, progress.step, progress.micro, distributed.rank()) >> 1)
        with contextlib.nullcontext() if last or distributed.world() == 1 else self.ddp.no_sync():
            with precision.autocast(args.amp, self.device):
                loss, metrics = self.forward(views, batch, progress)
            self.scaler.scale(loss / args.accumulation_steps).backward()
        return {"loss": loss, **metrics}

    def _gradients(self) -> Metrics:
        """Clip the gradient; returns the length before that of each of the module's `parts`, where it names any."""
        clip, parts = self.args.clip_grad, getattr(self.module, "parts", {})
        if not clip and not parts:
            return {}
        self.scaler.unscale_(self.optimizer)
        lengths = {}
        for name, part in parts.items():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            length = torch.stack(torch._foreach_norm(gradients)).norm()
            counts = length.isfinite()  # under fp16 the scaler skips a step with another
            lengths[f"grad_{name}"] = torch.where(counts, length, 0.0), counts
        for together in self.independent() if clip else []:
            torch.nn.utils.clip_grad_norm_([p for p in together.parameters() if p.grad is not None], clip)
        return lengths

    def independent(self) -> Iterable[nn.Module]:
        """What trains, in parts that have nothing to do with each other: each one's gradient is clipped by itself."""
        return [self.module]

    def _announce(self) -> None:
        args, w, batch = self.args, distributed.world(), self.batch
        if not self.steps_per_epoch:
            raise InputError(f"{self.images.root}: {len(self.images)} images do not fill one batch of {batch}; lower --batch-size")
        say(f"{args.method} {args.arch}: {len(self.images)} images of {len(self.images.classes)} classes in {self.images.root}")
        say(f"views {args.recipe} at {args.image_size} pixels; {self.device.type}, amp {args.amp}")
        rates = ", ".join(dict.fromkeys(f"{rate:g}" for rate in self.rates))
        scaling = "taken as given" if args.learning_rate_scaling == "none" else f"{args.learning_rate_scaling} scaling"
        say(
            f"total batch {batch} = {args.batch_per_process} per process x {w} processes x {args.accumulation_steps} accumulation; "
            f"lr after scaling {rates} ({scaling}), lr warm-up {args.lr_warmup_epochs} epochs; "
            f"{args.epochs} epochs x {self.steps_per_epoch} steps"
        )
        if self.device.type == "cpu" and args.amp != "off":
            say("many CPUs are slower with mixed precision, by far: --amp off")
        if self.device.type == "cuda" and w == 1 < torch.cuda.device_count() and args.gpu is None:
            say(f"one of {torch.cuda.device_count()} GPUs trains; --multiprocessing-distributed starts a process on each")
        if self.order.start < 0:
            before = -self.order.start
            say(f"{before} steps before epoch 0, counted from -{before}: {before / self.steps_per_epoch:.3g} epochs of images")
        if args.lr_warmup_epochs >= args.epochs:
            say(f"the warm-up's {args.lr_warmup_epochs} epochs (--lr-warmup-epochs) outlast the run: the rate is not reached")
        if args.resume:
            say(f"resumed from {args.resume} at epoch {self.first_epoch}")
        say(f"run folder {args.save_dir}")

    def _resume(self, state: checkpoint.State) -> int:
        """Take up a checkpoint; returns the epoch to run next."""
        args = self.args
        images = state.get("images", len(self.images))
        if images != len(self.images):
            where = f"{self.images.root} has {len(self.images)}"
            raise InputError(f"{args.resume}: was trained on {images} images, but {where}; resume with the data it was made with")
        checkpoint.restore(self.module, state, args.resume, args.arch, args.method)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        args.seed = state["progress"]["seed"]
        return state["epoch"]

    def save(self, name: str, done: int, **more: float) -> None:
        """Write the run's state after `done` epochs to the run folder, on rank 0."""
        if distributed.rank() != 0:
            return
        step = done * self.steps_per_epoch
        state = {
            "epoch": done,
            "arch": self.args.arch,
            "method": self.args.method,
            "args": vars(self.args),
            "images": len(self.images),
            "state_dict": {f"module.{key}": tensor for key, tensor in self.module.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {"step": step, "samples": step * self.batch, "seed": self.args.seed},
            **more,
        }
        checkpoint.save(Path(self.args.save_dir) / name, state)
