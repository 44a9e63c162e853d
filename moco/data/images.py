"""The images of one split, by number: files or an array, with their labels; and how a file becomes a tensor."""

import contextlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.functional import pil_to_tensor

from moco.errors import InputError

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jpe",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
)

Reduction = Callable[
    [int, int], int
]  # (height, width) to the factor by which an image may be shrunk: 1, 2, 4 or 8


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

    def together(self, rows: np.ndarray, takes: Callable[[int, int], bool]) -> Tensor | None:
        """Return the images with the indices `rows` as one uint8 [n, 3, H, W], or None.

        The result is None unless all are in memory with equal sizes, and `takes(H, W)` is true.
        """
        return None

    def name(self, i: int) -> str:
        """What a list of images calls image `i`."""
        raise NotImplementedError

    def part(self, rows: np.ndarray) -> "Images":
        """The images of `rows`, places or a mask."""
        raise NotImplementedError

    @property
    def multi_label(self) -> bool:
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
class CachedFolder(ImageFolder):
    """An `ImageFolder` whose decoded images are in memory (see `cache`), except those left on disk.

    `pixels` is uint8 and holds one image after the other. It is a tensor, because PyTorch shares
    tensors with loader processes by any start method. `starts` [N] has the offset of each image in
    `pixels`, or -1 if the image is read from its file. `sizes` [N, 2] has heights and widths.
    """

    pixels: Tensor
    starts: np.ndarray
    sizes: np.ndarray

    def read(self, i: int, reduction: Reduction = whole) -> Tensor:
        start, (height, width) = self.starts[i], self.sizes[i].tolist()
        if start < 0:
            return super().read(i, reduction)
        return self.pixels[start : start + 3 * height * width].view(3, height, width)

    def together(self, rows: np.ndarray, takes: Callable[[int, int], bool]) -> Tensor | None:
        starts, sizes = self.starts[rows], self.sizes[rows]
        height, width = sizes[0].tolist()
        if (starts < 0).any() or (sizes != sizes[0]).any() or not takes(height, width):
            return None
        # NumPy gathers bytes eight times as fast as PyTorch
        windows = np.lib.stride_tricks.sliding_window_view(self.pixels.numpy(), 3 * height * width)
        return torch.from_numpy(windows[starts]).view(len(rows), 3, height, width)

    def part(self, rows: np.ndarray) -> "CachedFolder":
        return replace(super().part(rows), starts=self.starts[rows], sizes=self.sizes[rows])


@dataclass(frozen=True)
class ImageArray(Images):
    """Images that lie in memory: `pixels` is uint8 [N, 3, H, W]."""

    pixels: np.ndarray

    def read(self, i: int, reduction: Reduction = whole) -> Tensor:
        return torch.from_numpy(self.pixels[i])

    def together(self, rows: np.ndarray, takes: Callable[[int, int], bool]) -> Tensor | None:
        return torch.from_numpy(self.pixels[rows]) if takes(*self.pixels.shape[2:]) else None

    def name(self, i: int) -> str:
        return str(i)

    def part(self, rows: np.ndarray) -> "ImageArray":
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])


_LARGE = 200_000  # bytes of a JPEG above which a look at its size first costs next to nothing


def decode(path: str, reduction: Reduction = whole) -> Tensor:
    """The RGB image in `path`, uint8 [3, H, W]: of an animation the first frame, of deep images the upper eight bits.

    A large JPEG is decoded at 1 / `reduction(height, width)` of its size, which is faster. Raises InputError that names the file.
    """
    try:
        data = read_file(path)
        if not len(data):
            raise InputError(f"{path}: empty image file; remove or replace it")
        raw = memoryview(data.numpy())  # reading elements of a tensor is slow
        if raw[:2] != b"\xff\xd8":  # torchvision crashes on damaged PNGs
            return _decode_with_pil(path)
        _check_size(path, raw)
        if len(data) > _LARGE:
            image = _decode_smaller(path, reduction)
            if image is not None:
                return image
        return decode_image(data, ImageReadMode.RGB)
    except (RuntimeError, ValueError, OSError, IndexError):
        return _decode_with_pil(path)


class _Shrinks(Exception):
    """An exception for a large JPEG, which `decode` may decode at a reduced size."""


def decode_whole(path: str) -> Tensor | None:
    """Decode an image that has one size only; return None for large JPEGs and unreadable files.

    `decode` may decode a large JPEG at a reduced size, depending on its `reduction`.
    """

    def refuse(height: int, width: int) -> int:
        raise _Shrinks

    try:
        return decode(path, refuse)
    except (InputError, _Shrinks):
        return None


def decoded_size(path: str) -> int:
    """Read from the file's header how many bytes `decode_whole` returns; 0 if it returns None."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return 0  # opening a pipe would block
        with _opened(path) as image:
            large = image.format in ("JPEG", "MPO") and os.path.getsize(path) > _LARGE
            return 0 if large else 3 * image.height * image.width
    except Exception:  # as in `_decode_with_pil`
        return 0


_MOST = 10**9  # pixels
_DENSEST = 1000  # pixels of a JPEG in a byte; of a progressive one in one colour they are 341


def _check_size(path: str, data: memoryview) -> None:
    """Raise InputError for a JPEG that claims more pixels than its bytes can hold, before they are allocated."""
    i = 2
    while i + 9 <= len(data) and data[i] == 0xFF:
        if 0xC0 <= data[i + 1] <= 0xCF and data[i + 1] not in (
            0xC4,
            0xC8,
            0xCC,
        ):  # the frame's header
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (i + 5, i + 7))
            if height * width > min(_MOST, max(_DENSEST * len(data), 1 << 20)):
                raise InputError(
                    f"{path}: unreadable image (claims {width} x {height} pixels in {len(data)} bytes); remove or replace it"
                )
            return
        i += 1 if data[i + 1] == 0xFF else 2 + int.from_bytes(data[i + 2 : i + 4], "big")


# what Pillow may take a file for, whatever it is called: of others, PostScript would be run
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """By Pillow, without its warnings (of palettes, EXIF), which every worker would repeat; what it cannot read, it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_FORMATS) as image:
            yield image


def _decode_smaller(path: str, reduction: Reduction) -> Tensor | None:
    """The JPEG in `path` at the share of its size that `reduction` allows; None where that is all of it."""
    try:
        with _opened(path) as image:
            factor = reduction(image.height, image.width)
            image.draft("RGB", (image.width // factor, image.height // factor))
            return pil_to_tensor(image.convert("RGB")) if factor > 1 else None
    except (
        Image.DecompressionBombError
    ):  # Pillow refuses images of more than 178 million pixels; torchvision reads them
        return None


def _decode_with_pil(path: str) -> Tensor:
    """All but ordinary JPEGs."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a file")  # a pipe would be waited for
        with _opened(path) as image:
            return pil_to_tensor(_shallow(image).convert("RGB"))
    except Exception as error:  # Pillow's plugins raise many kinds
        broken = isinstance(error, FileNotFoundError) and os.path.islink(path)
        reason = "a broken link" if broken else getattr(error, "strerror", None) or str(error)
        reason = reason.replace(f"'{path}'", "file") or type(error).__name__
        raise InputError(f"{path}: unreadable image ({reason}); remove or replace it") from None


def _shallow(image: Image.Image) -> Image.Image:
    """An image of more than eight bits with eight, which Pillow by itself would clip: 16-bit grey by its upper ones.

    Of wider integers and of floats the file does not say what is white: it is the least of 1 (of floats), 255 and 65535 that no
    pixel is above, or else the brightest pixel.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64)).clip(0)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        white = 65535.0
    else:
        levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((level for level in levels if pixels.max() <= level), pixels.max())
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
