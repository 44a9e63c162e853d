"""Batched colour operations with a draw per sample, on whatever device the images are.

Every operation means what `torchvision.transforms.v2.functional` means by it; images are float RGB in [0, 1], [B, 3, H, W],
and each takes its parameter as a tensor [B].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.augment.recipes import MEAN, STD, View

_HUE = 3  # the place of hue among brightness, contrast, saturation, hue


def grayscale(x: Tensor) -> Tensor:
    """Luma .2989 R + .587 G + .114 B, [B, 1, H, W]."""
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).unsqueeze(1)


def blend(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Apply at most one of the three blends to each sample (the other factors of that sample are 1), [B] each.

    factor x + (1 - factor) other, clamped to [0, 1], where other is 0, the mean luma, or the pixel's luma.
    """
    gray = grayscale(x)
    factor, contrast, saturation = ((f)[:, None, None, None] for f in (brightness * contrast * saturation, contrast, saturation))
    other = (1 - contrast) * gray.mean((2, 3), keepdim=True) + (1 - saturation) * gray
    return torch.addcmul(other, factor, x).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` [B] of a full turn, in [-.5, .5], through HSV."""
    r, g, b = x.unbind(1)
    value, arg = x.max(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp_min(1e-12)
    # hue in sixths of a turn: which channel is largest fixes the sector (red before green before blue on ties)
    sector = torch.where(arg == 0, (g - b) / safe, torch.where(arg == 1, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = sector + 6 * shift[:, None, None]
    # a channel loses the share max(0, min(k, 4 - k, 1)) of the chroma, k = (n + hue) mod 6 for n = 5, 3, 1
    k = (hue.unsqueeze(1) + hue.new_tensor((5.0, 3.0, 1.0)).view(1, 3, 1, 1)).remainder_(6)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each sample with its own `sigma` [B] in pixels: 2 radius + 1 taps, reflected at the borders."""
    n, c, h, w = x.shape
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # [B 3, taps]
    x = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, n * c, h + 2 * radius, w + 2 * radius)
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * c)
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * c)
    return x.view(n, c, h, w)


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert the pixels at or above `threshold`."""
    return torch.where(x >= threshold, 1 - x, x)


def normalize(x: Tensor) -> Tensor:
    """uint8 or float images to ImageNet's zero mean and unit deviation."""
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (_to_float(x) - mean) / std


@dataclass
class Draws:
    """What happens to each of B samples. Booleans and factors [B]; `order` [B, 4] lists the jitter's operations in turn."""

    jitter: Tensor
    order: Tensor
    factors: Tensor  # [B, 4]: brightness, contrast, saturation, hue
    gray: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor
    flip: Tensor


def draw(view: View, n: int, generator: torch.Generator) -> Draws:
    """Draw the parameters of `n` samples for `view`, on the CPU, so that CPU and GPU runs see the same views."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    strength = torch.tensor(view.jitter)
    center = torch.tensor((1.0, 1.0, 1.0, 0.0))
    low = torch.where(center > 0, (center - strength).clamp_min(0), -strength)
    low_sigma, high_sigma = view.blur_sigma
    return Draws(
        jitter=rand(n) < view.jitter_p,
        order=rand(n, 4).argsort(1),
        factors=low + (center + strength - low) * rand(n, 4),
        gray=rand(n) < view.gray_p,
        blur=rand(n) < view.blur_p,
        sigma=low_sigma + (high_sigma - low_sigma) * rand(n),
        solarize=rand(n) < view.solarize_p,
        flip=rand(n) < view.flip_p,
    )


def apply(x: Tensor, view: View, draws: Draws) -> Tensor:
    """Colour, flip and normalize `x` [B, 3, H, W] (uint8, or float in [0, 1]) as `draws` says; returns float32.

    The draws lie on the CPU, so the rows that an operation touches are known without waiting for the device.
    """
    x = _to_float(x)
    operations = {"jitter": _jitter, "gray": _gray, "blur": _blur, "solarize": _solarize}
    for name in view.order:
        rows = getattr(draws, name).nonzero().squeeze(1)
        if len(rows):
            x = operations[name](x, rows, view, draws)
    flip = draws.flip.nonzero().squeeze(1).to(x.device, non_blocking=True)
    x[flip] = x[flip].flip(-1)
    return normalize(x)


def augment(x: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """`draw` and `apply` in one call."""
    return apply(x, view, draw(view, len(x), generator))


def _to_float(x: Tensor) -> Tensor:
    return x.float().div_(255) if x.dtype == torch.uint8 else x.to(torch.float32, copy=True)


def _jitter(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    order, factors = draws.order[rows], draws.factors[rows]
    rows = rows.to(x.device, non_blocking=True)
    y = x[rows]
    for slot in range(4):
        operation = order[:, slot, None] == torch.arange(4)  # [b, 4], one True in each row
        coefficients = torch.where(operation, factors, torch.ones(()))[:, :_HUE].to(x.device, non_blocking=True)
        y = blend(y, *coefficients.unbind(1))
        hue = operation[:, _HUE].nonzero().squeeze(1)
        shift = factors[hue, _HUE].to(x.device, non_blocking=True)
        hue = hue.to(x.device, non_blocking=True)
        if len(hue) and view.jitter[_HUE]:
            y[hue] = adjust_hue(y[hue], shift)
    return x.index_copy_(0, rows, y)


def _gray(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    rows = rows.to(x.device, non_blocking=True)
    return x.index_copy_(0, rows, grayscale(x[rows]).expand(-1, 3, -1, -1))


def _blur(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    radius = min(math.ceil(3 * view.blur_sigma[1]), x.shape[-1] - 1, x.shape[-2] - 1)
    sigma = draws.sigma[rows].to(x.device, non_blocking=True)
    rows = rows.to(x.device, non_blocking=True)
    return x.index_copy_(0, rows, gaussian_blur(x[rows], sigma, radius))


def _solarize(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    rows = rows.to(x.device, non_blocking=True)
    return x.index_copy_(0, rows, solarize(x[rows]))
