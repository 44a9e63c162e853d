"""Pre-training, for every method: the training loop on unlabelled views, the k-NN monitor and the checkpoints."""

import sys
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


def check_views(config: Config, several_crops: bool = False) -> None:
    """Refuse a recipe that does not make two views, or, with `several_crops`, more than two."""
    views = len(recipes.of_options(config))
    if views < 2 or (views > 2) != several_crops:
        needed = "more than two" if several_crops else "two"
        raise InputError(
            f"--recipe {config.views.recipe}: makes {views} views, but {needed} are needed; choose another"
        )


def check(config: Config, transformers: bool = False) -> None:
    """Check, before any process starts, the architecture (a ResNet, unless `transformers`), the data folder and the run folder."""
    if not transformers and config.network.arch not in resnets.ARCHS:
        raise InputError(
            f"--arch {config.network.arch}: this script is for torchvision's ResNets; main_moby.py trains transformers"
        )
    if config.input.dataset == "imagenet":
        root = _find(config)
        subsets.check_classes(root / "train", config.input.class_list, config.input.data_name)
    else:
        registry.check(config.input.dataset, config.run.data, config.input.download)
        if registry.METRIC[config.input.dataset] == "map11" and config.monitor.knn_every:
            several = f"each image of {config.input.dataset} has several labels, and k-NN needs one"
            raise InputError(f"--knn-every: {several}; leave it out")
    mean, std = registry.normalization(config.input.dataset)
    config.views.mean, config.views.std = config.views.mean or mean, config.views.std or std


def _find(config: Config) -> Path:
    """Return the data folder. Raise InputError, which names `--knn-every 0` if only the k-NN monitor cannot use it."""
    if not config.monitor.knn_every:
        return folders.find(config.run.data, ("train",))
    try:
        return folders.find(config.run.data, ("train", "val"))
    except InputError as error:
        folders.find(config.run.data, ("train",))  # raises its own error if train/ is wrong
        raise InputError(f"{error}; or train without the k-NN monitor: --knn-every 0") from None


def train(config: Config, device: torch.device, build: Callable[[Images], nn.Module]) -> None:
    """Pre-train the model that `build(images)` returns. Runs in every process."""
    if config.input.batch_per_process < 2:
        raise InputError(
            "--batch-size gives each process a single image; batch norm and the loss need at least two. Raise --batch-size"
        )
    images = registry.training(config.input.dataset, config.run.data, config.input.class_list)
    if config.monitor.knn_every and config.monitor.knn_k > len(images):
        print_rank0(
            f"--knn-k {config.monitor.knn_k}: the bank has {len(images)} images, and all of them vote"
        )
    torch.manual_seed(config.run.seed)
    method = build(images)
    Pretraining(
        config, precision.place(method, device, config.compute.compile, config.compute.grad_checkpoint), images, device
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
        args = self.config
        asked, batch = getattr(config, "bn_splits", 1), config.input.batch_per_process
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
        config, last = self.config, done == self.config.optimizer.epochs
        saves = last or done % config.log.save_every == 0
        metrics = {}
        if config.monitor.knn_every and (last or done % config.monitor.knn_every == 0):
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
        if any(state["args"].get(name) != getattr(self.config, name) for name in retention):
            there = checkpoint.numbered(Path(self.config.run.save_dir), inside=False)
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
        if self.config.retention.keep:
            older = checkpoint.numbered(newest.parent, inside=False)[self.config.retention.keep :]
            superseded += [path for path in older if not self._is_kept(checkpoint.epoch_of(path))]
        for path in set(superseded) - {newest}:
            path.unlink(missing_ok=True)

    def _is_kept(self, epoch: int) -> bool:
        """Return whether the checkpoint of an epoch, counted from 0, is kept however old it is."""
        every = self.config.retention.keep_every
        regular = every > 0 and (epoch + 1) % every == 0
        return regular or epoch in self.spared or epoch == self.best[1]

    def finished(self) -> None:
        print_rank0(f"trained for {clock(self.seconds)}")
        saved = next(iter(checkpoint.found(self.config.run.save_dir)), None)
        if saved is not None and distributed.rank() == 0:
            print_rank0(f"the last checkpoint is {saved}; what you can run next:")
            for command in next_commands.commands(self.config, self.images.root, saved):
                print_rank0(f"  {command}")

    def _knn(self) -> float:
        """Return the k-NN top-1 of the encoder on val/, against train/, in [0, 1].

        With `--on-bad-image skip`, training images that cannot be read are left out.
        """
        config, module = self.config, self.module
        val = registry.testing(config.input.dataset, config.run.data, config.input.class_list)
        backbone = module.encoder, networks.features
        net, of = (
            backbone if config.monitor.knn_features == "backbone" else (module.embedding, nn.Module.__call__)
        )
        unreadable = [] if config.log.on_bad_image == "skip" else None
        bank = features.extract(net, self.images, config, self.device, of=of, unreadable=unreadable)
        self._note_left_out({i for i, _ in unreadable or ()})
        queries = features.extract(net, val, config, self.device, of=of)
        return features.knn(*bank, *queries, len(val.classes), [config.monitor.knn_k], config.monitor.knn_t)[config.monitor.knn_k]

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
