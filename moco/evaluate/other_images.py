"""Read test images in another folder than the training images, such as ImageNet-A, -R or -V2.

Their class folders are matched with the classes of the training images.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from moco.data import catalog, folders, sources
from moco.data.folders import same_on_all_ranks
from moco.data.images import Images
from moco.errors import InputError, short
from moco.files import read_lines
from moco.messages import print_rank0
from moco.sections_eval import OtherTest


def check(settings: OtherTest, dataset: str) -> None:
    """Raise InputError if the folder or the file of the options is missing or has no classes.

    Call it before any process starts.
    """
    if not settings.eval_data:
        return
    if catalog.METRIC[dataset] == "map11":
        raise InputError(
            f"--eval-data: the images of {dataset} show several classes each; leave it out"
        )
    _read(settings.eval_data)
    if settings.class_map:
        _read_map(settings.class_map)


def load(settings: OtherTest, train: Images) -> Images:
    """Return the images of `--eval-data`. Labels are indices into the classes of `train`.

    A folder of the test images has the name of its class. If the names of all folders are integers
    that are not classes, they are indices into the classes of `train`, which are sorted, as in
    ImageNet-V2. With `--class-map`, the file names the class of each folder, and folders that are
    not in it are left out.

    Raises InputError if the images cannot be listed, or a folder has no class.
    """
    images = _read(settings.eval_data)
    if settings.class_map:
        label = _mapped(images, train, settings)
    else:
        label = _named(images, train, settings.eval_data)
    labels = np.array([label.get(name, -1) for name in images.classes])[images.labels]
    kept = labels >= 0
    found = replace(images.subset(kept), labels=labels[kept], classes=train.classes)
    shown, left_out = len(set(label.values())), len(images.classes) - len(label)
    without = f"; {left_out} class folders are not in {settings.class_map} and are left out"
    print_rank0(
        f"{settings.eval_data}: {len(found)} test images of {shown} of the {len(train.classes)} "
        f"classes{without * bool(left_out)}"
    )
    return found


def shown_classes(images: Images) -> np.ndarray:
    """Return the indices of the classes that have an image, in ascending order."""
    return np.unique(images.labels)


def restrict(train: Images, val: Images) -> tuple[Images, Images]:
    """Return both splits with only the classes of `val`, for k-NN.

    Raises InputError if that is a single class, so that every prediction is right.
    """
    shown = shown_classes(val)
    require_two(shown, val)
    index = np.full(len(train.classes), -1)
    index[shown] = np.arange(len(shown))
    classes = tuple(train.classes[i] for i in shown)
    train = train.subset(index[train.labels] >= 0)
    return tuple(replace(one, labels=index[one.labels], classes=classes) for one in (train, val))


def require_two(shown: np.ndarray, images: Images) -> None:
    """Raise InputError if the test images have one class only."""
    if len(shown) < 2:
        raise InputError(
            f"{images.root}: its test images are of one class, and only their classes can be "
            "predicted, so every prediction is right; give images of two classes or more"
        )


def _read(folder: str) -> Images:
    """Return the labelled images of a folder: of its val/, or else of the class folders in it."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"--eval-data {folder}: no such folder; give a folder of class folders")
    source = sources.locate(root, "val")
    if source and source.layout.class_names(source.folder, "val"):
        return sources.scan(root, "val")
    if not folders.has_class_folders(root):
        raise InputError(
            f"--eval-data {folder}: has no class folders; expected CLASS/*.jpg, or val/CLASS/*.jpg"
        )
    return same_on_all_ranks(folders.scan_classes(root))


def _named(images: Images, train: Images, folder: str) -> dict[str, int]:
    """Return the label of each class folder, by its name."""
    index = {name: i for i, name in enumerate(train.classes)}
    if not index.keys() & set(images.classes) and all(map(_is_index, images.classes)):
        index = {name: int(name) for name in images.classes if int(name) < len(train.classes)}
    unknown = [name for name in images.classes if name not in index]
    if unknown:
        raise InputError(
            f"--eval-data {folder}: {len(unknown)} of its {len(images.classes)} class folders are "
            f"not classes of {train.root}, first '{short(unknown[0])}' (a class there is "
            f"'{train.classes[0]}'); rename them, or give --class-map FILE"
        )
    return {name: index[name] for name in images.classes}


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _mapped(images: Images, train: Images, settings: OtherTest) -> dict[str, int]:
    """Return the label of each class folder that is in the file of `--class-map`."""
    index = {name: i for i, name in enumerate(train.classes)}
    label = {}
    for name, wanted in _read_map(settings.class_map).items():
        if wanted in index:
            label[name] = index[wanted]
        elif _is_index(wanted) and int(wanted) < len(train.classes):
            label[name] = int(wanted)
        else:
            raise InputError(
                f"--class-map {settings.class_map}: '{short(wanted)}' is neither a class of "
                f"{train.root} nor an index below {len(train.classes)}; correct the line of "
                f"'{short(name)}'"
            )
    found = {name: label[name] for name in images.classes if name in label}
    if not found:
        raise InputError(
            f"--class-map {settings.class_map}: names no class folder of {settings.eval_data}, "
            f"which has '{short(images.classes[0])}'; write a folder and a class on each line"
        )
    return found


def _read_map(path: str) -> dict[str, str]:
    """Return the class of each folder in the file of `--class-map`.

    A line has the folder and the class, with a tab between them, or spaces if neither name has any.
    """
    try:
        lines = [os.fsdecode(line.strip()) for line in read_lines(Path(path))]
    except InputError as error:
        raise InputError(f"--class-map {path}: cannot be read ({error})") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        words = [one.strip() for one in line.split("\t")] if "\t" in line else line.split()
        if len(words) != 2:
            raise InputError(
                f"--class-map {path}: line {number} is '{short(line)}'; write a folder and a class "
                "with a tab between them"
            )
        if words[0] in found:
            raise InputError(
                f"--class-map {path}: line {number} has the folder '{short(words[0])}' again; "
                "write each folder once"
            )
        found[words[0]] = words[1]
    if not found:
        raise InputError(f"--class-map {path}: is empty; write a folder and a class on each line")
    return found
