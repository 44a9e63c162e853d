"""The data set of a loader: decode an image once, and take its crops as uint8.

`Views` is the data set. `loader` runs it in worker processes.
"""

import contextlib
import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from moco import rng
from moco.augment import crop
from moco.augment.recipes import Recipe
from moco.data import decoding
from moco.data.images import Images
from moco.errors import InputError, ListError

SampleId = tuple[int, int]  # (epoch, index of the image); the random crops depend on both
# (crops, index of the image, unreadable images); see `Batch`
Sample = tuple[list[Tensor], int, list[tuple[int, str]]]


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


class RandomCrops(NamedTuple):
    """A transform that takes a recipe's random crops. They depend on (seed, epoch, index, view)."""

    recipe: Recipe
    seed: int

    def __call__(self, image: Tensor, sample: SampleId, out: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the views of `image`, uint8 [3, H, W]: one uint8 tensor [3, S, S] per view.

        If `out` is given, write them there; see `crop.random_views`.
        """
        return crop.random_views(image, self.recipe, rng.CROP, self.seed, *sample, out=out)

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
    """A map-style dataset from (epoch, index) to a `Sample`."""

    def __init__(
        self,
        images: Images,
        crop: RandomCrops | CenterCrop,
        skip_unreadable: bool = False,
        settings: decoding.Decoding = decoding.DEFAULT,
    ):
        """Read `images`, decoded with `settings`, and apply `crop` to each.

        If `skip_unreadable`, an image that cannot be read is replaced by another one, chosen by
        (epoch, index). Otherwise, or if the list of the images has changed, the sample is the
        InputError.
        """
        self.images, self.crop, self.skip_unreadable = images, crop, skip_unreadable
        self.settings = settings

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, sample: SampleId) -> Sample | InputError:
        """Return the sample, or the InputError if its image cannot be read."""
        return self._crop(sample, self.crop)

    def _crop(
        self, sample: SampleId, transform: Callable[[Tensor, SampleId], list[Tensor]]
    ) -> Sample | InputError:
        """Read an image and apply `transform`; see `__getitem__`."""
        epoch, index = sample
        images, crop = self.images, self.crop
        unreadable: list[tuple[int, str]] = []
        for attempt in range(MAX_REPLACEMENTS + 1):
            i = rng.key(rng.REPLACEMENT, epoch, index, attempt) % len(self) if attempt else index
            try:
                image = images.read(i, self.settings, lambda h, w: crop.reduction(h, w, sample))
                return transform(image, sample), i, unreadable
            except InputError as error:
                if not self.skip_unreadable or isinstance(error, ListError):
                    # The main process raises it, as one line without a worker's traceback.
                    return error
                unreadable.append((i, str(error)))
        return InputError(
            f"{unreadable[0][1]}; {MAX_REPLACEMENTS} other images, tried instead, cannot be read "
            "either"
        )

    def __getitems__(self, samples: list[SampleId]) -> Batch | InputError:
        """Return the batch of `samples`, or the first InputError.

        PyTorch's DataLoader calls this with the samples of a batch, and passes the result through
        `collate_fn`. If the images are in memory and `crop` accepts them, they are cropped at once.
        """
        epochs, indices = np.array(samples).T.copy()
        images = self.images.read_batch(indices, self.crop.accepts)
        if images is None:
            return self._one_by_one(samples)
        views = self.crop.crop_batch(images, epochs, indices)
        return Batch(views, *map(torch.from_numpy, (indices, self.images.labels[indices])), [])

    def _one_by_one(self, samples: list[SampleId]) -> Batch | InputError:
        """Return the batch of `samples`. Each image is cropped while a core's cache has it."""
        n, views, random = len(samples), [], isinstance(self.crop, RandomCrops)
        unreadable: list[tuple[int, str]] = []
        indices = np.empty(n, dtype=np.int64)
        if random:
            sizes = [view.size for view in self.crop.recipe]
            views = [_empty((n, s, s, 3), torch.uint8).permute(0, 3, 1, 2) for s in sizes]
        for row, sample in enumerate(samples):
            transform = self.crop
            if random:
                transform = functools.partial(
                    self.crop, out=[view[row : row + 1] for view in views]
                )
            with torch.inference_mode():  # operations start faster
                found = self._crop(sample, transform)
            if isinstance(found, InputError):
                return found
            crops, indices[row], errors = found
            unreadable += errors
            if not random:
                views = views or [_empty((n, *crop.shape), crop.dtype) for crop in crops]
                for view, one in zip(views, crops, strict=True):
                    view[row] = one
        labels = self.images.labels[indices]
        return Batch(views, torch.from_numpy(indices), torch.from_numpy(labels), unreadable)


MAX_REPLACEMENTS = 10  # images to try instead of an unreadable one


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory for a batch of views.

    In a worker process, the main process can read this memory, so the batch is not copied.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    memory = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    _populate(memory)
    return torch.empty(0, dtype=dtype).set_(memory).view(shape)


def _populate(memory: torch.UntypedStorage) -> None:
    """Let Linux provide all pages of `memory` in one call, which is faster than at each first use.

    Before version 5.14, Linux cannot do this, and nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError, TypeError):
            start, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes())
            ctypes.CDLL(None).madvise(start, size, 23)  # MADV_POPULATE_WRITE
