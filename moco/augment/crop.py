"""Random resized crops, RandAugment and centre crops of one decoded image, uint8 in and out: the workers' share of a view."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from moco.augment.recipes import Recipe, View
from moco.rng import key as fold
from moco.rng import uniform

Box = tuple[int, int, int, int]  # top, left, height, width


def random_box(height: int, width: int, view: View, key: int) -> Box:
    """A box with the distribution of torchvision's `RandomResizedCrop`, as a pure function of `key`.

    Ten tries draw an area in `view.scale` and a log-uniform aspect in `view.ratio`; if none fits, the largest centred
    box whose aspect lies in `view.ratio`.
    """
    (low, high), (narrow, wide) = view.scale, view.ratio
    for i in range(0, 40, 4):
        area = height * width * (low + (high - low) * uniform(key, i))
        aspect = narrow * (wide / narrow) ** uniform(key, i + 1)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int((height - h + 1) * uniform(key, i + 2))
            left = int((width - w + 1) * uniform(key, i + 3))
            return top, left, h, w
    aspect = min(max(width / height, narrow), wide)
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut `box` out of `image` [3, H, W] uint8 and resize it to [3, size, size], bilinear with antialiasing."""
    top, left, h, w = box
    return _resize(image[:, top : top + h, left : left + w], (size, size))


def random_boxes(height: int, width: int, recipe: Recipe, *counters: int) -> list[Box]:
    """A random box for each view of `recipe`; `counters` (and the view) fix the draw."""
    return [random_box(height, width, view, fold(*counters, i)) for i, view in enumerate(recipe)]


def random_views(image: Tensor, recipe: Recipe, *counters: int) -> list[Tensor]:
    """One random crop of `image` [3, H, W] uint8 for each view of `recipe`, cut at its `random_boxes`, with its RandAugment."""
    boxes = random_boxes(*image.shape[1:], recipe, *counters)
    views = [resized_crop(image, box, view.size) for box, view in zip(boxes, recipe, strict=True)]
    for i, view in enumerate(recipe):
        if view.randaugment[0]:
            views[i] = randaugment(views[i], *view.randaugment, fold(*counters, i))
    return views


def randaugment(image: Tensor, operations: int, magnitude: int, key: int) -> Tensor:
    """RandAugment (Cubuk et al., arXiv 1909.13719) of `image` [3, H, W] uint8, a pure function of `key`.

    torchvision's operations, with `magnitude` in [0, 10] as in the paper; what comes in from outside is mid-grey. They run on a
    Pillow image, which takes half the time of a tensor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key >> 1)
        # by channels, which is many times faster than to move each pixel's three values together
        augmented = _randaugment(operations, magnitude)(Image.merge("RGB", [Image.fromarray(channel) for channel in image.numpy()]))
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in augmented.split()]))


@functools.cache
def _randaugment(operations: int, magnitude: int) -> v2.RandAugment:
    return v2.RandAugment(operations, magnitude, num_magnitude_bins=11, fill=[128] * 3)


def center_view(image: Tensor, size: int) -> Tensor:
    """The evaluation view: the shorter side to 8/7 of `size` (256 for 224), then the central size x size pixels.

    Rounds as torchvision's Resize and CenterCrop do. A small image that has this size is seen whole, as those of CIFAR and STL-10
    are in the literature.
    """
    if tuple(image.shape[1:]) == (size, size) and size <= _WHOLE:
        return image
    image = _middle(image)
    height, width = image.shape[1:]
    short, edge = round(size * 8 / 7), min(height, width)
    image = _resize(image, (short * height // edge, short * width // edge))
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size].contiguous()


_WHOLE = 96  # pixels
_LONGEST = 16  # times the shorter side


def _middle(image: Tensor) -> Tensor:
    """Without the ends of an image [3, H, W] that is longer than any camera's, which would be made as large as its middle."""
    for axis, length in ((1, image.shape[1]), (2, image.shape[2])):
        most = _LONGEST * min(image.shape[1:])
        if length > most:
            cut = (length - most) // 2
            image = image.narrow(axis, cut, length - 2 * cut)
    return image


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image.contiguous()
    out = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)
    return out[0].contiguous(memory_format=torch.contiguous_format)
