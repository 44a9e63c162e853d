"""Keep an index of all images in the tar files of a split, so that these are searched only once.

Finding the members of a tar file means reading all of their headers, one after the other. The index
is kept next to the tar files or, if that folder is read-only, in the project's cache folder. It has
the name, size and time of each tar file. Tar files that have changed are listed again.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from moco.data.photos import cache_folder, cache_paths
from moco.data.splits import File
from moco.data.tar_listing import BLOCK, Listing, list_tar
from moco.errors import InputError, one_line, short
from moco.files import replacing, to_json
from moco.messages import counted

_THREADS = 16  # as for folders: on a network disk, reading waits for the server
_VERSION = 1  # of the list's file; a file of another version is replaced
_EVERY = 10.0  # seconds between lines on the progress


class Index(NamedTuple):
    """The images in the tar files of a split, in the order of the files.

    Attributes:
        shards: int32 [N], the index of each image's tar file.
        offsets: int64 [N], the first byte of each image in its tar file.
        sizes: int64 [N], the bytes of each image.
        members: bytes [N], the names of the images in their tar files.
        codes: int32 [N], the index in `texts` of each image's label; -1 if it has none.
        texts: bytes [T], the different labels, in UTF-8.
        left_out: bytes [S], the numbers of other members of each tar file, by ending, as JSON.
    """

    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    members: np.ndarray
    codes: np.ndarray
    texts: np.ndarray
    left_out: np.ndarray

    def counts(self) -> Counter[str]:
        """Return the numbers of other members of all tar files, by ending."""
        return sum((Counter(json.loads(text)) for text in self.left_out), Counter())


@functools.lru_cache(maxsize=4)
def load(folder: Path, split: str, files: tuple[File, ...]) -> Index:
    """Return the images in these tar files of a split, from the kept index if it is valid.

    Otherwise list them, keep the index, and print a line. Processes of one machine take turns.

    Raises InputError if a tar file cannot be read, or is unusable.
    """
    places = _places(folder, split, files)
    with _turn(places[-1].name):
        kept: dict[File, Listing] = {}
        reason = ""
        for place in places:
            index, listings, reason_here = _read(place, files)
            if index is not None:
                return _frozen(index)
            kept, reason = kept or listings, reason or reason_here
        began = time.monotonic()
        index = _joined(_list_all(folder, files, kept))
        where = _keep(index, files, places)
    seconds = time.monotonic() - began
    _print(
        f"{folder}: {counted(len(index.shards), 'image')} listed in "
        f"{counted(len(files), 'tar file')} in {seconds:.1f} s{reason}; {where}"
    )
    return _frozen(index)


def _frozen(index: Index) -> Index:
    """Return `index` with read-only arrays, because several sets of images share them."""
    for array in index:
        array.flags.writeable = False
    return index


def _print(message: str) -> None:
    """Print a line. Only the process that lists the files does; any rank may be the first."""
    tqdm.write(one_line(message), file=sys.stderr)


# Listing.


def _list_all(folder: Path, files: tuple[File, ...], kept: dict[File, Listing]) -> list[Listing]:
    """List several tar files at the same time, except those whose listings are `kept`."""
    new = [file for file in files if file not in kept]
    progress = _Progress(folder, sum(file.size for file in new))
    with ThreadPoolExecutor(_THREADS) as pool:
        listings = pool.map(lambda file: list_tar(folder / file.name, progress), new)
        try:
            found = kept | dict(zip(new, listings, strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [found[file] for file in files]


class _Progress:
    """A count of bytes that prints a line now and then. Several threads may add to it."""

    def __init__(self, folder: Path, total: int):
        self.folder, self.total, self.done = folder, total, 0
        self.lock, self.printed = threading.Lock(), time.monotonic()

    def __call__(self, size: int) -> None:
        """Add `size` bytes."""
        with self.lock:
            self.done += size
            if time.monotonic() - self.printed < _EVERY:
                return
            self.printed = time.monotonic()
        _print(
            f"{self.folder}: listing the images in tar files, {self.done / self.total:.0%} of "
            f"{self.total / 2**30:.3g} GiB"
        )


def _joined(listings: list[Listing]) -> Index:
    """Return the index of all listings."""
    counts = [len(listing.members) for listing in listings]
    labels = np.concatenate([listing.labels for listing in listings])
    texts, codes = np.unique(labels, return_inverse=True)
    if len(texts) and not texts[0]:  # images without a label
        texts, codes = texts[1:], codes - 1
    return Index(
        np.repeat(np.arange(len(listings), dtype=np.int32), counts),
        np.concatenate([listing.offsets for listing in listings]),
        np.concatenate([listing.sizes for listing in listings]),
        np.concatenate([listing.members for listing in listings]),
        codes.astype(np.int32),
        texts,
        np.array([to_json(dict(listing.left_out)).encode() for listing in listings]),
    )


# The file with the index.


def _places(folder: Path, split: str, files: tuple[File, ...]) -> list[Path]:
    """Return the paths at which the index may be: next to the tar files, and in cache folders."""
    inside = folder / os.path.dirname(files[0].name)
    key = hashlib.sha256(os.fsencode(os.path.realpath(inside))).hexdigest()[:16]
    return [
        inside / f".tar-index-{split}.npz",
        *cache_paths(f"tar-index-{key}-{split}.npz"),
    ]


@contextlib.contextmanager
def _turn(name: str) -> Iterator[None]:
    """Wait until no other process of this machine lists the same tar files."""
    with contextlib.ExitStack() as stack:
        # without a lock, each process makes its own index, which takes longer but does no harm
        with contextlib.suppress(OSError, NotImplementedError, InputError):
            stack.enter_context(FileLock(cache_folder() / f"{name}.lock"))
        yield


def _keep(index: Index, files: tuple[File, ...], places: list[Path]) -> str:
    """Write the index to the first of `places` that is writable. Return what to print about it."""
    facts = {
        "version": np.array(_VERSION),
        "names": np.array([os.fsencode(file.name) for file in files]),
        "file_sizes": np.array([file.size for file in files]),
        "mtimes": np.array([file.mtime_ns for file in files]),
    }
    reason = ""
    for place in places:
        try:
            with replacing(place) as file:
                np.savez(file, **facts, **index._asdict())
            return f"the index is kept in {place}"
        except OSError as error:
            reason = error.strerror or str(error)
    return f"the index cannot be kept ({reason}), so each start makes it again"


_Read = tuple[Index | None, dict[File, Listing], str]


def _read(place: Path, files: tuple[File, ...]) -> _Read:
    """Read a kept index. Return it if it has exactly `files`; otherwise, its usable part.

    The file may be damaged, or written by somebody else, so all of its values are checked.

    Returns the index or None, the listings of unchanged tar files, and a reason to print.
    """
    try:
        if not place.is_file():
            return None, {}, ""
        arrays = _arrays(place)
        if arrays.pop("version").tolist() != _VERSION:
            return None, {}, f" ({place} is of another version, and is replaced)"
        names, sizes, mtimes = (arrays.pop(name) for name in ("names", "file_sizes", "mtimes"))
        facts = (map(os.fsdecode, names.tolist()), sizes.tolist(), mtimes.tolist())
        there = tuple(File(*one) for one in zip(*facts, strict=True))
        index = Index(**arrays)
        _check(index, sizes)
    except Exception as error:  # a damaged file raises errors of many types
        why = short(" ".join(str(error).split())) or type(error).__name__
        return None, {}, f" ({place} is damaged: {why}; it is replaced)"
    if there == files:
        return index, {}, ""
    wanted, firsts = set(files), np.searchsorted(index.shards, np.arange(len(there) + 1))
    kept = {
        file: _listing(index, k, slice(*firsts[k : k + 2]))
        for k, file in enumerate(there)
        if file in wanted
    }
    changed = counted(len(files) - len(kept), "is new or has changed", "are new or have changed")
    return None, kept, f" ({changed})"


def _arrays(place: Path) -> dict[str, np.ndarray]:
    """Return the arrays in an .npz file without compression, none of them of Python objects."""
    with zipfile.ZipFile(place) as file:
        if sum(one.file_size for one in file.infolist()) > place.stat().st_size:
            raise ValueError("compressed")  # a small file could fill the memory
    with np.load(place, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _check(index: Index, sizes: np.ndarray) -> None:
    """Raise ValueError if a value of the index is impossible for tar files of these `sizes`."""
    types = {"shards": "i", "offsets": "i", "sizes": "i", "members": "S", "codes": "i"}
    types |= {"texts": "S", "left_out": "S"}
    for name, kind in types.items():
        array = index._asdict()[name]
        if array.ndim != 1 or array.dtype.kind != kind:
            raise ValueError(f"{name} has another type")
    n = len(index.shards)
    if not n or any(len(one) != n for one in index[:5]) or len(index.left_out) != len(sizes):
        raise ValueError("its arrays differ in length")
    if not np.array_equal(np.unique(index.shards), np.arange(len(sizes))):
        raise ValueError("a tar file has no images")
    if (np.diff(index.shards) < 0).any():
        raise ValueError("its images are not in the order of the tar files")
    ends = sizes[index.shards]
    if (
        (index.offsets < BLOCK).any()
        or (index.offsets % BLOCK).any()
        or (index.sizes < 0).any()
        or (index.offsets > ends).any()
        or (index.sizes > ends - index.offsets).any()
    ):
        raise ValueError("an image is outside its tar file")
    if index.codes.min() < -1 or index.codes.max() >= len(index.texts):
        raise ValueError("a label is out of range")
    for text in index.texts.tolist():
        if not text.decode().isprintable() or not text:
            raise ValueError("a label is not text")
    for counts in map(json.loads, index.left_out.tolist()):
        if not all(isinstance(k, str) and type(v) is int for k, v in counts.items()):
            raise ValueError("its counts are no numbers")


def _listing(index: Index, shard: int, rows: slice) -> Listing:
    """Return the listing of one tar file, which has these `rows` of the index."""
    texts = np.append(index.texts, b"")  # -1 is the last one: no label
    return Listing(
        index.members[rows],
        index.offsets[rows],
        index.sizes[rows],
        texts[index.codes[rows]],
        Counter(json.loads(index.left_out[shard])),
    )
