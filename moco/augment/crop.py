"""Random resized crops and centre crops of decoded uint8 images.

The loader's workers compute this part of a view; `moco/augment/color.py` does the rest, in batches.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.augment.recipes import Recipe, View
from moco.rng import Key, uniform
from moco.rng import key as fold

Box = tuple[int, int, int, int]  # top, left, height, width


def random_box(height: int, width: int, view: View, key: int) -> Box:
    """Return a random box, distributed like that of torchvision's `RandomResizedCrop`.

    The image has `height` x `width` pixels. The same `key` always gives the same box. Up to ten
    times, draw an area in `view.scale` and a log-uniform aspect ratio in `view.ratio`. If no box
    fits, return the largest centred one with an aspect ratio in `view.ratio`.
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


def resized_crop(image: Tensor, box: Box, size: int, interpolation: str = "bilinear") -> Tensor:
    """Crop `image` [3, H, W] uint8 to `box`, and resize it to [3, size, size].

    The interpolation is bilinear or bicubic, with antialiasing.
    """
    out = _channels_last(size)
    _write_resized_crop(image.permute(1, 2, 0).numpy(), box, size, interpolation, out)
    return out[0].contiguous()


def _channels_last(size: int) -> Tensor:
    """Return memory for an image, uint8 [1, 3, size, size], in PyTorch's format channels_last.

    In this format, the three values of a pixel are next to each other, as JPEG decoders write them.
    PyTorch resizes such images fastest.
    """
    return torch.empty(1, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


def _write_resized_crop(
    image: np.ndarray, box: Box, size: int, interpolation: str, out: Tensor
) -> None:
    """Write `resized_crop` of `image` [H, W, 3] to `out`.

    `out` is uint8 [1, 3, size, size] in the format channels_last.
    """
    top, left, h, w = box
    # NumPy copies the box faster than PyTorch
    crop = image[top : top + h, left : left + w].copy(order="C")
    crop = torch.from_numpy(crop[None].transpose(0, 3, 1, 2))
    if h == size and w == size:
        out.copy_(crop)
    else:
        # F.interpolate calls these functions, too, but cannot write to given memory
        _RESIZE[interpolation](crop, (size, size), False, None, None, out=out)


_RESIZE = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
}


def random_boxes(height: int, width: int, recipe: Recipe, *counters: int) -> list[Box]:
    """Return a random box for each view of `recipe`.

    The same `counters` always give the same boxes, and each view draws its own.
    """
    start = fold(*counters)
    return [random_box(height, width, view, fold(i, start=start)) for i, view in enumerate(recipe)]


def random_views(
    image: Tensor, recipe: Recipe, *counters: int, out: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Return a random crop of `image` [3, H, W] uint8 for each view of `recipe`.

    The crops are those of `random_boxes`. The three values of a pixel are next to each other in
    memory. If `out` is given, write them there: it has a batch of one image for each view, uint8
    [1, 3, S, S] in PyTorch's format channels_last.
    """
    pixels = image.permute(1, 2, 0).numpy()
    height, width, _ = pixels.shape
    boxes = random_boxes(height, width, recipe, *counters)
    out = out or [_channels_last(view.size) for view in recipe]
    for box, view, memory in zip(boxes, recipe, out, strict=True):
        _write_resized_crop(pixels, box, view.size, view.interpolation, memory)
    return [memory[0] for memory in out]


def center_view(
    image: Tensor, size: int, resize: str = "scaled", out: Tensor | None = None
) -> Tensor:
    """Return the evaluation view: resize the image, then crop the center of size x size pixels.

    Sizes are rounded as in torchvision's Resize and CenterCrop. An image of exactly size x size
    pixels is returned unchanged if `size` is at most `NATIVE`, because the literature evaluates
    CIFAR and STL-10 on full images.

    Args:
        image: uint8 [3, H, W], or a batch [B, 3, H, W].
        size: height and width of the result, in pixels.
        resize: "scaled" if the shorter side becomes 8/7 of `size`, which is 256 pixels for 224;
            "margin" if it becomes `size` + 32; "stretched" if both sides become 8/7 of `size`.
        out: contiguous memory for the result.
    """
    if tuple(image.shape[-2:]) == (size, size) and size <= NATIVE:
        return image if out is None else out.copy_(image)
    short = size + 32 if resize == "margin" else round(size * 8 / 7)
    if resize == "stretched":
        image = _resize(image, (short, short))
    else:
        image = _middle(image)
        height, width = image.shape[-2:]
        edge = min(height, width)
        image = _resize(image, (short * height // edge, short * width // edge))
    top, left = (round((side - size) / 2) for side in image.shape[-2:])
    view = image[..., top : top + size, left : left + size].numpy()
    # NumPy changes the layout twice as fast as PyTorch
    if out is None:
        return torch.from_numpy(view.copy(order="C"))
    np.copyto(out.numpy(), view)
    return out


NATIVE = 96  # pixels: the largest images that are evaluated at their own size
_LONGEST = 16  # aspect ratio


def _middle(image: Tensor) -> Tensor:
    """Crop the ends of an image [..., H, W] whose aspect ratio is above `_LONGEST`.

    Otherwise, resizing the shorter side would make the longer one huge, although the center crop
    drops most of it.
    """
    for axis in (-2, -1):
        side, longest = image.shape[axis], _LONGEST * min(image.shape[-2:])
        if side > longest:
            margin = (side - longest) // 2
            image = image.narrow(axis, margin, side - 2 * margin)
    return image


def _resize(image: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize an image [3, H, W] or a batch [B, 3, H, W]."""
    if tuple(image.shape[-2:]) == size:
        return image
    batch = image if image.dim() == 4 else image[None]
    out = F.interpolate(batch, size, mode=mode, antialias=True, align_corners=False)
    return out if image.dim() == 4 else out[0]


# Views of a full batch of small images of equal size. Draws and pixels are the same as for each
# image alone, but Python's overhead is paid once per batch.


def can_crop_at_once(height: int, width: int, recipe: Recipe) -> bool:
    """Return whether `random_views_at_once` accepts images of this size and is the faster way."""
    if max(height, width) > _LARGEST or any(view.interpolation != "bilinear" for view in recipe):
        return False
    return max(height, width) <= _LARGEST_SHRINKING * min(view.size for view in recipe)


_LARGEST = 64  # pixels; the matrix products of larger images take longer than resizing crop by crop
_LARGEST_SHRINKING = 4  # beyond this factor, the float32 sums of `resized_crops` are not exact
_CHUNK = 64  # images whose intermediate results fit in a core's cache


def random_views_at_once(
    images: Tensor, recipe: Recipe, *counters: Key, out: Sequence[Tensor]
) -> None:
    """Apply `random_views` to each of `images` uint8 [B, 3, H, W].

    `can_crop_at_once` must be true for them. The views are written to `out`, uint8 [B, 3, S, S]
    each. At least one of `counters` is an array [B], with one number per image; the others are the
    same for all images.
    """
    for i, (view, memory) in enumerate(zip(recipe, out, strict=True)):
        boxes = random_boxes_at_once(*images.shape[2:], view, fold(*counters, i))
        resized_crops(images, boxes, memory)


def random_boxes_at_once(height: int, width: int, view: View, keys: np.ndarray) -> np.ndarray:
    """Draw the `random_box` of each of `keys` uint64 [B]; return int64 [B, 4]."""
    (low, high), (narrow, wide) = view.scale, view.ratio
    boxes = np.empty((len(keys), 4), dtype=np.int64)
    left_over, unsure = np.arange(len(keys)), []  # indices of the keys without a box so far
    for i in range(0, 40, 4):
        drawn = keys[left_over]
        area = height * width * (low + (high - low) * uniform(drawn, i))
        aspect = narrow * (wide / narrow) ** uniform(drawn, i + 1)
        sides = np.sqrt(np.stack([area / aspect, area * aspect]))  # [2, n]: height, width
        # NumPy's power may differ from Python's in the last bit. That changes the box if a side is
        # nearly halfway between two whole numbers of pixels.
        unsure.append(left_over[(np.abs(sides % 1 - 0.5) < 1e-6).any(0)])
        h, w = np.rint(sides).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top = ((height - h + 1) * uniform(drawn, i + 2)).astype(np.int64)
        left = ((width - w + 1) * uniform(drawn, i + 3)).astype(np.int64)
        boxes[left_over[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        left_over = left_over[~fits]
        if not len(left_over):
            break
    for index in np.concatenate([left_over, *unsure]):
        boxes[index] = random_box(height, width, view, int(keys[index]))
    return boxes


def resized_crops(images: Tensor, boxes: np.ndarray, out: Tensor) -> None:
    """Write `resized_crop` of each of `images` uint8 [B, 3, H, W] to `out` [B, 3, size, size].

    Bilinear interpolation is linear in each axis, so a resized crop is two matrix products. For
    uint8 images PyTorch rounds the weights to multiples of 2^-p, and the result of each product to
    whole grey levels. Shrinking by up to `_LARGEST_SHRINKING` needs p of at most 16, for which the
    float32 sums here are exact. So each pixel equals PyTorch's.

    Args:
        images: uint8 [B, 3, H, W].
        boxes: the box of each image, int64 [B, 4].
        out: memory for the result, uint8, contiguous.
    """
    (n, channels, height, width), size = images.shape, out.shape[-1]
    top, left, h, w = boxes.T
    down = torch.from_numpy(_placed_weights(height, size)[h, top])  # [B, size, H]
    across = torch.from_numpy(_placed_weights(width, size)[w, left])  # [B, size, W]
    pixels = out.numpy()
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        x = torch.from_numpy(np.ascontiguousarray(images[part].numpy())).float()
        x = x.view(-1, channels * height, width)
        x = torch.bmm(x, across[part].transpose(1, 2)).add_(0.5).floor_()
        x = torch.matmul(down[part, None], x.view(-1, channels, height, size)).add_(0.5)
        # NumPy converts to uint8 seven times as fast as PyTorch
        np.copyto(pixels[part], x.numpy(), casting="unsafe")


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
    # the precision p: the most bits that keep the largest weight within a signed 16-bit integer
    bits = next(p for p in range(23) if p == 22 or int(0.5 + weights.max() * 2 ** (p + 1)) >= 2**15)
    return np.floor(0.5 + weights * 2**bits) / 2**bits
