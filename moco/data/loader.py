"""From files to batches of uint8 crops: workers decode each image once and cut its views, and do no colour work."""

import math
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from moco import distributed, rng
from moco.augment import crop
from moco.augment.recipes import Recipe
from moco.data.images import Images
from moco.errors import InputError

Place = tuple[int, int]  # epoch, index


class Batch(NamedTuple):
    """`views`: one uint8 tensor [B, 3, S, S] per view; `index`: int64 [B]; `label`: int64 [B], or [B, classes] (`Images`)."""

    views: list[Tensor]
    index: Tensor
    label: Tensor


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
        spare = min(min(h, w) / (2 * view.size) for (_, _, h, w), view in zip(boxes, self.recipe, strict=True))
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))


class CenterCrop(NamedTuple):
    """Cut the evaluation view of `size` pixels."""

    size: int

    def __call__(self, image: Tensor, place: Place) -> list[Tensor]:
        return [crop.center_view(image, self.size)]

    def reduction(self, height: int, width: int, place: Place) -> int:
        """Evaluation sees every pixel."""
        return 1


class Views(Dataset):
    """One sample per (epoch, index): its views, its index and its label; or the InputError that kept it from being read."""

    def __init__(self, images: Images, cut: RandomCrops | CenterCrop):
        self.images, self.cut = images, cut

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> tuple[list[Tensor], int, Tensor] | InputError:
        _, i = place
        try:
            image = self.images.read(i, lambda height, width: self.cut.reduction(height, width, place))
            return self.cut(image, place), i, torch.as_tensor(self.images.labels[i])
        except InputError as error:
            return error  # raised in the main process, where it is one line and not a worker's traceback


def collate(samples: list) -> Batch | InputError:
    """Stack samples into a Batch, or pass on the first that could not be read."""
    return next((s for s in samples if isinstance(s, InputError)), None) or Batch(*default_collate(samples))


class TrainOrder(Sampler):
    """Batches of (epoch, index) for this rank, for the steps from `start` to `stop` without a break between epochs.

    An epoch's order is one permutation of (seed, epoch), the same for every rank and any number of processes; each
    global batch is cut into the ranks' parts. A step has `accumulation` global batches; what does not fill one is left out.
    Steps below 0 are those that may come before epoch 0, the last ones of the epochs -1, -2, ...
    """

    def __init__(self, n: int, batch: int, accumulation: int, seed: int, start: int = 0, stop: int = 0):
        self.n, self.batch, self.accumulation, self.seed, self.start, self.stop = n, batch, accumulation, seed, start, stop
        self.steps_per_epoch = n // (batch * distributed.world() * accumulation)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        shape = (self.steps_per_epoch, self.accumulation, distributed.world(), self.batch)
        order_of = None
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order = torch.randperm(self.n, generator=rng.generator("cpu", rng.ORDER, self.seed, epoch))
                mine, order_of = order[: math.prod(shape)].view(shape)[:, :, distributed.rank()], epoch
            for batch in mine[place].tolist():
                yield [(epoch, i) for i in batch]


class EvalOrder(Sampler):
    """Batches of (0, index) over every W-th image from this rank's on: each image once over all ranks, none twice."""

    def __init__(self, n: int, batch: int):
        self.places = [(0, i) for i in range(distributed.rank(), n, distributed.world())]
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch)

    def __iter__(self) -> Iterator[list[Place]]:
        for i in range(0, len(self.places), self.batch):
            yield self.places[i : i + self.batch]


def batches(
    images: Images, cut: RandomCrops | CenterCrop, order: Sampler, args: Namespace, device: torch.device
) -> Iterator[Batch]:
    """Read `images` in `order` and yield batches on `device`. Raises InputError for an image that cannot be read.

    `args.workers` is the number of loader processes for `args.batch_size` images: each rank takes its share, rounded up.
    """
    cuda = device.type == "cuda"
    workers = -(-args.workers * args.batch_per_process // args.batch_size)
    loader = DataLoader(
        Views(images, cut),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=cuda,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        views = [view.to(device, non_blocking=True) for view in batch.views]
        yield Batch(views, batch.index.to(device, non_blocking=True), batch.label.to(device, non_blocking=True))
