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


@dataclass(frozen=True)
class Compared:
    """The features that an evaluation compares."""

    features: str | None = option(
        None,
        "features to compare: those of the backbone, or those of the projection head",
        choices=("backbone", "head"),
        unset="backbone",
    )
    host_features: bool = option(
        False, "keep the features in the host's memory, not on the GPU", switch=False
    )


@dataclass(frozen=True)
class FewShot:
    """The episodes of few-shot classification."""

    TITLE: ClassVar[str] = "few-shot classification"
    few_shot: bool = option(
        False,
        "instead of k-NN, classify the images of val/ in episodes: each draws classes, and learns "
        "them from a few images",
        switch=False,
    )
    ways: int = option(5, "classes of an episode", range="[2, 10000]", metavar="N")
    shots: tuple[int, ...] = option(
        (1, 5),
        "images of each class to learn from; several are tested one after the other",
        range=sections.POSITIVE,
        nargs="+",
        metavar="K",
    )
    queries: int = option(
        15, "images of each class to classify", range=sections.POSITIVE, metavar="Q"
    )
    episodes: int = option(600, "number of episodes", range="[2, 1000000]")
    few_shot_classifier: tuple[str, ...] = option(
        ("mean", "logistic"),
        "mean: nearest class mean, by cosine; logistic: logistic regression",
        choices=("mean", "logistic"),
        nargs="+",
    )


@dataclass(frozen=True)
class OtherTest:
    """Test images in another folder than the training images, such as ImageNet-R."""

    TITLE: ClassVar[str] = "other test images"
    eval_data: str | None = option(
        None,
        "test on the class folders in this folder instead of val/, such as ImageNet-A, -R, "
        "-Sketch or -V2; only its classes can be predicted",
        metavar="FOLDER",
    )
    class_map: str | None = option(
        None,
        "file with a line for each class folder of --eval-data to use: its name, and the name or "
        "index of the training images' class",
        metavar="FILE",
        unset="folders have the names of the classes, or all have their indices",
    )


@dataclass(frozen=True)
class Retrieval(Compared):
    """The database that is searched, and the ranks at which the result is measured."""

    TITLE: ClassVar[str] = "retrieval"
    protocol: str | None = option(
        None,
        "revisited, dino or synco-v2: whose extraction and formula are the defaults for "
        "--dataset roxford5k and rparis6k. --cfg and options on the command line take precedence",
        metavar="NAME",
        unset="revisited",
    )
    database: str = option(
        "train",
        "split to search for images of the class of each val/ image; val: the other images of val/",
        choices=("train", "val"),
    )
    k: tuple[int, ...] = option(
        (1, 5, 10),
        "values of k for Recall@k, or for the mean precision at k of roxford5k and rparis6k",
        range=sections.POSITIVE,
        nargs="+",
    )


@dataclass(frozen=True)
class Extraction:
    """The features of roxford5k and rparis6k, whose images keep their aspect ratio."""

    TITLE: ClassVar[str] = "roxford5k and rparis6k"
    imsize: int = option(
        1024, "longer side of the images; smaller images keep their size", range=sections.PIXELS
    )
    crop_queries: bool = option(True, "crop each query image to its box")
    center_crop: bool = option(
        False,
        "then resize the shorter side to 256 / 224 of --imsize, and crop the center to --imsize",
    )
    multiscale: bool = option(True, "join the features of the image at several --scales")
    scales: tuple[float, ...] = option(
        (1.0, 0.5**0.5, 0.5), "scales of --multiscale", range="[0.05, 4]", nargs="+", metavar="S"
    )
    pooling: str | None = option(
        None,
        "gem: generalized mean with exponent 3 over the feature map of a ResNet; network: the "
        "network's own features",
        choices=("gem", "network"),
        unset="gem for torchvision's ResNets, network for others",
    )
    normalize_scales: bool = option(
        True, "normalize the features of each scale to norm 1 before they are joined"
    )
    ap: str = option(
        "revisited",
        "average precision; revisited: trapezoids, without the ignored images; synco-v2: the mean "
        "precision at the positives, with ignored images ranked as wrong ones",
        choices=("revisited", "synco-v2"),
    )


@dataclass(frozen=True)
class Clustering(Compared):
    """The clusters of k-means."""

    TITLE: ClassVar[str] = "clustering"
    split: str = option("val", "images to cluster", choices=("val", "train"))
    clusters: int | None = option(
        None, "number of clusters", range="[2, 1000000]", unset="the number of classes"
    )
    repeats: int = option(
        5, "runs of k-means with different seeds, of which the mean is reported", range="[1, 1000]"
    )
