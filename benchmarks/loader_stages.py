"""The stages of a loader's work, each measured alone; see loader.py.

read               the bytes of the file
decode             the decoder that we use, alone
libjpeg-turbo      the same library, through simplejpeg, if that is installed
decode and check   the decoder, with our check of the size and the orientation
boxes              draw the boxes of two crops
resize             copy the two boxes out of the image, and resize them
decode and resize  the decoder and the two resized boxes, and nothing else
one worker         all of these in a loader process, up to the batch in the main process
colors             the color operations of two views, on the CPU
kornia             kornia's operations, the same ones, on the same crops, if kornia is installed
"""

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moco.augment import color, crop
from moco.augment.recipes import Recipe
from moco.config import MEAN, STD
from moco.data import decoding, jpeg, loader
from moco.data.images import ImageFolder
from moco.sections import Input

_BATCHES = 10  # that `one_worker` measures
_epochs = itertools.count()


Stages = dict[str, Callable[[], object]]  # by name; each is for all images of a folder


def candidates(folder: ImageFolder, recipe: Recipe) -> tuple[Stages, Stages]:
    """Return the stages for all images of `folder`, in two groups to measure one after the other.

    The second one has the stage that forks a process. After a fork, the first write to each page of
    the main process's memory takes time, which would be added to that of other candidates.
    """
    indices = range(len(folder))
    data = [folder.encoded(i) for i in indices]
    headers = [jpeg.header(memoryview(one)) for one in data]
    _, decoder = jpeg.decoder()
    images = list(map(decoder, data, headers))
    sizes = [image.shape[1:] for image in images]
    boxes = [crop.random_boxes(*size, recipe, 0, i) for i, size in enumerate(sizes)]
    out = [crop._channels_last(view.size) for view in recipe]
    cut = loader.RandomCrops(recipe, seed=0)
    batch = loader.Views(folder, cut).__getitems__([(0, i) for i in indices])

    def resize(image: Tensor, of_views: list[crop.Box]) -> None:
        pixels = image.permute(1, 2, 0).numpy()
        for box, view, memory in zip(of_views, recipe, out, strict=True):
            crop._write_resized_crop(pixels, box, view.size, view.interpolation, memory)

    found = {
        "read": lambda: [folder.encoded(i) for i in indices],
        "decode": lambda: _each(decoder, data, headers),
        "decode and check": lambda: _each(lambda one: decoding.decode(one, ""), data),
        "boxes": lambda: [
            crop.random_boxes(*size, recipe, next(_epochs), i) for i, size in enumerate(sizes)
        ],
        "resize": lambda: _each(resize, images, boxes),
        "colors": lambda: colors(batch.views, recipe),
    }
    if turbo := libjpeg_turbo():
        found["libjpeg-turbo"] = lambda: _each(turbo, data)
    if theirs := kornia(recipe[0].size):
        found["kornia"] = lambda: [theirs(crops.float().div_(255)) for crops in batch.views]
    apart = {
        "decode and resize": lambda: _each(
            lambda one, header, boxes: resize(decoder(one, header), boxes), data, headers, boxes
        ),
        "one worker": lambda: one_worker(folder, cut),
    }
    return found, apart


TURN = 0.4  # seconds


def turn(run: Callable[[], object]) -> Callable[[], float]:
    """Return a candidate that calls `run` for `TURN` seconds and returns the mean time of a call.

    Batches follow each other in training. So a candidate runs repeatedly, and its memory stays in
    the caches. Processor time leaves out interruptions by other programs.
    """

    def calls() -> float:
        began, n = time.process_time(), 0
        while (passed := time.process_time() - began) < TURN:
            run()
            n += 1
        return passed / n

    return calls


def _each(run: Callable[..., object], *inputs: list) -> None:
    """Call `run` for each of the inputs, and drop the results."""
    for one in zip(*inputs, strict=True):
        run(*one)


def one_worker(folder: ImageFolder, cut: loader.RandomCrops) -> float:
    """Return the seconds in which one loader process makes a batch of all images.

    The time begins when the first batch has arrived, so the start of the process does not count.
    """
    n, first = len(folder), next(_epochs)
    order = loader.TrainBatchSampler(n, n, 1, seed=0, start=first, stop=first + _BATCHES + 1)
    options = Input(workers=1, batch_size=n, batch_per_process=n)
    batches = loader.batches(folder, cut, order, options, torch.device("cpu"))
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return (time.perf_counter() - began) / _BATCHES


def colors(views: list[Tensor], recipe: Recipe) -> list[Tensor]:
    """Return the views after our color operations and normalization."""
    generator = torch.Generator().manual_seed(next(_epochs))
    return [
        color.augment(crops, view, generator) for crops, view in zip(views, recipe, strict=True)
    ]


def libjpeg_turbo() -> Callable[[np.ndarray], np.ndarray] | None:
    """Return simplejpeg's decoder, a thin layer over libjpeg-turbo; None if it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        print("simplejpeg is not installed: libjpeg-turbo alone is left out")
        return None
    return simplejpeg.decode_jpeg


def kornia(size: int) -> Callable[[Tensor], Tensor] | None:
    """Return MoCo v2's color operations by kornia; None if kornia is not installed."""
    try:
        from kornia import augmentation
    except ImportError:
        print("kornia is not installed: its color operations are left out")
        return None
    taps = 2 * int(3 * 2.0 * size / 224 + 0.5) + 1  # as many as ours
    return augmentation.AugmentationSequential(
        augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=0.5),
        augmentation.RandomHorizontalFlip(p=0.5),
        augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
