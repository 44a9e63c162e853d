"""Find, check and download the data sets of the evaluation scripts by name.

`catalog` has their names. `readers` reads each of them in its published layout and split.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from torchvision import datasets as tv
from torchvision.datasets.utils import download_and_extract_archive

from moco.config import MEAN, STD
from moco.data import file_lists, photos, readers, subsets
from moco.data.catalog import NAMES, is_downloadable
from moco.data.folders import same_on_all_ranks
from moco.data.images import ImageFolder, Images
from moco.data.sources import TABLES, TARS, class_names, find, locate, scan
from moco.errors import InputError, unknown


def _download_sun397(root: str, download: bool) -> None:
    """Download SUN397 and the lists of its splits, which torchvision leaves out."""
    tv.SUN397(root, download=download)
    url = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
    download_and_extract_archive(url, root, os.path.join(root, "SUN397"))


def _download_tiny_imagenet(root: str, download: bool) -> None:
    """Download and unpack Tiny ImageNet, which torchvision lacks."""
    del download  # True
    download_and_extract_archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", root)


class _Dataset(NamedTuple):
    """An entry of the table of data sets.

    Attributes:
        read: Reads the training and test images.
        get: Downloads the data set if called with (root, download=True). If it can only be obtained
            by hand, a text that says where.
        layout: The folders and files that the root folder must have, for messages.
        mean: The mean of the training images' RGB values in [0, 1]; ImageNet's unless published.
        std: Their standard deviation.
    """

    read: readers.Reader
    get: Callable[..., object] | str
    layout: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


_DATASETS = {
    "cifar10": _Dataset(
        readers.cifar(tv.CIFAR10),
        tv.CIFAR10,
        "cifar-10-batches-py/ (data_batch_1, ..., batches.meta)",
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),  # the mean of the images' stds, as in MoCo's demo
    ),
    "cifar100": _Dataset(
        readers.cifar(tv.CIFAR100),
        tv.CIFAR100,
        "cifar-100-python/ (train, test, meta)",
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
    ),
    "stl10": _Dataset(readers.stl10, tv.STL10, "stl10_binary/ (train_X.bin, ..., class_names.txt)"),
    "tiny_imagenet": _Dataset(
        readers.tiny_imagenet,
        _download_tiny_imagenet,
        "tiny-imagenet-200/ (wnids.txt, train/, val/images/, val/val_annotations.txt)",
    ),
    "imagenette": _Dataset(
        readers.imagenette,
        lambda root, **yes: tv.Imagenette(root, size="320px", **yes),
        "imagenette2/, imagenette2-320/ or imagenette2-160/ (train/, val/)",
    ),
    "flowers": _Dataset(
        readers.torchvision_files(tv.Flowers102, "train+val", "test"),
        tv.Flowers102,
        "flowers-102/ (jpg/, imagelabels.mat, setid.mat)",
    ),
    "pets": _Dataset(
        readers.torchvision_files(tv.OxfordIIITPet, "trainval", "test"),
        tv.OxfordIIITPet,
        "oxford-iiit-pet/ (images/, annotations/)",
    ),
    "food101": _Dataset(
        readers.torchvision_files(tv.Food101, "train", "test"),
        tv.Food101,
        "food-101/ (images/, meta/)",
    ),
    "cars": _Dataset(
        readers.torchvision_files(tv.StanfordCars, "train", "test"),
        "https://github.com/pytorch/vision/issues/7545, which names copies (its own site is gone)",
        "stanford_cars/ (cars_train/, cars_test/, devkit/, cars_test_annos_withlabels.mat)",
    ),
    "caltech101": _Dataset(
        readers.caltech101, tv.Caltech101, "caltech101/101_ObjectCategories/CLASS/*.jpg"
    ),
    "dtd": _Dataset(
        readers.torchvision_files(tv.DTD, "train+val", "test"),
        tv.DTD,
        "dtd/dtd/ (images/, labels/)",
    ),
    "aircraft": _Dataset(
        readers.torchvision_files(tv.FGVCAircraft, "trainval", "test"),
        tv.FGVCAircraft,
        "fgvc-aircraft-2013b/data/ (images/, variants.txt, ...)",
    ),
    "sun397": _Dataset(
        readers.sun397,
        _download_sun397,
        "SUN397/ (a/abbey/*.jpg, ..., Partitions/Training_01.txt and Testing_01.txt)",
    ),
    "voc2007": _Dataset(
        readers.torchvision_files(readers.VOC2007, "trainval", "test"),
        lambda root, **yes: [
            tv.VOCDetection(root, "2007", split, **yes) for split in ("trainval", "test")
        ],
        "VOCdevkit/VOC2007/ (JPEGImages/, Annotations/, ImageSets/Main/)",
    ),
    "places365": _Dataset(
        readers.places365,
        lambda root, **yes: [
            tv.Places365(root, split, small=True, **yes) for split in ("train-standard", "val")
        ],
        "places365_train_standard.txt, places365_val.txt, data_256_standard/ and val_256/ "
        "(or data_large_standard/ and val_large/)",
    ),
    "places205": _Dataset(
        readers.places205,
        "http://places.csail.mit.edu",
        "trainvalsplit_places205/ (train_places205.csv, val_places205.csv) and images256/",
    ),
}


def load(name: str, root: str, seed: int = 0) -> readers.Split:
    """Return the training images and the test images of data set `name` in the folder `root`.

    If no split is published, a random split is drawn from `seed`.

    Raises InputError if the data set's lists are missing, unreadable or wrong.
    """
    if name in ("imagenet", "photos"):
        folder = _imagenet(name, root)
        train = scan(folder, "train")
        return train, scan(folder, "val", train.classes)
    if name not in _DATASETS:
        raise unknown("dataset", name, NAMES)
    return _read(name, root, _DATASETS[name].read, seed)


def load_voc_halves(root: str) -> readers.Split:
    """Return the images of VOC2007's train and val, the two halves of its trainval.

    Raises InputError if the lists are missing, unreadable or wrong.
    """
    halves = readers.torchvision_files(readers.VOC2007, "train", "val")
    return _read("voc2007", root, halves, seed=0)


def _read(name: str, root: str, read: readers.Reader, seed: int) -> readers.Split:
    """Return the two splits that `read` finds in `root`.

    Raises InputError if it fails, which says how to get data set `name`.
    """
    root = _absolute(root)
    try:
        if not os.path.isdir(root):
            raise FileNotFoundError("no such folder")
        train, test = read(root, seed)
        return same_on_all_ranks(train), same_on_all_ranks(test)
    except InputError:
        raise
    except Exception as error:  # torchvision, pickle, scipy and expat raise errors of many types
        raise _unusable(name, root, _reason(error)) from error


def normalization(name: str) -> tuple[list[float], list[float]]:
    """Return the mean and std of a data set's RGB values in [0, 1]; ImageNet's for folders."""
    mean, std = (_DATASETS[name].mean, _DATASETS[name].std) if name in _DATASETS else (MEAN, STD)
    return list(mean), list(std)


def train_images(
    name: str, root: str, class_list: str | None = None, file_list: str | None = None
) -> Images:
    """Return the images to pre-train on: those of a folder or a list, or a data set's.

    `class_list` is a file that names the classes to keep, and `file_list` is one that names the
    images. A folder need not have val/, nor labels.

    Raises InputError if the images or the classes cannot be found.
    """
    if file_list is not None:
        return same_on_all_ranks(file_lists.read(file_list, Path(root)))
    if name in _DATASETS:
        return subsets.keep_classes(load(name, root)[0], class_list)
    folder = find("photos" if name == "photos" else root, ("train",), labels=False)
    return subsets.keep_classes(scan(folder, "train"), class_list)


def test_images(name: str, root: str, class_list: str | None = None) -> Images:
    """Return the images to test an encoder on: those in val/, or a data set's test images.

    Their labels are indices into the same classes as those of `train_images`.

    Raises InputError if the images or the classes cannot be found.
    """
    if name in _DATASETS:
        return subsets.keep_classes(load(name, root)[1], class_list)
    folder = find("photos" if name == "photos" else root, ("train", "val"))
    images = scan(folder, "val", class_names(folder, "train"))
    return subsets.keep_classes(images, class_list)


def has_test_images(name: str, root: str, file_list: str | None = None) -> bool:
    """Return whether `test_images` finds images, and the training images have labels.

    Raises InputError if a folder cannot be read.
    """
    if file_list is not None:
        return False
    if name != "imagenet" or root == "photos":
        return True
    train = locate(Path(root), "train")
    return bool(train and class_names(Path(root), "train") and locate(Path(root), "val"))


def check(name: str, root: str, download: bool) -> None:
    """Check that the data set can be loaded. If `download`, download it first if it is missing.

    Several processes of a machine may call this at the same time; only one of them downloads.

    Raises InputError if `load` fails, or if the first image of a split is missing.
    """
    if name in ("imagenet", "photos"):
        _imagenet(name, root)
        return
    root = _absolute(root)
    if download and is_downloadable(name):
        if _is_image_folder(root) and not _is_usable(name, root):
            raise InputError(
                f"{root}: has the images of another data set (train/), so {name} is not downloaded "
                f"to it; {_OWN_FOLDER}"
            )
        _download(name, root)
    _check_images(name, root)


# what to do instead of mixing a data set with others in one folder
_OWN_FOLDER = "leave the folder out: the data set is then downloaded to ./data"


def _is_image_folder(root: str) -> bool:
    """Return whether `root` has the folder train/ of an image folder, such as ImageNet's."""
    return (Path(root) / "train").is_dir()


def _absolute(root: str) -> str:
    """Return the absolute path of `root`. A leading ~ is the user's home."""
    return os.path.abspath(os.path.expanduser(root))


def _imagenet(name: str, root: str) -> Path:
    """Return the folder of ImageNet or `photos`. Raises InputError, which says where to get it."""
    try:
        return find("photos" if name == "photos" else root, ("train", "val"))
    except InputError as error:
        found = locate(Path(root), "train") if os.path.isdir(root) else None
        if found is None:
            how = "get ImageNet by hand from https://image-net.org"
        elif found.layout not in (TARS, TABLES) and not has_test_images(name, root):
            how = "tools/embed.py writes the features of the images in any folder"
        else:
            raise
        raise InputError(f"{error}; {how}") from None


def _check_images(name: str, root: str) -> None:
    """Raise InputError if `load` fails, or if the first image of a split is missing."""
    for images in load(name, root):
        if isinstance(images, ImageFolder) and not os.path.isfile(images.path(0)):
            raise _unusable(name, root, f"no {images.path(0)}")


def _is_usable(name: str, root: str) -> bool:
    """Return whether the data set can be loaded: Imagenette's own folder also has train/."""
    try:
        _check_images(name, root)
    except InputError:
        return False
    return True


def _download(name: str, root: str) -> None:
    """Download the data set unless it exists. Processes of one machine take turns."""
    try:
        photos.cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(photos.cache_folder() / f"{name}.lock"):
            if not _is_usable(name, root):
                _DATASETS[name].get(root, download=True)
    except Exception as error:  # urllib, tarfile and torchvision raise errors of many types
        layout = _DATASETS[name].layout
        how = f"remove an incomplete copy and try again, or put {layout} there by hand"
        raise InputError(
            f"{root}: --download of {name} failed ({_reason(error)}); {how}"
        ) from error


def _unusable(name: str, root: str, reason: str) -> InputError:
    """Return the error to raise if a data set cannot be loaded. It says how to get the data set."""
    get, layout = _DATASETS[name].get, _DATASETS[name].layout
    if isinstance(get, str):
        how = f"--download cannot get it; get it by hand from {get}"
    elif _is_image_folder(root):
        how = _OWN_FOLDER
    else:
        how = "get it with --download (remove an incomplete copy first)"
    if _is_image_folder(root):
        how += "; for the images in its train/, leave out --dataset"
        how += ", and use another script than main_voc07.py" * (name == "voc2007")
    return InputError(f"{root}: no usable {name} ({reason}); expected {layout}; {how}")


def _reason(error: BaseException) -> str:
    """Return the message of an error as one line, without torchvision's own advice."""
    error = error.__cause__ or error
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no {os.fsdecode(error.filename)}"
    text = re.sub(r"\. You can \w+ download=True.*", "", " ".join(str(error).split())).rstrip(".")
    return text if isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: {text}"
