"""The sections of an evaluation's settings; see moco/sections.py for the sections of every run."""

from dataclasses import dataclass
from typing import ClassVar

from moco.options import option


@dataclass(frozen=True)
class Encoder:
    """The encoder that is evaluated."""

    TITLE: ClassVar[str] = "encoder"
    pretrained: str | None = option(
        None,
        "checkpoint of this project or of other software, such as MoCo, SogCLR, MoBY or timm",
        metavar="FILE",
        unset="a randomly initialised encoder",
    )
    encoder_method: str | None = None  # of the checkpoint's pre-training
    pretrain_epochs: int | None = None  # of the checkpoint


@dataclass(frozen=True)
class Classifier:
    """The classifier on the encoder: how it is trained, chosen and tested."""

    TITLE: ClassVar[str] = "classifier"
    weights: str = option(
        "freeze",
        "freeze: train the classifier only; finetune: train the encoder, too",
        choices=("freeze", "finetune"),
    )
    evaluate: bool = option(False, "only test the classifier of --resume", "-e", switch=False)
    val_from_train: float | None = option(
        None,
        "fraction of each class's training images to hold out; the best classifier is chosen on "
        "them",
        range="(0, 1)",
        metavar="FRACTION",
        unset="choose it on val/",
    )


@dataclass(frozen=True)
class Labels:
    """The training images whose labels are used."""

    TITLE: ClassVar[str] = "labels"
    train_percent: int = option(
        100,
        "percentage of labelled images: on ImageNet those in the published lists; otherwise, or "
        "with --class-list, a sample of each class",
        choices=(1, 10, 100),
    )
    subset_file: str | None = option(
        None, "list of the labelled images, one file name a line", metavar="FILE"
    )


@dataclass(frozen=True)
class FeatureFiles:
    """The files that features are saved to, or loaded from instead of being computed."""

    TITLE: ClassVar[str] = "files of features"
    dump_features: str | None = option(
        None, "write the features of both splits to FOLDER, as .npy files", metavar="FOLDER"
    )
    load_features: str | None = option(
        None,
        "read the features from FOLDER; leave out DIR and --pretrained; the seed is the dump's",
        metavar="FOLDER",
    )
