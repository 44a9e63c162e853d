"""RandAugment (Cubuk et al., arXiv 1909.13719) with the operations of TPU models, batched.

Each image gets N of the 16 operations of `OPERATIONS`, drawn with replacement. All have the same
magnitude. Pixels from outside the image are mid-grey. `moco/augment/color.py` calls `apply`.

The operations work on grey levels: float images [B, 3, H, W] of whole numbers from 0 to 255.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.devices import to_device

LARGEST = 10  # magnitude
_GREY = 128.0
_SIZE = 224  # the lengths in `OPERATIONS` are for images of this many pixels


@dataclass(frozen=True)
class Arguments:
    """The arguments of an operation on B images. The tensors are on the CPU.

    Attributes:
        strength: the strength of the operation at this magnitude.
        sign: 1 or -1, the direction in which each image is shifted or rotated, [B].
        center: row and column of the center of Cutout's square, as fractions of height and width,
            [B, 2].
    """

    strength: float
    sign: Tensor
    center: Tensor


Change = Callable[[Tensor, Arguments], Tensor]


def apply(x: Tensor, draws: Tensor, magnitude: int) -> Tensor:
    """Return images after RandAugment, [B, 3, H, W] in [0, 1]. They are rounded to grey levels.

    Args:
        x: images [B, 3, H, W] in [0, 1].
        draws: uniform random numbers in [0, 1), on the CPU, [B, N, 4]. Each of the N operations
            takes one for its index, one for its sign, and two for its center.
        magnitude: in [0, 10].
    """
    x = torch.round(255 * x)
    for index, sign, *center in (layer.unbind(1) for layer in draws.unbind(1)):
        chosen = (index * len(OPERATIONS)).long()
        for i, (strength, change) in enumerate(OPERATIONS.values()):
            images = (chosen == i).nonzero().squeeze(1)
            if len(images):
                arguments = Arguments(
                    strength(magnitude / LARGEST),
                    torch.where(sign[images] < 0.5, -1.0, 1.0),
                    torch.stack(center, 1)[images],
                )
                images = to_device(images, x.device)
                x.index_copy_(0, images, change(x[images], arguments))
    return x.mul_(1 / 255)


# operations on the levels of each pixel


def _autocontrast(x: Tensor, _: Arguments) -> Tensor:
    """Stretch each channel so that its levels range from 0 to 255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = torch.floor((x - low) * 255 / (high - low).clamp_min(1))
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor, _: Arguments) -> Tensor:
    """Map the levels of each channel so that their distribution is nearly uniform."""
    levels = x.long().flatten(2)  # [B, 3, H W]
    counts = levels.new_zeros(*levels.shape[:2], 256)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    # the number of pixels below the brightest level, divided by 255 steps
    step = (levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))) // 255
    darker = counts.cumsum(2) - counts
    table = ((darker + step // 2) // step.clamp_min(1)).clamp_max(255)
    return torch.where(step[..., None] > 0, table.gather(2, levels).view(x.shape).to(x.dtype), x)


def _invert(x: Tensor, _: Arguments) -> Tensor:
    return 255 - x


def _posterize(x: Tensor, arguments: Arguments) -> Tensor:
    """Keep only the first bits of each level."""
    step = 2 ** (8 - int(arguments.strength))
    return x.div(step, rounding_mode="floor").mul_(step)


def _solarize(x: Tensor, arguments: Arguments) -> Tensor:
    """Invert the levels at or above a threshold."""
    return torch.where(x < int(arguments.strength), x, 255 - x)


def _solarize_add(x: Tensor, arguments: Arguments) -> Tensor:
    """Make levels below 128 brighter."""
    return torch.where(x < 128, (x + int(arguments.strength)).clamp_max(255), x)


# operations that blend an image with another one


def _blend(other: Tensor, x: Tensor, factor: float) -> Tensor:
    """Return other + factor (x - other), within the levels."""
    return torch.floor(torch.lerp(other, x, factor).clamp_(0, 255))


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.split(1, 1)
    return torch.round(0.299 * r + 0.587 * g + 0.114 * b)


def _color(x: Tensor, arguments: Arguments) -> Tensor:
    return _blend(_luma(x).expand_as(x), x, arguments.strength)


def _contrast(x: Tensor, arguments: Arguments) -> Tensor:
    mean = torch.round(_luma(x).mean((2, 3), keepdim=True))
    return _blend(mean.expand_as(x), x, arguments.strength)


def _brightness(x: Tensor, arguments: Arguments) -> Tensor:
    return _blend(torch.zeros_like(x), x, arguments.strength)


def _sharpness(x: Tensor, arguments: Arguments) -> Tensor:
    """Blend an image with its smoothed version. Pixels at the border stay as they are."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = x.new_ones(3, 1, 3, 3)
    kernel[..., 1, 1] = 5
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = torch.round(F.conv2d(x, kernel, groups=3) / 13)
    return _blend(smooth, x, arguments.strength)


# operations on positions


def _warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Return images whose pixel (column, row) is that of `x` at `matrix` (column, row, 1), rounded.

    `matrix` is [B, 2, 3], on the CPU. Pixels are counted from 0.
    """
    n, channels, height, width = x.shape
    rows, columns = (torch.arange(side, device=x.device, dtype=x.dtype) for side in (height, width))
    a, b, c = to_device(matrix, x.device)[..., None, None].unbind(2)  # each [B, 2, 1, 1]
    source = torch.floor(a * columns + b * rows[:, None] + (c + 0.5)).long()
    column, row = source.unbind(1)  # each [B, H, W]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).view(n, 1, -1)
    moved = x.flatten(2).gather(2, place.expand(-1, channels, -1)).view(x.shape)
    return torch.where(inside[:, None], moved, _GREY)


def _affine(sign: Tensor, matrix: tuple[float, ...]) -> Tensor:
    """Return the identity plus `sign` [B] times a matrix of 2 x 3 numbers, [B, 2, 3]."""
    return torch.eye(2, 3) + sign[:, None, None] * torch.tensor(matrix).view(2, 3)


def _rotate(x: Tensor, arguments: Arguments) -> Tensor:
    """Rotate images about their center."""
    height, width = x.shape[2:]
    y0, x0 = (height - 1) / 2, (width - 1) / 2
    angle = math.radians(arguments.strength)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[0, -sin, sin * y0], [sin, 0, -sin * x0]])
    still = torch.tensor([[cos, 0, (1 - cos) * x0], [0, cos, (1 - cos) * y0]])
    return _warp(x, arguments.sign[:, None, None] * turn + still)


def _shear_x(x: Tensor, arguments: Arguments) -> Tensor:
    return _warp(x, _affine(arguments.sign, (0, arguments.strength, 0, 0, 0, 0)))


def _shear_y(x: Tensor, arguments: Arguments) -> Tensor:
    return _warp(x, _affine(arguments.sign, (0, 0, 0, arguments.strength, 0, 0)))


def _translate_x(x: Tensor, arguments: Arguments) -> Tensor:
    return _warp(x, _affine(arguments.sign, (0, 0, _pixels(x, arguments), 0, 0, 0)))


def _translate_y(x: Tensor, arguments: Arguments) -> Tensor:
    return _warp(x, _affine(arguments.sign, (0, 0, 0, 0, 0, _pixels(x, arguments))))


def _cutout(x: Tensor, arguments: Arguments) -> Tensor:
    """Make a square grey. It may extend beyond the image."""
    half, inside = round(_pixels(x, arguments)), []
    for axis, size in enumerate(x.shape[2:]):
        center = torch.floor(arguments.center[:, axis, None] * size)
        pixel = torch.arange(size)
        inside.append((pixel >= center - half) & (pixel < center + half))  # [B, size]
    rows, columns = (to_device(part, x.device) for part in inside)
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], _GREY, x)


def _pixels(x: Tensor, arguments: Arguments) -> float:
    """Return the length of an operation, scaled from an image of 224 pixels to this one."""
    return arguments.strength * x.shape[-1] / _SIZE


def _enhanced(m: float) -> float:
    return 0.1 + 1.8 * m


# Each operation's strength as a function of magnitude / 10, and the operation. Lengths are in
# pixels of an image of 224 pixels.
OPERATIONS: dict[str, tuple[Callable[[float], float], Change]] = {
    "AutoContrast": (lambda m: m, _autocontrast),
    "Equalize": (lambda m: m, _equalize),
    "Invert": (lambda m: m, _invert),
    "Rotate": (lambda m: 30 * m, _rotate),  # degrees
    "Posterize": (lambda m: 4 * m, _posterize),  # bits, rounded down
    "Solarize": (lambda m: 256 * m, _solarize),
    "Color": (_enhanced, _color),
    "Contrast": (_enhanced, _contrast),
    "Brightness": (_enhanced, _brightness),
    "Sharpness": (_enhanced, _sharpness),
    "ShearX": (lambda m: 0.3 * m, _shear_x),
    "ShearY": (lambda m: 0.3 * m, _shear_y),
    "TranslateX": (lambda m: 100 * m, _translate_x),
    "TranslateY": (lambda m: 100 * m, _translate_y),
    "Cutout": (lambda m: 40 * m, _cutout),  # half the side of the square
    "SolarizeAdd": (lambda m: 110 * m, _solarize_add),
}
