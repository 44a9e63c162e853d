"""The color operations on one large image, for a CPU.

The results equal those of `moco/augment/operations.py`, except for rounding. That file works on
batches. Here, each parameter is a number, and there are fewer passes over the pixels, because a
core's cache holds only a few such images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.augment.operations import LUMA

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the jitter's operations


@dataclass
class OneImage:
    """An image whose RGB values in [0, 1] are `scale` x + `offset`.

    Operations that only scale or shift all values change these two numbers. The others give the
    same result for `x` as for the values, except for `clamp`.
    """

    x: Tensor  # float [1, 3, H, W], contiguous; operations may overwrite it. Gray: [1, 1, H, W]
    scale: float = 1.0
    offset: float = 0.0

    def values(self) -> Tensor:
        """Return the RGB values in [0, 1], [1, 3, H, W] or [1, 1, H, W]; they become `x`."""
        if (self.scale, self.offset) != (1, 0):
            offset = torch.tensor(self.offset, dtype=self.x.dtype)
            torch.add(offset, self.x, alpha=self.scale, out=self.x)
            self.scale, self.offset = 1.0, 0.0
        return self.x

    def colors(self) -> Tensor:
        """Return `x` with three channels, [1, 3, H, W]; it becomes `x`."""
        self.x = self.x.expand(-1, 3, -1, -1).contiguous()
        return self.x

    def jitter(self, order: list[int], factors: list[float]) -> None:
        """Jitter the colors. `order` lists the operations, `factors` has the factor of each."""
        self.colors()
        for operation in order:
            factor = factors[operation]
            if operation == HUE:
                self.x = adjust_hue(self.x, factor) if factor else self.x
                continue
            if operation == BRIGHTNESS:
                self.scale, self.offset = factor * self.scale, factor * self.offset
            elif operation == CONTRAST:
                means = self.x.mean((0, 2, 3)).tolist()
                mean = self.scale * float(np.dot(LUMA, means)) + sum(LUMA) * self.offset
                self.scale *= factor
                self.offset = factor * self.offset + (1 - factor) * mean
            elif operation == SATURATION:
                self.x = combined(self.x, factor * np.eye(3) + (1 - factor) * np.array(LUMA))
                self.offset *= factor + (1 - factor) * sum(LUMA)
            if factor > 1:  # otherwise the result is a mean of numbers in [0, 1]
                self.clamp()

    def clamp(self) -> None:
        """Clamp the RGB values to [0, 1]."""
        if self.scale < 1e-6:  # a division by it may overflow
            self.values().clamp_(0, 1)
        else:
            self.x.clamp_(-self.offset / self.scale, (1 - self.offset) / self.scale)

    def grayscale(self) -> None:
        """Replace the channels by the luma."""
        self.x = combined(self.x, np.array([LUMA]))
        self.offset *= sum(LUMA)

    def normalize(self, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
        """Write (values - mean) / std to `out` [1, 3, H, W]."""
        offsets = torch.tensor([(self.offset - m) / s for m, s in zip(mean, std, strict=True)])
        channels = self.x.expand(-1, 3, -1, -1).unbind(1)
        for x, s, offset, result in zip(channels, std, offsets, out.unbind(1), strict=True):
            torch.add(offset, x, alpha=self.scale / s, out=result)


def combined(x: Tensor, weights: np.ndarray) -> Tensor:
    """Return `weights` [n, 3] times the channels of `x` [1, 3, H, W]: [1, n, H, W]."""
    found = torch.mm(torch.from_numpy(weights).to(x.dtype), x.view(3, -1))
    return found.view(1, -1, *x.shape[2:])


def adjust_hue(x: Tensor, shift: float) -> Tensor:
    """Return the image with its hue shifted in HSV space by `shift`, in [-.5, .5] of a turn.

    The image `x` may be overwritten. A shift by a third of a turn exchanges the channels. The rest
    of the shift is at most 1/6. As the hue turns, each channel of a pixel rises from the pixel's
    minimum to its maximum within 1/6 of a turn, stays there for 1/3, falls within 1/6, and stays at
    the minimum for 1/3. Extend the rising or falling line of a channel c beyond the minimum and the
    maximum. At the pixel's hue, its value is 2 c - middle, where `middle` is the median of the
    pixel's channels. The shift adds or subtracts 6 `shift` (maximum - minimum), and the result is
    clamped to the minimum and maximum. The order of the other two channels says whether the line
    rises or falls.
    """
    thirds = round(3 * shift)
    if thirds % 3:
        x = x.roll(thirds, 1)
    r, g, b = x.unbind(1)
    low, high = torch.minimum(r, g), torch.maximum(r, g)
    smallest, largest = torch.minimum(low, b), torch.maximum(high, b)
    torch.minimum(high, b, out=high)
    middle = torch.maximum(low, high, out=low)
    change = torch.sub(largest, smallest, out=high).mul_(6 * shift - 2 * thirds)
    line = torch.empty_like(x)  # 1 for the rising line, -1 for the falling one
    for i, (after, before) in enumerate(((g, b), (b, r), (r, g))):
        torch.sub(before, after, out=line[:, i])
    torch.lerp(middle, x, 2.0, out=x).addcmul_(line.sign_(), change)  # lerp: 2 x - middle
    return torch.clamp(x, smallest, largest, out=x)


def gaussian_blur(x: Tensor, sigma: float, radius: int) -> Tensor:
    """Return the blurred image, without taps below 4e-6 of the largest.

    The kernel has at most 2 `radius` + 1 taps, and `sigma` is in pixels. Borders are reflected.

    A blur along an axis is a product with a matrix that is zero far from its diagonal. A block of
    rows or columns needs only the pixels near it. `band` has their weights, which are the same for
    all blocks.
    """
    height, width = x.shape[2:]
    radius = min(radius, math.ceil(5 * sigma))
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-radius, radius + 1)]
    taps = torch.tensor(weights, dtype=x.dtype) / sum(weights)
    reach = _BLOCK + 2 * radius
    band = torch.zeros(_BLOCK, reach, dtype=x.dtype)
    band.as_strided((_BLOCK, len(taps)), (reach + 1, 1)).copy_(taps)
    down, across = -(-height // _BLOCK), -(-width // _BLOCK)  # numbers of blocks
    missing = (0, across * _BLOCK - width, 0, down * _BLOCK - height)  # of the last blocks
    out = torch.empty(1, x.shape[1], down * _BLOCK, across * _BLOCK, dtype=x.dtype)
    # one channel and its intermediate results fit in a core's cache
    for channel, result in zip(x.unbind(1), out[0], strict=True):
        channel = F.pad(channel, (radius,) * 4, mode="reflect")
        channel = F.pad(channel, missing)[0] if any(missing) else channel[0]
        rows = channel.unfold(0, reach, _BLOCK).transpose(1, 2)  # [down, reach, W + 2 radius]
        channel = torch.bmm(band.expand(down, -1, -1), rows).flatten(0, 1)
        columns = channel.unfold(1, reach, _BLOCK).transpose(0, 1)  # [across, H, reach]
        channel = torch.bmm(columns, band.t().expand(across, -1, -1))
        result.view(-1, across, _BLOCK).copy_(channel.transpose(0, 1))
    return out[..., :height, :width].contiguous()


_BLOCK = 16  # rows or columns
