"""Image folders in the ImageNet layout, and the built-in `photos`."""

import functools
import hashlib
import multiprocessing
import os
import stat
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from moco import distributed
from moco.data.images import SUFFIXES, ImageFolder, Images
from moco.data.photos import photos
from moco.errors import InputError


def find(data: str, splits: tuple[str, ...]) -> Path:
    """The root folder that `data` names, checked without reading the images: `photos`, or a folder with `splits`.

    Raises InputError for a missing folder or split, a split without class folders, and for val classes that are not
    train's.
    """
    if data == "photos":
        return photos()
    root = Path(data)
    if not _is_folder(root):
        raise InputError(
            f"{data}: no such folder; give an ImageNet-style folder (train/CLASS/*.jpg), or the word photos"
        )
    for split in splits:
        if not _is_folder(split_folder(root, split)):
            other = ", and no test/ with class folders in its place" if split == "val" else ""
            expected = f"{split}/CLASS/*.jpg" + " or test/CLASS/*.jpg" * (split == "val")
            raise InputError(f"{data}: has no {split}/ folder{other}; expected {expected}")
    train = class_names(root / "train") if "train" in splits else ()
    if "val" in splits:
        folder = split_folder(root, "val")
        val = class_names(folder)
        strange = sorted(set(val) - set(train)) if train else []
        if len(val) == 1 and len(train) != 1:
            raise InputError(
                f"{folder}: holds one class folder only ({val[0]}); sort its images into class folders named as in train/"
            )
        if strange:
            raise InputError(
                f"{folder}: {len(strange)} classes are not among train's, first '{strange[0]}'; name the folders as in train/"
            )
    return root


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split; for val, if there is no val/, test/ if it has class folders."""
    folder, test = root / split, root / "test"
    if split == "val" and not _is_folder(folder) and _is_folder(test):
        entries = _entries(str(test))
        if entries.folders or entries.links:
            # the process that started this one has printed the line
            if multiprocessing.parent_process() is None:
                _print_once(f"{root}: has no val/; test/ is used instead")
            return test
    return folder


def _is_folder(path: Path) -> bool:
    """Return whether `path` is a folder. Raises InputError if that cannot be found out."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from None


def class_names(split: Path) -> tuple[str, ...]:
    """The class folders of a split, sorted. Raises InputError where there is none."""
    return _classes(split, _entries(str(split)))


def _classes(split: Path, entries: "_Entries") -> tuple[str, ...]:
    names = sorted(entries.folders + entries.links)
    if not names:
        what = "holds images but no class folders" if entries.images else "holds no class folders"
        raise InputError(f"{split}: {what}; expected {split.name}/CLASS/*.jpg")
    return tuple(names)


def scan(root: Path, split: str, classes: tuple[str, ...] = ()) -> ImageFolder:
    """List the images of `root`/`split`, sorted; labels are indices into `classes`.

    `classes` are by default the split's own folders.

    The folder is listed at every call, because its modification time need not change when its
    content does. Rank 0 prints one line on stderr that counts files with other endings.

    Raises InputError if a class folder has no images, if a folder cannot be read, if two classes
    share a folder, and, on every rank, if the ranks find different images.
    """
    folder = split_folder(root, split)
    top = _entries(str(folder))
    own = _classes(folder, top)
    with ThreadPoolExecutor(_THREADS) as pool:
        listings = list(pool.map(functools.partial(images_below, folder), own))
    owner: dict[str, str] = {}
    for name, listing in zip(own, listings, strict=True):
        if not listing.images:
            held = f", but {_endings(listing.others)}" if listing.others else ""
            held += ", and leads to a folder that is listed already" if listing.repeated else ""
            raise InputError(
                f"{folder / name}: holds no image ({', '.join(SUFFIXES)}){held}; remove the folder or fill it"
            )
        if shared := next((real for real in listing.folders if real in owner), None):
            raise InputError(
                f"{folder / owner[shared]} and {folder / name}: both lead to {shared} through links, "
                "so its images would belong to two classes; remove one of the links"
            )
        owner |= dict.fromkeys(listing.folders, name)
    _tell_of_others(folder, listings, Counter(map(_ending, top.others)), len(top.images))
    classes = classes or own
    place = {name: i for i, name in enumerate(classes)}
    labels = np.repeat([place[name] for name in own], [len(listing.images) for listing in listings])
    paths = np.array([path for listing in listings for path in listing.images])
    return agreed(ImageFolder(folder, labels, classes, paths))


def agreed(images: Images) -> Images:
    """Return `images`. Raises InputError, on every rank, if the ranks have found different ones."""
    if distributed.world_size() == 1:
        return images
    content = images.paths if isinstance(images, ImageFolder) else images.labels
    names = repr((images.classes, images.labels.shape)).encode()
    digest = hashlib.sha256(names + images.labels.tobytes() + content.tobytes()).hexdigest()
    found: list[tuple[int, str]] = [(0, "")] * distributed.world_size()
    dist.all_gather_object(found, (len(images), digest))
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise InputError(
            f"{images.root}: rank 0 and rank {other} find different images ({found[0][0]} and {found[other][0]} of them); "
            "copy the folder to every node again, or give one that all nodes share"
        )
    return images


# Listing reads names and opens no file, so that a million files take a few seconds. On a network
# disk each folder waits for the server, so that many are listed at once.

_THREADS = 16


# Folders that operating systems, archives and network disks create, in lower case. Hidden folders
# are ignored anyway.
_SYSTEM = set("@eadir @__thumb @recycle @recently-snapshot #recycle #snapshot".split())


_SYSTEM |= set("__macosx lost+found $recycle.bin".split()) | {"system volume information"}


class _Entries(NamedTuple):
    """The names in one folder, without hidden and system ones. `links` are links to folders."""

    images: list[str]
    others: list[str]
    folders: list[str]
    links: list[str]


def _entries(folder: str) -> _Entries:
    """Return what `folder` holds. Raises InputError if it cannot be read, or if a link in it is broken.

    A link that is named like an image counts as one; where it leads is not checked.
    """
    found = _Entries([], [], [], [])
    try:
        os.stat(os.path.join(folder, "."))  # fails without x permission, though names can be read
        with os.scandir(folder) as entries:
            for entry in entries:
                name, lower = entry.name, entry.name.lower()
                if name[0] == "." or lower in _SYSTEM:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    found.folders.append(name)
                elif lower.endswith(SUFFIXES):
                    found.images.append(name)
                elif not entry.is_symlink():
                    found.others.append(name)
                elif stat.S_ISDIR(os.stat(entry.path).st_mode):
                    found.links.append(name)
                else:
                    found.others.append(name)
    except FileNotFoundError as error:
        if error.filename and os.path.islink(error.filename):
            where = os.readlink(error.filename)
            raise InputError(
                f"{error.filename}: is a link to {where}, which does not exist; restore it, or remove the link"
            ) from None
        raise _unreadable(folder, error) from None
    except OSError as error:
        raise _unreadable(folder, error) from None
    return found


def _unreadable(path: str | Path, error: OSError) -> InputError:
    path = os.fsdecode(error.filename or path).removesuffix(f"{os.sep}.")
    if isinstance(error, PermissionError):
        how = "give this user permission (chmod u+rx, or a group or ACL), or remove it"
    else:
        how = "look at the disk or the network"
    return InputError(f"{path}: cannot be read: {error.strerror}; {how}")


class Listing(NamedTuple):
    """The images below a folder: their paths, sorted, and what else was found."""

    images: list[bytes]
    others: Counter[str]  # numbers of files that are not images, by ending
    folders: dict[str, None]  # the real path of each folder that was listed
    repeated: list[str]  # links to folders that are listed already


def images_below(top: Path, name: str = "") -> Listing:
    """List the images in `top`/`name` and the folders below it, by their paths from `top`.

    Follows links to folders, but leaves out a link to a folder that is listed already, to `top`, or
    to a folder above it. Raises InputError if a folder cannot be read.
    """
    real_top = os.path.realpath(top)
    listing = Listing([], Counter(), {}, [])
    images: list[str] = []
    real = os.path.realpath(top / name)
    folders, links = [(name, real)], []
    while folders or links:
        # links come last, so that a file's path does not depend on links to its folder
        inside, real = folders.pop() if folders else links.pop()
        around = inside != "" and os.path.commonpath([real_top, real]) == real
        if around or real in listing.folders:
            listing.repeated.append(os.path.join(top, inside))
            continue
        listing.folders[real] = None
        entries = _entries(os.path.join(top, inside))
        prefix = os.path.join(inside, "")
        images += [prefix + file for file in entries.images]
        listing.others.update(map(_ending, entries.others))
        # sorted, because a file system's own order differs between copies
        for one in sorted(entries.folders, reverse=True):
            folders.append((prefix + one, os.path.join(real, one)))
        for one in entries.links:
            links.append((prefix + one, os.path.realpath(os.path.join(top, prefix + one))))
        if entries.links:
            links.sort(reverse=True)
    listing.images.extend(map(os.fsencode, sorted(images)))
    return listing


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no ending"


def _endings(counts: Counter[str]) -> str:
    """Return the counts as text: .txt 300, .avif 12, and others 4."""
    most = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    rest = sum(count for _, count in most[5:])
    return ", ".join(
        f"{ending} {count}" for ending, count in most[:5] + [("others", rest)] * bool(rest)
    )


def _tell_of_others(
    folder: Path, listings: list[Listing], others: Counter[str], beside: int
) -> None:
    """Print one line on what was left out: other files, images outside class folders, links."""
    others = sum((listing.others for listing in listings), others)
    repeated = [link for listing in listings for link in listing.repeated]
    what = []
    if others:
        what.append(f"{others.total()} files with other endings ({_endings(others)})")
    if beside:
        what.append(f"{beside} images outside the class folders")
    if repeated:
        what.append(
            f"{len(repeated)} links to folders that are listed already, first {repeated[0]}"
        )
    if what:
        _print_once(f"{folder}: left out: {'; '.join(what)}")


@functools.cache  # val/ is listed again by each k-NN test
def _print_once(message: str) -> None:
    if distributed.is_rank0():
        tqdm.write(message, file=sys.stderr)
