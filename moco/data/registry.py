"""Data sets by name, for the evaluation scripts: each laid out and split as published.

Torchvision finds, reads and downloads them where it can. Lists of images are read here, images are not."""

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from torchvision import datasets as tv
from torchvision.datasets.utils import download_and_extract_archive

from moco.config import MEAN, STD
from moco.data import photos, subsets
from moco.data.folders import agreed, class_names, find, scan, split_folder
from moco.data.images import ImageArray, ImageFolder, Images
from moco.errors import InputError, unknown
from moco.files import read_pickle

Split = tuple[Images, Images]  # to train on, to test on


Loader = Callable[[str, int], Split]  # of root and seed


# What torchvision lists.


class _AsItLies:
    """Before one of torchvision's classes: reads without its checksums, which a reduced copy of a data set would fail."""

    def _check_integrity(self, *_: object) -> bool:
        return True  # open() names the file that is missing


def _cifar(kind: type) -> Loader:
    """A loader of CIFAR's batches, which are pickles, and which torchvision would read as code."""

    def read(root: str, name: str, *keys: str) -> Any:
        file = os.path.join(root, kind.base_folder, name)
        os.stat(file)  # an error that names it, where it is absent
        try:
            found = read_pickle(file)
        except InputError as error:
            raise ValueError(f"{file}: {error}") from None
        return next(found[key] for key in keys if key in found)

    def split(root: str, batches: list) -> Images:
        pixels = np.concatenate([read(root, name, "data") for name, _ in batches]).reshape(
            -1, 3, 32, 32
        )
        labels = np.concatenate([read(root, name, "labels", "fine_labels") for name, _ in batches])
        return _made(
            ImageArray,
            root,
            pixels.astype(np.uint8),
            labels,
            read(root, kind.meta["filename"], kind.meta["key"]),
        )

    return lambda root, seed: (split(root, kind.train_list), split(root, kind.test_list))


def _stl10(root: str, seed: int) -> Split:
    kind = type("STL10", (_AsItLies, tv.STL10), {})
    parts = [kind(root, split) for split in ("train", "test")]
    return tuple(_made(ImageArray, root, part.data, part.labels, part.classes) for part in parts)


def _files(kind: type, train: str, test: str) -> Loader:
    """A loader of what torchvision's `kind` lists; a+b stands for two of its splits."""
    kind = type(kind.__name__, (_AsItLies, kind), {})

    def load(root: str, seed: int) -> Split:
        splits = [[kind(root, split) for split in both.split("+")] for both in (train, test)]
        classes = getattr(
            splits[0][0], "classes", [str(i) for i in range(1, 103)]
        )  # 0.21 has no names for the 102 flowers
        return tuple(_joined(root, parts, classes) for parts in splits)

    return load


def _joined(root: str, parts: list, classes: Sequence[str]) -> Images:
    """One part after the other. A part may number no more classes than it shows, so labels go by the names in `classes`."""
    paths, labels = [], []
    start = len(os.fsencode(os.path.join(root, "")))
    for part in parts:
        if isinstance(part, tv.StanfordCars):
            files, own = zip(*part._samples, strict=True)
        else:
            files = next(
                getattr(part, name)
                for name in ("_image_files", "_images", "images")
                if hasattr(part, name)
            )
            own = part._labels
        names = getattr(part, "classes", classes)
        paths += (os.fsencode(file)[start:] for file in files)
        labels.append(own if names == classes else _places(names, classes)[own])
    return _made(ImageFolder, root, paths, np.concatenate(labels), classes)


class _VOC2007(tv.VOCDetection):
    classes = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa "
        "train tvmonitor"
    ).split()

    def __init__(self, root: str, split: str):
        super().__init__(root, "2007", split)

    @property
    def _labels(self) -> np.ndarray:
        """[N, 20]: 1 for a class with an ordinary object, -1 for one with difficult objects only, 0 for one with none."""
        labels = np.zeros((len(self.annotations), len(self.classes)), dtype=np.int64)
        for row, file in zip(labels, self.annotations, strict=True):
            for thing in ET.parse(file).iter("object"):
                place = self.classes.index(thing.findtext("name"))
                difficult = int(thing.findtext("difficult") or 0)
                row[place] = -1 if difficult and row[place] != 1 else 1
        return labels


# What it does not list, or not by these splits, or slowly.


def _caltech101(root: str, seed: int) -> Split:
    """30 random images of each class, and the rest. Torchvision guesses the files' names from how many there are."""
    os.stat(
        os.path.join(root, "caltech101", "101_ObjectCategories")
    )  # an error that names it, if it is absent
    images = scan(Path(root) / "caltech101", "101_ObjectCategories")
    kept = [i for i, name in enumerate(images.classes) if name != "BACKGROUND_Google"]
    images = images.part(np.isin(images.labels, kept))
    images = replace(
        images,
        labels=np.searchsorted(kept, images.labels),
        classes=tuple(images.classes[i] for i in kept),
    )
    train = np.zeros(len(images), dtype=bool)
    for places in subsets.by_class(images, seed):
        train[places[:30]] = True
    if train.all():
        raise ValueError("no class has more than 30 images: none to test on")
    return images.part(train), images.part(~train)


def _sun397(root: str, seed: int) -> Split:
    """The first official split: lines such as /a/abbey/sun_aaalbzqrimafwbiv.jpg."""
    splits = []
    for name in ("Training_01.txt", "Testing_01.txt"):
        file = _first(root, ("SUN397", "SUN397/Partitions", "Partitions"), name) / name
        splits.append([line.strip("/ ") for line in file.read_text().splitlines() if line.strip()])
    folders = sorted({os.path.dirname(path) for path in splits[0]})
    classes = [folder.partition("/")[2] for folder in folders]  # without the letter
    labels = [_places([os.path.dirname(path) for path in paths], folders) for paths in splits]
    paths = [[os.fsencode(path) for path in paths] for paths in splits]
    return tuple(
        _made(ImageFolder, Path(root, "SUN397"), *split, classes)
        for split in zip(paths, labels, strict=True)
    )


def _places365(root: str, seed: int) -> Split:
    """The images of 256 pixels, else the large ones. Torchvision takes ten times as long for the 1.8 million lines."""
    train = Path(root, "places365_train_standard.txt"), ("data_256_standard", "data_large_standard")
    return _scenes(root, train, (Path(root, "places365_val.txt"), ("val_256", "val_large")))


def _places205(root: str, seed: int) -> Split:
    folders = (".", "data/vision/torralba/deeplearning/images256", "images256", "images")
    names = ("train_places205.csv", "val_places205.csv")
    return _scenes(
        root,
        *((_first(root, ("trainvalsplit_places205", "."), name) / name, folders) for name in names),
    )


def _scenes(root: str, *lists: tuple[Path, Sequence[str]]) -> Split:
    """Two lists of PATH LABEL lines, each below the first of its folders that holds its first image.

    A class is called by the folder of its first training image.
    """
    splits = []
    for file, folders in lists:
        fields = file.read_bytes().translate(bytes.maketrans(b",;", b"  ")).split()
        if not fields or len(fields) % 2:
            raise ValueError(f"{file} does not hold lines of the form PATH LABEL")
        paths = np.strings.lstrip(np.array(fields[::2]), b"/")
        splits.append(
            (
                _first(root, folders, os.fsdecode(paths[0])),
                paths,
                np.array(fields[1::2]).astype(np.int64),
            )
        )
    _, paths, labels = splits[0]
    names = {
        label: os.path.dirname(paths[i])
        for label, i in zip(*np.unique(labels, return_index=True), strict=True)
    }
    classes = [os.fsdecode(names.get(label, b"%d" % label)) for label in range(max(names) + 1)]
    return tuple(_made(ImageFolder, *split, classes) for split in splits)


def _first(root: str, folders: Sequence[str], name: str) -> Path:
    """The first of the `folders` in `root` that holds the file `name`."""
    places = [Path(root, folder) for folder in folders]
    for place in places:
        if (place / name).is_file():
            return place
    raise FileNotFoundError(f"no {name} in {' or '.join(map(str, places))}")


def _made(
    kind: type, root: str | Path, content: Sequence, labels: Sequence, classes: Sequence[str]
) -> Images:
    """`kind` with its paths or pixels. Raises ValueError where the labels are not one an image, or not of `classes`."""
    labels = np.array(labels, dtype=np.int64)
    if len(labels) != len(content) or not len(labels):
        raise ValueError(f"{len(content)} images with {len(labels)} labels")
    if labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} with {len(classes)} classes"
        )
    return kind(Path(root), labels, tuple(classes), np.ascontiguousarray(content))


def _places(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Where `names` stand in `classes`. Raises ValueError for one that does not."""
    place = {name: i for i, name in enumerate(classes)}
    if strange := sorted(set(names) - place.keys()):
        raise ValueError(f"no training image of class '{strange[0]}'")
    return np.array([place[name] for name in names], dtype=np.int64)


# All of them.


def _download_sun397(root: str, download: bool) -> None:
    tv.SUN397(root, download=download)
    url = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
    download_and_extract_archive(url, root, os.path.join(root, "SUN397"))


class _Set(NamedTuple):
    load: Loader
    get: (
        Callable[..., object] | str
    )  # downloads, called with root and download=True; or says where people find it
    layout: str  # of the root
    mean: tuple[float, ...] = MEAN  # of the training images' RGB in [0, 1], if published
    std: tuple[float, ...] = STD


_SETS = {
    "cifar10": _Set(
        _cifar(tv.CIFAR10),
        tv.CIFAR10,
        "cifar-10-batches-py/ (data_batch_1, ..., batches.meta)",
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),  # as in MoCo's demo: the std of each image, averaged
    ),
    "cifar100": _Set(
        _cifar(tv.CIFAR100),
        tv.CIFAR100,
        "cifar-100-python/ (train, test, meta)",
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
    ),
    "stl10": _Set(_stl10, tv.STL10, "stl10_binary/ (train_X.bin, ..., class_names.txt)"),
    "flowers": _Set(
        _files(tv.Flowers102, "train+val", "test"),
        tv.Flowers102,
        "flowers-102/ (jpg/, imagelabels.mat, setid.mat)",
    ),
    "pets": _Set(
        _files(tv.OxfordIIITPet, "trainval", "test"),
        tv.OxfordIIITPet,
        "oxford-iiit-pet/ (images/, annotations/)",
    ),
    "food101": _Set(_files(tv.Food101, "train", "test"), tv.Food101, "food-101/ (images/, meta/)"),
    "cars": _Set(
        _files(tv.StanfordCars, "train", "test"),
        "https://github.com/pytorch/vision/issues/7545, which names copies (its own site is gone)",
        "stanford_cars/ (cars_train/, cars_test/, devkit/, cars_test_annos_withlabels.mat)",
    ),
    "caltech101": _Set(_caltech101, tv.Caltech101, "caltech101/101_ObjectCategories/CLASS/*.jpg"),
    "dtd": _Set(_files(tv.DTD, "train+val", "test"), tv.DTD, "dtd/dtd/ (images/, labels/)"),
    "aircraft": _Set(
        _files(tv.FGVCAircraft, "trainval", "test"),
        tv.FGVCAircraft,
        "fgvc-aircraft-2013b/data/ (images/, variants.txt, ...)",
    ),
    "sun397": _Set(
        _sun397,
        _download_sun397,
        "SUN397/ (a/abbey/*.jpg, ..., Partitions/Training_01.txt and Testing_01.txt)",
    ),
    "voc2007": _Set(
        _files(_VOC2007, "trainval", "test"),
        lambda root, **yes: [
            tv.VOCDetection(root, "2007", split, **yes) for split in ("trainval", "test")
        ],
        "VOCdevkit/VOC2007/ (JPEGImages/, Annotations/, ImageSets/Main/)",
    ),
    "places365": _Set(
        _places365,
        lambda root, **yes: [
            tv.Places365(root, split, small=True, **yes) for split in ("train-standard", "val")
        ],
        "places365_train_standard.txt, places365_val.txt, data_256_standard/ and val_256/ (or data_large_standard/ and val_large/)",
    ),
    "places205": _Set(
        _places205,
        "http://places.csail.mit.edu",
        "trainvalsplit_places205/ (train_places205.csv, val_places205.csv) and images256/",
    ),
}


NAMES: tuple[str, ...] = ("imagenet", "photos", *_SETS)


_ALSO = {"place205": "places205", "imagenet2012": "imagenet"}  # as in AdCo's and FNC's commands


def canonical(name: str) -> str:
    """A data set's name here: in small letters, and as in `NAMES` where a paper's commands have another."""
    return _ALSO.get(name.lower(), name.lower())


# What papers report: top-1 accuracy, its mean over classes, or the mean over classes of 11-point average precision.
METRIC = dict.fromkeys(NAMES, "acc1") | dict.fromkeys(
    ("flowers", "pets", "caltech101", "aircraft"), "mean_per_class"
)


METRIC["voc2007"] = "map11"


def load(name: str, root: str, seed: int = 0) -> Split:
    """The training and the test images of data set `name` in the folder `root`; `seed` draws a split where none is published.

    Raises InputError where their lists are absent, unreadable or wrong.
    """
    if name in ("imagenet", "photos"):
        folder = _imagenet(name, root)
        train = scan(folder, "train")
        return train, scan(folder, "val", train.classes)
    if name not in _SETS:
        raise unknown("dataset", name, NAMES)
    root = _full(root)
    try:
        if not os.path.isdir(root):
            raise FileNotFoundError("no such folder")
        train, test = _SETS[name].load(root, seed)
        return agreed(train), agreed(test)
    except InputError:
        raise
    except Exception as error:  # torchvision, pickle, scipy and expat raise many kinds
        raise _unusable(name, root, _reason(error)) from error


def normalization(name: str) -> tuple[list[float], list[float]]:
    """Return the mean and std of a data set's RGB in [0, 1]; ImageNet's for folders."""
    mean, std = (_SETS[name].mean, _SETS[name].std) if name in _SETS else (MEAN, STD)
    return list(mean), list(std)


def training(name: str, root: str, class_list: str | None = None) -> Images:
    """Return the images to pre-train on: those of train/, or the training images of a data set.

    A folder need not have val/.
    """
    if name in _SETS:
        images = load(name, root)[0]
    else:
        images = scan(find("photos" if name == "photos" else root, ("train",)), "train")
    return subsets.of_classes(images, class_list)


def testing(name: str, root: str, class_list: str | None = None) -> Images:
    """Return the images to test a pre-trained encoder on: val/, or the test images of a data set.

    They have the classes of `training`.
    """
    if name in _SETS:
        images = load(name, root)[1]
    else:
        folder = find("photos" if name == "photos" else root, ("train", "val"))
        images = scan(folder, "val", class_names(folder / "train"))
    return subsets.of_classes(images, class_list)


def check(name: str, root: str, download: bool) -> None:
    """Raise InputError unless `load` works and the first image of each split is there; before that, `download` what is not.

    Several processes of a machine may call it at once.
    """
    if name in ("imagenet", "photos"):
        _imagenet(name, root)
        return
    root = _full(root)
    if download and name in _SETS and callable(_SETS[name].get):
        _download(name, root)
    _look(name, root)


def _full(root: str) -> str:
    return os.path.abspath(os.path.expanduser(root))


def _imagenet(name: str, root: str) -> Path:
    try:
        return find("photos" if name == "photos" else root, ("train", "val"))
    except InputError as error:
        if os.path.isdir(os.path.join(root, "train")) and split_folder(Path(root), "val").is_dir():
            raise
        raise InputError(f"{error}; get ImageNet by hand from https://image-net.org") from None


def _look(name: str, root: str) -> None:
    for images in load(name, root):
        if isinstance(images, ImageFolder) and not os.path.isfile(images.path(0)):
            raise _unusable(name, root, f"no {images.path(0)}")


def _download(name: str, root: str) -> None:
    """Download what `_look` misses, one process after the other: those that waited have nothing left to do."""
    try:
        photos.cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(photos.cache_folder() / f"{name}.lock"):
            try:
                _look(name, root)
            except InputError:
                _SETS[name].get(root, download=True)
    except Exception as error:  # urllib, tarfile, zipfile and torchvision raise many kinds
        how = f"remove an incomplete copy and try again, or put {_SETS[name].layout} there by hand"
        raise InputError(
            f"{root}: --download of {name} failed ({_reason(error)}); {how}"
        ) from error


def _unusable(name: str, root: str, reason: str) -> InputError:
    get, layout = _SETS[name].get, _SETS[name].layout
    by_hand = f"--download cannot get it, so get it by hand from {get}"
    how = (
        by_hand
        if isinstance(get, str)
        else "get it with --download (remove an incomplete copy first)"
    )
    if (Path(root) / "train").is_dir():
        how += "; for the images in its train/, leave out --dataset"
    return InputError(f"{root}: no usable {name} ({reason}); expected {layout}; {how}")


def _reason(error: BaseException) -> str:
    error = error.__cause__ or error
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no {os.fsdecode(error.filename)}"
    text = re.sub(r"\. You can \w+ download=True.*", "", " ".join(str(error).split())).rstrip(".")
    return text if isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: {text}"
