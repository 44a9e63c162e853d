"""The data set of a loader: decode an image once, and take its crops as uint8.

`Views` is the data set. `loader` runs it in worker processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco import rng
from moco.augment import crop
from moco.augment.recipes import Recipe
from moco.data import decoding
from moco.data.batch import Batch, Sent, Slots
from moco.data.images import Images
from moco.errors import InputError, ListError

SampleId = tuple[int, int]  # (epoch, index of the image); the random crops depend on both
# (crops, index of the image, unreadable images); see `Batch`
Sample = tuple[list[Tensor], int, list[tuple[int, str]]]


class Transform:
    """A function from an image to its views.

    Attributes:
        sizes: The height and width of each view, in pixels. If it is empty, the sizes are unknown
            before the call.
        channels_last: Whether views of single images are written fastest in PyTorch's memory format
            channels_last.
    """

    sizes: tuple[int, ...] = ()
    channels_last = False

    def __call__(self, image: Tensor, sample: SampleId, out: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the views of `image`, uint8 [3, H, W]: one uint8 tensor [3, height, width] each.

        If `out` is given, write the views there: one uint8 [1, 3, S, S] for each of `sizes`. If
        there are no `sizes`, it is never given.
        """
        raise NotImplementedError

    def reduction(self, height: int, width: int, sample: SampleId) -> int:
        """Return the factor by which an image of this size may be shrunk first: 1, 2, 4 or 8."""
        del height, width, sample  # for subclasses
        return 1

    def accepts(self, height: int, width: int) -> bool:
        """Return whether `crop_batch` accepts images of this size."""
        del height, width  # for subclasses
        return False

    def crop_batch(
        self, images: Tensor, epochs: np.ndarray, indices: np.ndarray, out: Sequence[Tensor]
    ) -> None:
        """Write the views of images [B, 3, H, W] to `out`. They equal those of each image alone."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomCrops(Transform):
    """A transform that takes a recipe's random crops. They depend on (seed, epoch, index, view)."""

    recipe: Recipe
    seed: int
    channels_last = True

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the height and width of each view, in pixels."""
        return tuple(view.size for view in self.recipe)

    def __call__(self, image: Tensor, sample: SampleId, out: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the random crops of `image`; see `Transform` and `crop.random_views`."""
        return crop.random_views(image, self.recipe, rng.CROP, self.seed, *sample, out=out)

    def reduction(self, height: int, width: int, sample: SampleId) -> int:
        """Return the largest factor at which every crop is at least twice as large as its view.

        With a smaller margin, the loss of quality would be visible; Pillow's thumbnails keep the
        same margin. A crop covers a fraction of the image that does not depend on the image's size,
        so a shrunk image yields the same views, except for rounding.
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

    def crop_batch(
        self, images: Tensor, epochs: np.ndarray, indices: np.ndarray, out: Sequence[Tensor]
    ) -> None:
        """Write the random crops of `images` to `out`; see `Transform.crop_batch`."""
        counters = (rng.CROP, self.seed, epochs, indices)
        crop.random_views_at_once(images, self.recipe, *counters, out=out)


@dataclass(frozen=True)
class CenterCrop(Transform):
    """A transform that returns the evaluation view of `size` pixels; see `crop.center_view`."""

    size: int
    resize: str = "scaled"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the height and width of the view, in pixels."""
        return (self.size,)

    def __call__(
        self, image: Tensor, _sample: SampleId, out: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return the view of `image`, uint8 [3, H, W], as a list of one uint8 [3, size, size].

        If `out` is given, write the view there: one uint8 [1, 3, size, size].
        """
        memory = out[0][0] if out else None
        return [crop.center_view(image, self.size, self.resize, out=memory)]

    def accepts(self, height: int, width: int) -> bool:
        """Return whether `crop_batch` accepts images of this size; larger ones take much memory."""
        return max(height, width) <= 256

    def crop_batch(
        self, images: Tensor, _epochs: np.ndarray, _indices: np.ndarray, out: Sequence[Tensor]
    ) -> None:
        """Write the view of each of `images` to `out`; see `Transform.crop_batch`."""
        crop.center_view(images, self.size, self.resize, out=out[0])


class Views(Dataset):
    """A map-style dataset from (epoch, index) to a `Sample`."""

    def __init__(
        self,
        images: Images,
        crop: Transform,
        skip_unreadable: bool = False,
        settings: decoding.Decoding = decoding.DEFAULT,
        slots: Slots | None = None,
    ):
        """Read `images`, decoded with `settings`, and apply `crop` to each.

        If `skip_unreadable`, an image that cannot be read is replaced by another one, chosen by
        (epoch, index). Otherwise, or if the list of the images has changed, the sample is the
        InputError. A worker process writes its batches to `slots`, if they are given.
        """
        self.images, self.crop, self.skip_unreadable = images, crop, skip_unreadable
        self.settings, self.slots = settings, slots

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, sample: SampleId) -> Sample | InputError:
        """Return the sample, or the InputError if its image cannot be read."""
        try:
            return self._crop(sample)
        except InputError as error:
            return error

    def __getitems__(self, samples: list[SampleId]) -> Batch | Sent | InputError:
        """Return the batch of `samples`, or the first InputError.

        PyTorch's DataLoader calls this with the samples of a batch, and passes the result through
        `collate_fn`. If the images are in memory and `crop` accepts them, they are cropped at once.
        """
        try:
            if not self.crop.sizes:
                return self._stacked(samples)
            size = len(samples) * bytes_per_image(self.crop)
            slot = self.slots.find(size) if self.slots else None
            if slot is None:
                return self._written(samples, torch.empty(size, dtype=torch.uint8))
            return self.slots.send(slot, self._written(samples, self.slots.memory(slot, size)))
        except InputError as error:
            # The main process raises it, as one line without a worker's traceback.
            return error

    def _stacked(self, samples: list[SampleId]) -> Batch:
        """Return the batch of `samples`. It copies views, because their sizes were unknown."""
        found = self._one_by_one(samples, [()] * len(samples))
        views = zip(*(crops for crops, _, _ in found), strict=True)
        return self._joined(list(map(torch.stack, views)), found)

    def _written(self, samples: list[SampleId], memory: Tensor) -> Batch:
        """Return the batch of `samples`. Its views are written to `memory`."""
        epochs, indices = np.array(samples).T.copy()
        images = self.images.read_batch(indices, self.crop.accepts)
        channels_last = images is None and self.crop.channels_last
        views = _shaped(memory, len(samples), self.crop.sizes, channels_last)
        if images is None:
            rows = zip(*(view.split(1) for view in views), strict=True)
            return self._joined(views, self._one_by_one(samples, rows))
        self.crop.crop_batch(images, epochs, indices, views)
        return Batch(views, *map(torch.from_numpy, (indices, self.images.labels[indices])), [])

    def _one_by_one(
        self, samples: list[SampleId], outs: Iterable[Sequence[Tensor]]
    ) -> list[Sample]:
        """Return the samples. Each image is cropped while a core's cache has it.

        `outs` has the memory for the views of each sample; see `Transform`.
        """
        with torch.inference_mode():  # operations start faster
            return [self._crop(sample, out) for sample, out in zip(samples, outs, strict=True)]

    def _crop(self, sample: SampleId, out: Sequence[Tensor] = ()) -> Sample:
        """Read an image and crop it, into `out` if that is given.

        Raises InputError if no image can be read.
        """
        epoch, index = sample
        images, crop = self.images, self.crop
        unreadable: list[tuple[int, str]] = []
        for attempt in range(MAX_REPLACEMENTS + 1):
            i = rng.key(rng.REPLACEMENT, epoch, index, attempt) % len(self) if attempt else index
            try:
                image = images.read(i, self.settings, lambda h, w: crop.reduction(h, w, sample))
                return crop(image, sample, out), i, unreadable
            except InputError as error:
                if not self.skip_unreadable or isinstance(error, ListError):
                    raise
                unreadable.append((i, str(error)))
        raise InputError(
            f"{unreadable[0][1]}; {MAX_REPLACEMENTS} other images, tried instead, cannot be read "
            "either"
        )

    def _joined(self, views: list[Tensor], samples: list[Sample]) -> Batch:
        """Return the batch of `samples`, whose views are `views`."""
        indices = np.array([i for _, i, _ in samples])
        unreadable = [one for *_, errors in samples for one in errors]
        labels = self.images.labels[indices]
        return Batch(views, torch.from_numpy(indices), torch.from_numpy(labels), unreadable)


MAX_REPLACEMENTS = 10  # images to try instead of an unreadable one


def bytes_per_image(crop: Transform) -> int:
    """Return the bytes of all views of an image."""
    return sum(3 * size**2 for size in crop.sizes)


def _shaped(memory: Tensor, n: int, sizes: tuple[int, ...], channels_last: bool) -> list[Tensor]:
    """Return parts of `memory` as one tensor [n, 3, size, size] for each of `sizes`."""
    parts = zip(memory.split([3 * n * size**2 for size in sizes]), sizes, strict=True)
    if channels_last:
        return [part.view(n, size, size, 3).permute(0, 3, 1, 2) for part, size in parts]
    return [part.view(n, 3, size, size) for part, size in parts]
