"""Pre-train any method: check its settings, train on views, monitor k-NN, keep checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco import devices, distributed
from moco.augment import recipes
from moco.builder.base import Method
from moco.config import Pretraining, flat, replaced
from moco.data import cache, catalog, file_lists, loader, registry, sources, subsets
from moco.data.images import Images, note_dark
from moco.encoder import archs, networks, recompute, trial
from moco.engine import checkpoint, contract, initial, next_commands, precision, record, tracking
from moco.engine.log import Metrics, format_duration
from moco.engine.monitor import Monitor
from moco.engine.task import Task
from moco.engine.trainer import Trainer
from moco.errors import InputError
from moco.messages import counted, print_rank0
from moco.rng import Progress


def check_views(config: Pretraining, several_crops: bool = False) -> None:
    """Raise InputError if the recipe makes the wrong number of views.

    It must make two views, or more than two with `several_crops`.
    """
    views = len(recipes.from_settings(config.views))
    if views < 2 or (views > 2) != several_crops:
        needed = "more than two" if several_crops else "two"
        raise InputError(
            f"--recipe {config.views.recipe}: makes {counted(views, 'view')}, but {needed} are "
            "needed; choose another"
        )


def check_one_size(config: Pretraining) -> None:
    """Raise InputError if the recipe makes views of different sizes."""
    sizes = sorted({view.size for view in recipes.from_settings(config.views)})
    if len(sizes) > 1:
        raise InputError(
            f"--recipe {config.views.recipe}: its views have {' and '.join(map(str, sizes))} "
            "pixels, but all views pass the network at once; choose a recipe with one size"
        )


def complete(config: Pretraining, uses_labels: str = "") -> Pretraining:
    """Return `config` with the mean and std of the data set, unless they are given.

    Call it before any process starts. Raises InputError if the architecture or the data do not fit
    the script, or if the weights of `--init` do not fit the architecture.

    Args:
        config: the settings of the run.
        uses_labels: the option that makes the method train on labels, such as --loss supcon; "" if
            there is none. With such an option, each image must have one label.
    """
    _check_network(config)
    dataset, data = config.input.dataset, config.run.data
    if dataset != "imagenet" or data == "photos":
        config = replaced(config, file_list=None)
    if config.listed.file_list:
        _check_list(config)
        if uses_labels:
            raise _no_labels(uses_labels, "the images of --file-list have no labels")
    elif dataset == "imagenet":
        root = _find(config)
        subsets.check_classes(root, config.input.class_list, config.input.data_name)
        if uses_labels:
            _check_classes(root, config.input.class_list, uses_labels)
    else:
        registry.check(dataset, data, config.input.download)
        if catalog.METRIC[dataset] == "map11" and (option := _labels_for(config)):
            several = f"each image of {dataset} has several labels, and one is needed"
            raise InputError(f"{option}: {several}; leave it out")
        if catalog.METRIC[dataset] == "map11" and uses_labels:
            raise _no_labels(uses_labels, f"each image of {dataset} has several labels")
    initial.check(config)
    mean, std = registry.normalization(dataset)
    return replaced(config, mean=config.views.mean or mean, std=config.views.std or std)


def require_labels(images: Images, uses_labels: str) -> None:
    """Raise InputError if the method trains on labels, but the images do not have one each.

    Args:
        images: the training set.
        uses_labels: see `complete`.
    """
    if uses_labels and images.single_labels is None:
        raise _no_labels(uses_labels, f"the images of {images.root} do not have one class each")


def _check_classes(root: Path, class_list: str | None, uses_labels: str) -> None:
    """Raise InputError if the training images have no labels, or if all are of one class."""
    classes = sources.class_names(root, "train")
    if classes and class_list:
        classes = subsets.select_classes(classes, class_list, root)
    if len(classes) < 2:
        problem = "are of one class" if classes else "have no labels"
        raise _no_labels(uses_labels, f"the images of {root} {problem}")


def _no_labels(option: str, problem: str) -> InputError:
    """Return the error for data whose labels `option` cannot use."""
    how = "give images in class folders (train/CLASS/), with two classes or more"
    return InputError(f"{option}: trains on labels, but {problem}; {how}, or leave it out")


def _check_list(config: Pretraining) -> None:
    """Raise InputError if the list of images cannot be used, or if an option needs labels."""
    file, settings = config.listed.file_list, flat(config)
    for name in ("class_list", "data_name", "knn_every", "probe_online"):
        if settings[name]:
            option = f"--{name.replace('_', '-')}"
            how = "give --knn-every 0" if name == "knn_every" else "leave it out"
            raise InputError(f"{option}: the images of --file-list have no labels; {how}")
    root = Path(config.run.data)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one at which the paths of {file} start")
    file_lists.check(file, root)


def _check_network(config: Pretraining) -> None:
    """Raise InputError if the network does not take the views, or lacks what options need."""
    network, size = config.network, config.views.image_size
    if network.arch in archs.ARCHS:
        return
    net = networks.create(network.arch, 1, size, stem=network.stem, norm_eps=network.norm_eps)
    sizes = {size, *(view.size for view in recipes.from_settings(config.views))}
    trial.check(net, network.arch, sizes)
    if config.compute.grad_checkpoint:
        recompute.recompute_blocks(net)


# the options that need labels, and how to train without them
_NEED_LABELS = {
    "--knn-every": "; or train without the k-NN monitor: --knn-every 0",
    "--probe-online": "; or leave out --probe-online",
}


def _labels_for(config: Pretraining) -> str:
    """Return the given option that needs the labels of train/ and val/; "" if there is none."""
    if config.monitor.knn_every:
        return "--knn-every"
    return "--probe-online" if config.monitor.probe_online else ""


def _find(config: Pretraining) -> Path:
    """Return the data folder. Raises InputError if it lacks train/, or val/ for the monitor.

    If only val/ is wrong, the message says how to train without it.
    """
    data = config.run.data
    option = _labels_for(config)
    if not option:
        root = sources.find(data, ("train",), labels=False)
        if sources.holds_folders_without_labels(root):
            print_rank0(
                f"{root}: has no train/ folder, so all images in it are used, and its folders are "
                "not classes; to use them as classes, move them into train/"
            )
        return root
    try:
        return sources.find(data, ("train", "val"))
    except InputError as error:
        sources.find(data, ("train",), labels=False)  # raises another error if train/ is wrong
        raise InputError(f"{error}{_NEED_LABELS[option]}") from None


def train(config: Pretraining, device: torch.device, build: Callable[[Images], Method]) -> None:
    """Pre-train the method that `build(images)` returns. Runs in every process.

    Args:
        config: the settings of the run.
        device: the device of this process.
        build: creates the method for a training set.

    Raises InputError if the settings, the data or a checkpoint of `--resume` do not fit.
    """
    if config.input.batch_per_process < 2:
        raise InputError(
            "--batch-size gives each process a single image; batch norm and the loss need at "
            "least two. Raise --batch-size"
        )
    images = registry.train_images(
        config.input.dataset, config.run.data, config.input.class_list, config.listed.file_list
    )
    note_dark(images, config.input)
    k = config.monitor.knn_k
    if option := _labels_for(config):
        subsets.require_two_classes(images, _NEED_LABELS[option])
    if config.monitor.knn_every and k > len(images):
        print_rank0(
            f"--knn-k {k}: the training set has only {counted(len(images), 'image')}, and all of "
            "them vote"
        )
    torch.manual_seed(config.run.seed)
    method = build(images)
    contract.check(method)
    initial.load(method, config)
    if method.sync_batch_norm:
        method = distributed.sync_batch_norm(method, device)
    compute = config.compute
    module = precision.prepare_model(method, device, compute.compile, compute.grad_checkpoint)
    Trainer(PretrainingTask(config, module, images, device)).train()


class PretrainingTask(Task):
    """The pre-training of a method, with its checkpoints and its k-NN monitor.

    Args:
        config: the settings of the run.
        module: the method, on `device`.
        images: the training set.
        device: the device of this process.
    """

    module: Method

    def __init__(self, config: Pretraining, module: Method, images: Images, device: torch.device):
        super().__init__(config, module, images, device)
        self.images_before_epoch_0 = module.images_before_epoch_0
        # the best k-NN top-1 accuracy of a saved epoch, and that epoch
        self.best = (-1.0, -1)
        # epochs whose checkpoints an earlier start kept by another --keep or --keep-every
        self.spared: frozenset[int] = frozenset()
        self.monitor = Monitor(config, module, device, len(images.classes))

    @property
    def grad_norm_modules(self) -> dict[str, nn.Module]:
        """Return the modules whose gradient norms are logged, by name."""
        return self.module.grad_norm_modules

    def notes(self) -> list[str]:
        """Return the lines to print at the start: about a list of images, and the method's."""
        file = self.config.listed.file_list
        listed = [f"the images are those that {file} names, in its order"] * bool(file)
        return listed + self.module.notes(self.config.input.batch_per_process)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the method's parameter groups for the optimizer."""
        return self.module.parameter_groups(self.config.optimizer.lr, self.config.optimizer.wd)

    def load_images(self) -> None:
        """Decode the training images into memory, if --cache-images allows it."""
        (self.images,) = cache.load(self.config.input, self.images)

    def loss(
        self, net: nn.Module, views: list[Tensor], batch: loader.Batch, progress: Progress
    ) -> tuple[Tensor, Metrics]:
        """Return the method's loss and metrics of one pass. The online probe learns from it."""
        loss, metrics = net(views, batch.index, progress)
        if self.monitor.probe:
            metrics = {**metrics, **self.monitor.probe.learn(batch.label)}
        return loss, metrics

    def scheduled(self, progress: Progress) -> dict[str, float]:
        """Return the momentum of the method's moving average, if it has one."""
        found = self.module.schedules(progress)
        return {name: value for name, value in found.items() if name == "momentum"}

    def after_step(self) -> None:
        """Call the method's `after_step`, which may update a moving average, for example."""
        self.module.after_step()

    def gather_state(self) -> None:
        """Call the method's `gather_state`, which copies shards of buffers to all ranks."""
        self.module.gather_state()

    def start_run(self) -> dict[str, float]:
        """Measure the encoder before training. Return metrics to log."""
        return self.monitor.measure_start(self.images)

    def end_epoch(self, trainer: Trainer, done: int) -> dict[str, float]:
        """Measure and save, if either is due after `done` epochs. Return metrics to log."""
        config, last = self.config, done == self.config.optimizer.epochs
        saves = last or done % config.log.save_every == 0
        metrics = {}
        if names := self.monitor.due(done):
            # save first, because k-NN takes a while, and the run may be stopped meanwhile
            self.save_mid_epoch(trainer, done - 1, done * trainer.steps_per_epoch)
            metrics = self.monitor.measure(self.images, names)
            if saves and metrics.get("knn", -1.0) > self.best[0]:
                self.best = metrics["knn"], done - 1
        if saves:
            self._tidy(trainer.save(f"checkpoint_{done - 1:04d}.pth.tar", done))
        return metrics

    def state(self) -> dict[str, Any]:
        """Return the best k-NN accuracy and its epoch, the epochs kept, and the monitor's state."""
        accuracy, epoch = self.best
        best = {"best_knn": accuracy, "best_epoch": epoch} if epoch >= 0 else {}
        return {**best, "spared": sorted(self.spared), **self.monitor.state()}

    def restore(self, state: checkpoint.State) -> None:
        """Restore the best k-NN accuracy and its epoch, the epochs kept, and the monitor."""
        best, spared = (state.get("best_knn"), state.get("best_epoch")), state.get("spared")
        self.monitor.restore(state)
        if isinstance(best[0], float) and isinstance(best[1], int):
            self.best = best
        if isinstance(spared, list):
            self.spared = frozenset(epoch for epoch in spared if type(epoch) is int)
        settings = flat(self.config)
        if any(state["args"].get(name) != settings[name] for name in ("keep", "keep_every")):
            there = checkpoint.numbered(Path(self.config.run.save_dir), mid_epoch=False)
            self.spared |= frozenset(map(checkpoint.epoch_of, there))

    def save_mid_epoch(self, trainer: Trainer, epoch: int, step: int) -> Path:
        """Save inside epoch `epoch`, after `step` steps of the run. Return the path of the file."""
        path = trainer.save(f"checkpoint_{max(epoch, 0):04d}_{step}.pth.tar", epoch, step)
        self._tidy(path)
        return path

    def _tidy(self, newest: Path) -> None:
        """Delete superseded mid-epoch checkpoints, and epoch checkpoints beyond --keep."""
        if distributed.rank() != 0:
            return
        superseded = checkpoint.numbered(newest.parent, mid_epoch=True)
        if self.config.retention.keep:
            older = checkpoint.numbered(newest.parent, mid_epoch=False)[
                self.config.retention.keep :
            ]
            superseded += [path for path in older if not self._is_kept(checkpoint.epoch_of(path))]
        for path in set(superseded) - {newest}:
            path.unlink(missing_ok=True)

    def _is_kept(self, epoch: int) -> bool:
        """Return whether the checkpoint of an epoch, counted from 0, is kept beyond --keep."""
        every = self.config.retention.keep_every
        regular = every > 0 and (epoch + 1) % every == 0
        return regular or epoch in self.spared or epoch == self.best[1]

    def finish(self, trainer: Trainer) -> None:
        """Print how long and how fast the run trained, and commands to run next."""
        speed = trainer.log.images_per_second()
        print_rank0(
            f"trained for {format_duration(trainer.seconds)}"
            + (f" at {speed:.0f} images per second" if speed else "")
        )
        found = {"eval/best_knn": self.best[0]} if self.best[1] >= 0 else {}
        tracking.results({**found, "time/seconds": trainer.seconds})
        if distributed.rank() == 0:
            folder = self.config.run.save_dir
            record.add(folder, peak_memory=devices.peak_memory(self.device))
        saved = next(iter(checkpoint.list_checkpoints(self.config.run.save_dir)), None)
        if saved is not None and distributed.rank() == 0:
            print_rank0(f"the last checkpoint is {saved}; commands to run next:")
            for command in next_commands.commands(self.config, saved):
                print_rank0(f"  {command}")
