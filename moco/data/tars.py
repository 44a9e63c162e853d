"""Images in tar files (WebDataset's layout), which are read in place and in any order.

`tar_listing` says which members are images and labels, `splits` which tar files belong to a split.
"""

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moco.data import folders, labels, splits, tar_index, tar_listing
from moco.data.images import EncodedImages
from moco.data.splits import File
from moco.errors import InputError, one_line
from moco.messages import counted

_COMPRESSED = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tar.z")
_COMPRESSED += (".tgz", ".tbz2", ".txz", ".tzst")
_SUFFIXES = (".tar", *_COMPRESSED)
_OPEN_FILES = 256  # per process; more than 1024 exceed the usual limit of a process


@dataclass(frozen=True)
class TarImages(EncodedImages):
    """Images in tar files below `root`.

    Attributes:
        files: The tar files.
        shards: int32 [N], the index of each image's tar file.
        offsets: int64 [N], the first byte of each image in its tar file.
        sizes: int64 [N], the bytes of each image.
        members: bytes [N], the names of the images in their tar files.
    """

    files: tuple[File, ...]
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    members: np.ndarray

    def encoded(self, i: int) -> np.ndarray:
        """Return the content of the member of image `i`; see `EncodedImages.encoded`.

        Raises ListError if the tar file has changed since it was listed, or if it has been removed
        before this process opened it.
        """
        file = self.files[self.shards[i]]
        data = np.empty(self.sizes[i], np.uint8)
        if not len(data):
            raise self._unreadable(i, "the member is empty")
        path = os.path.join(self.root, file.name)
        try:
            descriptor = _opened(path, file)
            done, offset = 0, int(self.offsets[i])
            while done < len(data):
                # does not move the position in the file, which forked processes share
                count = os.preadv(descriptor.number, [data[done:]], offset + done)
                if not count:
                    splits.check_unchanged(path, os.fstat(descriptor.number), file)
                    raise OSError("the tar file is truncated")
                done += count
            # it may have been written to since it was opened
            splits.check_unchanged(path, os.fstat(descriptor.number), file)
        except OSError as error:
            raise self._unreadable(i, error.strerror or str(error)) from None
        return data

    def _unreadable(self, i: int, reason: str) -> InputError:
        return InputError(f"{self.path(i)}: unreadable image ({reason}); remove or replace it")

    def name(self, i: int) -> str:
        """Return the name of the tar file and that of the member, as in train-00.tar/0001.jpg."""
        return f"{self.files[self.shards[i]].name}/{os.fsdecode(self.members[i])}"

    def listed_names(self, i: int) -> tuple[str, ...]:
        """Return the names by which lists may name image `i`; see `Images.listed_names`.

        They are, with and without folders, the member's name and its key, and the key with the
        suffix of ImageNet's files.
        """
        member = os.fsdecode(self.members[i])
        folder, base = os.path.split(member)
        stem = base.split(".", 1)[0]
        key = os.path.join(folder, stem)
        return (self.name(i), member, key, f"{key}.JPEG", base, stem, f"{stem}.JPEG")

    def content(self) -> bytes:
        """Return the labels, and the names and places of the images; see `Images.content`."""
        places = (self.members, self.shards, self.offsets, self.sizes)
        return super().content() + b"".join(one.tobytes() for one in places)

    def subset(self, indices: np.ndarray) -> "TarImages":
        """Return the images with these `indices`; see `Images.subset`."""
        return replace(
            self,
            labels=self.labels[indices],
            shards=self.shards[indices],
            offsets=self.offsets[indices],
            sizes=self.sizes[indices],
            members=self.members[indices],
        )


class _Descriptor:
    """An open file. It is closed when nothing uses it any more, in this thread or another."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if "number" in vars(self):
            os.close(self.number)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str, file: File) -> _Descriptor:
    """Open a tar file. Each process keeps the last ones that it used open.

    Raises OSError if it cannot be opened, and ListError if it is not the listed `file` any more or
    has been removed.
    """
    try:
        descriptor = _Descriptor(path)
    except FileNotFoundError:
        raise splits.removed_error(path) from None
    splits.check_unchanged(path, os.fstat(descriptor.number), file)
    return descriptor


# The layout.


def holds(folder: Path, split: str) -> bool:
    """Return whether `folder` has tar files of the split. See `sources.Layout`.

    Compressed tar files also count unless there are other images, so that reading them raises an
    error that says what to do.
    """
    found = splits.names(folder, split, _SUFFIXES)
    tars = any(not name.lower().endswith(_COMPRESSED) for name in found)
    return tars or (bool(found) and not folders.has_images_below(folder))


def class_names(folder: Path, split: str) -> tuple[str, ...]:
    """Return the names of the classes of a split; see `sources.Layout`."""
    files = _files(folder, split)
    index = tar_index.load(folder, split, files)
    try:
        return labels.classes(_labels(index), _class_names(folder))
    except InputError as error:
        raise InputError(f"{folder}: {error}{_example(index, files)}") from None


def scan(folder: Path, split: str, classes: tuple[str, ...]) -> TarImages:
    """List the images of a split; see `sources.Layout`.

    Prints lines that count what is left out.
    """
    files = _files(folder, split)
    index = tar_index.load(folder, split, files)
    splits.note_choice(folder, split, [file.name for file in files], _SUFFIXES)
    _print_left_out(folder, files, index)
    try:
        found, names = labels.indices(_labels(index), _class_names(folder), classes)
    except InputError as error:
        raise InputError(f"{folder}: {error}{_example(index, files)}") from None
    places = (index.shards, index.offsets, index.sizes, index.members)
    return TarImages(folder, found, names, files, *places)


def _files(folder: Path, split: str) -> tuple[File, ...]:
    """Return the tar files of a split. Raises InputError if one of them is compressed."""
    found = splits.names(folder, split, _SUFFIXES)
    for name in found:
        if name.lower().endswith(_COMPRESSED):
            raise tar_listing.compressed(folder / name)
    return splits.files(folder, found)


def _labels(index: tar_index.Index) -> labels.Labels:
    return labels.Labels([text.decode() for text in index.texts.tolist()], index.codes)


def _class_names(folder: Path) -> tuple[str, ...]:
    """Return the names in the classes.txt of the data folder or of the split's folder."""
    return labels.read_classes_file(folder, *(folder.parent,) * (folder.name in _SPLIT_FOLDERS))


_SPLIT_FOLDERS = {name for names in splits.FOLDERS.values() for name in names}


def _example(index: tar_index.Index, files: tuple[File, ...]) -> str:
    """Return text that names the first image without a label; an empty string if all have one."""
    without = np.flatnonzero(index.codes < 0)
    if not len(without):
        return ""
    first = without[0]
    return f" (first: {files[index.shards[first]].name}/{os.fsdecode(index.members[first])})"


def _print_left_out(folder: Path, files: tuple[File, ...], index: tar_index.Index) -> None:
    """Print one line that counts the members and the files that are not read."""
    counts = index.counts()
    others = folders.count_images(folder) if not os.path.dirname(files[0].name) else 0
    parts = []
    if counts:
        parts.append(
            f"{counted(counts.total(), 'member')} of tar files ({folders.endings(counts)})"
        )
    if others:
        parts.append(f"{counted(others, 'image')} next to the tar files")
    if parts:
        folders.print_once(one_line(f"{folder}: left out: {'; '.join(parts)}"))
