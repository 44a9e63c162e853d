"""Read a list of image files, one path a line, for `--file-list`."""

import codecs
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moco.data.decoding import SUFFIXES
from moco.data.images import ImageFolder
from moco.data.names import GROUP, Names, UnchangedFile
from moco.errors import InputError, changed, short
from moco.messages import counted, print_rank0

CHECKED = 1000  # paths that `check` looks up; on a network disk, looking up a million takes minutes
# A larger list stays in its file. Every rank reads the list, so 8 ranks would hold 8 copies.
IN_MEMORY = 256 << 20  # bytes
_ENDINGS = tuple(map(os.fsencode, SUFFIXES))


def read(file: str, root: Path) -> ImageFolder:
    """Return the images that `file` names, in its order. They have no labels.

    Relative paths are relative to `root`. Empty lines are ignored. No image is opened, and a path
    need not exist; see `check`.

    Raises InputError if the list cannot be read, is empty, or has a line that does not end like an
    image.
    """
    names = _names(file)
    return ImageFolder(root, np.zeros(len(names), int), (), names)


def check(file: str, root: Path) -> None:
    """Raise InputError if `read` would, or if a path is not a file.

    If the list is longer than `CHECKED`, only that many paths are looked up, spread evenly from the
    first to the last. Prints a line if paths are listed more than once.
    """
    names = _names(file)
    for i in np.unique(np.linspace(0, len(names) - 1, CHECKED).astype(int)):
        name = names[i]
        path = os.path.join(root, os.fsdecode(name))
        if not os.path.isfile(path):
            relative = "" if os.path.isabs(name) else f"; relative paths start at {root}"
            raise InputError(
                f"--file-list {file}, line {_line_number(file, name)}: {short(path, 500)}: "
                f"no such file{relative}"
            )
    if repeated := _repeated(names):
        print_rank0(
            f"--file-list {file}: {repeated} of {counted(len(names), 'line')} "
            f"repeat{'s' * (repeated == 1)} a path; each line counts as an image of its own"
        )


def _repeated(names: Names) -> int:
    """Return how many names are equal to an earlier one.

    Names with equal 64-bit hashes count as equal. Among 100 million different names, the chance of
    two equal hashes is 1 in 3700. The result is then one too high.
    """
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def _names(file: str) -> Names:
    """Return the paths in a list. See `read` for errors."""
    try:
        text = _opened(file)
        starts, count = _index(file, text)
        kept = text[:] if len(text) <= IN_MEMORY else text
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--file-list {file}: cannot be read ({reason}); expected text with one path a line"
        ) from None
    if not count:
        raise InputError(f"--file-list {file}: names no image; expected one path a line")
    return Names(kept, starts, count, _images_in)


def _opened(file: str) -> UnchangedFile:
    """Open a list. Raises OSError or ValueError if it cannot be read."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        # a pipe can be read once only, and every process reads the list
        raise ValueError("not a file; write the paths to a file first")
    return UnchangedFile(file)


def _index(file: str, text: UnchangedFile) -> tuple[np.ndarray, int]:
    """Return the offset of each group of paths for `Names`, and the number of paths.

    Raises InputError if a line does not end like an image, and ValueError if `text` is not text.
    """
    starts, count, number = [], 0, 0  # number of the lines before the chunk
    for offset, chunk in _chunks(text):
        if b"\0" in chunk:
            raise ValueError("not text in UTF-8")
        endings = chunk.lower().splitlines()
        others = [i for i, line in enumerate(endings) if not line.endswith(_ENDINGS)]
        for i in others:
            if endings[i].strip():
                line = chunk.splitlines()[i]
                raise InputError(
                    f"--file-list {file}, line {number + i + 1}: '{short(os.fsdecode(line))}' does "
                    f"not end like an image ({', '.join(SUFFIXES)}); expected one path a line, and "
                    "nothing else"
                )
        lengths = np.fromiter(map(len, chunk.splitlines(keepends=True)), np.int64, len(endings))
        found = np.delete(offset + lengths.cumsum() - lengths, others)
        starts.append(found[-count % GROUP :: GROUP].copy())  # a view would keep all of `found`
        count, number = count + len(found), number + len(endings)
    return np.concatenate([*starts, [len(text)]]), count


_CHUNK = 16 << 20  # bytes of a list that are split into lines at a time


def _chunks(text: UnchangedFile) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a list, many at a time, and the offset of the first of them."""
    start = len(codecs.BOM_UTF8) if text[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8 else 0
    size = _CHUNK
    while start < len(text):
        chunk = text[start : start + size]
        if start + size < len(text):
            # a carriage return at the end may be the first half of a line break
            chunk = chunk[: max(chunk.rfind(b"\n"), chunk.rfind(b"\r", 0, -1)) + 1]
        if chunk:
            yield start, chunk
            start, size = start + len(chunk), _CHUNK
        else:
            size *= 2  # a longer line


def _images_in(text: bytes) -> list[bytes]:
    """Return the paths in a part of a list: all lines except empty ones."""
    return [line for line in text.splitlines() if line.strip()]


def _line_number(file: str, path: bytes) -> int:
    """Return the number of the first line of a list that is `path`."""
    number = 1
    for _, chunk in _chunks(_opened(file)):
        lines = chunk.splitlines()
        if path in lines:
            return number + lines.index(path)
        number += len(lines)
    raise changed(file)
