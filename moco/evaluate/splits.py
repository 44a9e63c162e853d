"""Read the images that an evaluation trains and tests on, and those whose labels it may use."""

from pathlib import Path
from typing import NamedTuple

from moco import distributed
from moco.config import Config
from moco.data import registry, sources, subsets
from moco.data.images import Images, note_dark
from moco.errors import InputError
from moco.evaluate import other_images
from moco.messages import counted, print_rank0
from moco.methods import trains_on_labels


def check_val_from_train(config: Config) -> None:
    """Raise InputError if `--val-from-train` is not a fraction."""
    fraction = config.val_from_train
    if fraction is not None and not 0 < fraction < 1:
        raise InputError(
            f"--val-from-train {fraction:g}: must be between 0 and 1, as in --val-from-train 0.1"
        )


def check_labels(config: Config) -> None:
    """Download or read the list of labelled images, if there is one. Call it after `complete`.

    Raises InputError if it cannot be downloaded or read.
    """
    if config.labels.subset_file:
        subsets.read_names(Path(config.labels.subset_file))
        return
    percent, images = config.labels.train_percent, config.input
    of_imagenet = images.dataset == "imagenet" and not images.class_list
    if percent == 100 or not of_imagenet:
        return
    if subsets.is_imagenet(sources.class_names(Path(config.run.data), "train")):
        subsets.published_list(percent)


class Splits(NamedTuple):
    """The images to train and test a classifier on and, if some are held out, to choose it on."""

    train: Images
    val: Images
    held_out: Images | None = None


def load(config: Config) -> Splits:
    """Return the labelled training images, the validation images, and the images held out.

    `--val-from-train` holds images out; they are not among the training images. With `--eval-data`,
    the validation images are those of that folder.

    Raises InputError if the data cannot be read.
    """
    seed, images = config.run.seed, config.input
    train, val = registry.load(images.dataset, config.run.data, seed)
    if config.other_test.eval_data:
        val = other_images.load(config.other_test, train)
    train, val = (subsets.keep_classes(part, images.class_list) for part in (train, val))
    subsets.require_two_classes(train)
    note_dark(train, images)
    if config.labels:
        train = _labelled(config, train)
    if not config.val_from_train:
        return Splits(train, val)
    train, held_out = subsets.hold_out(train, config.val_from_train, seed)
    print_rank0(
        f"{counted(len(held_out), 'image of train/ is', 'images of train/ are')} held out to "
        "choose the classifier on, "
        f"{len(train)} are trained on"
    )
    return Splits(train, val, held_out)


def _labelled(config: Config, train: Images) -> Images:
    """Return the training images whose labels are used. If these are not all, write subset.txt."""
    labels = config.labels
    part = subsets.labelled_subset(train, labels.train_percent, config.run.seed, labels.subset_file)
    if len(part) < len(train) and distributed.rank() == 0:
        file = Path(config.run.save_dir) / "subset.txt"
        subsets.write_names(part, file)
        print_rank0(
            f"{len(part)} of {len(train)} training images are labelled; they are listed in {file}"
        )
        method = config.encoder.encoder_method
        if trains_on_labels(method):
            print_rank0(
                f"the encoder was pre-trained with {method} on the labels of all its images, so "
                "this is no result with few labels"
            )
    return part
