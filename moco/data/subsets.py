"""Parts of a training set: some held out to choose a model on, or those few that a label is given for."""

import contextlib
import hashlib
import os
import re
import string
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moco import rng
from moco.data.folders import class_names
from moco.data.images import Images
from moco.data.photos import in_cache
from moco.errors import InputError, short
from moco.files import read_lines, replacing


def hold_out(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Split `images` into the rest and a random `fraction` of each class, rounded, one image at least; the same for a seed.

    Raises InputError where a class has a single image.
    """
    held = np.zeros(len(images), dtype=bool)
    for places in by_class(images, seed):
        if len(places) == 1:
            name = images.classes[images.labels[places[0]]]
            raise InputError(
                f"{images.root / name}: has one image only, of which no part can be held out; add images"
            )
        held[places[: min(len(places) - 1, max(1, round(fraction * len(places))))]] = True
    return images.part(~held), images.part(held)


def sample(images: Images, fraction: float, seed: int) -> Images:
    """A random `fraction` of each class, rounded, one image at least; the same for a seed."""
    kept = [places[: max(1, round(fraction * len(places)))] for places in by_class(images, seed)]
    return images.part(np.sort(np.concatenate(kept)))


def by_class(images: Images, seed: int) -> list[np.ndarray]:
    """The places of each class's images in random order; where an image can show several classes, one list of all."""
    order = torch.randperm(len(images), generator=rng.generator("cpu", rng.SPLIT, seed)).numpy()
    if images.multi_label:
        return [order]
    order = order[images.labels[order].argsort(kind="stable")]
    starts = np.bincount(images.labels, minlength=len(images.classes)).cumsum()[:-1]
    return [places for places in np.split(order, starts) if len(places)]


# Some of the classes, as ImageNet-100 is some of ImageNet's.


def of_classes(images: Images, file: str | None) -> Images:
    """The images of the classes that `file` names (all without one), labelled by their places among these, in their old order."""
    if file is None:
        return images
    if images.multi_label:
        raise InputError(
            f"--class-list: cannot be used with {images.root}, whose images show several classes each"
        )
    classes = chosen(images.classes, file, images.root)
    kept = np.isin(images.labels, [images.classes.index(name) for name in classes])
    if not kept.any():
        raise InputError(f"--class-list {file}: {images.root} has no image of its classes")
    place = np.array([classes.index(name) if name in classes else -1 for name in images.classes])
    return replace(images.part(kept), labels=place[images.labels[kept]], classes=classes)


def chosen(classes: tuple[str, ...], file: str, root: Path) -> tuple[str, ...]:
    """Those of `classes`, the folders of `root`, that `file` names, one a line, with or without more words behind the name.

    Raises InputError where the file cannot be read, or names a class that is not among them.
    """
    wanted = {
        line if line in classes else line.split()[0] for line in names(Path(file), "--class-list")
    }
    if missing := wanted - set(classes):
        raise InputError(
            f"--class-list {file}: {len(missing)} of its {len(wanted)} classes are not folders of {root}, "
            f"first '{short(min(missing))}'; give folder names, one a line"
        )
    return tuple(name for name in classes if name in wanted)


SIZES = {"imagenet100": 100, "imagenet1000": 1000}  # classes


def check_classes(split: Path, file: str | None, data_name: str | None) -> None:
    """Raise InputError where `file` names classes that are no folders of `split`, or leaves more than `data_name` has."""
    classes = class_names(split)
    if file is not None:
        classes = chosen(classes, file, split)
    if len(classes) > SIZES.get(data_name, len(classes)):
        raise InputError(
            f"--data-name {data_name}: has {SIZES[data_name]} classes, but {split} {len(classes)}; "
            "name those to use in a file, one a line, and give it with --class-list FILE"
        )


# Lists of labelled images. ImageNet's of 1 % and 10 % are SimCLR's (arXiv 2002.05709), which every later table uses.

_URL = (
    "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/{}percent.txt"
)
_SHA256 = {
    1: "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    10: "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}


def is_imagenet(classes: tuple[str, ...]) -> bool:
    """Whether the class folders are ImageNet's, to which the published lists belong."""
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def published(percent: int) -> Path:
    """The published list of 1 or 10 per cent of ImageNet, in the cache folder; downloaded on first use.

    Raises InputError, which says how to supply it, where it cannot be had or is not the published one.
    """
    url = _URL.format(percent)
    for kept in in_cache(f"imagenet_subsets/{percent}percent.txt"):
        with contextlib.suppress(OSError):
            if is_published(kept.read_bytes(), percent):
                return kept
    otherwise = "get it elsewhere and give it with --subset-file FILE"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"the list of ImageNet's {percent} % cannot be downloaded from {url} ({reason}); {otherwise}"
        ) from None
    if not is_published(text, percent):
        raise InputError(
            f"{url}: is not the published list any more (its sha256 differs); {otherwise}"
        )
    with replacing(kept) as file:
        file.write(text)
    return kept


def is_published(text: bytes, percent: int) -> bool:
    """Whether `text` is, to the bit, the published list of `percent` per cent."""
    return hashlib.sha256(text).hexdigest() == _SHA256.get(percent)


def names(file: Path, option: str = "--subset-file") -> set[str]:
    """Return the names in `file`, one a line, without spaces around them, decoded as file names.

    Raises InputError, which names the `option`, if the file cannot be read or is empty.
    """
    try:
        wanted = {os.fsdecode(line.strip()) for line in read_lines(file) if line.strip()}
    except InputError as error:
        raise InputError(f"{option} {file}: cannot be read ({error})") from None
    if not wanted:
        raise InputError(f"{option} {file}: names nothing; expected one name a line")
    return wanted


def write_names(images: Images, file: Path) -> None:
    """Write the names of `images` for `listed`. Raises InputError if a name has a line break."""
    lines = [os.fsencode(images.name(i)) for i in range(len(images))]
    if bad := next((line for line in lines if len(line.splitlines()) > 1), None):
        raise InputError(
            f"{images.root}: the file name {bad!r} has a line break in it, which a list of names cannot hold; rename the file"
        )
    with replacing(file) as out:
        out.write(b"".join(line + b"\n" for line in lines))


def listed(images: Images, file: Path) -> Images:
    """The images that `file` names: by file name, as the published lists do, or by what comes after train/.

    Raises InputError where the list cannot be used, names an image that `images` lacks (the message counts them), or a
    file name that stands in several folders.
    """
    wanted = names(file)
    found: dict[str, int] = {}
    for i in range(len(images)):
        path = images.name(i).strip(string.whitespace)
        name = path if path in wanted else os.path.basename(path)
        if name not in wanted:
            continue
        if name in found:
            raise InputError(
                f"--subset-file {file}: '{name}' stands in several class folders; write CLASS/{name}"
            )
        found[name] = i
    if missing := wanted - found.keys():
        raise InputError(
            f"{images.root}: {len(missing)} of the {len(wanted)} images that {file} names are missing, "
            f"first '{short(min(missing))}'; complete the folder, or give another list with --subset-file FILE"
        )
    return images.part(np.sort(np.fromiter(found.values(), np.int64)))


def labelled(images: Images, percent: int, seed: int, file: str | None = None) -> Images:
    """The images whose labels count as known: those of `file`, or `percent` per cent of all.

    On ImageNet the published list; on other data a sample of each class, drawn anew for each seed.
    """
    if file:
        return listed(images, Path(file))
    if percent == 100:
        return images
    return (
        listed(images, published(percent))
        if is_imagenet(images.classes)
        else sample(images, percent / 100, seed)
    )
