"""A batch of views, and the memory in which loader processes pass it to the main process.

PyTorch would allocate new shared memory for each tensor of each batch. The system has to clear this
memory, and the main process has to open and map it. `Slots` are allocated once and used again.
"""

import contextlib
import itertools
import mmap
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import get_worker_info


class Batch(NamedTuple):
    """A batch of samples. Its size B is that of one process and one forward pass.

    Attributes:
        views: One uint8 tensor [B, 3, S, S] per view. On a CPU, random crops of large images are in
            PyTorch's memory format channels_last.
        index: The indices of the images, int64 [B].
        label: Their labels, int64 [B], or [B, classes]; see `Images.labels`.
        unreadable: The index of each image that cannot be read, with the reason. The batch has
            another image instead.
    """

    views: list[Tensor]
    index: Tensor
    label: Tensor
    unreadable: list[tuple[int, str]]


class Slots:
    """Shared memory for the views of several batches, in slots of one batch each.

    Each worker has its own slots. It writes the views of a batch into a free slot, marks the slot
    as used, and sends its number. The main process marks it as free as soon as no tensor needs the
    memory any more. Only one process at a time may change a mark, so there is no lock.
    """

    def __init__(self, workers: int, per_worker: int, size: int):
        """Reserve `per_worker` slots of `size` bytes for each of `workers` processes.

        These must be forked afterwards, to have the same memory. The system provides it page by
        page, when a worker first writes to it.
        """
        n = workers * per_worker
        self._per_worker, self._number = per_worker, next(_numbers)
        self._memory = np.frombuffer(mmap.mmap(-1, n * size), np.uint8).reshape(n, size)
        self._used = np.frombuffer(mmap.mmap(-1, n), np.uint8)
        _reserved[self._number] = self

    def find(self, size: int) -> int | None:
        """Return the number of a free slot of this worker.

        Return None in the main process, if `size` bytes do not fit, or if the main process still
        uses all slots.
        """
        worker = get_worker_info()
        if worker is None or not 0 < size <= self._memory.shape[1]:
            return None
        first = worker.id * self._per_worker
        used = self._used[first : first + self._per_worker].tolist()
        return first + used.index(0) if 0 in used else None

    def memory(self, slot: int, size: int) -> Tensor:
        """Return the first bytes of a slot's memory, uint8 [size]."""
        return torch.from_numpy(self._memory[slot, :size])

    def send(self, slot: int, batch: Batch) -> "Sent":
        """Mark `slot` as used, and return what the main process receives as `batch`.

        The views of `batch` are in the slot's memory.
        """
        self._used[slot] = 1
        first = self._memory[slot].ctypes.data
        layouts = [(view.shape, view.stride(), view.data_ptr() - first) for view in batch.views]
        others = (batch.index.numpy(), batch.label.numpy(), batch.unreadable)
        return Sent((self._number, slot, layouts, *others))

    def receive(
        self,
        slot: int,
        layouts: list[tuple[tuple[int, ...], tuple[int, ...], int]],
        index: np.ndarray,
        label: np.ndarray,
        unreadable: list[tuple[int, str]],
    ) -> Batch:
        """Return the batch in `slot`. Its tensors share the slot's memory and keep it in use.

        `layouts` has the shape, the strides and the offset of each view.
        """
        memory = self._memory[slot]  # a new array, which lives as long as the views
        weakref.finalize(memory, self._used.__setitem__, slot, 0).atexit = False
        found = torch.from_numpy(memory)
        views = [found.as_strided(*layout) for layout in layouts]
        return Batch(views, torch.from_numpy(index), torch.from_numpy(label), unreadable)


class Sent(NamedTuple):
    """A batch in a slot. The process that unpickles it gets a `Batch`."""

    content: tuple

    def __reduce__(self) -> tuple:
        """Return a function and its arguments, from which pickle makes the batch."""
        return _received, self.content


_numbers = itertools.count()
_reserved: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


def _received(number: int, slot: int, *content: Any) -> Batch:
    return _reserved[number].receive(slot, *content)


def reserve(workers: int, per_worker: int, size: int) -> Slots | None:
    """Return `Slots`.

    Return None if there are no workers, if views have no fixed size, if workers are not forked, or
    if memory is short.
    """
    if workers and size and mp.get_start_method() == "fork":
        with contextlib.suppress(OSError):  # too much memory
            return Slots(workers, per_worker, size)
    return None
