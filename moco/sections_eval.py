"""The sections of an evaluation's settings; see moco/sections.py for the sections of every run."""

from dataclasses import dataclass
from typing import ClassVar

from moco import sections
from moco.options import option

TEST_RESIZES = ("scaled", "margin", "stretched")  # see `moco.augment.crop.center_view`


@dataclass(frozen=True)
class Views(sections.Views):
    """The views of each training image, and the resize of test images."""

    test_resize: str | None = option(
        None,
        "resize of test images before the centre crop; scaled: the shorter side becomes "
        "256 / 224 of --image-size; margin: it becomes --image-size + 32; stretched: both sides "
        "become 256 / 224 of --image-size",
        choices=TEST_RESIZES,
        unset="that of --resume's classifier, else scaled",
    )


def protocol() -> str | None:
    """Return the field of `--protocol`."""
    return option(
        None,
        "paper whose settings are the defaults: {protocols}. --cfg and options on the command line "
        "take precedence",
        metavar="NAME",
        unset="that of the checkpoint's method; none with --cfg",
    )


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
    encoder_script: str | None = None  # of the checkpoint's pre-training, such as synco
    pretrain_epochs: int | None = None  # of the checkpoint


@dataclass(frozen=True)
class Classifier:
    """The classifier on the encoder: how it is trained, chosen and tested."""

    TITLE: ClassVar[str] = "classifier"
    protocol: str | None = protocol()
    weights: str = option(
        "freeze",
        "freeze: train the classifier only; finetune: train the encoder, too",
        choices=("freeze", "finetune"),
    )
    zero_init_classifier: bool = option(False, "initialize the classifier with zeros")
    sync_bn: bool = option(
        False,
        "batch norm normalizes the batches of all processes together, for --weights finetune",
    )
    evaluate: bool = option(False, "only test the classifier of --resume", "-e", switch=False)
    label_smoothing: float = option(
        0.0,
        "fraction of each label that is spread evenly over all classes",
        range="[0, 1)",
        metavar="FRACTION",
    )
    drop_path: float = option(
        0.0,
        "stochastic depth of a ViT's or Swin's blocks in training, of frozen ones too",
        range="[0, 1)",
        metavar="P",
    )
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
