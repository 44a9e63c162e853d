"""Load and check what an evaluation needs: the data, and the pre-trained encoder."""

from argparse import Namespace
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


def check(args: Namespace) -> None:
    """Check, before any process starts, the data and that the checkpoint fits; take the arch from it if not given."""
    if args.data == "photos":
        args.dataset = "photos"
    registry.check(args.dataset, args.data, args.download)
    if args.dataset == "imagenet":
        subsets.check_classes(Path(args.data) / "train", args.class_list, args.data_name)
    if tests_only(args) and args.encoder_method:
        args.stem, args.mean, args.std = (
            args.stem or "imagenet",
            args.mean or list(MEAN),
            args.std or list(STD),
        )
        networks.create(
            args.arch, 1, args.image_size, stem=args.stem
        )  # raises InputError if they do not fit
        return
    state = checkpoint.load(args.pretrained) if args.pretrained else {}
    facts = metadata.read_metadata(state)
    args.arch = args.arch or facts.arch or "resnet50"
    if args.pretrained and not args.image_size and not facts.image_size:
        taken = "224 pixels are taken (--image-size)"
        print_rank0(f"{args.pretrained}: does not say what size of images it is for; {taken}")
    args.image_size = args.image_size or facts.image_size or 224
    used = facts._replace(mean=args.mean or facts.mean, std=args.std or facts.std)
    if args.pretrained and (line := metadata.lacks_normalization(args.pretrained, used)):
        print_rank0(f"{line} (--mean, --std)")
    args.mean, args.std = args.mean or facts.mean or list(MEAN), args.std or facts.std or list(STD)
    args.encoder_method = facts.method if args.pretrained else "random"
    args.pretrain_epochs = facts.epoch
    if not args.pretrained:
        args.stem = args.stem or "imagenet"
        return
    net = networks.create(args.arch, 1, args.image_size)
    stem = encoders.stem_of(net, encoders.tensors_of(net, state))
    if args.stem not in (None, stem):
        has = f"{args.pretrained} has the stem {stem}"
        raise InputError(f"--stem {args.stem}: {has}; leave --stem out")
    args.stem = stem
    with encoders.naming_arch(args.pretrained, facts.arch, args.arch):
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
        raise InputError(
            "--evaluate tests a trained classifier: give its checkpoint with --resume FILE"
        )
    if not args.resume:
        return
    state = checkpoint.load(args.resume)
    if (origin := checkpoint.origin(state)) != "classifier":
        lacking = ", ".join(checkpoint.lacking(state))
        what = (
            f"cannot be resumed: it lacks {lacking}"
            if lacking
            else f"is a {origin} checkpoint, not a classifier's"
        )
        train = ", and leave out --evaluate: it has no classifier to test" if args.evaluate else ""
        raise InputError(
            f"{args.resume}: {what}; give it with --pretrained instead of --resume{train}"
        )
    checkpoint.check_script(state, args)
    facts, saved = metadata.read_metadata(state), state["args"]
    for name in ("arch", "image_size", "stem", "mean", "std"):
        given, own = getattr(args, name), getattr(facts, name)
        if own is None or given in (None, own):
            setattr(args, name, given or own)
        elif name != "image_size" or not args.evaluate:
            given, own = (
                " ".join(map(str, value)) if isinstance(value, list) else value
                for value in (given, own)
            )
            raise InputError(
                f"--{name.replace('_', '-')} {given}: {args.resume} was trained with {own}; leave it out"
            )
        else:
            print_rank0(
                f"the classifier was trained at {own} pixels, and is tested at {given} (--image-size)"
            )
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
        raise InputError(
            f"--val-from-train {args.val_from_train:g}: must lie between 0 and 1, as in --val-from-train 0.1"
        )


def check_labels(args: Namespace) -> None:
    """Fetch or read the list of labelled images, where there is one; after `check`."""
    if args.subset_file:
        subsets.names(Path(args.subset_file))
        return
    few_of_a_folder = (
        args.train_percent < 100 and args.dataset == "imagenet" and not args.class_list
    )
    if few_of_a_folder and subsets.is_imagenet(folders.class_names(Path(args.data) / "train")):
        subsets.published(args.train_percent)


class Splits(NamedTuple):
    """What a classifier is trained and tested on, and, of the training images, what it may be chosen on."""

    train: Images
    val: Images
    held_out: Images | None = None


def splits(args: Namespace) -> Splits:
    """The images of `--dataset`: of its training images the labelled share, if the script asks for one, less what is held out."""
    train, val = (
        subsets.of_classes(part, args.class_list)
        for part in registry.load(args.dataset, args.data, args.seed)
    )
    if hasattr(args, "train_percent"):
        train = _labelled(args, train)
    if not getattr(args, "val_from_train", None):
        return Splits(train, val)
    train, held_out = subsets.hold_out(train, args.val_from_train, args.seed)
    print_rank0(
        f"{len(held_out)} images of train/ are held out to choose on, {len(train)} to train on"
    )
    return Splits(train, val, held_out)


def _labelled(args: Namespace, train: Images) -> Images:
    """The images of train/ whose labels are used; their names go to subset.txt in the run folder."""
    part = subsets.labelled(train, args.train_percent, args.seed, args.subset_file)
    if len(part) < len(train) and distributed.rank() == 0:
        file = Path(args.save_dir) / "subset.txt"
        subsets.write_names(part, file)
        print_rank0(
            f"{len(part)} of {len(train)} training images are labelled; they are listed in {file}"
        )
    return part


def pretrained(args: Namespace, classes: int, device: torch.device) -> nn.Module:
    """The encoder of `--pretrained` (randomly initialised without it) with a new classifier for `classes`, on `device`."""
    torch.manual_seed(args.seed)
    net = networks.create(args.arch, classes, args.image_size, stem=args.stem)
    if tests_only(args):
        print_rank0(
            f"testing the classifier of {args.resume}, {args.arch} at {args.image_size} pixels"
        )
    elif args.pretrained:
        state = checkpoint.load(args.pretrained)
        print_rank0(f"{args.pretrained}: {_load(net, args, state)}")
        facts = metadata.read_metadata(state)
        if facts.image_size not in (None, args.image_size):
            print_rank0(
                f"it was pre-trained at {facts.image_size} pixels, and sees {args.image_size} here (--image-size)"
            )
        _say_if_normalized_otherwise(args, facts)
    else:
        print_rank0(f"no --pretrained: a randomly initialised {args.arch}")
    return precision.place(net, device, args.compile, args.grad_checkpoint)


def _say_if_normalized_otherwise(args: Namespace, facts: metadata.Metadata) -> None:
    """Print one line if `--mean` or `--std` differs from the checkpoint's."""
    names = [
        name for name in ("mean", "std") if getattr(facts, name) not in (None, getattr(args, name))
    ]
    if names:
        own, given = (
            " and ".join(
                f"{name} {' '.join(f'{one:g}' for one in getattr(source, name))}" for name in names
            )
            for source in (facts, args)
        )
        options = ", ".join(f"--{name}" for name in names)
        print_rank0(
            f"its images were normalized with {own} in pre-training, and are with {given} here ({options})"
        )


def _load(net: nn.Module, args: Namespace, state: checkpoint.State) -> str:
    """Load the backbone, and the layers of its projection head that `--ft-proj` keeps below the classifier.

    Returns a line on how many tensors matched, and from which of the file's encoders.
    """
    tensors = encoders.tensors_of(net, state)
    matched, chosen = (
        encoders.load_backbone(net, tensors, args.pretrained),
        encoders.describe_choice(net, tensors),
    )
    if kept := getattr(args, "ft_proj", 0):
        encoders.keep_projection(net, tensors, kept, args.pretrained)
    if getattr(args, "features", "backbone") == "head":
        encoders.load_projection(net, tensors, args.pretrained)
    said = f"{matched} of {len(networks.backbone_keys(net))} backbone tensors matched"
    return f"{said} ({chosen})" if chosen else said


def check_features(args: Namespace, multi_label: bool) -> None:
    """`check` for the scripts that classify frozen features, of images that show several classes, if `many`, or one."""
    feature_files.check(args, multi_label)
    if not args.load_features:
        check(args)
        feature_files.check_dump(args)


def frozen_features(
    args: Namespace, device: torch.device, unit_norm: bool = True
) -> tuple[features.Features, features.Features, tuple[str, ...]]:
    """This rank's share of the features of both splits, from `--load-features` or from the encoder, and the classes.

    Raises InputError where a feature is infinite or no number.
    """
    if args.load_features:
        train, val, classes = feature_files.load(args, device)
    else:
        images, val_images, _ = splits(args)
        net = pretrained(args, len(images.classes), device)
        (train, val), classes = (
            feature_files.of_splits(net, images, val_images, args, device, unit_norm),
            images.classes,
        )
    if not all(rows.sum().isfinite() for rows, _ in (train, val)):
        source = args.load_features or args.pretrained
        raise InputError(
            f"{source}: its features are not all finite numbers; the encoder diverged, or --amp fp16 overflows"
        )
    return train, val, classes
