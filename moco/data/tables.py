"""Images in Hugging Face's data sets on disk: arrow files, and parquet files.

`table_files` opens the files, `splits` says which of them belong to a split.
"""

import functools
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco import messages
from moco.data import folders, labels, splits
from moco.data.images import EncodedImages
from moco.data.splits import File
from moco.data.table_files import KEPT_BYTES, Arrow, Columns, Parquet, attempt
from moco.errors import InputError, ListError, one_line
from moco.files import read_text, unreadable
from moco.messages import counted

_SUFFIXES = (".parquet", ".arrow")
_OPEN_FILES = 64  # per process
TOOL = "python tools/parquet_to_tar.py"


@dataclass(frozen=True)
class TableImages(EncodedImages):
    """Images in the rows of parquet or arrow files below `root`.

    Attributes:
        files: The files.
        columns: Their columns with images and labels.
        table: int32 [N], the index of each image's file.
        rows: int64 [N], its row in that file.
        paths: bytes [N], the file name that the table has for the image, or nothing.
    """

    files: tuple[File, ...]
    columns: Columns
    table: np.ndarray
    rows: np.ndarray
    paths: np.ndarray

    def encoded(self, i: int) -> np.ndarray:
        """Return the bytes in the row of image `i`; see `EncodedImages.encoded`.

        Raises ListError if the file has changed or been removed since it was listed.
        """
        file = self.files[self.table[i]]
        try:
            table = _opened(self.root, file)
            # a mapped file that became shorter would end the process with a bus error
            _check_unchanged(self.root, file)
            data = attempt(self.root / file.name, lambda: table.image(int(self.rows[i])))
        except ListError:
            raise
        except InputError as error:
            raise self._unreadable(i, str(error)) from None
        if data is None or not data.size:
            raise self._unreadable(i, "the row has no bytes")
        return np.frombuffer(data, np.uint8)

    def _unreadable(self, i: int, reason: str) -> InputError:
        return InputError(f"{self.path(i)}: unreadable image ({reason}); remove or replace it")

    def name(self, i: int) -> str:
        """Return the names of the file and of the image and the row, as in a.parquet/12/cat.jpg."""
        path = os.path.basename(os.fsdecode(self.paths[i]))
        return f"{self.files[self.table[i]].name}/{self.rows[i]}{f'/{path}' if path else ''}"

    def content(self) -> bytes:
        """Return the labels, the rows and the files; see `Images.content`."""
        facts = repr([(file.name, file.size) for file in self.files]).encode()
        return super().content() + self.table.tobytes() + self.rows.tobytes() + facts

    def subset(self, indices: np.ndarray) -> "TableImages":
        """Return the images with these `indices`; see `Images.subset`."""
        return replace(
            self,
            labels=self.labels[indices],
            table=self.table[indices],
            rows=self.rows[indices],
            paths=self.paths[indices],
        )


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(root: Path, file: File) -> Arrow | Parquet:
    """Open a file. Each process keeps the last ones that it used open.

    Raises InputError if it is unusable, and ListError if it is not the listed `file` any more.
    """
    path = root / file.name
    _check_unchanged(root, file)
    kind = Arrow if path.suffix.lower() == ".arrow" else Parquet
    return attempt(path, lambda: kind(path))


def _check_unchanged(root: Path, file: File) -> None:
    """Raise ListError if a file is not the listed `file` any more, or has been removed."""
    path = root / file.name
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise splits.removed_error(path) from None
    except OSError as error:
        raise unreadable(error).at(path) from None
    splits.check_unchanged(path, status, file)


# The layout.


def holds(folder: Path, split: str) -> bool:
    """Return whether `folder` has parquet or arrow files of the split; see `sources.Layout`."""
    return bool(splits.names(folder, split, _SUFFIXES))


def class_names(folder: Path, split: str) -> tuple[str, ...]:
    """Return the names of the classes of a split; see `sources.Layout`."""
    found = _listed(folder, split, _files(folder, split))
    try:
        return labels.classes(found.given, found.images.columns.class_names)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def scan(folder: Path, split: str, classes: tuple[str, ...]) -> TableImages:
    """List the images of a split; see `sources.Layout`.

    Prints a line that says how long reading an image of a parquet file takes.
    """
    files = _files(folder, split)
    found = _listed(folder, split, files)
    splits.note_choice(folder, split, [file.name for file in files], _SUFFIXES)
    try:
        indices, names = labels.indices(found.given, found.images.columns.class_names, classes)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    images = replace(found.images, labels=indices, classes=names)
    if split == "train":
        _note_cost(folder, split, files)
    return images


def _names(folder: Path, split: str) -> list[str]:
    """Return the names of the split's parquet files or, without any, arrow files."""
    found = splits.names(folder, split, _SUFFIXES)
    if parquet := [name for name in found if name.lower().endswith(".parquet")]:
        return parquet
    state = folder / "state.json"
    if state.is_file() and found:
        return _saved(state)
    # the package datasets keeps results of its functions in files of the same folder
    return [name for name in found if not os.path.basename(name).startswith("cache-")]


def _saved(state: Path) -> list[str]:
    """Return the names of the arrow files that the package datasets lists in a saved data set."""
    try:
        facts = json.loads(read_text(state))
        names = [one["filename"] for one in facts["_data_files"]]
        if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
            raise ValueError
        if not names or facts.get("_indices_files") or facts.get("_indices_data_files"):
            raise ValueError
    except InputError as error:
        raise InputError(f"{state}: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(
            f"{state}: does not list the files of a saved data set; save it again with save_to_disk"
        ) from None
    return names


def _files(folder: Path, split: str) -> tuple[File, ...]:
    return splits.files(folder, _names(folder, split))


class _Listed(NamedTuple):
    """The images of a split without labels, and the labels as the files have them."""

    images: TableImages
    given: labels.Labels


@functools.lru_cache(maxsize=4)
def _listed(folder: Path, split: str, files: tuple[File, ...]) -> _Listed:
    """Read the numbers of rows, the labels and the images' paths in the files of a split."""
    columns = _opened(folder, files[0]).columns
    counts, texts, paths = [], [], []
    for file in files:
        path = folder / file.name
        table = _opened(folder, file)
        if table.columns != columns:
            raise InputError(
                f"{path}: has other columns or classes than {files[0].name}; keep data sets in "
                "folders of their own"
            )
        counts.append(table.rows)
        if columns.label is not None:
            texts.append(_texts(attempt(path, lambda t=table: t.values(columns.label))))
        if columns.has_path:
            read = attempt(path, lambda t=table: t.values(columns.image, "path"))
            paths.append(_paths(read))
    if not sum(counts):
        raise InputError(f"{folder}: its {split} files have no rows; download them again")
    table = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    rows = np.concatenate([np.arange(count) for count in counts])
    given = labels.Labels((), np.full(len(rows), -1))
    if columns.label is not None:
        values, codes = np.unique(np.concatenate(texts), return_inverse=True)
        known = [text.decode() for text in values.tolist() if text]
        given = labels.Labels(known, codes - (len(values) - len(known)))
    names = np.concatenate(paths) if paths else np.zeros(len(rows), "S1")
    blank = np.zeros(len(rows), np.int64)
    images = TableImages(folder, blank, (), files, columns, table, rows, names)
    _check_bytes(images)
    return _Listed(images, given)


def _texts(values: list[int | str | None]) -> np.ndarray:
    """Return labels as bytes [n]. A missing label is empty."""
    return np.array([b"" if one is None else str(one).encode() for one in values] or [b""])[
        : len(values)
    ]


def _paths(values: Iterable[str | None]) -> np.ndarray:
    """Return the file names in these paths as bytes [n]."""
    found = [os.fsencode(os.path.basename(one or ""))[:200] for one in values]
    return np.array(found or [b""])[: len(found)]


def _check_bytes(images: TableImages) -> None:
    """Raise InputError if the first image has a path, but no bytes."""
    file = images.files[images.table[0]]
    path = images.root / file.name
    table = _opened(images.root, file)
    if attempt(path, lambda: table.image(0)) is None:
        raise InputError(
            f"{path}: has the paths of images, but not their bytes; save the data set with its "
            "images (the package datasets: push_to_hub, or map before save_to_disk)"
        )


@functools.cache
def _note_cost(folder: Path, split: str, files: tuple[File, ...]) -> None:
    """Print how long it takes to read images in random order, unless all stay in memory."""
    images = _listed(folder, split, files).images
    slow = isinstance(_opened(folder, files[0]), Parquet)
    if not slow or sum(file.size for file in files) <= KEPT_BYTES or not messages.is_rank0():
        return
    indices = np.linspace(0, len(images) - 1, _MEASURED + 2).astype(int)[1:-1]
    began = time.perf_counter()
    for i in indices:
        images.encoded(i)
    ms = 1000 * (time.perf_counter() - began) / _MEASURED
    rows = _opened(folder, files[0]).group_rows
    root = folder.parent if folder.name in splits.FOLDERS[split] else folder
    folders.print_once(
        one_line(
            f"{folder}: reading an image takes {ms:.1f} ms, because parquet files are read in "
            f"groups of up to {counted(rows, 'image')}; tar files are faster: {TOOL} {root} OUT"
        )
    )


_MEASURED = 5  # images
