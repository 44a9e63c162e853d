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
from moco.rng import Key, uniform
from moco.rng import key as fold

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
        augmented = _randaugment(operations, magnitude)(
            Image.merge("RGB", [Image.fromarray(channel) for channel in image.numpy()])
        )
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in augmented.split()]))


@functools.cache
def _randaugment(operations: int, magnitude: int) -> v2.RandAugment:
    return v2.RandAugment(operations, magnitude, num_magnitude_bins=11, fill=[128] * 3)


def center_view(image: Tensor, size: int) -> Tensor:
    """Return the evaluation view: resize the shorter side to 8/7 of `size`, then crop the center.

    `image` is uint8 [3, H, W], or a batch [B, 3, H, W]. The shorter side becomes 256 pixels for a
    `size` of 224. Sizes are rounded as in torchvision's Resize and CenterCrop. An image of exactly
    size x size pixels is returned unchanged if `size` is at most `_WHOLE`: the literature evaluates
    CIFAR and STL-10 on full images.
    """
    if tuple(image.shape[-2:]) == (size, size) and size <= _WHOLE:
        return image
    image = _middle(image)
    height, width = image.shape[-2:]
    short, edge = round(size * 8 / 7), min(height, width)
    image = _resize(image, (short * height // edge, short * width // edge))
    top, left = (round((side - size) / 2) for side in image.shape[-2:])
    return image[..., top : top + size, left : left + size].contiguous()


_WHOLE = 96  # pixels
_LONGEST = 16  # times the shorter side


def _middle(image: Tensor) -> Tensor:
    """Cut off the ends of an image [..., H, W] whose aspect ratio is above `_LONGEST`.

    Otherwise resizing its shorter side would make the longer one huge, for pixels that the center
    crop drops.
    """
    for axis in (-2, -1):
        length, most = image.shape[axis], _LONGEST * min(image.shape[-2:])
        if length > most:
            cut = (length - most) // 2
            image = image.narrow(axis, cut, length - 2 * cut)
    return image


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image [3, H, W] or a batch [B, 3, H, W]."""
    if tuple(image.shape[-2:]) == size:
        return image.contiguous()
    batch = image if image.dim() == 4 else image[None]
    out = F.interpolate(batch, size, mode="bilinear", antialias=True, align_corners=False)
    return out.view(*image.shape[:-2], *size).contiguous(memory_format=torch.contiguous_format)


# Views of a full batch of small images of equal size. Draws and pixels are the same as image by
# image, but Python's overhead is paid once per batch.


def can_crop_at_once(height: int, width: int, recipe: Recipe) -> bool:
    """Return whether `random_views_at_once` accepts images of this size and is the faster way."""
    if max(height, width) > _LARGEST or any(view.randaugment[0] for view in recipe):
        return False
    return max(height, width) <= _LARGEST_SHRINKING * min(view.size for view in recipe)


_LARGEST = 64  # pixels; the matrix products of larger images take longer than resizing crop by crop
_LARGEST_SHRINKING = 4  # times; beyond it, the float32 sums of `resized_crops` would not be exact
_CHUNK = 64  # images whose intermediate results fit in a core's cache


def random_views_at_once(images: Tensor, recipe: Recipe, *counters: Key) -> list[Tensor]:
    """Apply `random_views` to each of `images` uint8 [B, 3, H, W]; return [B, 3, S, S] per view.

    `can_crop_at_once` must be true for them. At least one of `counters` is an array [B], with one
    number per image; the others are the same for all images.
    """
    views = []
    for i, view in enumerate(recipe):
        boxes = random_boxes_at_once(*images.shape[2:], view, fold(*counters, i))
        views.append(resized_crops(images, boxes, view.size))
    return views


def random_boxes_at_once(height: int, width: int, view: View, keys: np.ndarray) -> np.ndarray:
    """Draw the `random_box` of each of `keys` uint64 [B]; return int64 [B, 4]."""
    (low, high), (narrow, wide) = view.scale, view.ratio
    boxes = np.empty((len(keys), 4), dtype=np.int64)
    rows, unsure = np.arange(len(keys)), []  # rows: keys without a fitting box so far
    for i in range(0, 40, 4):
        drawn = keys[rows]
        area = height * width * (low + (high - low) * uniform(drawn, i))
        aspect = narrow * (wide / narrow) ** uniform(drawn, i + 1)
        sides = np.sqrt(np.stack([area / aspect, area * aspect]))  # [2, n]: height, width
        # NumPy's power may differ from Python's in the last bit. That changes the box if a side is
        # nearly halfway between two whole numbers of pixels.
        unsure.append(rows[(np.abs(sides % 1 - 0.5) < 1e-6).any(0)])
        h, w = np.rint(sides).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top = ((height - h + 1) * uniform(drawn, i + 2)).astype(np.int64)
        left = ((width - w + 1) * uniform(drawn, i + 3)).astype(np.int64)
        boxes[rows[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        rows = rows[~fits]
        if not len(rows):
            break
    for row in np.concatenate([rows, *unsure]):
        boxes[row] = random_box(height, width, view, int(keys[row]))
    return boxes


def resized_crops(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Apply `resized_crop` to each of `images` uint8 [B, 3, H, W]; return uint8 [B, 3, size, size].

    Bilinear interpolation is linear along rows and along columns, so a resized crop is two matrix
    products. For uint8 images PyTorch rounds the weights to multiples of 2^-p, and the result of
    each product to whole grey levels. Shrinking by up to `_LARGEST_SHRINKING` needs p of at most 16,
    for which the float32 sums here are exact. So each pixel equals PyTorch's.

    Args:
        boxes: the box of each image, int64 [B, 4].
    """
    (n, channels, height, width), (top, left, h, w) = images.shape, boxes.T
    down, across = _placed_weights(height, size)[h, top], _placed_weights(width, size)[w, left]
    down, across = torch.from_numpy(down), torch.from_numpy(across)  # [B, size, H], [B, size, W]
    out = torch.empty(n, channels, size, size, dtype=torch.uint8)
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        x = images[part].float().view(-1, channels * height, width)
        x = torch.bmm(x, across[part].transpose(1, 2)).add_(0.5).floor_()
        x = torch.matmul(down[part, None], x.view(-1, channels, height, size)).add_(0.5)
        # NumPy converts to uint8 seven times as fast as PyTorch
        out[part] = torch.from_numpy(x.numpy().astype(np.uint8))
    return out


@functools.cache
def _placed_weights(length: int, size: int) -> np.ndarray:
    """Return the weights that resize any interval of an axis of `length` pixels to `size` pixels.

    The result is float32 [length + 1, length, size, length], indexed by the interval's length, its
    first pixel, the output pixel and the input pixel. It is a strided view of a much smaller array.
    """
    weights = np.zeros((length + 1, size, 2 * length), dtype=np.float32)
    for box in range(1, length + 1):
        weights[box, :, length : length + box] = _weights(box, size)
    by_box, by_pixel, one = weights.strides
    shape, strides = (length + 1, length, size, length), (by_box, -one, by_pixel, one)
    return np.lib.stride_tricks.as_strided(weights[:, :, length:], shape, strides)


def _weights(length: int, size: int) -> np.ndarray:
    """Return the antialiased weights by which PyTorch resizes `length` uint8 pixels to `size`.

    They are float64 [size, length].
    """
    scale = length / size
    reach = max(scale, 1.0)  # half the width of the triangle filter around each output pixel
    center = scale * (np.arange(size) + 0.5)[:, None]
    pixel = np.arange(length)
    first, last = ((center + side * reach + 0.5).astype(np.int64) for side in (-1, 1))
    weights = (1 - np.abs(pixel - center + 0.5) / reach).clip(0)
    weights *= (pixel >= first) & (pixel < last)
    weights /= weights.sum(1, keepdims=True)
    # the precision p: as many bits as keep the largest weight within a signed 16-bit integer
    bits = next(p for p in range(23) if p == 22 or int(0.5 + weights.max() * 2 ** (p + 1)) >= 2**15)
    return np.floor(0.5 + weights * 2**bits) / 2**bits
