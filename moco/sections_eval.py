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
        "checkpoint of any method here, or a MoCo, SogCLR, MoBY or bare file",
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
        "freeze", "of the encoder: kept, or trained too", choices=("freeze", "finetune")
    )
    evaluate: bool = option(False, "only test the classifier of --resume", "-e", switch=False)
    val_from_train: float | None = option(
        None,
        "fraction of each class's training images, held out to choose the best classifier on",
        range="(0, 1)",
        metavar="FRACTION",
        unset="it is chosen on val/",
    )


@dataclass(frozen=True)
class Labels:
    """The training images whose labels are used."""

    TITLE: ClassVar[str] = "labels"
    train_percent: int = option(
        10,
        "percentage of the labels: on ImageNet those of the published lists; otherwise, or with "
        "--class-list, a sample of each class",
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
        None, "write the features of both splits there, as .npy files", metavar="FOLDER"
    )
    load_features: str | None = option(
        None,
        "read them from there: no DIR, no --pretrained; the seed is that of the dump",
        metavar="FOLDER",
    )
