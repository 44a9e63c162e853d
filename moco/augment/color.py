"""Draw the parameters of a view's color operations per sample, and apply them to a batch.

Start at `augment_views`. The operations are in `moco/augment/operations.py`, the crops in
`moco/augment/crop.py`, and the recipes of the views in `moco/augment/recipes.py`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moco.augment import one_image, randaugment
from moco.augment.one_image import HUE
from moco.augment.operations import (
    adjust_hue,
    blend,
    denormalize,
    gaussian_blur,
    grayscale,
    normalize,
    rotate,
    solarize,
    to_float,
)
from moco.augment.recipes import View
from moco.devices import to_device

__all__ = [
    "Draws",
    "adjust_hue",
    "apply",
    "augment",
    "augment_views",
    "blend",
    "compile_operations",
    "denormalize",
    "draw",
    "gaussian_blur",
    "grayscale",
    "normalize",
    "solarize",
]

# A CPU computes images of more pixels one by one: then the cache saves more than calls cost.
_SMALL = 128 * 128
_FLIPPED = {"flip": -1, "vertical_flip": -2}  # the axis of each flip
_GEOMETRY = (*_FLIPPED, "rotate")  # the last operations of every view


@functools.cache
def compile_operations() -> None:
    """Compile `blend` and `adjust_hue` with torch.compile, for the rest of this process."""
    for operation in (blend, adjust_hue):
        compiled = torch.compile(operation, dynamic=True)
        globals()[operation.__name__] = functools.partial(_fused, compiled)


def _fused(operation: Callable[..., Tensor], *inputs: Tensor, out: Tensor | None = None) -> Tensor:
    """Call a compiled operation and copy its result to `out`, because it cannot write to `out`."""
    result = operation(*inputs)
    return result if out is None else out.copy_(result)


@dataclass
class Draws:
    """The random parameters of B samples, each a tensor [B] unless a comment says otherwise."""

    jitter: Tensor  # whether to jitter; gray, blur, solarize and the flips are bool, too
    order: Tensor  # [B, 4] the jitter's operations, in the order in which to apply them
    factors: Tensor  # [B, 4] of brightness, contrast, saturation, hue
    gray: Tensor
    blur: Tensor
    sigma: Tensor  # of the blur, in pixels
    solarize: Tensor
    flip: Tensor
    operations: Tensor  # [B, N, 4] for `randaugment.apply`
    vertical_flip: Tensor
    angle: Tensor  # of the rotation, in degrees

    @property
    def randaugment(self) -> Tensor:
        """Return whether to apply RandAugment to each sample."""
        return torch.full((len(self.operations),), self.operations.shape[1] > 0)

    @property
    def rotate(self) -> Tensor:
        """Return whether to rotate each sample."""
        return self.angle != 0

    def select(self, indices: Tensor | slice) -> "Draws":
        """Return the draws of the samples at `indices`."""
        return Draws(**{name: values[indices] for name, values in vars(self).items()})

    @staticmethod
    def join(draws: Sequence["Draws"]) -> "Draws":
        """Concatenate the draws of several batches."""
        return Draws(
            **{name: torch.cat([getattr(one, name) for one in draws]) for name in vars(draws[0])}
        )


def draw(view: View, n: int, generator: torch.Generator) -> Draws:
    """Draw the parameters of `n` samples of `view`.

    The draws are on the CPU, so that runs on CPUs and GPUs see the same views.
    """

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
        operations=rand(n, view.randaugment[0], 4),
        # New draws are added at the end, so that those above stay the same.
        vertical_flip=rand(n) < view.vertical_flip_p,
        angle=view.rotate * (2 * rand(n) - 1),
    )


def apply(x: Tensor, view: View, draws: Draws) -> Tensor:
    """Return the views of images: apply color operations, flips, rotation and normalization.

    The draws are on the CPU, so the code knows which samples an operation changes without waiting
    for the device. A GPU applies an operation to all of these samples at once. A CPU finishes one
    chunk of small images, or one large image, before the next, so that the pixels stay in its
    cache.

    Args:
        x: images [B, 3, H, W], uint8 or float in [0, 1].
        view: their recipe.
        draws: the random parameters of the B samples, from `draw`.

    Returns:
        float32 [B, 3, H, W].
    """
    if x.device.type != "cpu":
        return _apply_by_operation(x, view, draws)
    # `_apply_by_chunk` flips first, and RandAugment does not commute with a flip.
    large = x.shape[-2] * x.shape[-1] > _SMALL or view.randaugment[0]
    return _apply_by_image(x, view, draws) if large else _apply_by_chunk(x, view, draws)


def augment(x: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """Draw the parameters of `view` for images `x`, and apply them. See `draw` and `apply`."""
    return apply(x, view, draw(view, len(x), generator))


def augment_views(
    crops: Sequence[Tensor], recipe: Sequence[View], generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """Return the views of a batch: `augment` each view's crops with its own generator.

    On an accelerator, views with equal settings are computed together, to start fewer kernels.

    Args:
        crops: crops of each view, [B, 3, S, S], uint8 or float in [0, 1].
        recipe: the views.
        generators: random generator of each view, on the CPU.

    Returns:
        float32 [B, 3, S, S] per view.
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
    """Return the views of a batch; apply views with equal settings in one call."""
    equal: dict[View, list[int]] = {}
    for i, view in enumerate(recipe):
        equal.setdefault(view, []).append(i)
    found: dict[int, Tensor] = {}
    for view, indices in equal.items():
        joined = torch.cat([crops[i] for i in indices])
        images = apply(joined, view, Draws.join([draws[i] for i in indices]))
        found.update(zip(indices, images.split([len(crops[i]) for i in indices]), strict=True))
    return [found[i] for i in range(len(recipe))]


# On a GPU: apply each operation at once to all samples that it changes.


def _apply_by_operation(x: Tensor, view: View, draws: Draws) -> Tensor:
    x = to_float(x)
    for name in (*view.order, *_GEOMETRY):
        indices = getattr(draws, name).nonzero().squeeze(1)
        if len(indices):
            change = _jitter if name == "jitter" else functools.partial(_change, name)
            change(x, indices, view, draws)
    return normalize(x, view.mean, view.std, out=x)


def _change(name: str, x: Tensor, indices: Tensor, view: View, draws: Draws) -> None:
    """Apply an operation other than the jitter to the samples at `indices`, in place."""
    operations = draws.operations[indices]
    number = {"rotate": draws.angle, "blur": draws.sigma}.get(name)
    number = None if number is None else to_device(number[indices], x.device)
    indices = to_device(indices, x.device)
    y = x[indices]
    if name == "gray":
        y = grayscale(y).expand(-1, 3, -1, -1)
    elif name == "blur":
        y = gaussian_blur(y, number, _radius(x, view))
    elif name == "randaugment":
        y = randaugment.apply(y, operations, view.randaugment[1])
    elif name == "solarize":
        y = solarize(y)
    elif name == "rotate":
        y = rotate(y, number)
    else:
        y = y.flip(_FLIPPED[name])
    x.index_copy_(0, indices, y)


def _jitter(x: Tensor, indices: Tensor, view: View, draws: Draws) -> None:
    """Jitter the samples at `indices`, in place."""
    # The jitter has four slots, one operation in each. Sort the samples by the slot of their hue
    # shift: then in each slot the samples that shift their hue are one slice, and the others two.
    slots = _slot_of_hue(draws.order[indices])
    indices = indices[slots.argsort(stable=True)]
    ends = slots.bincount(minlength=4).cumsum(0).tolist()
    coefficients = to_device(_coefficients(draws)[indices], x.device)
    shift = to_device(draws.factors[indices, HUE], x.device)
    indices = to_device(indices, x.device)
    y = x.index_select(0, indices)
    for slot, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        for part in (slice(0, first), slice(last, len(y))):
            if part.start < part.stop:
                blend(y[part], *coefficients[part, slot].unbind(1), out=y[part])
        if first < last and view.jitter[HUE]:
            adjust_hue(y[first:last], shift[first:last], out=y[first:last])
    x.index_copy_(0, indices, y)


def _coefficients(draws: Draws) -> Tensor:
    """Return the factors of `blend` in each slot, [B, slot, 3]: 1 if it has no effect there."""
    operation = draws.order[..., None] == torch.arange(4)  # [B, slot, 4]: one True in each slot
    return torch.where(operation, draws.factors[:, None], torch.ones(()))[..., :HUE]


def _slot_of_hue(order: Tensor) -> Tensor:
    """Return the index of the slot in which each sample shifts its hue, [B]."""
    return (order == HUE).int().argmax(1)


def _radius(x: Tensor, view: View) -> int:
    """Return the radius of the blur's kernel: 3 sigma, or less if the images are smaller."""
    return min(math.ceil(3 * view.blur_sigma[1]), x.shape[-1] - 1, x.shape[-2] - 1)


# On a CPU, for small images: one chunk after the other, each small enough for the cache. All images
# of a chunk shift their hue in the same slot, or none has jitter. Those that turn gray come last.

_CHUNK = 128  # images


def _apply_by_chunk(x: Tensor, view: View, draws: Draws) -> Tensor:
    slots = torch.where(draws.jitter, _slot_of_hue(draws.order), 4)
    order = (2 * slots + draws.gray).argsort(stable=True)
    ends = slots.bincount(minlength=5).cumsum(0).tolist()
    draws, order = draws.select(order), order.numpy()
    coefficients, shift = _coefficients(draws).unbind(2), draws.factors[:, HUE]
    names = ("gray", "blur", "solarize", *_GEOMETRY)
    happens = {name: getattr(draws, name).numpy() for name in names}
    images, out = x.numpy(), torch.empty(x.shape)  # NumPy indexes several times as fast as PyTorch
    for slot, part in _chunks(ends):
        chunk = np.ascontiguousarray(images[order[part]])
        # Flip first, because uint8 images are a quarter of the bytes.
        for name, axis in _FLIPPED.items():
            if (flip := happens[name][part]).any():
                chunk[flip] = torch.from_numpy(chunk[flip]).flip(axis).numpy()
        y = to_float(torch.from_numpy(chunk))
        for name in (*view.order, "rotate"):
            if name == "jitter":
                if slot < 4:
                    _jitter_chunk(y, [c[part] for c in coefficients], shift[part], slot, view)
            elif name == "gray":
                if count := int(happens["gray"][part].sum()):
                    y[-count:] = grayscale(y[-count:])
            elif name in happens and happens[name][part].any():
                of_chunk = draws.select(part)
                _change(name, y, getattr(of_chunk, name).nonzero().squeeze(1), view, of_chunk)
        out.numpy()[order[part]] = normalize(y, view.mean, view.std, out=y).numpy()
    return out


def _chunks(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """Split the samples up to each of `ends` into equal chunks of at most `_CHUNK`.

    Yields the index of the end and the chunk.
    """
    for group, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        n = last - first
        chunks = -(-n // _CHUNK)
        for i in range(chunks):
            yield group, slice(first + i * n // chunks, first + (i + 1) * n // chunks)


def _jitter_chunk(
    x: Tensor, coefficients: list[Tensor], shift: Tensor, slot_of_hue: int, view: View
) -> None:
    """Jitter images in place; `coefficients` are the three factors of `blend`, [B, slot] each."""
    for slot in range(4):
        if slot != slot_of_hue:
            blend(x, *(c[:, slot] for c in coefficients), out=x)
        elif view.jitter[HUE]:
            adjust_hue(x, shift, out=x)


# On a CPU, for large images: all operations on one image after the other, with numbers as factors.


def _apply_by_image(x: Tensor, view: View, draws: Draws) -> Tensor:
    out = torch.empty(x.shape)
    with torch.inference_mode():  # many short operations, which start faster
        _write_by_image(x, view, draws, out)
    return out


def _write_by_image(x: Tensor, view: View, draws: Draws, out: Tensor) -> None:
    """Write the views of `x` to `out`."""
    order, factors, sigma = draws.order.tolist(), draws.factors.tolist(), draws.sigma.tolist()
    operations = (*_FLIPPED, *view.order, "rotate")
    if view.randaugment[0]:  # it does not commute with a flip
        operations = (*view.order, *_GEOMETRY)
    happens = {name: getattr(draws, name).tolist() for name in operations}
    for i, stored in enumerate(x.numpy()[:, None]):
        changes = [name for name in operations if happens[name][i]]
        # `_one_image` copies anyway, so a flip before it is free
        while changes and changes[0] in _FLIPPED:
            stored = np.flip(stored, _FLIPPED[changes.pop(0)])
        image = _one_image(stored)
        for name in changes:
            if name == "jitter":
                image.jitter(order[i], factors[i])
            elif name == "gray":
                image.grayscale()
            elif name == "blur":
                image.x = one_image.gaussian_blur(image.x, sigma[i], _radius(x, view))
            elif name == "randaugment":
                chosen = draws.operations[i : i + 1]
                image.colors()
                image.x = randaugment.apply(image.values(), chosen, view.randaugment[1])
            elif name == "solarize":
                image.x = solarize(image.values())
            elif name == "rotate":
                image.x = rotate(image.x, draws.angle[i : i + 1])
            else:
                image.x = image.x.flip(_FLIPPED[name])
        image.normalize(view.mean, view.std, out[i : i + 1])


def _one_image(x: np.ndarray) -> one_image.OneImage:
    """Return an image [1, 3, H, W], uint8 or float, in the form in which operations change it."""
    if x.dtype != np.uint8:
        return one_image.OneImage(torch.from_numpy(x.astype(np.float32, order="C")))
    # NumPy changes the layout twice as fast as PyTorch
    return one_image.OneImage(torch.from_numpy(np.ascontiguousarray(x)).float(), 1 / 255)
