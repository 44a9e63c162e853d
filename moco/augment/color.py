"""Batched colour operations with a draw per sample, on whatever device the images are.

Every operation means what `torchvision.transforms.v2.functional` means by it; images are float RGB in [0, 1], [B, 3, H, W],
and each takes its parameter as a tensor [B].
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.augment.recipes import View
from moco.config import MEAN, STD
from moco.devices import to_device

_SMALL = (
    128 * 128
)  # pixels; to take images of up to so many one by one costs a CPU more in calls than it saves in cache
_TINY = 1e-30  # less than any difference of two colours but 0
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # the jitter's operations


@functools.cache
def fuse() -> None:
    """Let torch.compile fuse what `blend` and `adjust_hue` do, in this process from now on."""
    for operation in (blend, adjust_hue):
        compiled = torch.compile(operation, dynamic=True)
        globals()[operation.__name__] = functools.partial(_fused, compiled)


def _fused(operation: Callable[..., Tensor], *inputs: Tensor, out: Tensor | None = None) -> Tensor:
    """Call a compiled operation and copy its result to `out`: compiled code cannot write there."""
    result = operation(*inputs)
    return result if out is None else out.copy_(result)


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

    def part(self, rows: Tensor | slice) -> "Draws":
        """Return the draws of the samples with the indices `rows`."""
        return Draws(**{name: values[rows] for name, values in vars(self).items()})

    @staticmethod
    def join(draws: Sequence["Draws"]) -> "Draws":
        """Return the draws of several batches as those of one."""
        return Draws(
            **{name: torch.cat([getattr(one, name) for one in draws]) for name in vars(draws[0])}
        )


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

    The draws lie on the CPU, so it is known without waiting for the device which samples each
    operation changes. A GPU applies an operation to all of these samples at once. A CPU finishes
    one chunk of small images, or one large image, before the next: so the pixels stay in its cache.
    """
    if x.device.type != "cpu":
        return _apply_by_operation(x, view, draws)
    pixels = x.shape[-2] * x.shape[-1]
    return _apply_by_image(x, view, draws) if pixels > _SMALL else _apply_by_chunk(x, view, draws)


def augment(x: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """`draw` and `apply` in one call."""
    return apply(x, view, draw(view, len(x), generator))


def augment_views(
    crops: Sequence[Tensor], recipe: Sequence[View], generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """Return `augment` of each view's crops.

    An accelerator computes the views that have the same settings together: that is fewer operations
    for Python to start.
    """
    draws = [
        draw(view, len(x), generator)
        for x, view, generator in zip(crops, recipe, generators, strict=True)
    ]
    if crops[0].device.type == "cpu":
        return list(map(apply, crops, recipe, draws))
    return _apply_together(crops, recipe, draws)


def _apply_together(
    crops: Sequence[Tensor], recipe: Sequence[View], draws: list[Draws]
) -> list[Tensor]:
    alike: dict[View, list[int]] = {}
    for place, view in enumerate(recipe):
        alike.setdefault(view, []).append(place)
    found: dict[int, Tensor] = {}
    for view, places in alike.items():
        joined = apply(
            torch.cat([crops[i] for i in places]), view, Draws.join([draws[i] for i in places])
        )
        found.update(zip(places, joined.split([len(crops[i]) for i in places]), strict=True))
    return [found[place] for place in range(len(recipe))]


def _to_float(x: Tensor) -> Tensor:
    return x.float().mul_(1 / 255) if x.dtype == torch.uint8 else x.to(torch.float32, copy=True)


# On a GPU: apply an operation to all its samples at once.


def _apply_by_operation(x: Tensor, view: View, draws: Draws) -> Tensor:
    x = _to_float(x)
    operations = {
        "jitter": _jitter,
        "gray": _gray,
        "blur": _blur,
        "solarize": _solarize,
        "flip": _flip,
    }
    for name in (*view.order, "flip"):
        rows = getattr(draws, name).nonzero().squeeze(1)
        if len(rows):
            x = operations[name](x, rows, view, draws)
    return normalize(x, view.mean, view.std, out=x)


def _jitter(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    # Sort the samples by the slot in which their hue turns. In each slot those that turn their hue
    # are then one slice, and the others at most two slices.
    slots = _slot_of_hue(draws.order[rows])
    rows = rows[slots.argsort(stable=True)]
    ends = slots.bincount(minlength=4).cumsum(0).tolist()
    coefficients = to_device(_coefficients(draws)[rows], x.device)
    shift = to_device(draws.factors[rows, _HUE], x.device)
    rows = to_device(rows, x.device)
    y = x.index_select(0, rows)
    for slot, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        for part in (slice(0, first), slice(last, len(y))):
            if part.start < part.stop:
                blend(y[part], *coefficients[part, slot].unbind(1), out=y[part])
        if first < last and view.jitter[_HUE]:
            adjust_hue(y[first:last], shift[first:last], out=y[first:last])
    return x.index_copy_(0, rows, y)


def _coefficients(draws: Draws) -> Tensor:
    """Return `blend`'s factors in each of the jitter's slots, [B, slot, 3]; 1 where it has no effect."""
    operation = draws.order[..., None] == torch.arange(4)  # [B, slot, 4]: one True in each slot
    return torch.where(operation, draws.factors[:, None], torch.ones(()))[..., :_HUE]


def _slot_of_hue(order: Tensor) -> Tensor:
    """Return the index of the jitter's slot, of four, in which each sample's hue turns, [B]."""
    return (order == _HUE).int().argmax(1)


def _flip(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    rows = to_device(rows, x.device)
    return x.index_copy_(0, rows, x[rows].flip(-1))


def _gray(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    rows = to_device(rows, x.device)
    return x.index_copy_(0, rows, grayscale(x[rows]).expand(-1, 3, -1, -1))


def _blur(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    sigma = to_device(draws.sigma[rows], x.device)
    rows = to_device(rows, x.device)
    return x.index_copy_(0, rows, gaussian_blur(x[rows], sigma, _radius(x, view)))


def _radius(x: Tensor, view: View) -> int:
    return min(math.ceil(3 * view.blur_sigma[1]), x.shape[-1] - 1, x.shape[-2] - 1)


def _solarize(x: Tensor, rows: Tensor, view: View, draws: Draws) -> Tensor:
    rows = to_device(rows, x.device)
    return x.index_copy_(0, rows, solarize(x[rows]))


# On a CPU, for small images: one chunk after the other, each small enough for the cache. All images of
# a chunk turn their hue in the same slot of the jitter, or have no jitter. Those that turn gray come last.

_CHUNK = 128  # images


def _apply_by_chunk(x: Tensor, view: View, draws: Draws) -> Tensor:
    slots = torch.where(draws.jitter, _slot_of_hue(draws.order), 4)
    rows = (2 * slots + draws.gray).argsort(stable=True)
    ends = slots.bincount(minlength=5).cumsum(0).tolist()
    draws, rows = draws.part(rows), rows.numpy()
    coefficients, shift = _coefficients(draws).unbind(2), draws.factors[:, _HUE]
    happens = {name: getattr(draws, name).numpy() for name in ("gray", "blur", "solarize", "flip")}
    images, out = x.numpy(), torch.empty(x.shape)  # NumPy indexes several times as fast as PyTorch
    for slot, part in _chunks(ends):
        chunk, flip = images[rows[part]], happens["flip"][part]
        # Flip first: as uint8, the images are a quarter of the bytes.
        chunk[flip] = torch.from_numpy(chunk[flip]).flip(-1).numpy()
        y = _to_float(torch.from_numpy(chunk))
        for name in view.order:
            if name == "jitter":
                if slot < 4:
                    _jitter_chunk(y, [c[part] for c in coefficients], shift[part], slot, view)
            elif name == "gray":
                if count := int(happens["gray"][part].sum()):
                    y[-count:] = grayscale(y[-count:])
            elif happens[name][part].any():
                mine = draws.part(part)
                operation = _blur if name == "blur" else _solarize
                y = operation(y, getattr(mine, name).nonzero().squeeze(1), view, mine)
        out.numpy()[rows[part]] = normalize(y, view.mean, view.std, out=y).numpy()
    return out


def _chunks(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """Cut the rows before each of `ends` into equal parts of at most `_CHUNK`; yield group and part."""
    for group, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        parts = -(-(last - first) // _CHUNK)
        for i in range(parts):
            yield (
                group,
                slice(
                    first + i * (last - first) // parts, first + (i + 1) * (last - first) // parts
                ),
            )


def _jitter_chunk(
    x: Tensor, coefficients: list[Tensor], shift: Tensor, slot_of_hue: int, view: View
) -> None:
    """Jitter images in place. `coefficients` has three factors of `blend`, [B, slot] each."""
    for slot in range(4):
        if slot != slot_of_hue:
            blend(x, *(c[:, slot] for c in coefficients), out=x)
        elif view.jitter[_HUE]:
            adjust_hue(x, shift, out=x)


# On a CPU, where images are large: all operations on one image after the other, with plain numbers as factors.


def _apply_by_image(x: Tensor, view: View, draws: Draws) -> Tensor:
    radius, out = _radius(x, view), torch.empty(x.shape)
    order, factors, sigma = draws.order.tolist(), draws.factors.tolist(), draws.sigma.tolist()
    happens = {name: getattr(draws, name).tolist() for name in (*view.order, "flip")}
    operations = {
        "jitter": lambda image, i: _jitter_image(image, order[i], factors[i]),
        "gray": lambda image, i: grayscale(image).repeat(1, 3, 1, 1),
        "blur": lambda image, i: _blur_image(image, sigma[i], radius),
        "solarize": lambda image, i: solarize(image),
        "flip": lambda image, i: image.flip(-1),
    }
    for i, image in enumerate(x.split(1)):
        image = _to_float(image)
        for name in happens:
            if happens[name][i]:
                image = operations[name](image, i)
        normalize(image, view.mean, view.std, out[i : i + 1])
    return out


def _jitter_image(x: Tensor, order: list[int], factors: list[float]) -> Tensor:
    """Brightness, contrast, saturation and hue of one image [1, 3, H, W] in `order`; overwrites it."""
    for operation in order:
        factor = factors[operation]
        if operation == _BRIGHTNESS:
            x = x.mul_(factor).clamp_(0, 1)
        elif operation == _CONTRAST:
            mean = grayscale(x.mean((2, 3), keepdim=True))
            x = x.mul_(factor).add_(mean, alpha=1 - factor).clamp_(0, 1)
        elif operation == _SATURATION:
            x = torch.lerp(grayscale(x), x, factor).clamp_(0, 1)
        elif factor:
            x = adjust_hue(x, torch.tensor([factor]))
    return x


def _blur_image(x: Tensor, sigma: float, radius: int) -> Tensor:
    """`gaussian_blur` of one image [1, 3, H, W], without the taps that weigh less than 4e-6 of the middle one.

    Weighted sums of the padded image moved by one place, then by one row at a time, as if it were one long row. What runs
    over a border lies in the padding, which is cut off.
    """
    h, w = x.shape[2:]
    radius = min(radius, math.ceil(5 * sigma))
    kernel = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-radius, radius + 1)]
    x = F.pad(x, (radius,) * 4, mode="reflect")
    for step in (1, w + 2 * radius):
        row, out = x.view(-1), torch.empty_like(x)
        n = len(row) - 2 * radius * step
        total = torch.mul(row[:n], kernel[0] / sum(kernel), out=out.view(-1)[:n])
        for i, weight in enumerate(kernel[1:], 1):
            total.add_(row[i * step :][:n], alpha=weight / sum(kernel))
        x = out
    return x[..., :h, :w]
