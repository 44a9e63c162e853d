"""The training loop: one for every script. What is trained, and on what loss, is a subclass's business."""

import contextlib
import math
import sys
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moco import devices, distributed, rng
from moco.augment import color, recipes
from moco.data import cache, loader
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.engine import checkpoint, optim, precision, resume
from moco.engine.log import Mean, Metrics, RunLog, write_options
from moco.errors import InputError
from moco.launch import interrupt

COLLAPSED = 0.1  # feature_std, below which a warning is given


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
        self.batch = (
            args.batch_per_process * distributed.world_size() * args.accumulation_steps
        )  # of a step
        self.lr_scale = optim.scale(args.learning_rate_scaling, self.batch)
        self.optimizer = optim.make(self.groups(), args)
        # before any schedule, and before a resumed one
        self.rates = [group["lr"] * self.lr_scale for group in self.optimizer.param_groups]
        self.scaler = self.make_scaler()
        state = checkpoint.load(args.resume) if args.resume else None
        if state:
            self._resume(state)
        self.ddp = distributed.data_parallel(self.trained())
        self.order = loader.TrainBatchSampler(
            len(images), args.batch_per_process, args.accumulation_steps, args.seed
        )
        self.steps_per_epoch = self.order.steps_per_epoch
        self.order.stop = self.steps_per_epoch * args.epochs
        self._unreadable: set[int] = set()
        self._recent: list[
            tuple[int, Tensor, Tensor]
        ] = []  # step, loss, images of the passes since losses were looked at
        self.order.start = self._step_of(state) if state else -self.images_before() // self.batch
        self.first_epoch = self.order.start // max(1, self.steps_per_epoch)
        if state:
            self.first_epoch = min(
                self.first_epoch, state["epoch"]
            )  # all its steps may be done, and its end not
        place = torch.tensor([[self.order.start, self.first_epoch]], device=device)
        if (distributed.all_gather(place) != place).any():
            raise InputError(
                "--resume: the processes do not read the same checkpoint; give one that all nodes see"
            )

    def trained(self) -> nn.Module:
        """What `forward` calls as `self.ddp`: the module, or the part of it that trains."""
        return self.module

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: what trains, at the one rate of `--lr`."""
        params = [p for p in self.module.parameters() if p.requires_grad]
        return [{"params": params, "lr": self.args.lr, "weight_decay": self.args.wd}]

    def make_scaler(self) -> torch.amp.GradScaler:
        """Of the gradient, under fp16."""
        return precision.scaler(self.args.amp, self.device)

    def images_before(self) -> int:
        """How many images train before epoch 0, in steps that are counted below 0."""
        return 0

    @abstractmethod
    def forward(
        self, views: list[Tensor], batch: loader.Batch, progress: rng.Progress
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one pass, through `self.ddp`."""

    def start_epoch(self) -> None:
        """Put the module into the mode it trains in."""
        self.module.train()

    def after_step(self) -> None:  # noqa: B027 (a subclass may have nothing to add)
        """What follows the optimizer's step."""

    def end_epoch(self, done: int) -> dict[str, float]:
        """Evaluate and save after `done` epochs; returns what to log."""
        return {}

    def finished(self) -> None:  # noqa: B027
        """Print what can follow the training. `self.seconds` is its duration over all starts."""

    seconds: float | None = None
    _saved = False  # whether this start has written a checkpoint
    may_diverge = False  # whether numbers that are not finite end the run

    @abstractmethod
    def save_inside(self, epoch: int, step: int) -> Path:
        """Save before the end of an epoch, when `step` steps of the run are done; returns the file's path."""

    def keep_in_memory(self) -> None:
        """Decode the images that every epoch reads into memory, if --cache-images says so."""
        (self.images,) = cache.load(self.args, self.images)

    def train(self) -> None:
        """Every epoch that is left, with its log lines."""
        args, per_epoch = self.args, self.steps_per_epoch
        self._announce()
        if self.order.start < self.order.stop:
            self.keep_in_memory()
        log = RunLog(args, self.order.stop, self.order.start, self.device)
        if distributed.rank() == 0:
            checkpoint.begin(Path(args.save_dir), args.resume)
        cut = loader.RandomCrops(self.recipe, args.seed)
        skips = args.on_bad_image == "skip"
        batches = loader.batches(self.images, cut, self.order, args, self.device, skips)
        with interrupt.Requests() as requests, contextlib.closing(log), contextlib.closing(batches):
            for epoch in range(self.first_epoch, args.epochs):
                self._epoch(epoch, batches, log, requests)
                if epoch < 0:
                    continue
                distributed.broadcast_buffers(self.module)
                metrics = self.end_epoch(epoch + 1)
                if metrics:
                    log.line(epoch, (epoch + 1) * per_epoch, metrics)
        self.seconds = log.seconds()
        self.finished()

    def _epoch(
        self, epoch: int, batches: Iterator[loader.Batch], log: RunLog, requests: interrupt.Requests
    ) -> None:
        args, per_epoch = self.args, self.steps_per_epoch
        self.start_epoch()
        mean, means, self._skipped = Mean(), {}, 0
        for step in range(max(epoch * per_epoch, self.order.start), (epoch + 1) * per_epoch):
            rate = self._set_rates(step)
            for micro in range(args.accumulation_steps):
                before = time.perf_counter()
                batch = next(batches)
                log.wait(time.perf_counter() - before)
                self._note(batch.unreadable)
                found = self._pass(
                    batch, rng.Progress(args.seed, epoch, step, micro, per_epoch, args.epochs)
                )
                self._recent.append((step, found["loss"].detach(), batch.index))
                mean.add(found)
            mean.add(self._gradients())
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.after_step()
            log.tick()
            asked, ends = requests.agreed(), (step + 1) % per_epoch == 0
            saves = asked or (
                args.save_every_steps and (step + 1) % args.save_every_steps == 0 and not ends
            )
            if saves or ends or (step + 1) % args.print_freq == 0:
                self._check_numbers(rate)
            if ends or asked or (step + 1) % args.print_freq == 0:
                means = mean.read()
                log.line(epoch, step + 1, {**means, "lr": rate})
            if saves:
                path = self.save_inside(epoch, step + 1)
            if asked:
                distributed.barrier()
                raise interrupt.Interrupted(
                    f"{asked}: saved {path} after step {step + 1}; --resume auto goes on from there"
                )
        self._look_at(means, epoch)

    def _set_rates(self, step: int) -> float:
        """Give each parameter group its rate for this step; returns the first one's."""
        passed = step / self.steps_per_epoch if step >= 0 else self.args.lr_warmup_epochs
        if self.args.lr_by != "step":
            passed = int(passed) + (self.args.lr_by == "epoch-end" and step >= 0)
        rates = self._rates(passed)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates[0]

    def _rates(self, passed: float) -> list[float]:
        """Return each parameter group's rate after `passed` epochs."""
        return [optim.rate(self.args, base, passed, self.lr_scale) for base in self.rates]

    def _pass(self, batch: loader.Batch, progress: rng.Progress) -> Metrics:
        """Views, loss, gradient. The ranks' gradients meet in the last pass of a step."""
        args, last = self.args, progress.micro + 1 == self.args.accumulation_steps
        draws = [
            progress.generator(rng.COLOR, "cpu", distributed.rank(), i)
            for i in range(len(self.recipe))
        ]
        views = list(map(precision.layout, color.augment_views(batch.views, self.recipe, draws)))
        # what layers draw by themselves, such as which of them stochastic depth leaves out
        torch.manual_seed(
            rng.key(rng.LAYERS, args.seed, progress.step, progress.micro, distributed.rank()) >> 1
        )
        with (
            contextlib.nullcontext()
            if last or distributed.world_size() == 1
            else self.ddp.no_sync()
        ):
            with precision.autocast(args.amp, self.device):
                loss, metrics = self.forward(views, batch, progress)
            self.scaler.scale(loss / args.accumulation_steps).backward()
        return {"loss": loss, **metrics}

    def _note(self, unreadable: list[tuple[int, str]]) -> None:
        """Name images that could not be read and were replaced, each once. Raises InputError where they are too many."""
        for i, reason in unreadable:
            if i not in self._unreadable:
                tqdm.write(f"skipped, another image takes its place: {reason}", file=sys.stderr)
            self._unreadable.add(i)
        self._skipped += len(unreadable)
        most = max(
            1,
            self.steps_per_epoch
            * self.args.batch_per_process
            * self.args.accumulation_steps
            // 100,
        )
        if self._skipped > most:
            raise InputError(
                f"{self.images.root}: more than 1 % of the images cannot be read ({self._skipped} in this epoch, so far); "
                "look at the data, the disk or the network"
            )

    def _look_at(self, means: dict[str, float], epoch: int) -> None:
        """Say so where the epoch's last features are nearly all the same."""
        deviation = means.get("feature_std", 1.0)
        if epoch >= 0 and deviation < COLLAPSED:
            print_rank0(
                f"warning: epoch {epoch} ends with a feature_std of {deviation:.2g}, where 1 is spread out and 0 is one point: "
                "the features have collapsed, or nearly; try a lower --lr, a longer --lr-warmup-epochs, a larger --batch-size"
            )

    @torch.no_grad()
    def _check_numbers(self, rate: float) -> None:
        """Raise InputError, on every rank, where one of the last losses of any rank, or a weight, is no finite number.

        It is asked before anything is saved; until then nothing has waited for the device.
        """
        steps, losses, indices = zip(*self._recent, strict=True)
        self._recent.clear()
        if self.may_diverge:
            return
        weights = torch.stack(
            torch._foreach_norm([p for p in self.module.parameters() if p.requires_grad])
        ).max()
        losses = (
            *losses,
            weights,
        )  # which the last step has made infinite, though its loss was not
        steps, indices = (*steps, steps[-1]), (*indices, indices[-1])
        wide = devices.widest(self.device)
        values = torch.stack(losses).to(wide)
        bad = (~values.isfinite()).nonzero()
        first = int(bad[0]) if len(bad) else 0
        images = indices[first][:2].to(wide)
        facts = torch.cat(
            [
                values.new_tensor([steps[first] if len(bad) else math.inf]),
                values[first : first + 1],
                images,
            ]
        )
        step, loss, *images = min(
            distributed.all_gather(facts[None]).tolist(), key=lambda rank: rank[0]
        )
        if math.isfinite(step):
            names = ", ".join(self.images.name(int(i)) for i in images)
            where = f"step {step:.0f} (epoch {step // self.steps_per_epoch:.0f}, lr {rate:g}, images {names}, ...)"
            kept = next(iter(checkpoint.found(self.args.save_dir)), None)
            if kept:
                lr = "lr" if hasattr(self.args, "lr") else "lr-backbone,lr-classifier"
                what = f"the last checkpoint from before it is {kept}; "
                what += f"continue with --resume auto --allow-change {lr} and a lower learning rate"
            else:
                what = (
                    "there is no checkpoint from before it; lower --lr, or raise --lr-warmup-epochs"
                )
            raise InputError(f"the loss, or a weight, is {loss:g} at {where}; {what}")

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
            torch.nn.utils.clip_grad_norm_(
                [p for p in together.parameters() if p.grad is not None], clip
            )
        return lengths

    def independent(self) -> Iterable[nn.Module]:
        """What trains, in parts that have nothing to do with each other: each one's gradient is clipped by itself."""
        return [self.module]

    def _announce(self) -> None:
        args, w, batch = self.args, distributed.world_size(), self.batch
        if not self.steps_per_epoch:
            raise InputError(
                f"{self.images.root}: {len(self.images)} images do not fill one batch of {batch}; lower --batch-size"
            )
        print_rank0(
            f"{args.method} {args.arch}: {len(self.images)} images of {len(self.images.classes)} classes in {self.images.root}"
        )
        print_rank0(
            f"views {args.recipe} at {args.image_size} pixels; {self.device.type}, amp {args.amp}"
        )
        rates = ", ".join(dict.fromkeys(f"{rate:g}" for rate in self.rates))
        scaling = (
            "taken as given"
            if args.learning_rate_scaling == "none"
            else f"{args.learning_rate_scaling} scaling"
        )
        print_rank0(
            f"total batch {batch} = {args.batch_per_process} per process x {w} processes x {args.accumulation_steps} accumulation; "
            f"lr after scaling {rates} ({scaling}), lr warm-up {args.lr_warmup_epochs} epochs; "
            f"{args.epochs} epochs x {self.steps_per_epoch} steps"
        )
        gpus = devices.count(self.device.type)
        if self.device.type == "cuda" and w == 1 < gpus and args.gpu is None:
            print_rank0(
                f"one of {gpus} GPUs trains; --multiprocessing-distributed starts a process on each"
            )
        if self.order.start < 0:
            before = -self.order.start
            print_rank0(
                f"{before} steps before epoch 0, counted from -{before}: {before / self.steps_per_epoch:.3g} epochs of images"
            )
        if args.lr_warmup_epochs >= args.epochs:
            print_rank0(
                f"the warm-up's {args.lr_warmup_epochs} epochs (--lr-warmup-epochs) outlast the run: the rate is not reached"
            )
        if args.lr_by == "epoch-end" and args.epochs == 1 and not max(self._rates(1)):
            print_rank0(
                "the only epoch has a learning rate of 0, that of its end (--lr-by epoch-end): it trains nothing"
            )
        if args.resume:
            inside = self.order.start - self.first_epoch * self.steps_per_epoch
            print_rank0(
                f"resumed from {args.resume} at epoch {self.first_epoch}"
                + f", after {inside} of its steps" * bool(inside)
            )
            self._say_if_done()
        print_rank0(f"run folder {args.save_dir}")

    def _say_if_done(self) -> None:
        done, epochs = self.first_epoch, self.args.epochs
        if done >= epochs:
            print_rank0(
                f"no epochs are left: {done} are done, and --epochs is {epochs}; raise it to train longer"
            )

    def check_resumed(self, state: checkpoint.State) -> None:  # noqa: B027
        """Raise InputError if the checkpoint does not go with this task's data."""

    def _resume(self, state: checkpoint.State) -> None:
        """Restore the run's state from the checkpoint of `--resume`. Raises InputError if it is of another run."""
        args = self.args
        tests = getattr(args, "evaluate", False)  # a test alone takes no step, by no optimizer
        checkpoint.check_origin(state, args)
        if not tests:
            resume.check_unchanged(args, state, self.batch)
        self.check_resumed(state)
        images = state.get("images", len(self.images))
        if images != len(self.images):
            where = f"{self.images.root} has {len(self.images)}"
            raise InputError(
                f"{args.resume}: was trained on {images} images, but {where}; resume with the data it was made with"
            )
        checkpoint.restore(self.module, state, args.resume, self.may_diverge)
        if not tests:
            optim.restore(self.optimizer, state["optimizer"], args.resume, self.may_diverge)
            precision.restore(self.scaler, state.get("scaler", {}), args.resume)

    def _step_of(self, state: checkpoint.State) -> int:
        """The step to run next: of the epoch that was begun, as many as its images fill, should the batch be another one now."""
        progress, epoch = state["progress"], state["epoch"]
        begun = (
            progress["step"] - epoch * progress.get("steps_per_epoch", 0)
            if "batch" in progress
            else 0
        )
        inside = begun * progress.get("batch", 0) // self.batch
        return epoch * self.steps_per_epoch + min(inside, self.steps_per_epoch)

    def more_state(self) -> dict[str, Any]:
        """Return further entries of a checkpoint: plain values by key."""
        return {}

    def save(self, name: str, epoch: int, step: int | None = None) -> Path:
        """Write the run's state, on rank 0: after `epoch` epochs, or after `step` steps, of which some are the next epoch's.

        Returns the file's path.
        """
        path = Path(self.args.save_dir) / name
        if distributed.rank() != 0:
            return path
        step = epoch * self.steps_per_epoch if step is None else step
        state = {
            "epoch": max(epoch, 0),
            "arch": self.args.arch,
            "method": self.args.method,
            "args": vars(self.args),
            "images": len(self.images),
            "state_dict": {
                f"module.{key}": tensor for key, tensor in self.module.state_dict().items()
            },
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {
                "step": step,
                "samples": step * self.batch,
                "seed": self.args.seed,
                "batch": self.batch,
                "steps_per_epoch": self.steps_per_epoch,
            },
            **self.more_state(),
        }
        checkpoint.save(path, state)
        if self.args.resume and not self._saved:
            write_options(self.args)  # see RunLog
        self._saved = True
        return path
