"""List folders of images: in ImageNet's layout, SPLIT/CLASS/*.jpg, or without class folders.

`sources` decides which of them a data folder has.
"""

import functools
import multiprocessing
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from moco import distributed, messages
from moco.data.decoding import SUFFIXES
from moco.data.images import ImageFolder, Images
from moco.data.names import Names
from moco.errors import InputError
from moco.messages import counted


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split; validation/ or test/ if val/ is missing.

    test/ is only used if it has class folders, or files that hold many images.
    """
    folder = root / split
    if split != "val" or is_folder(folder):
        return folder
    for other in (root / "validation", root / "test"):
        if is_folder(other):
            entries = _entries(str(other))
            shards = any(name.lower().endswith(SHARDS) for name in entries.others)
            if entries.folders or entries.links or shards:
                # a spawned process does not repeat the line of the process that started it
                if multiprocessing.parent_process() is None:
                    print_once(f"{root}: has no val/; {other.name}/ is used instead")
                return other
    return folder


SHARDS = (".tar", ".parquet", ".arrow")  # endings of files that hold many images


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder. Raises InputError if the system does not say."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from None


def class_names(split: Path) -> tuple[str, ...]:
    """Return the names of a split's class folders, sorted. Raises InputError if there are none."""
    return _classes(split, _entries(str(split)))


def _classes(split: Path, entries: "_Entries") -> tuple[str, ...]:
    """Return the names of the class folders among the `entries` of a split, sorted."""
    names = sorted(entries.folders + entries.links)
    if not names:
        holds = "holds images but no class folders" if entries.images else "holds no class folders"
        raise InputError(f"{split}: {holds}; expected {split.name}/CLASS/*.jpg")
    return tuple(names)


def has_class_folders(folder: Path) -> bool:
    """Return whether `folder` has folders. Raises InputError if it cannot be read."""
    entries = _entries(str(folder))
    return bool(entries.folders or entries.links)


def count_images(folder: Path) -> int:
    """Return the number of images in `folder`, without those in folders below it."""
    return len(_entries(str(folder)).images)


def has_images_below(folder: Path) -> bool:
    """Return whether `images_below` finds an image; stop at the first one."""
    try:
        with os.scandir(folder) as entries:  # a folder of a million images is not listed to the end
            if any(_is_image(entry) for entry in entries):
                return True
    except OSError as error:
        raise _unreadable(folder, error) from None
    return any(entries.images for _, entries in _walk(folder, "", {}, []))


def scan_classes(folder: Path, classes: tuple[str, ...] = ()) -> ImageFolder:
    """List the images of `folder`/CLASS, sorted by path within each class.

    Labels are indices into `classes`, by default the names of the folder's own class folders.

    Nothing is cached between calls, because a folder's modification time need not change when its
    content does. Rank 0 prints one line on stderr that counts files with other endings.

    Raises InputError if a class folder has no images, if a folder cannot be read, or if two classes
    share a folder.
    """
    top = _entries(str(folder))
    own = _classes(folder, top)
    listings = _list_each(folder, own)
    owner: dict[str, str] = {}
    for name, listing in zip(own, listings, strict=True):
        if not listing.count:
            other = f", but {endings(listing.others)}" if listing.others else ""
            other += ", and links to a folder that is listed already" if listing.repeated else ""
            raise InputError(
                f"{folder / name}: holds no image ({', '.join(SUFFIXES)}){other}; "
                "remove the folder or fill it"
            )
        if shared := next((real for real in listing.folders if real in owner), None):
            raise InputError(
                f"{folder / owner[shared]} and {folder / name}: both lead to {shared} through "
                "links, so its images would belong to two classes; remove one of the links"
            )
        owner |= dict.fromkeys(listing.folders, name)
    _print_left_out(folder, listings, Counter(map(_ending, top.others)), len(top.images))
    classes = classes or own
    label = {name: i for i, name in enumerate(classes)}
    labels = np.repeat([label[name] for name in own], [listing.count for listing in listings])
    paths = Names.joined(b"".join(listing.paths for listing in listings))
    return ImageFolder(folder, labels, classes, paths)


def scan_flat(folder: Path) -> ImageFolder:
    """List all images in `folder` and below it, sorted by path. They have no labels.

    Rank 0 prints one line on stderr that counts files with other endings.

    Raises InputError if there is no image, or if a folder cannot be read.
    """
    listing = images_below(folder)
    if not listing.count:
        raise InputError(f"{folder}: holds no image ({', '.join(SUFFIXES)})")
    _print_left_out(folder, [listing], Counter(), 0)
    return ImageFolder(folder, np.zeros(listing.count, int), (), Names.joined(listing.paths))


def same_on_all_ranks(images: Images) -> Images:
    """Return `images`. Raises InputError on every rank if the ranks see different images."""
    if distributed.world_size() == 1:
        return images
    found: list[tuple[int, str]] = [(0, "")] * distributed.world_size()
    dist.all_gather_object(found, (len(images), images.digest()))
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise InputError(
            f"{images.root}: rank 0 and rank {other} find different images "
            f"({found[0][0]} and {found[other][0]} of them); "
            "copy the folder to every node again, or give one that all nodes share"
        )
    return images


# Listing reads names and opens no file, so a million files take about a second. On a network disk,
# listing a folder waits for the server, so several threads list folders at the same time. Without
# waits, they only compete for the interpreter's lock, and listing takes 4 times as long.

_THREADS = 16
_PATIENCE = 0.05  # seconds of waiting after which threads start

# Folders that operating systems, archives and network disks create, in lower case. Hidden folders
# are ignored anyway.
_SYSTEM = {
    "@eadir",
    "@__thumb",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "__macosx",
    "lost+found",
    "$recycle.bin",
    "system volume information",
}


class _Entries(NamedTuple):
    """The names in one folder, without hidden and system ones. `links` are links to folders."""

    images: list[str]
    others: list[str]
    folders: list[str]
    links: list[str]


def _entries(folder: str) -> _Entries:
    """List the names in `folder`.

    A link that is named like an image counts as an image; its target is not checked.

    Raises InputError if the folder cannot be read, or if another link in it is broken.
    """
    found = _Entries([], [], [], [])
    try:
        os.stat(os.path.join(folder, "."))  # fails without x permission, though names can be read
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                lower, is_real_folder = name.lower(), entry.is_dir(follow_symlinks=False)
                if lower.endswith(SUFFIXES) and not is_real_folder:
                    found.images.append(name)
                elif lower in _SYSTEM:
                    continue
                elif is_real_folder:
                    found.folders.append(name)
                elif not entry.is_symlink():
                    found.others.append(name)
                elif stat.S_ISDIR(os.stat(entry.path).st_mode):
                    found.links.append(name)
                else:
                    found.others.append(name)
    except FileNotFoundError as error:
        if error.filename and os.path.islink(error.filename):
            target = os.readlink(error.filename)
            raise InputError(
                f"{error.filename}: is a link to {target}, which does not exist; restore it, "
                "or remove the link"
            ) from None
        raise _unreadable(folder, error) from None
    except OSError as error:
        raise _unreadable(folder, error) from None
    return found


def _is_image(entry: os.DirEntry) -> bool:
    """Return whether `_entries` counts a name as an image."""
    name = entry.name.lower()
    return name[0] != "." and name.endswith(SUFFIXES) and not entry.is_dir(follow_symlinks=False)


def _unreadable(path: str | Path, error: OSError) -> InputError:
    """Return the error to raise if a folder cannot be read."""
    path = os.fsdecode(error.filename or path).removesuffix(f"{os.sep}.")
    if isinstance(error, PermissionError):
        how = "give this user permission (chmod u+rx, or a group or ACL), or remove it"
    else:
        how = "check the disk or the network"
    return InputError(f"{path}: cannot be read: {error.strerror}; {how}")


class Listing(NamedTuple):
    """The images below a folder, and the other things found there."""

    paths: bytes  # those of the images, sorted, each followed by a null byte
    count: int  # number of images
    others: Counter[str]  # numbers of files that are not images, by ending
    folders: dict[str, None]  # the real path of each folder that was listed
    repeated: list[str]  # links to folders that are listed already


def _list_each(folder: Path, names: Sequence[str]) -> list[Listing]:
    """Return `images_below` of each of these folders in `folder`.

    Threads are started if most of the time is spent on waiting for the disk.
    """
    real = os.path.realpath(folder)
    found: list[Listing] = []
    began, computed = time.perf_counter(), time.thread_time()
    for name in names:
        passed = time.perf_counter() - began
        waited = passed - (time.thread_time() - computed)
        if waited > _PATIENCE and waited > passed / 2:
            break
        found.append(images_below(folder, name, real))
    if left := names[len(found) :]:
        with ThreadPoolExecutor(_THREADS) as pool:
            found += pool.map(lambda name: images_below(folder, name, real), left)
    return found


def images_below(top: Path, name: str = "", real_top: str = "") -> Listing:
    """List the images in `top`/`name` and all folders below it. Paths are relative to `top`.

    Links to folders are followed, except links to a folder that is listed already, to `top`, or to
    a folder above `top`.

    Args:
        top: a folder.
        name: the name of a folder in it; an empty string for `top` itself.
        real_top: the real path of `top`, if it is known.

    Raises InputError if a folder cannot be read.
    """
    others: Counter[str] = Counter()
    folders: dict[str, None] = {}
    repeated: list[str] = []
    found: list[tuple[str, list[str]]] = []  # the images of each folder
    for inside, entries in _walk(top, name, folders, repeated, real_top):
        found.append((os.path.join(inside, ""), entries.images))
        others.update(map(_ending, entries.others))
    if len(found) == 1:  # as usual; shorter names are faster to sort
        prefix, images = found[0]
        images.sort()
        text = prefix + f"\0{prefix}".join(images) + "\0" if images else ""
    else:
        images = sorted(prefix + file for prefix, files in found for file in files)
        text = "\0".join([*images, ""])
    return Listing(os.fsencode(text), len(images), others, folders, repeated)


def _walk(
    top: Path, name: str, listed: dict[str, None], repeated: list[str], real_top: str = ""
) -> Iterator[tuple[str, _Entries]]:
    """Yield the path and the entries of `top`/`name` and of each folder below it.

    See `images_below` for links and arguments. Adds to `listed` and `repeated` as in a `Listing`.

    Raises InputError if a folder cannot be read.
    """
    real_top = real = real_top or os.path.realpath(top)
    if name:
        path = os.path.join(top, name)
        # realpath looks up every folder on the way
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(real_top, name)
    folders, links = [(name, real)], []
    while folders or links:
        # links come last, so that a link to a folder does not change the paths of its files
        inside, real = folders.pop() if folders else links.pop()
        contains_top = inside != "" and os.path.commonpath([real_top, real]) == real
        if contains_top or real in listed:
            repeated.append(os.path.join(top, inside))
            continue
        listed[real] = None
        entries = _entries(os.path.join(top, inside))
        yield inside, entries
        prefix = os.path.join(inside, "")
        # sorted, because each file system has its own order
        for one in sorted(entries.folders, reverse=True):
            folders.append((prefix + one, os.path.join(real, one)))
        for one in entries.links:
            links.append((prefix + one, os.path.realpath(os.path.join(top, prefix + one))))
        if entries.links:
            links.sort(reverse=True)


def _ending(name: str) -> str:
    """Return the ending of a file name in lower case, such as .txt."""
    return os.path.splitext(name)[1].lower() or "no ending"


def endings(counts: Counter[str]) -> str:
    """Return the counts as text, such as '.txt 300, .avif 12'. The rarest are added as others."""
    most = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    rest = sum(count for _, count in most[5:])
    return ", ".join(
        f"{ending} {count}" for ending, count in most[:5] + [("others", rest)] * bool(rest)
    )


def _print_left_out(
    folder: Path, listings: list[Listing], others: Counter[str], outside: int
) -> None:
    """Print one line that counts what the scan of `folder` left out.

    `others` counts the non-image files in the split's top folder by ending; `outside`, the images.
    """
    others = sum((listing.others for listing in listings), others)
    repeated = [link for listing in listings for link in listing.repeated]
    left_out = []
    if others:
        left_out.append(f"{counted(others.total(), 'file')} with other endings ({endings(others)})")
    if outside:
        left_out.append(f"{counted(outside, 'image')} outside the class folders")
    if repeated:
        left_out.append(
            f"{counted(len(repeated), 'link')} to folders that are listed already, "
            f"first {repeated[0]}"
        )
    if left_out:
        print_once(f"{folder}: left out: {'; '.join(left_out)}")


@functools.cache  # each k-NN test lists val/ again
def print_once(message: str) -> None:
    """Print a line on stderr, on rank 0, unless it was printed before."""
    if messages.is_rank0():
        tqdm.write(message, file=sys.stderr)
