"""Subsets of a training set: a random split, some of the classes, or a list of labelled images.

Published protocols use them: ImageNet-100, and 1 % or 10 % of ImageNet's labels.
"""

import contextlib
import hashlib
import os
import re
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moco import rng
from moco.data import sources
from moco.data.catalog import CLASS_COUNTS
from moco.data.images import Images
from moco.data.photos import cache_paths
from moco.errors import InputError, short
from moco.files import read_lines, replacing


def hold_out(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Split `images` into two sets: the rest, and a random `fraction` of each class.

    At least one image of each class is held out, and at least one is not. The same seed gives the
    same split.

    Raises InputError if a class has a single image.
    """
    held = np.zeros(len(images), dtype=bool)
    for indices in shuffled_by_class(images, seed):
        if len(indices) == 1:
            name = images.classes[images.labels[indices[0]]]
            raise InputError(
                f"{images.root / name}: has one image only, which cannot be held out; add images"
            )
        count = min(len(indices) - 1, max(1, round(fraction * len(indices))))
        held[indices[:count]] = True
    return images.subset(~held), images.subset(held)


def sample(images: Images, fraction: float, seed: int) -> Images:
    """Return a random `fraction` of each class, at least one image. `seed` fixes the subset."""
    kept = [
        indices[: max(1, round(fraction * len(indices)))]
        for indices in shuffled_by_class(images, seed)
    ]
    return images.subset(np.sort(np.concatenate(kept)))


def shuffled_by_class(images: Images, seed: int) -> list[np.ndarray]:
    """Return the indices of each class's images in random order. Empty classes are left out.

    If an image can show several classes, return one array with the indices of all images.
    """
    order = torch.randperm(len(images), generator=rng.generator("cpu", rng.SPLIT, seed)).numpy()
    if images.multi_label:
        return [order]
    order = order[images.labels[order].argsort(kind="stable")]
    starts = np.bincount(images.labels, minlength=len(images.classes)).cumsum()[:-1]
    return [indices for indices in np.split(order, starts) if len(indices)]


def keep_classes(images: Images, file: str | None) -> Images:
    """Return the images of the classes that `file` names, or all images without a `file`.

    The classes keep their order, and labels become indices into the kept classes. See
    `select_classes` for the format of the file.

    Raises InputError if the file is unusable, if `images` has none of its classes, or if an image
    can show several classes.
    """
    if file is None:
        return images
    if images.multi_label:
        raise InputError(
            f"--class-list: cannot be used with {images.root}, whose images show several classes "
            "each; leave it out"
        )
    classes = select_classes(images.classes, file, images.root)
    kept = np.isin(images.labels, [images.classes.index(name) for name in classes])
    if not kept.any():
        raise InputError(
            f"--class-list {file}: {images.root} has no image of its classes; name other classes"
        )
    label = np.array([classes.index(name) if name in classes else -1 for name in images.classes])
    return replace(images.subset(kept), labels=label[images.labels[kept]], classes=classes)


def select_classes(classes: tuple[str, ...], file: str, root: Path) -> tuple[str, ...]:
    """Return those `classes`, the folders of `root`, that `file` names.

    The file has one class a line. Words after the name are ignored: published lists often describe
    the class there.

    Raises InputError if the file cannot be read, or names a class that is not among `classes`.
    """
    lines = read_names(Path(file), "--class-list")
    wanted = {line if line in classes else line.split()[0] for line in lines}
    if missing := wanted - set(classes):
        raise InputError(
            f"--class-list {file}: {len(missing)} of its {len(wanted)} classes are not folders of "
            f"{root}, first '{short(min(missing))}'; give folder names, one a line"
        )
    return tuple(name for name in classes if name in wanted)


def require_two_classes(images: Images, otherwise: str = "") -> None:
    """Raise InputError if the images are all of one class, so that every prediction is right.

    Args:
        images: the images that a classifier or k-NN learns from.
        otherwise: the end of the message: what to do with images of one class.
    """
    if len(images.classes) < 2 and not images.multi_label:
        raise InputError(
            f"{images.root}: its images are of one class, so every answer is right; "
            f"give images of two classes or more{otherwise}"
        )


def check_classes(root: Path, file: str | None, data_name: str | None) -> None:
    """Check `--class-list` and `--data-name` against the classes of the training images in `root`.

    Raises InputError if `file` names classes that are not there, if the images have no labels, or
    if more classes remain than the data set `data_name` has.
    """
    if file is None and data_name is None:
        return
    classes, split = sources.class_names(root, "train"), root / "train"
    if not classes:
        option = "--class-list" if file else "--data-name"
        raise InputError(f"{option}: the images of {root} have no labels; leave {option} out")
    if file is not None:
        classes = select_classes(classes, file, split)
    if len(classes) > CLASS_COUNTS.get(data_name, len(classes)):
        raise InputError(
            f"--data-name {data_name}: has {CLASS_COUNTS[data_name]} classes, but {split} "
            f"has {len(classes)}; list the classes to use in a file, one a line, and give it with "
            "--class-list FILE"
        )


# The lists of 1 % and 10 % of ImageNet's training images that come with SimCLR (arXiv 2002.05709).
# Later papers use the same lists.
_URL = (
    "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/{}percent.txt"
)
_SHA256 = {
    1: "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    10: "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}


def is_imagenet(classes: tuple[str, ...]) -> bool:
    """Return whether these are the class folders of ImageNet, for which lists are published."""
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def published_list(percent: int) -> Path:
    """Return the file with the published list of 1 or 10 per cent of ImageNet.

    The file is in the cache folder. It is downloaded on first use, or if it is damaged. Its SHA-256
    is checked.

    Raises InputError, which says how to supply the list by hand, if the download fails.
    """
    url = _URL.format(percent)
    for file in cache_paths(f"imagenet_subsets/{percent}percent.txt"):
        with contextlib.suppress(OSError):
            if _is_published(file.read_bytes(), percent):
                return file
    by_hand = "get it elsewhere and give it with --subset-file FILE"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"the list of ImageNet's {percent} % cannot be downloaded from {url} ({reason}); "
            f"{by_hand}"
        ) from None
    if not _is_published(text, percent):
        raise InputError(f"{url}: is no longer the published list (its sha256 differs); {by_hand}")
    with replacing(file) as out:
        out.write(text)
    return file


def _is_published(text: bytes, percent: int) -> bool:
    """Return whether `text` has the sha256 of the published list of `percent` per cent."""
    return hashlib.sha256(text).hexdigest() == _SHA256.get(percent)


def read_names(file: Path, option: str = "--subset-file") -> set[str]:
    """Return the names in `file`, one a line, decoded as paths and without spaces around them.

    Raises InputError, which names the `option`, if the file cannot be read or names nothing.
    """
    try:
        names = {os.fsdecode(line.strip()) for line in read_lines(file) if line.strip()}
    except InputError as error:
        raise InputError(f"{option} {file}: cannot be read ({error})") from None
    if not names:
        raise InputError(f"{option} {file}: names nothing; expected one name a line")
    return names


def write_names(images: Images, file: Path) -> None:
    """Write the names of `images` to a list that `select_listed` reads.

    Raises InputError if a name has a line break.
    """
    lines = [os.fsencode(images.name(i)) for i in range(len(images))]
    if bad := next((line for line in lines if len(line.splitlines()) > 1), None):
        raise InputError(
            f"{images.root}: the file name {bad!r} has a line break in it, which a list of names "
            "cannot hold; rename the file"
        )
    with replacing(file) as out:
        out.write(b"".join(line + b"\n" for line in lines))


def select_listed(images: Images, file: Path) -> Images:
    """Return the images that `file` names, one a line.

    A line is a file name, as in the published lists, or a path relative to train/.

    Raises InputError if the list cannot be read, if it names images that `images` lacks (the
    message counts them), or if several folders have a file of that name.
    """
    wanted = read_names(file)
    found: dict[str, int] = {}
    for i in range(len(images)):
        name = next((one for one in images.listed_names(i) if one in wanted), None)
        if name is None:
            continue
        if name in found:
            raise InputError(
                f"--subset-file {file}: several images are named '{name}': "
                f"{images.name(found[name])}, {images.name(i)}; write these names"
            )
        found[name] = i
    if missing := wanted - found.keys():
        raise InputError(
            f"{images.root}: {len(missing)} of the {len(wanted)} images that {file} names are "
            f"missing, first '{short(min(missing))}'; complete the folder, or give another list "
            "with --subset-file FILE"
        )
    return images.subset(np.sort(np.fromiter(found.values(), np.int64)))


def labelled_subset(images: Images, percent: int, seed: int, file: str | None = None) -> Images:
    """Return the images whose labels may be used: those that `file` names, or `percent` per cent.

    On ImageNet, 1 and 10 per cent are the published lists. On other data, they are a random sample
    of each class, which depends on `seed`.

    Raises InputError if the list cannot be read or downloaded, or does not fit `images`.
    """
    if file:
        return select_listed(images, Path(file))
    if percent == 100:
        return images
    if is_imagenet(images.classes):
        return select_listed(images, published_list(percent))
    return sample(images, percent / 100, seed)
