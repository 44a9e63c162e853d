"""Read a list of image files, one path a line, for `--file-list`."""

import os
import stat
from pathlib import Path

import numpy as np

from moco.data.decoding import SUFFIXES
from moco.data.images import ImageFolder
from moco.distributed import print_rank0
from moco.errors import InputError, short
from moco.files import read_lines

CHECKED = 1000  # paths that `check` looks up; on a network disk, looking up a million takes minutes
_ENDINGS = tuple(map(os.fsencode, SUFFIXES))


def read(file: str, root: Path) -> ImageFolder:
    """Return the images that `file` names, in its order. They have no labels.

    Relative paths are relative to `root`. Empty lines are ignored. No image is opened, and a path
    need not exist; see `check`.

    Raises InputError if the list cannot be read, is empty, or has a line that does not end like an
    image.
    """
    paths = [line for line in _lines(file) if line.strip()]
    return ImageFolder(root, np.zeros(len(paths), int), (), np.array(paths))


def check(file: str, root: Path) -> None:
    """Raise InputError if `read` would, or if a path is not a file.

    If the list is longer than `CHECKED`, only that many paths are looked up, spread evenly from the
    first to the last. Prints a line if paths are listed more than once.
    """
    lines = _lines(file)
    paths = [line for line in lines if line.strip()]
    for i in np.unique(np.linspace(0, len(paths) - 1, CHECKED).astype(int)):
        path = os.path.join(root, os.fsdecode(paths[i]))
        if not os.path.isfile(path):
            relative = "" if os.path.isabs(paths[i]) else f"; relative paths start at {root}"
            raise InputError(
                f"--file-list {file}, line {lines.index(paths[i]) + 1}: {path}: no such file"
                f"{relative}"
            )
    if repeated := len(paths) - len(set(paths)):
        print_rank0(
            f"--file-list {file}: {repeated} of {len(paths)} lines repeat a path; each line counts "
            "as an image of its own"
        )


def _lines(file: str) -> list[bytes]:
    """Return the lines of a list, with its empty ones. See `read` for errors."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            # a pipe can be read once only, and every process reads the list
            raise InputError("not a file; write the paths to a file first")
        lines = read_lines(file)
    except (InputError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--file-list {file}: cannot be read ({reason}); expected text with one path a line"
        ) from None
    empty = True
    for line in lines:
        if line.lower().endswith(_ENDINGS):
            empty = False
        elif line.strip():
            raise InputError(
                f"--file-list {file}, line {lines.index(line) + 1}: "
                f"'{short(os.fsdecode(line))}' does not end like an image "
                f"({', '.join(SUFFIXES)}); expected one path a line, and nothing else"
            )
    if empty:
        raise InputError(f"--file-list {file}: names no image; expected one path a line")
    return lines
