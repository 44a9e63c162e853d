"""The color operations of torchvision.transforms.v2.functional, batched.

Images are float RGB in [0, 1], [B, 3, H, W], unless a function says otherwise. Each operation takes
its parameter as a tensor [B], one number per sample. `moco/augment/color.py` draws the parameters
and applies the operations of a view.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.config import MEAN, STD

LUMA = (0.2989, 0.587, 0.114)  # weights of R, G and B in a grey level

_TINY = 1e-30  # smaller than any difference between two colors, except 0


def grayscale(x: Tensor) -> Tensor:
    """Return the luma .2989 R + .587 G + .114 B, [B, 1, H, W]."""
    r, g, b = x.split(1, 1)
    red, green, blue = LUMA
    return (red * r).add_(g, alpha=green).add_(b, alpha=blue)


def blend(
    x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, out: Tensor | None = None
) -> Tensor:
    """Adjust the brightness, contrast or saturation of each sample.

    The result is factor x + (1 - factor) other, clamped to [0, 1]. `other` is 0 for brightness, the
    mean luma for contrast, and the luma of the pixel for saturation.

    Args:
        x: images.
        brightness: factor of each sample, [B].
        contrast: factor of each sample, [B].
        saturation: factor of each sample, [B]. At most one of a sample's three factors is not 1.
        out: tensor for the result; may be `x`.
    """
    factors = (brightness * contrast * saturation, contrast, saturation)
    factor, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors)
    gray = grayscale(x)
    mean = (1 - contrast) * gray.mean((2, 3), keepdim=True)
    return torch.addcmul(gray.mul_(1 - saturation).add_(mean), factor, x, out=out).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """Shift the hue in HSV space by `shift` [B], in [-.5, .5], where 1 is a full turn.

    The result is written to `out`, which may be `x`, if it is given. The code avoids masks and
    torch.where, because on a CPU they are many times slower than arithmetic.
    """
    r, g, b = x.unbind(1)
    largest, smallest = torch.maximum(r, g), torch.minimum(r, g)
    torch.maximum(largest, b, out=largest)
    torch.minimum(smallest, b, out=smallest)
    chroma = largest - smallest
    above, below = largest.add_(chroma), smallest.sub_(chroma)
    # The hue's distance from cyan, in [-.5, .5] of a turn. Its magnitude is
    # (2 + (r - g - b + smallest) / chroma) / 6 in all six sectors: 0 for cyan, .5 for red.
    # It is negative if green exceeds blue. (torch.copysign takes twice as long as this.)
    sign = (b - g).add_(_TINY).sign_()
    hue = (above + r).sub_(g).sub_(b).mul_(sign)
    spare = torch.clamp_min(chroma, 1e-12, out=sign)
    hue = torch.addcdiv(shift.view(-1, 1, 1), hue, spare, value=1 / 6, out=hue)
    hue.sub_(torch.round(hue, out=spare))
    # Red is smallest around hue 0; green is largest around -1/6, blue around 1/6. Each channel is
    # constant up to 1/6 of a turn from there, changes linearly up to 1/3, and is constant again.
    out = torch.empty_like(x) if out is None else out
    red, green, blue = out.unbind(1)
    for channel, base, slope, offset in (
        (green, above, -6, 1 / 6),
        (blue, above, -6, -1 / 6),
        (red, below, 6, 0),
    ):
        distance = torch.add(hue, offset, out=spare).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, distance, chroma, value=slope, out=channel)
    return out


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each sample with a Gaussian of its own standard deviation `sigma` [B], in pixels.

    The kernel has 2 `radius` + 1 taps. Images are reflected at the borders.
    """
    n, c, h, w = x.shape
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # [3 B, taps]
    # The samples become the channels of a single image, so that each has a kernel of its own.
    x = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, n * c, h + 2 * radius, w + 2 * radius)
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * c)
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * c)
    return x.view(n, c, h, w)


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert the values at or above `threshold`, in [0, 1]."""
    bright = torch.ge(x, threshold, out=torch.empty_like(x))
    return torch.addcmul(x, bright, 1 - 2 * x)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each sample about its center by `angle` [B], in degrees, counter-clockwise.

    The interpolation is bilinear. Images are reflected at the borders, which fills the corners.
    """
    h, w = x.shape[2:]
    # positions are in pixels from the center
    rows, columns = (
        torch.arange(side, device=x.device, dtype=x.dtype) - (side - 1) / 2 for side in (h, w)
    )
    radians = torch.deg2rad(angle)[:, None, None]
    cos, sin = radians.cos(), radians.sin()
    column = cos * columns - sin * rows[:, None]  # [B, H, W], as is `row`
    row = sin * columns + cos * rows[:, None]
    grid = torch.stack([column * (2 / w), row * (2 / h)], -1)
    return F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)


def normalize(
    x: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, out: Tensor | None = None
) -> Tensor:
    """Return (x - mean) / std per channel, in float32.

    Args:
        x: images, uint8 or float in [0, 1].
        mean: mean of each channel of the data set, in [0, 1].
        std: standard deviation of each channel of the data set, in [0, 1].
        out: tensor for the result; may be `x` if that is float32.
    """
    mean, scale = _mean_and_scale(x.device, tuple(mean), tuple(std))
    return torch.sub(x if x.dtype == torch.float32 else to_float(x), mean, out=out).mul_(scale)


def denormalize(x: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Undo `normalize`: return images in [0, 1]."""
    mean, scale = _mean_and_scale(x.device, tuple(mean), tuple(std))
    return (x / scale + mean).clamp(0, 1)


@functools.cache
def _mean_and_scale(device: torch.device, *values: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in values)
    return mean, 1 / std


def to_float(x: Tensor) -> Tensor:
    """Return a float32 copy of `x`, scaled from [0, 255] to [0, 1] if it is uint8."""
    return x.float().mul_(1 / 255) if x.dtype == torch.uint8 else x.to(torch.float32, copy=True)
