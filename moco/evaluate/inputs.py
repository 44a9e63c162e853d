"""Load and check what an evaluation needs: the data, and the pre-trained encoder."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from moco import distributed
from moco.config import MEAN, STD
from moco.data import folders, registry, subsets
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.encoder import metadata, networks
from moco.encoder import pretrained as encoders
from moco.engine import checkpoint, features, precision
from moco.errors import InputError, short
from moco.evaluate import feature_files


def check(config: Config) -> None:
    """Check, before any process starts, the data and that the checkpoint fits; take the arch from it if not given."""
    if config.run.data == "photos":
        config.input.dataset = "photos"
    registry.check(config.input.dataset, config.run.data, config.input.download)
    if config.input.dataset == "imagenet":
        subsets.check_classes(Path(config.run.data) / "train", config.input.class_list, config.input.data_name)
    if tests_only(config) and config.encoder.encoder_method:
        config.network.stem, config.views.mean, config.views.std = (
            config.network.stem or "imagenet",
            config.views.mean or list(MEAN),
            config.views.std or list(STD),
        )
        networks.create(
            config.network.arch, 1, config.views.image_size, stem=config.network.stem
        )  # raises InputError if they do not fit
        return
    state = checkpoint.load(config.encoder.pretrained) if config.encoder.pretrained else {}
    facts = metadata.read_metadata(state)
    config.network.arch = config.network.arch or facts.arch or "resnet50"
    if config.encoder.pretrained and not config.views.image_size and not facts.image_size:
        taken = "224 pixels are taken (--image-size)"
        print_rank0(f"{config.encoder.pretrained}: does not say what size of images it is for; {taken}")
    config.views.image_size = config.views.image_size or facts.image_size or 224
    used = facts._replace(mean=config.views.mean or facts.mean, std=config.views.std or facts.std)
    if config.encoder.pretrained and (line := metadata.lacks_normalization(config.encoder.pretrained, used)):
        print_rank0(f"{line} (--mean, --std)")
    config.views.mean, config.views.std = config.views.mean or facts.mean or list(MEAN), config.views.std or facts.std or list(STD)
    config.encoder.encoder_method = facts.method if config.encoder.pretrained else "random"
    config.encoder.pretrain_epochs = facts.epoch
    if not config.encoder.pretrained:
        config.network.stem = config.network.stem or "imagenet"
        return
    net = networks.create(config.network.arch, 1, config.views.image_size)
    stem = encoders.stem_of(net, encoders.tensors_of(net, state))
    if config.network.stem not in (None, stem):
        has = f"{config.encoder.pretrained} has the stem {stem}"
        raise InputError(f"--stem {config.network.stem}: {has}; leave --stem out")
    config.network.stem = stem
    with encoders.naming_arch(config.encoder.pretrained, facts.arch, config.network.arch):
        _load(networks.create(config.network.arch, 1, config.views.image_size, stem=stem), config, state)


def tests_only(config: Config) -> bool:
    """Return whether the run only tests a classifier, whose checkpoint holds the full network."""
    return getattr(config, "evaluate", False) and not getattr(config, "ft_proj", 0)


def restore_options(config: Config, options: Iterable[str]) -> None:
    """Restore the architecture, image size and normalization from the classifier of `--resume`.

    With `--evaluate`, restore its seed and all its `options` as well.
    Raises InputError if `--resume` is not a classifier's checkpoint, or if a given option
    contradicts it.
    """
    if config.classifier.evaluate and not config.log.resume:
        raise InputError(
            "--evaluate tests a trained classifier: give its checkpoint with --resume FILE"
        )
    if not config.log.resume:
        return
    state = checkpoint.load(config.log.resume)
    if (origin := checkpoint.origin(state)) != "classifier":
        lacking = ", ".join(checkpoint.lacking(state))
        what = (
            f"cannot be resumed: it lacks {lacking}"
            if lacking
            else f"is a {origin} checkpoint, not a classifier's"
        )
        train = ", and leave out --evaluate: it has no classifier to test" if config.classifier.evaluate else ""
        raise InputError(
            f"{config.log.resume}: {what}; give it with --pretrained instead of --resume{train}"
        )
    checkpoint.check_script(state, config)
    facts, saved = metadata.read_metadata(state), state["args"]
    for name in ("arch", "image_size", "stem", "mean", "std"):
        given, own = getattr(config, name), getattr(facts, name)
        if own is None or given in (None, own):
            setattr(config, name, given or own)
        elif name != "image_size" or not config.classifier.evaluate:
            given, own = (
                " ".join(map(str, value)) if isinstance(value, list) else value
                for value in (given, own)
            )
            raise InputError(
                f"--{name.replace('_', '-')} {given}: {config.log.resume} was trained with {own}; leave it out"
            )
        else:
            print_rank0(
                f"the classifier was trained at {own} pixels, and is tested at {given} (--image-size)"
            )
    if not config.classifier.evaluate:
        return
    config.run.seed = state["progress"]["seed"]
    shared = ("pretrained", "val_from_train", "class_list", "learning_rate_scaling")
    for name in (*options, *shared):
        given = getattr(config, name)
        value = saved.get(name, given)
        if not _alike(value, given):
            raise InputError(
                f"{config.log.resume}: its --{name.replace('_', '-')} is {short(str(value))}, which is not valid; take another checkpoint"
            )
        setattr(config, name, value)
    config.encoder.encoder_method, config.encoder.pretrain_epochs = (
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


def check_choice(config: Config) -> None:
    """Refuse a `--val-from-train` that is no share."""
    if config.classifier.val_from_train is not None and not 0 < config.classifier.val_from_train < 1:
        raise InputError(
            f"--val-from-train {config.classifier.val_from_train:g}: must lie between 0 and 1, as in --val-from-train 0.1"
        )


def check_labels(config: Config) -> None:
    """Fetch or read the list of labelled images, where there is one; after `check`."""
    if config.labels.subset_file:
        subsets.names(Path(config.labels.subset_file))
        return
    few_of_a_folder = (
        config.labels.train_percent < 100 and config.input.dataset == "imagenet" and not config.input.class_list
    )
    if few_of_a_folder and subsets.is_imagenet(folders.class_names(Path(config.run.data) / "train")):
        subsets.published(config.labels.train_percent)


class Splits(NamedTuple):
    """What a classifier is trained and tested on, and, of the training images, what it may be chosen on."""

    train: Images
    val: Images
    held_out: Images | None = None


def splits(config: Config) -> Splits:
    """The images of `--dataset`: of its training images the labelled share, if the script asks for one, less what is held out."""
    train, val = (
        subsets.of_classes(part, config.input.class_list)
        for part in registry.load(config.input.dataset, config.run.data, config.run.seed)
    )
    if hasattr(config, "train_percent"):
        train = _labelled(config, train)
    if not getattr(config, "val_from_train", None):
        return Splits(train, val)
    train, held_out = subsets.hold_out(train, config.classifier.val_from_train, config.run.seed)
    print_rank0(
        f"{len(held_out)} images of train/ are held out to choose on, {len(train)} to train on"
    )
    return Splits(train, val, held_out)


def _labelled(config: Config, train: Images) -> Images:
    """The images of train/ whose labels are used; their names go to subset.txt in the run folder."""
    part = subsets.labelled(train, config.labels.train_percent, config.run.seed, config.labels.subset_file)
    if len(part) < len(train) and distributed.rank() == 0:
        file = Path(config.run.save_dir) / "subset.txt"
        subsets.write_names(part, file)
        print_rank0(
            f"{len(part)} of {len(train)} training images are labelled; they are listed in {file}"
        )
    return part


def pretrained(config: Config, classes: int, device: torch.device) -> nn.Module:
    """The encoder of `--pretrained` (randomly initialised without it) with a new classifier for `classes`, on `device`."""
    torch.manual_seed(config.run.seed)
    net = networks.create(config.network.arch, classes, config.views.image_size, stem=config.network.stem)
    if tests_only(config):
        print_rank0(
            f"testing the classifier of {config.log.resume}, {config.network.arch} at {config.views.image_size} pixels"
        )
    elif config.encoder.pretrained:
        state = checkpoint.load(config.encoder.pretrained)
        print_rank0(f"{config.encoder.pretrained}: {_load(net, config, state)}")
        facts = metadata.read_metadata(state)
        if facts.image_size not in (None, config.views.image_size):
            print_rank0(
                f"it was pre-trained at {facts.image_size} pixels, and sees {config.views.image_size} here (--image-size)"
            )
        _say_if_normalized_otherwise(config, facts)
    else:
        print_rank0(f"no --pretrained: a randomly initialised {config.network.arch}")
    return precision.place(net, device, config.compute.compile, config.compute.grad_checkpoint)


def _say_if_normalized_otherwise(config: Config, facts: metadata.Metadata) -> None:
    """Print one line if `--mean` or `--std` differs from the checkpoint's."""
    names = [
        name for name in ("mean", "std") if getattr(facts, name) not in (None, getattr(config, name))
    ]
    if names:
        own, given = (
            " and ".join(
                f"{name} {' '.join(f'{one:g}' for one in getattr(source, name))}" for name in names
            )
            for source in (facts, config)
        )
        options = ", ".join(f"--{name}" for name in names)
        print_rank0(
            f"its images were normalized with {own} in pre-training, and are with {given} here ({options})"
        )


def _load(net: nn.Module, config: Config, state: checkpoint.State) -> str:
    """Load the backbone, and the layers of its projection head that `--ft-proj` keeps below the classifier.

    Returns a line on how many tensors matched, and from which of the file's encoders.
    """
    tensors = encoders.tensors_of(net, state)
    matched, chosen = (
        encoders.load_backbone(net, tensors, config.encoder.pretrained),
        encoders.choice(net, tensors),
    )
    if kept := getattr(config, "ft_proj", 0):
        encoders.keep_projection(net, tensors, kept, config.encoder.pretrained)
    if getattr(config, "features", "backbone") == "head":
        encoders.load_projection(net, tensors, config.encoder.pretrained)
    said = f"{matched} of {len(networks.backbone_keys(net))} backbone tensors matched"
    return f"{said} ({chosen})" if chosen else said


def check_features(config: Config, multi_label: bool) -> None:
    """`check` for the scripts that classify frozen features, of images that show several classes, if `many`, or one."""
    feature_files.check(config, multi_label)
    if not config.files.load_features:
        check(config)
        feature_files.check_dump(config)


def frozen_features(
    config: Config, device: torch.device, unit_norm: bool = True
) -> tuple[features.Features, features.Features, tuple[str, ...]]:
    """This rank's share of the features of both splits, from `--load-features` or from the encoder, and the classes.

    Raises InputError where a feature is infinite or no number.
    """
    if config.files.load_features:
        train, val, classes = feature_files.load(config, device)
    else:
        images, val_images, _ = splits(config)
        net = pretrained(config, len(images.classes), device)
        (train, val), classes = (
            feature_files.of_splits(net, images, val_images, config, device, unit_norm),
            images.classes,
        )
    if not all(rows.sum().isfinite() for rows, _ in (train, val)):
        source = config.files.load_features or config.encoder.pretrained
        raise InputError(
            f"{source}: its features are not all finite numbers; the encoder diverged, or --amp fp16 overflows"
        )
    return train, val, classes
