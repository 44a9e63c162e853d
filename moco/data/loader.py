"""The data loader: worker processes decode each image once and take its crops as uint8.

Workers do no color operations: `augment.color` does them on the device.
"""

import atexit
import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from moco import devices, distributed, rng
from moco.augment import crop
from moco.augment.recipes import Recipe
from moco.data import decoding, jpeg
from moco.data.images import Images
from moco.errors import InputError
from moco.sections import Input

SampleId = tuple[int, int]  # (epoch, index of the image); the random crops depend on both


class Batch(NamedTuple):
    """A batch of samples. Its size B is that of one process and one forward pass.

    Attributes:
        views: One uint8 tensor [B, 3, S, S] per view.
        index: The indices of the images, int64 [B].
        label: Their labels, int64 [B], or [B, classes]; see `Images.labels`.
        unreadable: The index of each image that cannot be read, with the reason. The batch has
            another image instead.
    """

    views: list[Tensor]
    index: Tensor
    label: Tensor
    unreadable: list[tuple[int, str]]


class RandomCrops(NamedTuple):
    """A transform that takes a recipe's random crops. They depend on (seed, epoch, index, view)."""

    recipe: Recipe
    seed: int

    def __call__(self, image: Tensor, sample: SampleId) -> list[Tensor]:
        """Return the views of `image`, uint8 [3, H, W]: one uint8 tensor [3, S, S] per view."""
        return crop.random_views(image, self.recipe, rng.CROP, self.seed, *sample)

    def reduction(self, height: int, width: int, sample: SampleId) -> int:
        """Return the factor by which an image of this size may be shrunk first: 1, 2, 4 or 8.

        It is the largest factor at which every crop is at least twice as large as its view. With a
        smaller margin, the loss of quality would be visible; Pillow's thumbnails keep the same
        margin. A crop covers a fraction of the image that does not depend on the image's size, so a
        shrunk image yields the same views, except for rounding.
        """
        boxes = crop.random_boxes(height, width, self.recipe, rng.CROP, self.seed, *sample)
        spare = min(
            min(h, w) / (2 * view.size)
            for (_, _, h, w), view in zip(boxes, self.recipe, strict=True)
        )
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))

    def accepts(self, height: int, width: int) -> bool:
        """Return whether `crop_batch` accepts images of this size."""
        return crop.can_crop_at_once(height, width, self.recipe)

    def crop_batch(self, images: Tensor, epochs: np.ndarray, indices: np.ndarray) -> list[Tensor]:
        """Return the views of images [B, 3, H, W], equal to those of each image alone."""
        return crop.random_views_at_once(images, self.recipe, rng.CROP, self.seed, epochs, indices)


class CenterCrop(NamedTuple):
    """A transform that returns the evaluation view of `size` pixels; see `crop.center_view`."""

    size: int
    resize: str = "scaled"

    def __call__(self, image: Tensor, _sample: SampleId) -> list[Tensor]:
        """Return the view of `image`, uint8 [3, H, W], as a list of one uint8 [3, size, size]."""
        return [crop.center_view(image, self.size, self.resize)]

    def reduction(self, _height: int, _width: int, _sample: SampleId) -> int:
        """Return 1: evaluation decodes every pixel."""
        return 1

    def accepts(self, height: int, width: int) -> bool:
        """Return whether `crop_batch` accepts images of this size; larger ones take much memory."""
        return max(height, width) <= 256

    def crop_batch(self, images: Tensor, _epochs: np.ndarray, _indices: np.ndarray) -> list[Tensor]:
        """Return the view of images [B, 3, H, W], equal to that of each image alone."""
        return [crop.center_view(images, self.size, self.resize)]


class Views(Dataset):
    """A map-style dataset from (epoch, index) to (views, index, label, unreadable images)."""

    def __init__(
        self,
        images: Images,
        crop: RandomCrops | CenterCrop,
        skip_unreadable: bool = False,
        settings: decoding.Decoding = decoding.DEFAULT,
    ):
        """Read `images`, decoded with `settings`, and apply `crop` to each.

        If `skip_unreadable`, an image that cannot be read is replaced by another one, chosen by
        (epoch, index). Otherwise the sample is the InputError.
        """
        self.images, self.crop, self.skip_unreadable = images, crop, skip_unreadable
        self.settings = settings

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(
        self, sample: SampleId
    ) -> tuple[list[Tensor], int, Tensor, list[tuple[int, str]]] | InputError:
        """Return the sample, or the InputError if its image cannot be read."""
        epoch, index = sample
        images, crop = self.images, self.crop
        unreadable: list[tuple[int, str]] = []
        for attempt in range(MAX_REPLACEMENTS + 1):
            i = rng.key(rng.REPLACEMENT, epoch, index, attempt) % len(self) if attempt else index
            try:
                image = images.read(i, self.settings, lambda h, w: crop.reduction(h, w, sample))
                label = torch.as_tensor(images.labels[i])
                return crop(image, sample), i, label, unreadable
            except InputError as error:
                if not self.skip_unreadable:
                    # The main process raises it, as one line without a worker's traceback.
                    return error
                unreadable.append((i, str(error)))
        return InputError(
            f"{unreadable[0][1]}; {MAX_REPLACEMENTS} other images, tried instead, cannot be read "
            "either"
        )

    def __getitems__(self, samples: list[SampleId]) -> Batch | list:
        """Return a Batch if the images are in memory and `crop` accepts them, else a list.

        PyTorch's DataLoader calls this, and passes the result to `collate`.
        """
        epochs, indices = np.array(samples).T.copy()
        images = self.images.read_batch(indices, self.crop.accepts)
        if images is None:
            return [self[sample] for sample in samples]
        views = self.crop.crop_batch(images, epochs, indices)
        return Batch(views, *map(torch.from_numpy, (indices, self.images.labels[indices])), [])


MAX_REPLACEMENTS = 10  # images to try instead of an unreadable one


def collate(samples: Batch | list) -> Batch | InputError:
    """Stack samples into a Batch, or return the first error. A Batch is returned unchanged."""
    if isinstance(samples, Batch):
        return samples
    error = next((sample for sample in samples if isinstance(sample, InputError)), None)
    if error:
        return error
    unreadable = [one for sample in samples for one in sample[3]]
    return Batch(*default_collate([sample[:3] for sample in samples]), unreadable)


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


def batches(
    images: Images,
    crop: RandomCrops | CenterCrop,
    batch_sampler: Sampler,
    input: Input,
    device: torch.device,
    skip_unreadable: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of `batch_sampler` on `device`, in order.

    `input.workers` is the number of worker processes of a node, for `input.batch_size` images. Each
    rank starts a fraction of them, according to its `input.batch_per_process`, rounded up.

    Raises InputError if an image cannot be read, unless `skip_unreadable`.
    """
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None
    workers = -(-input.workers * input.batch_per_process // input.batch_size)
    jpeg.decoder()  # before workers are forked, which then share its memory
    for batch in _read(
        dataset=Views(images, crop, skip_unreadable, input),
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=cuda,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_init_worker,
    ):
        if isinstance(batch, InputError):
            raise batch
        yield _moved(batch, device, stream)


def _moved(batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> Batch:
    """Return `batch` on `device`. On CUDA, copy it on `stream`.

    When the loop asks for a batch, the GPU still computes the previous step, which is queued on the
    training's stream. A copy on a separate stream overlaps with that step; on the same stream it
    would wait for it.
    """
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        moved = [devices.to_device(x, device) for x in (*batch.views, batch.index, batch.label)]
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
