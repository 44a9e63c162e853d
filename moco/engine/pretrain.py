"""Pre-training, for every method: the training loop on unlabelled views, the k-NN monitor and the checkpoints."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moco import distributed
from moco.augment import recipes
from moco.builder.batch_norm import MIN_BN_GROUP, bn_groups
from moco.data import folders, loader, registry, subsets
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.encoder import networks, resnets
from moco.engine import checkpoint, features, next_commands, precision
from moco.engine.log import Metrics, clock
from moco.engine.trainer import Trainer
from moco.errors import InputError
from moco.rng import Progress


def check_views(args: Namespace, several_crops: bool = False) -> None:
    """Refuse a recipe that does not make two views, or, with `several_crops`, more than two."""
    views = len(recipes.of_options(args))
    if views < 2 or (views > 2) != several_crops:
        needed = "more than two" if several_crops else "two"
        raise InputError(
            f"--recipe {args.recipe}: makes {views} views, but {needed} are needed; choose another"
        )


def check(args: Namespace, transformers: bool = False) -> None:
    """Check, before any process starts, the architecture (a ResNet, unless `transformers`), the data folder and the run folder."""
    if not transformers and args.arch not in resnets.ARCHS:
        raise InputError(
            f"--arch {args.arch}: this script is for torchvision's ResNets; main_moby.py trains transformers"
        )
    if args.dataset == "imagenet":
        root = _find(args)
        subsets.check_classes(root / "train", args.class_list, args.data_name)
    else:
        registry.check(args.dataset, args.data, args.download)
        if registry.METRIC[args.dataset] == "map11" and args.knn_every:
            several = f"each image of {args.dataset} has several labels, and k-NN needs one"
            raise InputError(f"--knn-every: {several}; leave it out")
    mean, std = registry.normalization(args.dataset)
    args.mean, args.std = args.mean or mean, args.std or std


def _find(args: Namespace) -> Path:
    """Return the data folder. Raise InputError, which names `--knn-every 0` if only the k-NN monitor cannot use it."""
    if not args.knn_every:
        return folders.find(args.data, ("train",))
    try:
        return folders.find(args.data, ("train", "val"))
    except InputError as error:
        folders.find(args.data, ("train",))  # raises its own error if train/ is wrong
        raise InputError(f"{error}; or train without the k-NN monitor: --knn-every 0") from None


def train(args: Namespace, device: torch.device, build: Callable[[Images], nn.Module]) -> None:
    """Pre-train the model that `build(images)` returns. Runs in every process."""
    if args.batch_per_process < 2:
        raise InputError(
            "--batch-size gives each process a single image; batch norm and the loss need at least two. Raise --batch-size"
        )
    images = registry.train_images(args.dataset, args.data, args.class_list)
    if args.knn_every and args.knn_k > len(images):
        print_rank0(
            f"--knn-k {args.knn_k}: the bank has {len(images)} images, and all of them vote"
        )
    torch.manual_seed(args.seed)
    method = build(images)
    Pretraining(
        args, precision.place(method, device, args.compile, args.grad_checkpoint), images, device
    ).train()


class Pretraining(Trainer):
    """Trains a method: `module(views, index, progress)` gives its loss, `module.encoder` is what the monitor judges."""

    best = (
        -1.0,
        -1,
    )  # the best k-NN top-1 among the epochs that were saved, and which epoch it was
    # epochs whose checkpoints an earlier start kept by another --keep or --keep-every
    spared: frozenset[int] = frozenset()
    _left_out: frozenset[int] = frozenset()  # unreadable images that the monitor has named

    def _announce(self) -> None:
        super()._announce()
        args = self.args
        asked, batch = getattr(args, "bn_splits", 1), args.batch_per_process
        used = bn_groups(asked, batch)
        if distributed.world_size() == 1 and used < asked:
            groups = "1 group is" if used == 1 else f"{used} groups are"
            print_rank0(
                f"--bn-splits {asked}: {groups} used, because each needs {MIN_BN_GROUP} images and a pass has {batch}"
            )

    def images_before(self) -> int:
        return getattr(self.module, "images_before", 0)

    def forward(
        self, views: list[Tensor], batch: loader.Batch, progress: Progress
    ) -> tuple[Tensor, Metrics]:
        return self.ddp(views, batch.index, progress)

    def after_step(self) -> None:
        self.module.after_step()

    def end_epoch(self, done: int) -> dict[str, float]:
        args, last = self.args, done == self.args.epochs
        saves = last or done % args.save_every == 0
        metrics = {}
        if args.knn_every and (last or done % args.knn_every == 0):
            self.save_inside(done - 1, done * self.steps_per_epoch)  # it takes a while
            metrics["knn"] = self._knn()
            if saves and metrics["knn"] > self.best[0]:
                self.best = metrics["knn"], done - 1
        if saves:
            self._tidy(self.save(f"checkpoint_{done - 1:04d}.pth.tar", done))
        return metrics

    def more_state(self) -> dict[str, Any]:
        accuracy, epoch = self.best
        best = {"best_knn": accuracy, "best_epoch": epoch} if epoch >= 0 else {}
        return {**best, "spared": sorted(self.spared)}

    def _resume(self, state: checkpoint.State) -> None:
        super()._resume(state)
        best, spared = (state.get("best_knn"), state.get("best_epoch")), state.get("spared")
        if isinstance(best[0], float) and isinstance(best[1], int):
            self.best = best
        if isinstance(spared, list):
            self.spared = frozenset(epoch for epoch in spared if type(epoch) is int)
        retention = ("keep", "keep_every")
        if any(state["args"].get(name) != getattr(self.args, name) for name in retention):
            there = checkpoint.numbered(Path(self.args.save_dir), inside=False)
            self.spared |= frozenset(map(checkpoint.epoch_of, there))

    def save_inside(self, epoch: int, step: int) -> Path:
        path = self.save(f"checkpoint_{max(epoch, 0):04d}_{step}.pth.tar", epoch, step)
        self._tidy(path)
        return path

    def _tidy(self, newest: Path) -> None:
        """Delete superseded mid-epoch checkpoints, and the epoch checkpoints that --keep leaves out."""
        if distributed.rank() != 0:
            return
        superseded = checkpoint.numbered(newest.parent, inside=True)
        if self.args.keep:
            older = checkpoint.numbered(newest.parent, inside=False)[self.args.keep :]
            superseded += [path for path in older if not self._is_kept(checkpoint.epoch_of(path))]
        for path in set(superseded) - {newest}:
            path.unlink(missing_ok=True)

    def _is_kept(self, epoch: int) -> bool:
        """Return whether the checkpoint of an epoch, counted from 0, is kept however old it is."""
        every = self.args.keep_every
        regular = every > 0 and (epoch + 1) % every == 0
        return regular or epoch in self.spared or epoch == self.best[1]

    def finished(self) -> None:
        print_rank0(f"trained for {clock(self.seconds)}")
        saved = next(iter(checkpoint.found(self.args.save_dir)), None)
        if saved is not None and distributed.rank() == 0:
            print_rank0(f"the last checkpoint is {saved}; what you can run next:")
            for command in next_commands.commands(self.args, self.images.root, saved):
                print_rank0(f"  {command}")

    def _knn(self) -> float:
        """Return the k-NN top-1 of the encoder on val/, against train/, in [0, 1].

        With `--on-bad-image skip`, training images that cannot be read are left out.
        """
        args, module = self.args, self.module
        val = registry.test_images(args.dataset, args.data, args.class_list)
        backbone = module.encoder, networks.features
        net, of = (
            backbone if args.knn_features == "backbone" else (module.embedding, nn.Module.__call__)
        )
        unreadable = [] if args.on_bad_image == "skip" else None
        bank = features.extract(net, self.images, args, self.device, of=of, unreadable=unreadable)
        self._note_left_out({i for i, _ in unreadable or ()})
        queries = features.extract(net, val, args, self.device, of=of)
        return features.knn(*bank, *queries, len(val.classes), [args.knn_k], args.knn_t)[args.knn_k]

    def _note_left_out(self, unreadable: set[int]) -> None:
        """Print one line that names the images of `unreadable` which no earlier line has named."""
        new = sorted(unreadable - self._left_out)
        self._left_out |= unreadable
        if new:
            names = ", ".join(self.images.name(i) for i in new[:10]) + ", ..." * (len(new) > 10)
            what = "training image" if len(new) == 1 else "training images"
            tqdm.write(
                f"k-NN leaves out {len(new)} {what} that cannot be read: {names}", file=sys.stderr
            )
