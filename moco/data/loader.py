"""The data loader: worker processes read the images of each batch; see `views`.

Workers do no color operations: `augment.color` does them on the device.
"""

import atexit
import contextlib
import errno
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Sampler

from moco import devices, distributed, rng
from moco.data import jpeg
from moco.data.batch import Batch, reserve
from moco.data.images import Images
from moco.data.views import CenterCrop, RandomCrops, SampleId, Transform, Views, bytes_per_image
from moco.errors import InputError
from moco.messages import counted
from moco.sections import Input

__all__ = [
    "Batch",
    "CenterCrop",
    "EvalBatchSampler",
    "RandomCrops",
    "SampleId",
    "TrainBatchSampler",
    "Transform",
    "Views",
    "batches",
    "kill_workers",
]


class TrainBatchSampler(Sampler):
    """A batch sampler that yields this rank's batches of (epoch, index) for a range of steps.

    The order of an epoch is one random permutation, which depends on (seed, epoch) only. Therefore
    a global batch has the same images for any number of processes, and each rank takes an equal
    number of them.

    A step has `accumulation` global batches. If the images of an epoch do not fill the last step,
    they are left out, or the last step is smaller. In a smaller step, too, each rank has an equal
    number of images. If necessary, the first images of the epoch are repeated to make it equal.

    Negative steps come before epoch 0, while AdCo fills its bank. They take the images of the first
    steps of epoch 0 (and of the next epochs, if epoch 0 is shorter), but crop them differently:
    their samples have the epochs -1, -2, ...
    """

    def __init__(
        self,
        n: int,
        batch: int,
        accumulation: int,
        seed: int,
        start: int = 0,
        stop: int = 0,
        before: int = 0,
        keep_last: int = 0,
    ):
        """Prepare the steps from `start` to `stop` - 1 for `n` images, `batch` of them per rank.

        `before` is the number of steps before epoch 0. `keep_last` is the minimum number of images
        per rank in the smaller last batch. If it is 0, there is no such batch.
        """
        self.n, self.batch, self.accumulation = n, batch, accumulation
        self.seed, self.start, self.stop, self.before = seed, start, stop, before
        ranks = distributed.world_size()
        self.full_steps, left = divmod(n, batch * accumulation * ranks)
        full, rest = divmod(left, batch * ranks)
        # this rank's images in each batch of the smaller step
        self.last = [batch] * full + [max(keep_last, -(-rest // ranks))] * bool(rest)
        self.last = self.last if keep_last else []
        self.repeated = sum(self.last) * ranks - left if self.last else 0
        self.steps_per_epoch = self.full_steps + bool(self.last)

    def sizes(self, step: int) -> list[int]:
        """Return the number of images of each of this rank's batches in a step."""
        if self.last and (step + 1) % self.steps_per_epoch == 0:
            return self.last
        return [self.batch] * self.accumulation

    def images(self, steps: int) -> int:
        """Return the number of images that this rank reads in the first `steps` steps."""
        per_step = self.batch * self.accumulation
        if not self.last:
            return steps * per_step
        epochs, inside = divmod(steps, self.steps_per_epoch)
        return epochs * (self.full_steps * per_step + sum(self.last)) + inside * per_step

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        per_epoch = max(1, self.steps_per_epoch)
        smaller = self.stop // per_epoch - self.start // per_epoch if self.last else 0
        steps = self.stop - self.start
        return (steps - smaller) * self.accumulation + smaller * len(self.last)

    def __iter__(self) -> Iterator[list[SampleId]]:
        """Yield this rank's batches in order."""
        ranks, rank = distributed.world_size(), distributed.rank()
        shuffled_epoch = None
        for step in range(self.start, self.stop):
            shown = step if step >= 0 else step + self.before  # the step whose images are read
            epoch, step_in_epoch = divmod(shown, self.steps_per_epoch)
            if epoch != shuffled_epoch:
                order = None  # frees its memory for the next one
                order, shuffled_epoch = rng.permutation(self.n, rng.ORDER, self.seed, epoch), epoch
            first = step_in_epoch * self.accumulation * self.batch * ranks
            shown_in = epoch if step >= 0 else -1 - epoch  # epoch that seeds the random crops
            for size in self.sizes(shown):
                mine = torch.arange(size) + first + rank * size
                yield [(shown_in, i) for i in order[mine % self.n].tolist()]
                first += size * ranks


class EvalBatchSampler(Sampler):
    """A batch sampler for evaluation. Over all ranks, it yields each image exactly once.

    Rank r takes the images r, r + W, r + 2 W, ... of W ranks. Samples are (0, index).
    """

    def __init__(self, n: int, batch: int):
        """Prepare this rank's batches of at most `batch` images, if all ranks have `n` images."""
        self.indices = range(distributed.rank(), n, distributed.world_size())
        self.batch = batch

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[SampleId]]:
        """Yield this rank's batches in order."""
        for i in range(0, len(self.indices), self.batch):
            yield [(0, index) for index in self.indices[i : i + self.batch]]


def _init_worker(_: int) -> None:
    """Let a worker survive the signals that stop a run.

    Such a signal often reaches all processes of a run. The main process then finishes its step, and
    needs the workers for that.
    """
    # a forked process inherits the pipe by which signals wake the main process
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM is delayed, not ignored, because the main process sends it to a worker that hangs
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SIGTERM_DELAY))
    sys.excepthook = _print_unless_disconnected


def _print_unless_disconnected(
    exception: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error, unless it only says that the main process has ended.

    The launcher reports the end of the main process.
    """
    if not issubclass(exception, ConnectionError | EOFError):
        sys.__excepthook__(exception, error, trace)


SIGTERM_DELAY = 600  # seconds that a worker still runs after a SIGTERM


def kill_workers(processes: list[BaseProcess]) -> None:
    """Kill worker processes that still run. They survive all signals except SIGKILL."""
    # PyTorch's handler of SIGCHLD would raise an error in the code that runs next
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)  # seconds; a process that waits for a dead file server cannot be killed
    signal.signal(signal.SIGCHLD, handler)


@atexit.register
def _kill_all_workers() -> None:
    """Kill the workers of a program that exits before it has read all batches.

    Python itself would send them SIGTERM and wait for them, up to `SIGTERM_DELAY` seconds.
    """
    kill_workers([process for process in mp.active_children() if process.daemon])


_PREFETCH = 4  # batches of each worker


def batches(
    images: Images,
    crop: Transform,
    batch_sampler: Sampler,
    input: Input,
    device: torch.device,
    skip_unreadable: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of `batch_sampler` on `device`, in order.

    `input.workers` is the number of worker processes of a node, for `input.batch_size` images. Each
    rank starts a fraction of them, according to its `input.batch_per_process`, rounded up.

    Raises InputError if an image cannot be read, unless `skip_unreadable`, or if workers cannot
    start.
    """
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None
    workers = -(-input.workers * input.batch_per_process // input.batch_size)
    _check_semaphores(workers)
    jpeg.decoder()  # before workers are forked, which then share its memory
    # two more than are prefetched: the loop may still hold two batches
    slots = reserve(workers, _PREFETCH + 2, input.batch_per_process * bytes_per_image(crop))
    for batch in _read(
        dataset=Views(images, crop, skip_unreadable, input, slots),
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=cuda,
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=_init_worker,
    ):
        if isinstance(batch, InputError):
            raise batch
        yield _moved(batch, device, stream)


def _check_semaphores(workers: int) -> None:
    """Raise InputError if /dev/shm has no space for the semaphores of this many workers.

    A DataLoader that fails to start prints a traceback, even if its error is caught. So this makes
    what a DataLoader shares with its workers, and frees it.
    """
    try:
        if workers:
            _ = mp.Event(), [mp.Queue() for _ in range(workers + 1)]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        processes = counted(workers, "loader process", "loader processes")
        raise InputError(
            f"/dev/shm is full, so {processes} cannot start; free space there, give a container "
            "more of it, or give --workers 0"
        ) from None


def _unchanged(batch: Batch | InputError) -> Batch | InputError:
    """Return `batch`. The DataLoader's default function would copy it."""
    return batch


def _moved(batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> Batch:
    """Return `batch` on `device`. On CUDA, copy it on `stream`.

    When the loop asks for a batch, the GPU still computes the previous step, which is queued on the
    training's stream. A copy on a separate stream overlaps with that step; on the same stream it
    would wait for it.
    """
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        moved = [devices.to_device(x, device) for x in (*batch.views, batch.index, batch.label)]
        if device.type != "cpu":  # `augment.color` changes the layout itself on a CPU
            moved = [x.contiguous() for x in moved]
    if stream:
        training = torch.cuda.current_stream(device)
        training.wait_stream(stream)  # all work queued from now on runs after the copies
        for x in moved:
            # Otherwise a later copy may reuse this memory before the step has read it.
            x.record_stream(training)
    *views, index, label = moved
    return Batch(views, index, label, batch.unreadable)


def _read(**options: Any) -> Iterator[Batch | InputError]:
    """Yield the batches of a DataLoader with these options.

    Raises RuntimeError if a worker was killed. The DataLoader itself sometimes raises the error of
    a broken connection instead.
    """
    with warnings.catch_warnings():
        # more workers than cores are the user's choice, for example for files on a network disk
        warnings.filterwarnings("ignore", "This DataLoader will create")
        reader = iter(DataLoader(**options))
    try:
        yield from reader
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        raise RuntimeError(
            f"DataLoader worker exited unexpectedly ({type(error).__name__})"
        ) from None
