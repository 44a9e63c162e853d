"""The images of one split, by number: files or an array, with their labels; and how a file becomes a tensor."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.functional import pil_to_tensor

from moco.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")

Reduction = Callable[[int, int], int]  # (height, width) to the factor by which an image may be shrunk: 1, 2, 4 or 8


def whole(height: int, width: int) -> int:
    """The `Reduction` that keeps every pixel."""
    return 1


@dataclass(frozen=True)
class Images:
    """N images with their labels, from `root`, the folder that messages name.

    `labels` is int64: places in `classes` [N], or, where an image shows several of them, [N, classes] with 1 for shown,
    0 for not shown, and -1 for what neither training nor a metric counts.
    """

    root: Path
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int, reduction: Reduction = whole) -> Tensor:
        """Image `i`, uint8 [3, H, W]. Raises InputError that names it."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """What a list of images calls image `i`."""
        raise NotImplementedError

    def part(self, rows: np.ndarray) -> "Images":
        """The images of `rows`, places or a mask."""
        raise NotImplementedError

    @property
    def many(self) -> bool:
        """Whether an image can show several classes."""
        return self.labels.ndim == 2


@dataclass(frozen=True)
class ImageFolder(Images):
    """Images in files below `root`.

    `paths` is an array of bytes relative to it, [N]: arrays, because worker processes that count references to a million
    strings copy the memory that they share.
    """

    paths: np.ndarray

    def path(self, i: int) -> str:
        """The full path of image `i`."""
        return os.path.join(self.root, self.name(i))

    def read(self, i: int, reduction: Reduction = whole) -> Tensor:
        return decode(self.path(i), reduction)

    def name(self, i: int) -> str:
        return os.fsdecode(self.paths[i])

    def part(self, rows: np.ndarray) -> "ImageFolder":
        return replace(self, paths=self.paths[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class ImageArray(Images):
    """Images that lie in memory: `pixels` is uint8 [N, 3, H, W]."""

    pixels: np.ndarray

    def read(self, i: int, reduction: Reduction = whole) -> Tensor:
        return torch.from_numpy(self.pixels[i])

    def name(self, i: int) -> str:
        return str(i)

    def part(self, rows: np.ndarray) -> "ImageArray":
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])


_LARGE = 200_000  # bytes of a JPEG above which a look at its size first costs next to nothing


def decode(path: str, reduction: Reduction = whole) -> Tensor:
    """The RGB image in `path`, uint8 [3, H, W]. Raises InputError that names the file.

    A large JPEG is decoded at 1 / `reduction(height, width)` of its size, which is faster.
    """
    try:
        data = read_file(path)
        if not len(data):
            raise InputError(f"{path}: empty image file; remove or replace it")
        if len(data) > _LARGE and data[0] == 0xFF and data[1] == 0xD8:
            image = _decode_smaller(path, reduction)
            if image is not None:
                return image
        image = decode_image(data, ImageReadMode.RGB)
        if image.dtype != torch.uint8:  # a PNG of 16 bits a channel
            image = (image.int() >> 8).to(torch.uint8)
        return image[0] if image.dim() == 4 else image  # the first frame of an animation
    except (RuntimeError, ValueError, OSError):
        return _decode_with_pil(path)


def _decode_smaller(path: str, reduction: Reduction) -> Tensor | None:
    """The JPEG in `path` at the share of its size that `reduction` allows; None where that is all of it."""
    try:
        with Image.open(path) as image:
            factor = reduction(image.height, image.width)
            image.draft("RGB", (image.width // factor, image.height // factor))
            return pil_to_tensor(image.convert("RGB")) if factor > 1 else None
    except Image.DecompressionBombError:  # Pillow refuses images of more than 178 million pixels; torchvision reads them
        return None


def _decode_with_pil(path: str) -> Tensor:
    """What torchvision's decoders do not read: TIFF, BMP, PPM, CMYK JPEGs."""
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise many kinds
        reason = str(error).replace(f"'{path}'", "file") or type(error).__name__
        raise InputError(f"{path}: unreadable image ({reason}); remove or replace it") from None
