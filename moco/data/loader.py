"""From files to batches of uint8 crops: workers decode each image once and cut its views, and do no colour work."""

import atexit
import contextlib
import math
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
from moco.data.images import Images
from moco.errors import InputError
from moco.sections import Input

Place = tuple[int, int]  # epoch, index


class Batch(NamedTuple):
    """`views`: one uint8 tensor [B, 3, S, S] per view; `index`: int64 [B]; `label`: int64 [B], or [B, classes] (`Images`).

    `unreadable`: number and reason of each image that could not be read, and has another in its place.
    """

    views: list[Tensor]
    index: Tensor
    label: Tensor
    unreadable: list[tuple[int, str]]


class RandomCrops(NamedTuple):
    """Cut a recipe's random crops; the draw depends on (seed, epoch, index, view)."""

    recipe: Recipe
    seed: int

    def __call__(self, image: Tensor, place: Place) -> list[Tensor]:
        return crop.random_views(image, self.recipe, rng.CROP, self.seed, *place)

    def reduction(self, height: int, width: int, place: Place) -> int:
        """By how much an image of this size may be shrunk first: 1, 2, 4 or 8, so that each crop stays twice its view's size.

        Less would show; Pillow's thumbnails leave the same gap. The crops' shares of the image do not depend on its size,
        so that the same draws cut the same parts out of the smaller image, but for rounding.
        """
        boxes = crop.random_boxes(height, width, self.recipe, rng.CROP, self.seed, *place)
        spare = min(
            min(h, w) / (2 * view.size)
            for (_, _, h, w), view in zip(boxes, self.recipe, strict=True)
        )
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))

    def takes(self, height: int, width: int) -> bool:
        """Return whether `at_once` accepts images of this size."""
        return crop.can_crop_at_once(height, width, self.recipe)

    def at_once(self, images: Tensor, epochs: np.ndarray, indices: np.ndarray) -> list[Tensor]:
        """Cut the views of a batch [B, 3, H, W]. They equal those cut image by image."""
        return crop.random_views_at_once(images, self.recipe, rng.CROP, self.seed, epochs, indices)


class CenterCrop(NamedTuple):
    """Cut the evaluation view of `size` pixels."""

    size: int

    def __call__(self, image: Tensor, place: Place) -> list[Tensor]:
        return [crop.center_view(image, self.size)]

    def reduction(self, height: int, width: int, place: Place) -> int:
        """Evaluation sees every pixel."""
        return 1

    def takes(self, height: int, width: int) -> bool:
        """Return whether `at_once` accepts images of this size; larger ones take much memory."""
        return max(height, width) <= 256

    def at_once(self, images: Tensor, epochs: np.ndarray, indices: np.ndarray) -> list[Tensor]:
        """Cut the views of a batch [B, 3, H, W]. They equal those cut image by image."""
        return [crop.center_view(images, self.size)]


class Views(Dataset):
    """One sample per (epoch, index): its views, its index, its label, and what could not be read.

    Where the image cannot be read, another one takes its place, by a draw of (epoch, index), if `skips`; else the sample is the
    InputError.
    """

    def __init__(self, images: Images, cut: RandomCrops | CenterCrop, skips: bool = False):
        self.images, self.cut, self.skips = images, cut, skips

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(
        self, place: Place
    ) -> tuple[list[Tensor], int, Tensor, list[tuple[int, str]]] | InputError:
        epoch, first = place
        unreadable: list[tuple[int, str]] = []
        for attempt in range(REPLACEMENTS + 1):
            i = rng.key(rng.REPLACEMENT, epoch, first, attempt) % len(self) if attempt else first
            try:
                image = self.images.read(
                    i, lambda height, width: self.cut.reduction(height, width, place)
                )
                return self.cut(image, place), i, torch.as_tensor(self.images.labels[i]), unreadable
            except InputError as error:
                if not self.skips:
                    return error  # raised in the main process, where it is one line and not a worker's traceback
                unreadable.append((i, str(error)))
        return InputError(
            f"{unreadable[0][1]}; nor could {REPLACEMENTS} others be read in its place"
        )

    def __getitems__(self, places: list[Place]) -> Batch | list:
        """Return a Batch if the images are in memory and `cut` accepts their size, else samples.

        PyTorch's DataLoader calls this, and passes the result to `collate`.
        """
        epochs, indices = np.array(places).T.copy()
        images = self.images.together(indices, self.cut.takes)
        if images is None:
            return [self[place] for place in places]
        views = self.cut.at_once(images, epochs, indices)
        return Batch(views, *map(torch.from_numpy, (indices, self.images.labels[indices])), [])


REPLACEMENTS = 10  # images tried in an unreadable one's place


def collate(samples: Batch | list) -> Batch | InputError:
    """Stack samples into a Batch, or return the first error. A Batch is returned unchanged."""
    if isinstance(samples, Batch):
        return samples
    error = next((sample for sample in samples if isinstance(sample, InputError)), None)
    if error:
        return error
    return Batch(
        *default_collate([sample[:3] for sample in samples]),
        [one for sample in samples for one in sample[3]],
    )


class TrainOrder(Sampler):
    """Batches of (epoch, index) for this rank, for the steps from `start` to `stop` without a break between epochs.

    An epoch's order is one permutation of (seed, epoch), the same for every rank and any number of processes; each
    global batch is cut into the ranks' parts. A step has `accumulation` global batches; what does not fill one is left out.
    Steps below 0 are those that may come before epoch 0, the last ones of the epochs -1, -2, ...
    """

    def __init__(
        self, n: int, batch: int, accumulation: int, seed: int, start: int = 0, stop: int = 0
    ):
        self.n, self.batch, self.accumulation, self.seed, self.start, self.stop = (
            n,
            batch,
            accumulation,
            seed,
            start,
            stop,
        )
        self.steps_per_epoch = n // (batch * distributed.world_size() * accumulation)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        shape = (self.steps_per_epoch, self.accumulation, distributed.world_size(), self.batch)
        order_of = None
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order = torch.randperm(
                    self.n, generator=rng.generator("cpu", rng.ORDER, self.seed, epoch)
                )
                mine, order_of = (
                    order[: math.prod(shape)].view(shape)[:, :, distributed.rank()],
                    epoch,
                )
            for batch in mine[place].tolist():
                yield [(epoch, i) for i in batch]


class EvalOrder(Sampler):
    """Batches of (0, index) over every W-th image from this rank's on: each image once over all ranks, none twice."""

    def __init__(self, n: int, batch: int):
        self.places = [(0, i) for i in range(distributed.rank(), n, distributed.world_size())]
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch)

    def __iter__(self) -> Iterator[list[Place]]:
        for i in range(0, len(self.places), self.batch):
            yield self.places[i : i + self.batch]


def _outlast_signals(_: int) -> None:
    """A signal to the whole group asks the run to end after its step, which needs the loader's processes."""
    signal.set_wakeup_fd(-1)  # a forked process inherits the run's pipe for signals
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda *_: signal.alarm(PATIENCE)
    )  # not ignored: so ends the rank what it must not wait for
    sys.excepthook = _tell_unless_alone


def _tell_unless_alone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error, unless it only says that the rank which reads the batches has ended.

    The launcher says that.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


PATIENCE = 600  # seconds


def end(processes: list[BaseProcess]) -> None:
    """Kill loader processes that are left: they outlast all other signals."""
    theirs = signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # torch's would raise, in the middle of what comes next
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)  # seconds; one that waits for a dead file server cannot even be killed
    signal.signal(signal.SIGCHLD, theirs)


@atexit.register
def _end_all() -> None:
    """Python would ask them to end and wait, where a program has left batches unread."""
    end([process for process in mp.active_children() if process.daemon])


def batches(
    images: Images,
    cut: RandomCrops | CenterCrop,
    order: Sampler,
    input: Input,
    device: torch.device,
    skips: bool = False,
) -> Iterator[Batch]:
    """Read `images` in `order` and yield batches on `device`. Raises InputError for an image that cannot be read, unless `skips`.

    `input.workers` is the number of loader processes for `input.batch_size` images: each rank takes its share, rounded up.
    """
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None
    workers = -(-input.workers * input.batch_per_process // input.batch_size)
    for batch in _read(
        dataset=Views(images, cut, skips),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=cuda,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_outlast_signals,
    ):
        if isinstance(batch, InputError):
            raise batch
        yield _moved(batch, device, stream)


def _moved(batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> Batch:
    """Return `batch` on `device`. On CUDA, copy it on `stream`.

    When the loop asks for a batch, the GPU still computes the previous step, which is queued on the
    stream of the training. A copy on a separate stream overlaps with it; on the same stream the
    copy would wait for it.
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
    """What a DataLoader yields. Raises its error for a process that was killed also where that shows by a connection to it."""
    with warnings.catch_warnings():
        # more workers than cores are the user's choice: files may come over a network
        warnings.filterwarnings("ignore", "This DataLoader will create")
        reader = iter(DataLoader(**options))
    try:
        yield from reader
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        raise RuntimeError(
            f"DataLoader worker exited unexpectedly ({type(error).__name__})"
        ) from None
