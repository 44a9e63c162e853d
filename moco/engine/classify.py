"""Classifiers on pre-trained encoders: what every evaluation reads, checks and writes, and how a classifier is trained."""

import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.augment.recipes import MEAN, STD
from moco.data import cache, datasets, loader, named, subsets
from moco.data.images import Images
from moco.encoder import networks, published
from moco.engine import checkpoint, encoder, features, metrics, precision
from moco.engine.log import STARTED, clock, say, write_json, write_options
from moco.engine.train import Trainer
from moco.errors import InputError, short
from moco.files import read_json
from moco.rng import Progress


def check(args: Namespace) -> None:
    """Check, before any process starts, the data and that the checkpoint fits; take the arch from it if not given."""
    if args.data == "photos":
        args.dataset = "photos"
    named.check(args.dataset, args.data, args.download)
    if args.dataset == "imagenet":
        subsets.check_classes(Path(args.data) / "train", args.class_list, args.data_name)
    if tests_only(args) and args.encoder_method:
        args.stem, args.mean, args.std = args.stem or "imagenet", args.mean or list(MEAN), args.std or list(STD)
        networks.create(args.arch, 1, args.image_size, stem=args.stem)  # raises InputError if they do not fit
        return
    state = checkpoint.load(args.pretrained) if args.pretrained else {}
    about = checkpoint.about(state)
    args.arch = args.arch or about.arch or "resnet50"
    if args.pretrained and not args.image_size and not about.image_size:
        taken = "224 pixels are taken (--image-size)"
        say(f"{args.pretrained}: does not say what size of images it is for; {taken}")
    args.image_size = args.image_size or about.image_size or 224
    used = about._replace(mean=args.mean or about.mean, std=args.std or about.std)
    if args.pretrained and (line := checkpoint.lacks_normalization(args.pretrained, used)):
        say(f"{line} (--mean, --std)")
    args.mean, args.std = args.mean or about.mean or list(MEAN), args.std or about.std or list(STD)
    args.encoder_method = about.method if args.pretrained else "random"
    args.pretrain_epochs = about.epoch
    if not args.pretrained:
        args.stem = args.stem or "imagenet"
        return
    net = networks.create(args.arch, 1, args.image_size)
    stem = published.stem(net, published.tensors_of(net, state))
    if args.stem not in (None, stem):
        has = f"{args.pretrained} has the stem {stem}"
        raise InputError(f"--stem {args.stem}: {has}; leave --stem out")
    args.stem = stem
    with encoder.naming_arch(args.pretrained, about.arch, args.arch):
        _load(networks.create(args.arch, 1, args.image_size, stem=stem), args, state)


def tests_only(args: Namespace) -> bool:
    """Return whether the run only tests a classifier, whose checkpoint holds the full network."""
    return getattr(args, "evaluate", False) and not getattr(args, "ft_proj", 0)


def restore_options(args: Namespace, options: Iterable[str]) -> None:
    """Restore the architecture, image size and normalization from the classifier of `--resume`.

    With `--evaluate`, restore its seed and all its `options` as well.
    Raises InputError if `--resume` is not a classifier's checkpoint, or if a given option
    contradicts it.
    """
    if args.evaluate and not args.resume:
        raise InputError("--evaluate tests a trained classifier: give its checkpoint with --resume FILE")
    if not args.resume:
        return
    state = checkpoint.load(args.resume)
    if (origin := checkpoint.origin(state)) != "classifier":
        lacking = ", ".join(checkpoint.lacking(state))
        what = f"cannot be resumed: it lacks {lacking}" if lacking else f"is a {origin} checkpoint, not a classifier's"
        train = ", and leave out --evaluate: it has no classifier to test" if args.evaluate else ""
        raise InputError(f"{args.resume}: {what}; give it with --pretrained instead of --resume{train}")
    checkpoint.check_script(state, args)
    about, saved = checkpoint.about(state), state["args"]
    for name in ("arch", "image_size", "stem", "mean", "std"):
        given, own = getattr(args, name), getattr(about, name)
        if own is None or given in (None, own):
            setattr(args, name, given or own)
        elif name != "image_size" or not args.evaluate:
            given, own = (" ".join(map(str, value)) if isinstance(value, list) else value for value in (given, own))
            raise InputError(f"--{name.replace('_', '-')} {given}: {args.resume} was trained with {own}; leave it out")
        else:
            say(f"the classifier was trained at {own} pixels, and is tested at {given} (--image-size)")
    if not args.evaluate:
        return
    args.seed = state["progress"]["seed"]
    shared = ("pretrained", "val_from_train", "class_list", "learning_rate_scaling")
    for name in (*options, *shared):
        given = getattr(args, name)
        value = saved.get(name, given)
        if not _alike(value, given):
            raise InputError(
                f"{args.resume}: its --{name.replace('_', '-')} is {short(str(value))}, which is not valid; take another checkpoint"
            )
        setattr(args, name, value)
    args.encoder_method, args.pretrain_epochs = (
        value if isinstance(value, kind) else None
        for value, kind in ((saved.get("encoder_method"), str), (saved.get("pretrain_epochs"), int))
    )


def _alike(saved: object, given: object) -> bool:
    """Whether a checkpoint's setting is of the kind that the option has here; where it has none by default, a word or a number."""
    if isinstance(given, list):
        return isinstance(saved, list) and bool(saved) and all(_alike(one, 0.0) for one in saved)
    if given is None or saved is None:
        return isinstance(saved, str | int | float | None)
    number = isinstance(given, int | float)
    return isinstance(saved, int | float) if number else isinstance(saved, type(given))


def check_choice(args: Namespace) -> None:
    """Refuse a `--val-from-train` that is no share."""
    if args.val_from_train is not None and not 0 < args.val_from_train < 1:
        raise InputError(f"--val-from-train {args.val_from_train:g}: must lie between 0 and 1, as in --val-from-train 0.1")


def check_labels(args: Namespace) -> None:
    """Fetch or read the list of labelled images, where there is one; after `check`."""
    if args.subset_file:
        subsets.names(Path(args.subset_file))
        return
    few_of_a_folder = args.train_percent < 100 and args.dataset == "imagenet" and not args.class_list
    if few_of_a_folder and subsets.is_imagenet(datasets.class_names(Path(args.data) / "train")):
        subsets.published(args.train_percent)


class Splits(NamedTuple):
    """What a classifier is trained and tested on, and, of the training images, what it may be chosen on."""

    train: Images
    val: Images
    held_out: Images | None = None


def splits(args: Namespace) -> Splits:
    """The images of `--dataset`: of its training images the labelled share, if the script asks for one, less what is held out."""
    train, val = (subsets.of_classes(part, args.class_list) for part in named.load(args.dataset, args.data, args.seed))
    if hasattr(args, "train_percent"):
        train = _labelled(args, train)
    if not getattr(args, "val_from_train", None):
        return Splits(train, val)
    train, held_out = subsets.hold_out(train, args.val_from_train, args.seed)
    say(f"{len(held_out)} images of train/ are held out to choose on, {len(train)} to train on")
    return Splits(train, val, held_out)


def _labelled(args: Namespace, train: Images) -> Images:
    """The images of train/ whose labels are used; their names go to subset.txt in the run folder."""
    part = subsets.labelled(train, args.train_percent, args.seed, args.subset_file)
    if len(part) < len(train) and distributed.rank() == 0:
        file = Path(args.save_dir) / "subset.txt"
        subsets.write_names(part, file)
        say(f"{len(part)} of {len(train)} training images are labelled; they are listed in {file}")
    return part


def pretrained(args: Namespace, classes: int, device: torch.device) -> nn.Module:
    """The encoder of `--pretrained` (randomly initialised without it) with a new classifier for `classes`, on `device`."""
    torch.manual_seed(args.seed)
    net = networks.create(args.arch, classes, args.image_size, stem=args.stem)
    if tests_only(args):
        say(f"testing the classifier of {args.resume}, {args.arch} at {args.image_size} pixels")
    elif args.pretrained:
        state = checkpoint.load(args.pretrained)
        say(f"{args.pretrained}: {_load(net, args, state)}")
        about = checkpoint.about(state)
        if about.image_size not in (None, args.image_size):
            say(f"it was pre-trained at {about.image_size} pixels, and sees {args.image_size} here (--image-size)")
        _say_if_normalized_otherwise(args, about)
    else:
        say(f"no --pretrained: a randomly initialised {args.arch}")
    return precision.place(net, device, args.compile, args.grad_checkpoint)


def _say_if_normalized_otherwise(args: Namespace, about: checkpoint.About) -> None:
    """Print one line if `--mean` or `--std` differs from the checkpoint's."""
    names = [name for name in ("mean", "std") if getattr(about, name) not in (None, getattr(args, name))]
    if names:
        own, given = (
            " and ".join(f"{name} {' '.join(f'{one:g}' for one in getattr(source, name))}" for name in names)
            for source in (about, args)
        )
        options = ", ".join(f"--{name}" for name in names)
        say(f"its images were normalized with {own} in pre-training, and are with {given} here ({options})")


@torch.no_grad()
def init_classifier(layer: nn.Linear, std: float = 0.01) -> None:
    """Draw new weights from N(0, std²), and set the bias to 0.

    The draws are made on the CPU, so that a run starts from the same classifier on every device.
    """
    layer.weight.copy_(torch.empty(layer.weight.shape).normal_(std=std))
    layer.bias.zero_()


def _load(net: nn.Module, args: Namespace, state: checkpoint.State) -> str:
    """Load the backbone, and the layers of its projection head that `--ft-proj` keeps below the classifier.

    Returns a line on how many tensors matched, and from which of the file's encoders.
    """
    tensors = published.tensors_of(net, state)
    matched, chosen = published.load_backbone(net, tensors, args.pretrained), published.choice(net, tensors)
    if kept := getattr(args, "ft_proj", 0):
        published.keep_projection(net, tensors, kept, args.pretrained)
    if getattr(args, "features", "backbone") == "head":
        published.load_projection(net, tensors, args.pretrained)
    said = f"{matched} of {len(networks.backbone_keys(net))} backbone tensors matched"
    return f"{said} ({chosen})" if chosen else said


def check_features(args: Namespace, many: bool) -> None:
    """`check` for the scripts that classify frozen features, of images that show several classes, if `many`, or one."""
    features.check(args, many)
    if not args.load_features:
        check(args)
        features.check_dump(args)


def frozen_features(
    args: Namespace, device: torch.device, unit: bool = True
) -> tuple[features.Features, features.Features, tuple[str, ...]]:
    """This rank's share of the features of both splits, from `--load-features` or from the encoder, and the classes.

    Raises InputError where a feature is infinite or no number.
    """
    if args.load_features:
        train, val, classes = features.load(args, device)
    else:
        images, val_images, _ = splits(args)
        net = pretrained(args, len(images.classes), device)
        (train, val), classes = features.of_splits(net, images, val_images, args, device, unit), images.classes
    if not all(rows.sum().isfinite() for rows, _ in (train, val)):
        source = args.load_features or args.pretrained
        raise InputError(f"{source}: its features are not all finite numbers; the encoder diverged, or --amp fp16 overflows")
    return train, val, classes


def write_results(args: Namespace, protocol: str, found: dict[str, float], seconds: float | None = None) -> None:
    """Write results.json to the run folder and print where it is, on rank 0.

    `found` has metrics as fractions in [0, 1]. `seconds` is how long the evaluation took; by
    default, the time since this process started.
    """
    if distributed.rank() != 0:
        return
    some = f" ({Path(args.class_list).name})" if getattr(args, "class_list", None) else ""
    results = {
        "method": args.encoder_method,
        "arch": args.arch,
        "checkpoint": args.pretrained,
        "pretrain_epochs": args.pretrain_epochs,
        "protocol": protocol,
        "dataset": (args.data if args.dataset == "imagenet" else args.dataset) + some,
        "metrics": found,
        "settings": {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)},
    }
    folder = Path(args.save_dir)
    if hasattr(args, "script") and not (folder / "args.yaml").exists():  # nothing was trained
        write_options(args)
    write_json(folder / "results.json", results)
    took = time.perf_counter() - STARTED if seconds is None else seconds
    say(f"results in {folder / 'results.json'}; the evaluation took {clock(took)}")


# what tells apart the runs of one protocol
_SETTINGS = (
    "features temperature image_size mean std stem"
    " epochs batch_size optimizer lr lr_backbone lr_classifier learning_rate_scaling cos wd weights train_percent"
    " subset_file ft_proj val_from_train amp seed"
    " iterations norm"  # of detectors
).split()


@torch.inference_mode()
def test(net: nn.Module, images: Images, args: Namespace, device: torch.device, heads: int = 1) -> list[dict[str, float]]:
    """What each of `net`'s classifiers, of which there are `heads`, is worth on `images`: see `metrics`, all in [0, 1].

    Each image counts once, whatever the number of ranks, and a rank may have none.
    """
    net.eval()
    meter = metrics.meter(images.many, heads, len(images.classes), device)
    for batch, label in features.test_batches(images, args, device):
        with precision.autocast(args.amp, device):
            meter.add(by_head(net(batch)), label)
    return meter.read()


def by_head(logits: Tensor) -> Tensor:
    """The logits of one classifier [B, classes] or of several [heads, B, classes], as the latter."""
    return logits.view(-1, *logits.shape[-2:])


class Setting(NamedTuple):
    """What tells one classifier's training from another's."""

    lr: float
    wd: float


class Classification(Trainer):
    """Trains one classifier or several, tests them after every epoch, and keeps the best.

    The best one is chosen on val/, as in the papers, or on the held-out part of train/. `settings` are the classifiers'.
    """

    best_name = "model_best.pth.tar"

    def __init__(self, args: Namespace, net: nn.Module, images: Splits, device: torch.device, settings: list[Setting]):
        self.val, self.held_out, self.settings, self.best = images.val, images.held_out, settings, 0.0
        self.metric = named.METRIC[args.dataset]
        self._decays = len({setting.wd for setting in settings})
        super().__init__(args, net, images.train, device)

    def losses(self, logits: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to train on and what to show, from logits [heads, B, classes].

        Cross entropy; where images show several classes, the mean binary one over what counts.
        """
        if label.dim() == 2:
            counts = (label >= 0).expand_as(logits)
            target = label.clamp_min(0).to(logits.dtype).expand_as(logits)
            each = F.binary_cross_entropy_with_logits(logits, target, counts.to(logits.dtype), reduction="none")
            losses = each.sum((1, 2)) / counts.sum((1, 2)).clamp_min(1)
        else:
            losses = torch.stack([F.cross_entropy(one, label) for one in logits])
        best = losses.nan_to_num(torch.inf).argmin()  # the one to show; a rate too high for the features may have diverged
        # take, unlike [best], does not wait for the device
        shown = {"loss": losses.take(best)}
        if label.dim() == 1:
            top1, top5 = (right.float().mean(-1).take(best) for right in metrics.correct(logits, label))
            shown |= {"acc1": top1, "acc5": top5}
        return losses.sum(), shown

    def test(self) -> None:
        """Choose a classifier and test it on val/: `accuracy` is its own, beside each one's metric where there are several."""
        on_val = self._test(self.val)
        judged = self._test(self.held_out) if self.held_out else on_val
        best = max(self.settings, key=lambda one: tuple(judged[one][name] for name in self._order(judged[one])))
        self.chosen_by = judged[best][self.metric]
        self.accuracy = {name: on_val[best][name] for name in self._order(on_val[best])}
        if self.held_out:
            self.accuracy[f"held_out_{self.metric}"] = self.chosen_by
        if len(self.settings) > 1:
            self.accuracy |= {"best_lr": best.lr} | ({"best_wd": best.wd} if self._decays > 1 else {})
            self.accuracy |= {f"{self.metric}_{self.name(one)}": found[self.metric] for one, found in on_val.items()}

    def _order(self, found: dict[str, float]) -> list[str]:
        """The metrics that this data set reports, first the one that counts."""
        return [self.metric, *(name for name in found if name not in (self.metric, "mean_per_class"))]

    def _test(self, images: Images) -> dict[Setting, dict[str, float]]:
        return dict(zip(self.settings, test(self.module, images, self.args, self.device, len(self.settings)), strict=True))

    def name(self, setting: Setting, space: str = "") -> str:
        """What a classifier is called: lr30, or lr30_wd0.0001 where several decays are tried; `lr 30` to read."""
        wd = f"{space or '_'}wd{space}{setting.wd:g}" if self._decays > 1 else ""
        return f"lr{space}{setting.lr:g}{wd}"

    def end_epoch(self, done: int) -> dict[str, float]:
        self.test()
        self.best = max(self.best, self.chosen_by)
        if self.best == self.chosen_by:
            self.save(self.best_name, done)
        self.save("checkpoint.pth.tar", done)
        return {f"val_{name}": value for name, value in self.accuracy.items()}

    def keep_in_memory(self) -> None:
        sets = self.images, self.val, self.held_out
        self.images, self.val, self.held_out = cache.load(self.args, *sets)

    def save_inside(self, epoch: int, step: int) -> Path:
        return self.save("checkpoint.pth.tar", epoch, step)

    def more_state(self) -> dict[str, Any]:
        return {
            "best_acc1": self.best,
            "classes": list(self.images.classes),
            "image_size": self.args.image_size,
        }

    def run(self, protocol: str) -> None:
        """Train what is left to train, or only test; print the accuracies and write results.json.

        If no epochs are left, the results of the run's end stay as they are.
        """
        done = self.first_epoch >= self.args.epochs and not self.args.evaluate
        if done:
            self._say_if_done()
        if done or self.args.evaluate:
            self.test()
        else:
            self.train()
            self.finish()
        found = self.accuracy
        title = metrics.TITLES[self.metric]
        if len(self.settings) > 1:
            each = [f"{self.name(one, ' ')}: {100 * found[f'{self.metric}_{self.name(one)}']:.3f}" for one in self.settings]
            say("  ".join(each) + f"  ({title}; the best follows)")
        say("* " + " ".join(f"{name} {100 * found[key]:.3f}" for key, name in metrics.TITLES.items() if key in found))
        if done:
            self.args.epochs = self.first_epoch  # what the classifier was trained for
            if self._has_results():
                say("results.json is of the end of these epochs, and stays as it is")
                return
        write_results(self.args, protocol, found, self.seconds)

    def _has_results(self) -> bool:
        """Return whether results.json is of as many epochs as are done; rank 0 answers."""
        try:
            written = read_json(Path(self.args.save_dir) / "results.json")["settings"]["epochs"]
        except (InputError, KeyError, TypeError):
            written = None
        return written == self.first_epoch

    def finish(self) -> None:
        """What follows training."""

    def check_resumed(self, state: checkpoint.State) -> None:
        if not isinstance(state.get("best_acc1"), int | float):
            raise InputError(f"{self.args.resume}: is of no classifier; --resume goes on with those of this script's runs")
        classes = state.get("classes")
        if classes is not None and classes != list(self.images.classes):
            raise InputError(f"{self.args.resume}: {_difference(classes, self.images.classes)}")
        self.best = state["best_acc1"]


def _difference(saved: object, classes: tuple[str, ...]) -> str:
    """Return how the classes of a classifier differ from those of the data."""
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    if len(names) != len(classes):
        return f"has {len(names)} classes, but the data has {len(classes)}; give the data that it was trained on"
    place = next((i for i, pair in enumerate(zip(names, classes, strict=True)) if pair[0] != pair[1]), 0)
    return (
        f"its classes differ from the data's: number {place} is '{names[place]}', but '{classes[place]}' in the data; "
        "give the data that it was trained on"
    )


class FineTuning(Classification):
    """Trains the whole network on labelled images: a new classifier at one rate, what was pre-trained at another.

    Args:
        setting: of the classifier.
        lr_backbone: of what was pre-trained, which has the same weight decay.
        zero_init: the classifier begins at 0.
    """

    def __init__(
        self,
        args: Namespace,
        net: nn.Module,
        images: Splits,
        device: torch.device,
        setting: Setting,
        lr_backbone: float,
        zero_init: bool = False,
    ):
        if args.batch_per_process < 2:
            raise InputError("--batch-size gives each process a single image; batch norm needs at least two. Raise --batch-size")
        self.classifier, self.lr_backbone = networks.classifier(net), lr_backbone
        init_classifier(self.classifier, std=0.0 if zero_init else 0.01)
        super().__init__(args, net, images, device, [setting])

    def groups(self) -> list[dict[str, Any]]:
        new = list(self.classifier.parameters())
        mine = {id(p) for p in new}
        old = [p for p in self.module.parameters() if id(p) not in mine]
        (lr, wd), old_lr = self.settings[0], self.lr_backbone
        return [{"params": new, "lr": lr, "weight_decay": wd}, {"params": old, "lr": old_lr, "weight_decay": wd}]

    def forward(self, views: list[Tensor], batch: loader.Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(by_head(self.ddp(views[0]).float()), batch.label)
