"""Hold the names of millions of files, with little memory for each.

As a Python object, a name takes about 100 bytes, and a loader process that reads it copies its
memory. In an array, every name takes as many bytes as the longest one. `Names` is one text, in
memory or in a file.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from moco.errors import ListError, changed

GROUP = 16  # names whose text is split at once, to find one of them
_AT_ONCE = 4096  # groups that are split at a time to read all names


class Names:
    """A sequence of names in bytes. Indexing by an array or a slice returns a selection.

    Args:
        text: the names with separators.
        starts: int64 [groups + 1], the offset in `text` of the first name of each group, and the
            end of the last group. A group has `GROUP` names; the last one may have fewer.
        count: the number of names.
        split: returns the names in a part of the text.
        picked: the indices of the selected names; None: all.
    """

    def __init__(
        self,
        text: "bytes | UnchangedFile",
        starts: np.ndarray,
        count: int,
        split: Callable[[bytes], list[bytes]],
        picked: np.ndarray | None = None,
    ):
        self.text, self.starts, self.count, self.split = text, starts, count, split
        self.picked = picked
        self._last: tuple[int, list[bytes]] = (-1, [])  # the group that was read last

    @classmethod
    def of(cls, names: Sequence[bytes]) -> "Names":
        """Return a copy of `names`. Raises ValueError if one has a null byte, which no path has."""
        text = b"\0".join([*names, b""])
        if text.count(b"\0") != len(names):
            raise ValueError("a path has a null byte")
        return cls.joined(text)

    @classmethod
    def joined(cls, text: bytes) -> "Names":
        """Return the names in `text`, each of which is followed by a null byte."""
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 0) + 1
        starts = np.append(0, ends)[: len(ends) : GROUP]
        return cls(text, np.append(starts, len(text)), len(ends), _split_at_null)

    def __len__(self) -> int:
        """Return the number of names."""
        return self.count if self.picked is None else len(self.picked)

    def __getitem__(self, i):
        """Return name `i`, or the selection by a slice, an array of indices, or a boolean mask.

        Raises ListError if the names are in a file that has changed or cannot be read.
        """
        if not isinstance(i, int | np.integer):
            picked = np.arange(self.count) if self.picked is None else self.picked
            return Names(self.text, self.starts, self.count, self.split, picked[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"name {i} of {len(self)}")
        i = int(i) % len(self) if self.picked is None else int(self.picked[i])
        group, k = divmod(i, GROUP)
        last, names = self._last
        if group != last:
            names = self._names(group, group + 1)
            self._last = group, names
        return names[k]

    def __iter__(self) -> Iterator[bytes]:
        """Yield the names in order."""
        if self.picked is not None:
            yield from (self[i] for i in range(len(self)))
            return
        groups = len(self.starts) - 1
        for first in range(0, groups, _AT_ONCE):
            yield from self._names(first, min(first + _AT_ONCE, groups))

    def _names(self, first: int, stop: int) -> list[bytes]:
        """Return the names of the groups from `first` to `stop` - 1."""
        return self.split(self.text[int(self.starts[first]) : int(self.starts[stop])])

    def digest(self) -> bytes:
        """Return a hash of the names and of their order."""
        found, names = hashlib.sha256(), iter(self)
        while some := list(islice(names, GROUP * _AT_ONCE)):
            found.update(b"\0".join([*some, b""]))
        return found.digest()


def _split_at_null(text: bytes) -> list[bytes]:
    return text.split(b"\0")[:-1]


class UnchangedFile:
    """The bytes of a file, as slices that are read when needed.

    It is read, not mapped into memory, because a mapped file that becomes shorter ends the process
    without a message. The file stays open, so it may be renamed, deleted or replaced by another
    one. If its content is written again in place, reading raises a ListError.
    """

    def __init__(self, path: str, facts: tuple[int, int] | None = None):
        """Open the file.

        Args:
            path: its path.
            facts: its size in bytes and the time of its last change in nanoseconds. If given, the
                first read refuses another file, or a changed one.

        Raises OSError if it cannot be opened, and ValueError if the path is invalid.
        """
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as this object)
        self.facts = facts or self._facts()

    def _facts(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __reduce__(self):
        """Pickle the path and the facts. The other process opens the file itself."""
        return UnchangedFile, (self.path, self.facts)

    def __len__(self) -> int:
        """Return the size of the file in bytes."""
        return self.facts[0]

    def __getitem__(self, part: slice) -> bytes:
        """Return a slice of the file.

        Raises ListError if the file has changed since it was first opened, or cannot be read.
        """
        start, stop, _ = part.indices(len(self))
        found = bytearray()
        try:
            # pread has no position, which forked processes would share
            handle = self._file.fileno()
            while piece := os.pread(handle, stop - start - len(found), start + len(found)):
                found += piece
            unchanged = self._facts() == self.facts
        except OSError as error:
            raise ListError(
                f"{self.path}: cannot be read ({error.strerror}); check the disk or the network"
            ) from None
        if not unchanged:
            raise changed(self.path)
        return bytes(found)
