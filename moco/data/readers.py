"""Read the training and test images of single data sets, each in its published layout and split.

Torchvision's classes find the files and labels of most data sets. No image file is opened here.
The table of all data sets is in `registry`.
"""

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets as tv

from moco.data import subsets
from moco.data.folders import class_names, scan_classes
from moco.data.images import ImageArray, ImageFolder, Images
from moco.data.names import Names
from moco.errors import InputError
from moco.pickles import read_pickle

Split = tuple[Images, Images]  # training images, test images
Reader = Callable[[str, int], Split]  # a function of the root folder and the seed


class _NoChecksums:
    """A mix-in for torchvision's data sets that skips their checksums.

    A reduced copy of a data set would fail the checks. If a file is missing, opening it raises an
    error.
    """

    def _check_integrity(self, *_: object) -> bool:
        return True


def cifar(dataset: type) -> Reader:
    """Return a reader of CIFAR's batches, for torchvision's class of that data set.

    The batches are pickles. Torchvision would unpickle them, and thereby run any code in them;
    `read_pickle` runs none.
    """

    def read(root: str, name: str, *keys: str) -> Any:
        file = os.path.join(root, dataset.base_folder, name)
        os.stat(file)  # if the file is missing, this error names it
        try:
            found = read_pickle(file)
        except InputError as error:
            raise ValueError(f"{file}: {error}") from None
        return next(found[key] for key in keys if key in found)

    def split(root: str, batches: list) -> Images:
        pixels = np.concatenate([read(root, name, "data") for name, _ in batches])
        pixels = pixels.reshape(-1, 3, 32, 32).astype(np.uint8)
        labels = np.concatenate([read(root, name, "labels", "fine_labels") for name, _ in batches])
        classes = read(root, dataset.meta["filename"], dataset.meta["key"])
        return _checked(ImageArray, root, pixels, labels, classes)

    return lambda root, _seed: (split(root, dataset.train_list), split(root, dataset.test_list))


def stl10(root: str, _seed: int) -> Split:
    """Read STL-10's labelled images."""
    dataset = type("STL10", (_NoChecksums, tv.STL10), {})
    splits = [dataset(root, split) for split in ("train", "test")]
    return tuple(
        _checked(ImageArray, root, split.data, split.labels, split.classes) for split in splits
    )


def torchvision_files(dataset: type, train: str, test: str) -> Reader:
    """Return a reader of the files that a torchvision class lists.

    `train` and `test` are names of its splits; "a+b" joins two splits.
    """
    dataset = type(dataset.__name__, (_NoChecksums, dataset), {})

    def load(root: str, _seed: int) -> Split:
        splits = [[dataset(root, split) for split in both.split("+")] for both in (train, test)]
        # torchvision 0.21 has no names for the 102 flowers
        numbers = [str(i) for i in range(1, 103)]
        classes = getattr(splits[0][0], "classes", numbers)
        return tuple(_joined(root, parts, classes) for parts in splits)

    return load


def _joined(root: str, splits: list, classes: Sequence[str]) -> Images:
    """Join torchvision's splits, one after the other, with labels that are indices into `classes`.

    Torchvision may number only the classes that occur in a split, so labels are matched by name.
    """
    paths, labels = [], []
    start = len(os.fsencode(os.path.join(root, "")))
    for split in splits:
        if isinstance(split, tv.StanfordCars):
            files, own = zip(*split._samples, strict=True)
        else:
            files = next(
                vars(split)[name]
                for name in ("_image_files", "_images", "images")
                if name in vars(split)
            )
            own = split._labels
        names = getattr(split, "classes", classes)
        paths += (os.fsencode(file)[start:] for file in files)
        labels.append(own if names == classes else _class_indices(names, classes)[own])
    return _checked(ImageFolder, root, paths, np.concatenate(labels), classes)


_VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


class VOC2007(tv.VOCDetection):
    """The images of VOC2007, each with the classes that it shows, from the detection labels."""

    classes = _VOC_CLASSES

    def __init__(self, root: str, split: str):
        """List the images of `split`: train, val, trainval or test."""
        super().__init__(root, "2007", split)

    @property
    def _labels(self) -> np.ndarray:
        """Return int64 [N, 20]: 1 if an image shows the class, 0 if not.

        It is -1 if all objects of the class are marked as difficult. VOC's metric ignores those.
        """
        labels = np.zeros((len(self.annotations), len(self.classes)), dtype=np.int64)
        for row, file in zip(labels, self.annotations, strict=True):
            for thing in ET.parse(file).iter("object"):
                i = self.classes.index(thing.findtext("name"))
                difficult = int(thing.findtext("difficult") or 0)
                row[i] = -1 if difficult and row[i] != 1 else 1
        return labels


def caltech101(root: str, seed: int) -> Split:
    """Draw 30 random images of each class for training. The other images are for the test.

    Torchvision is not used: it guesses the names of the files from their number.
    """
    os.stat(os.path.join(root, "caltech101", "101_ObjectCategories"))  # its error names the folder
    images = scan_classes(Path(root, "caltech101", "101_ObjectCategories"))
    kept = [i for i, name in enumerate(images.classes) if name != "BACKGROUND_Google"]
    images = images.subset(np.isin(images.labels, kept))
    images = replace(
        images,
        labels=np.searchsorted(kept, images.labels),
        classes=tuple(images.classes[i] for i in kept),
    )
    train = np.zeros(len(images), dtype=bool)
    for indices in subsets.shuffled_by_class(images, seed):
        train[indices[:30]] = True
    if train.all():
        raise ValueError("no class has more than 30 images, so none are left to test on")
    return images.subset(train), images.subset(~train)


def imagenette(root: str, _seed: int) -> Split:
    """Read Imagenette: the full-size version if it exists, else that of 320 or 160 pixels.

    `root` may also be the folder of a version itself.
    """
    versions = ("imagenette2", "imagenette2-320", "imagenette2-160", ".")
    folders = [Path(root, version) for version in versions]
    folder = next((one for one in folders if (one / "train").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no {' or '.join(str(one / 'train') for one in folders)}")
    for split in ("train", "val"):
        # otherwise any folder with train/ and val/ would pass for Imagenette
        if set(class_names(folder / split)) != tv.Imagenette._WNID_TO_CLASS.keys():
            raise ValueError(f"{folder / split} has other classes than Imagenette's ten")
    train = scan_classes(folder / "train")
    return train, scan_classes(folder / "val", train.classes)


def tiny_imagenet(root: str, _seed: int) -> Split:
    """Read Tiny ImageNet, in the folder to which its archive unpacks, or in `root` itself.

    A text file in each class folder lists the training images. The images of val/ are in one
    folder, and a text file has lines such as `val_0.JPEG  n03444034  0  32  44  62`, with the class
    in the second column.
    """
    folder = _first_with(root, ("tiny-imagenet-200", "."), "wnids.txt")
    classes = sorted((folder / "wnids.txt").read_text().split())
    train = [
        (f"{name}/images/{fields[0]}", name)
        for name in classes
        for fields in _columns(folder / "train" / name / f"{name}_boxes.txt", 5)
    ]
    val = [
        (f"images/{fields[0]}", fields[1])
        for fields in _columns(folder / "val" / "val_annotations.txt", 6)
    ]
    return tuple(
        _checked(
            ImageFolder,
            folder / split,
            [os.fsencode(path) for path, _ in listed],
            _class_indices([name for _, name in listed], classes),
            classes,
        )
        for split, listed in (("train", train), ("val", val))
    )


def _columns(file: Path, count: int) -> list[list[str]]:
    """Return the columns of each line in `file`. Raises ValueError unless there are `count`."""
    lines = [line.split() for line in file.read_text().splitlines()]
    if not lines or any(len(fields) != count for fields in lines):
        raise ValueError(f"{file} does not hold lines of {count} columns; it may be truncated")
    return lines


def sun397(root: str, _seed: int) -> Split:
    """Read the first of SUN397's official splits.

    Its lists have lines such as /a/abbey/sun_aaalbzqrimafwbiv.jpg.
    """
    splits = []
    for name in ("Training_01.txt", "Testing_01.txt"):
        file = _first_with(root, ("SUN397", "SUN397/Partitions", "Partitions"), name) / name
        splits.append([line.strip("/ ") for line in file.read_text().splitlines() if line.strip()])
    folders = sorted({os.path.dirname(path) for path in splits[0]})
    classes = [folder.partition("/")[2] for folder in folders]  # without the letter
    labels = [
        _class_indices([os.path.dirname(path) for path in paths], folders) for paths in splits
    ]
    paths = [[os.fsencode(path) for path in paths] for paths in splits]
    return tuple(
        _checked(ImageFolder, Path(root, "SUN397"), *split, classes)
        for split in zip(paths, labels, strict=True)
    )


def places365(root: str, _seed: int) -> Split:
    """Read Places365: the images of 256 pixels if they exist, else the large ones.

    Torchvision's class is not used, because it takes ten times as long for the 1.8 million images.
    """
    train = Path(root, "places365_train_standard.txt"), ("data_256_standard", "data_large_standard")
    return _scenes(root, train, (Path(root, "places365_val.txt"), ("val_256", "val_large")))


def places205(root: str, _seed: int) -> Split:
    """Read Places205. Its official archives unpack to several layouts."""
    folders = (".", "data/vision/torralba/deeplearning/images256", "images256", "images")
    names = ("train_places205.csv", "val_places205.csv")
    lists = [_first_with(root, ("trainvalsplit_places205", "."), name) / name for name in names]
    return _scenes(root, *((file, folders) for file in lists))


def _scenes(root: str, *lists: tuple[Path, Sequence[str]]) -> Split:
    """Read two lists with lines of the form PATH LABEL.

    Each list comes with the folders that may contain its images. The first folder that contains the
    list's first image is used. A class is named after the folder of its first training image.
    """
    splits = []
    for file, folders in lists:
        fields = file.read_bytes().translate(bytes.maketrans(b",;", b"  ")).split()
        if not fields or len(fields) % 2:
            raise ValueError(f"{file} does not hold lines of the form PATH LABEL")
        paths = [path.lstrip(b"/") for path in fields[::2]]
        labels = np.array(fields[1::2]).astype(np.int64)
        splits.append((_first_with(root, folders, os.fsdecode(paths[0])), paths, labels))
    _, paths, labels = splits[0]
    names = {
        label: os.path.dirname(paths[i])
        for label, i in zip(*np.unique(labels, return_index=True), strict=True)
    }
    classes = [os.fsdecode(names.get(label, b"%d" % label)) for label in range(max(names) + 1)]
    return tuple(_checked(ImageFolder, *split, classes) for split in splits)


def _first_with(root: str, folders: Sequence[str], name: str) -> Path:
    """Return the first of the `folders` in `root` that has the file `name`.

    Raises FileNotFoundError if none has it.
    """
    paths = [Path(root, folder) for folder in folders]
    for path in paths:
        if (path / name).is_file():
            return path
    raise FileNotFoundError(f"no {name} in {' or '.join(map(str, paths))}")


def _checked(
    images: type, root: str | Path, content: Sequence, labels: Sequence, classes: Sequence[str]
) -> Images:
    """Check the labels, and return an ImageFolder of paths or an ImageArray of pixels.

    Raises ValueError if there are more or fewer labels than images, or if a label has no class.
    """
    labels = np.array(labels, dtype=np.int64)
    if len(labels) != len(content) or not len(labels):
        raise ValueError(f"{len(content)} images with {len(labels)} labels")
    if labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} with {len(classes)} classes"
        )
    pixels_or_paths = Names.of(content) if images is ImageFolder else np.ascontiguousarray(content)
    return images(Path(root), labels, tuple(classes), pixels_or_paths)


def _class_indices(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the indices of `names` in `classes`. Raises ValueError if one is not there."""
    index = {name: i for i, name in enumerate(classes)}
    if extra := sorted(set(names) - index.keys()):
        raise ValueError(f"no training image of class '{extra[0]}'")
    return np.array([index[name] for name in names], dtype=np.int64)
