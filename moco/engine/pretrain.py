"""The pre-training loop: one for every method."""

import contextlib
import functools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco import distributed, rng
from moco.augment import color
from moco.augment.recipes import recipe
from moco.data import datasets, loader
from moco.engine import checkpoint, features, optim, precision
from moco.engine.log import Mean, RunLog, say
from moco.errors import InputError

Build = Callable[[Namespace], nn.Module]


def run(args: Namespace, build: Build, method: str) -> None:
    """Pre-train the module that `build(args)` makes, in as many processes as the launcher gives.

    Expects the options of `cli.add_pretrain` with `recipe` filled in. Raises InputError before any process starts where
    the data folder or the run folder will not do.
    """
    datasets.find(args.data, ("train", "val") if args.knn_every else ("train",))
    if args.resume is None and any(Path(args.save_dir).glob("checkpoint_*.pth.tar")):
        raise InputError(f"--save-dir {args.save_dir}: holds another run's checkpoints; --resume one, or choose another folder")
    args.method = method
    distributed.launch(functools.partial(_worker, build), args)


def _worker(build: Build, args: Namespace, device: torch.device) -> None:
    Pretraining(args, build, device).train()


class Pretraining:
    """One process's part of a run: the method, its optimizer, and where they stand."""

    def __init__(self, args: Namespace, build: Build, device: torch.device):
        self.args, self.device = args, device
        state = checkpoint.load(args.resume) if args.resume else None
        if state:
            args.seed = state.get("progress", {}).get("seed", args.seed)
        torch.manual_seed(args.seed)
        self.recipe = recipe(args.recipe, args.image_size)
        self.root = datasets.find(args.data, ("train",))
        self.folder = datasets.scan(self.root, "train")
        self.method = precision.place(build(args), device, args.compile)
        self.optimizer = optim.sgd(self.method.parameters(), args)
        self.scaler = precision.scaler(args.amp, device)
        self.first_epoch = self._restore(state) if state else 0
        # queue and bank are equal on every rank by construction, and BN statistics are shared once an epoch
        self.ddp = DistributedDataParallel(self.method, broadcast_buffers=False) if distributed.world() > 1 else self.method
        self.order = loader.TrainOrder(
            len(self.folder), args.batch_per_process, args.accumulation_steps, self.first_epoch, args.epochs, args.seed
        )
        self.steps_per_epoch = self.order.batches // args.accumulation_steps

    def train(self) -> None:
        """Every epoch that is left, with its log lines, k-NN checks and checkpoints."""
        args, per_epoch = self.args, self.steps_per_epoch
        self._announce()
        log = RunLog(args, per_epoch * args.epochs, per_epoch * self.first_epoch)
        cut = loader.RandomCrops(self.recipe, args.seed)
        batches = loader.batches(self.folder, cut, self.order, features.workers_per_process(args), self.device)
        for epoch in range(self.first_epoch, args.epochs):
            self._epoch(epoch, batches, log)
            distributed.broadcast_buffers(self.method)
            done, last = epoch + 1, epoch + 1 == args.epochs
            if args.knn_every and (last or done % args.knn_every == 0):
                log.line(epoch, done * per_epoch, {"knn": self._knn()})
            if last or done % args.save_every == 0:
                self._save(epoch)
        log.close()

    def _epoch(self, epoch: int, batches: Iterator[loader.Batch], log: RunLog) -> None:
        args, per_epoch = self.args, self.steps_per_epoch
        lr = optim.learning_rate(args, epoch)
        optim.set_learning_rate(self.optimizer, lr)
        self.method.train()
        mean = Mean()
        for i in range(per_epoch):
            step = epoch * per_epoch + i
            for micro in range(args.accumulation_steps):
                before = time.perf_counter()
                batch = next(batches)
                log.wait(time.perf_counter() - before)
                mean.add(self._forward_backward(batch, rng.Progress(args.seed, epoch, step, micro, per_epoch, args.epochs)))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.method.after_step()
            log.tick()
            if (step + 1) % args.print_freq == 0 or i + 1 == per_epoch:
                log.line(epoch, step + 1, {**mean.read(), "lr": lr})

    def _forward_backward(self, batch: loader.Batch, progress: rng.Progress) -> dict[str, Tensor]:
        """One pass of the step: colour, loss, gradient. The ranks' gradients meet in the last pass."""
        args, last = self.args, progress.micro + 1 == self.args.accumulation_steps
        views = [
            precision.layout(color.augment(crops, view, progress.generator(rng.COLOR + 16 * i, "cpu", distributed.rank())))
            for i, (crops, view) in enumerate(zip(batch.views, self.recipe, strict=True))
        ]
        with contextlib.nullcontext() if last or self.ddp is self.method else self.ddp.no_sync():
            with precision.autocast(args.amp, self.device):
                loss, metrics = self.ddp(views, batch.index, progress)
            self.scaler.scale(loss / args.accumulation_steps).backward()
        return {"loss": loss, **metrics}

    def _knn(self) -> float:
        """k-NN top-1 of the method's encoder on val/, against train/."""
        args = self.args
        val = datasets.scan(self.root, "val", self.folder.classes)
        bank, queries = (features.extract(self.method.encoder, folder, args, self.device) for folder in (self.folder, val))
        return features.knn(*bank, *queries, len(val.classes), [args.knn_k], args.knn_t)[args.knn_k]

    def _announce(self) -> None:
        args, w = self.args, distributed.world()
        batch = args.batch_per_process * w * args.accumulation_steps
        if not self.steps_per_epoch:
            raise InputError(f"{self.root / 'train'}: {len(self.folder)} images do not fill one batch of {batch}; lower --batch-size")
        say(f"{args.method} {args.arch} on {self.folder.root}: {len(self.folder)} images, views {args.recipe} at {args.image_size} pixels")
        say(
            f"total batch {batch} = {args.batch_per_process} per process x {w} processes x {args.accumulation_steps} accumulation; "
            f"lr after scaling {args.lr:g} (as given, {args.lr_warmup_epochs} epochs of lr warm-up); "
            f"{args.epochs} epochs x {self.steps_per_epoch} steps; {self.device.type}, amp {args.amp}"
        )
        if args.resume:
            say(f"resumed from {args.resume} at epoch {self.first_epoch}")
        say(f"run folder {args.save_dir}")

    def _restore(self, state: checkpoint.State) -> int:
        """Take up a checkpoint; returns the epoch to run next."""
        args = self.args
        checkpoint.restore(self.method, state, args.resume, args.arch, args.method)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        return state["epoch"]

    def _save(self, epoch: int) -> None:
        if distributed.rank() != 0:
            return
        done = epoch + 1
        step = done * self.steps_per_epoch
        samples = step * self.args.accumulation_steps * self.args.batch_per_process * distributed.world()
        checkpoint.save(
            Path(self.args.save_dir) / f"checkpoint_{epoch:04d}.pth.tar",
            {
                "epoch": done,
                "arch": self.args.arch,
                "method": self.args.method,
                "args": vars(self.args),
                "state_dict": checkpoint.with_prefix(self.method.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": {"step": step, "samples": samples, "seed": self.args.seed},
            },
        )
