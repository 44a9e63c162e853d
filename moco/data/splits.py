"""Find the files of a split that hold many images each: tar files, parquet files, arrow files."""

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from moco.data.folders import print_once
from moco.errors import InputError, ListError, changed, one_line
from moco.files import unreadable
from moco.messages import counted

# the words in a file's or folder's name that say which split it belongs to
WORDS = {"train": "train", "training": "train", "test": "test"}
WORDS |= dict.fromkeys(("val", "valid", "validation"), "val")
FOLDERS = {"train": ("train",), "val": ("val", "validation", "test")}  # of the files of each split


class File(NamedTuple):
    """A file that holds many images.

    Attributes:
        name: Its path relative to the folder in which it was found.
        size: Its size in bytes.
        mtime_ns: The time of its last change. If it or the size differs, the content may differ.
    """

    name: str
    size: int
    mtime_ns: int


def names(folder: Path, split: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the sorted names of the split's files in `folder` that end in one of `suffixes`.

    A word in the name of a file says which split it belongs to, as in train-0000.tar or
    imagenet1k-validation-00.tar. If no name has such a word, the files belong to the split whose
    name `folder` has, or to the training images. If `folder` has no such files, they are searched
    in its subfolder data/, where the Hugging Face hub has them.

    Raises InputError if a folder cannot be read.
    """
    found = _listed(folder, suffixes)
    if not found and (folder / "data").is_dir():
        found = [os.path.join("data", name) for name in _listed(folder / "data", suffixes)]
    by_split: dict[str | None, list[str]] = {}
    for name in found:
        by_split.setdefault(_split_of(name, suffixes), []).append(name)
    if by_split.keys() <= {None}:
        return found if WORDS.get(folder.name, "train") in _SPLITS[split] else []
    return next((by_split[one] for one in _SPLITS[split] if one in by_split), [])


_SPLITS = {"train": ("train",), "val": ("val", "test")}  # those whose files may be used for each


def _split_of(name: str, suffixes: tuple[str, ...]) -> str | None:
    """Return the split that the name of a file names last, or None."""
    stem = os.path.basename(name).lower()
    stem = stem.removesuffix(next(end for end in suffixes if stem.endswith(end)))
    words = [word for word in re.split("[^a-z]+", stem) if word in WORDS]
    return WORDS[words[-1]] if words else None


_CHECKPOINT = (".pth.tar", ".pt.tar")  # of runs, which are no tar files


def _listed(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the sorted names in `folder` that end in one of `suffixes`.

    Hidden files and checkpoints are left out.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name[0] != "."
                and entry.name.lower().endswith(suffixes)
                and not entry.name.lower().endswith(_CHECKPOINT)
                and not entry.is_dir()
            )
    except OSError as error:
        raise unreadable(error).at(folder) from None


def note_choice(folder: Path, split: str, chosen: list[str], suffixes: tuple[str, ...]) -> None:
    """Print lines that say which files in `folder` are left out, and whether test replaces val."""
    test = bool(chosen) and _split_of(chosen[0], suffixes) == "test"
    if split == "val" and test and folder.name != "test":
        print_once(f"{folder}: has no files named val; those named test are used instead")
    place = folder / os.path.dirname(chosen[0]) if chosen else folder
    others = [name for name in _listed(place, suffixes) if _split_of(name, suffixes) is None]
    if others and chosen and _split_of(chosen[0], suffixes):
        files = counted(len(others), "file whose name says", "files whose names say")
        left_out = f"{files} neither train nor val, first {others[0]}"
        print_once(one_line(f"{folder}: left out: {left_out}"))


def files(folder: Path, found: list[str]) -> tuple[File, ...]:
    """Return the `found` files of `folder` with their sizes and times.

    Raises InputError if a file cannot be read, or if some files of a numbered series are missing.
    """
    _check_complete(folder, found)
    return tuple(facts(folder, name) for name in found)


def facts(folder: Path, name: str) -> File:
    """Return the size and time of a file in `folder`. Raises InputError if it cannot be read."""
    path = folder / name
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path) and isinstance(error, FileNotFoundError):
            raise InputError(
                f"{path}: is a link to {os.readlink(path)}, which does not exist; download the "
                "file again, or remove the link"
            ) from None
        raise unreadable(error).at(path) from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is not a file; remove it")
    return File(name, status.st_size, status.st_mtime_ns)


def check_unchanged(path: str | Path, status: os.stat_result, file: File) -> None:
    """Raise ListError if `status` says that a file is not the listed `file` any more."""
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise changed(path)


def removed_error(path: str | Path) -> ListError:
    """Return the error for a file that has been removed since it was listed."""
    return ListError(f"{path}: has been removed since it was listed; restore it, and start again")


def _check_complete(folder: Path, found: list[str]) -> None:
    """Raise InputError if files of a series are missing: names such as train-00003-of-00257.tar."""
    series: dict[tuple[str, int], set[int]] = {}
    for name in found:
        if match := re.search(r"^(.*)-(\d{4,9})-of-(\d{4,9})\b", name):
            series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, total), there in series.items():
        if len(there) < total:
            missing = next(i for i in range(total) if i not in there)
            raise InputError(
                f"{folder}: has {len(there)} of the {total} files {name}-*-of-{total:05d}, "
                f"number {missing} is missing; download or convert the missing files"
            )
