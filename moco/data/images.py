"""The images of one split, in files or in memory, and the decoding of image files.

`folders` and `registry` make these objects; `loader` turns them into batches of crops.
"""

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

# A function from an image's height and width to the factor by which the image may be shrunk while
# it is decoded: 1, 2, 4 or 8.
Reduction = Callable[[int, int], int]


def full_size(_height: int, _width: int) -> int:
    """Return 1, the factor that keeps every pixel. This is the default `Reduction`."""
    return 1


@dataclass(frozen=True)
class Images:
    """The images of one split and their labels. Subclasses hold the images in files or in memory.

    Attributes:
        root: The folder of the images. Error messages name it.
        labels: int64 [N], indices into `classes`. If an image can show several classes:
            [N, classes], with 1 for a class that is shown, 0 for one that is not, and -1 for one
            that training and metrics ignore.
        classes: The names of the classes.
    """

    root: Path
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, i: int, reduction: Reduction = full_size) -> Tensor:
        """Return image `i` as uint8 [3, H, W].

        Raises InputError, which names the image, if it cannot be read.
        """
        raise NotImplementedError

    def read_batch(self, indices: np.ndarray, accepts: Callable[[int, int], bool]) -> Tensor | None:
        """Return the images with these `indices` as one uint8 tensor [n, 3, H, W], or None.

        The result is None unless all are in memory with equal sizes, and `accepts(H, W)` is true.
        """
        del indices, accepts  # for subclasses
        return None

    def name(self, i: int) -> str:
        """Return the name of image `i` in lists of images."""
        raise NotImplementedError

    def subset(self, indices: np.ndarray) -> "Images":
        """Return the images with these `indices`, or those for which a boolean mask is true."""
        raise NotImplementedError

    @property
    def multi_label(self) -> bool:
        """Return whether an image can show several classes."""
        return self.labels.ndim == 2


@dataclass(frozen=True)
class ImageFolder(Images):
    """Images in files below `root`.

    `paths` [N] holds their paths relative to `root` as bytes. It is an array, not a list. A worker
    process that reads a list updates the reference count of each string, and thereby copies memory
    that processes would otherwise share.
    """

    paths: np.ndarray

    def path(self, i: int) -> str:
        """Return the full path of image `i`."""
        return os.path.join(self.root, self.name(i))

    def read(self, i: int, reduction: Reduction = full_size) -> Tensor:
        """Decode the file of image `i`; see `decode`."""
        return decode(self.path(i), reduction)

    def name(self, i: int) -> str:
        """Return the path of image `i` relative to `root`."""
        return os.fsdecode(self.paths[i])

    def subset(self, indices: np.ndarray) -> "ImageFolder":
        """Return the images with these `indices`; see `Images.subset`."""
        return replace(self, paths=self.paths[indices], labels=self.labels[indices])


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

    def read(self, i: int, reduction: Reduction = full_size) -> Tensor:
        """Return image `i` from memory, or decode its file if it was left on disk."""
        start, (height, width) = self.starts[i], self.sizes[i].tolist()
        if start < 0:
            return super().read(i, reduction)
        return self.pixels[start : start + 3 * height * width].view(3, height, width)

    def read_batch(self, indices: np.ndarray, accepts: Callable[[int, int], bool]) -> Tensor | None:
        """Return the images with these `indices` as one tensor; see `Images.read_batch`."""
        starts, sizes = self.starts[indices], self.sizes[indices]
        height, width = sizes[0].tolist()
        if (starts < 0).any() or (sizes != sizes[0]).any() or not accepts(height, width):
            return None
        # NumPy gathers bytes eight times as fast as PyTorch
        windows = np.lib.stride_tricks.sliding_window_view(self.pixels.numpy(), 3 * height * width)
        return torch.from_numpy(windows[starts]).view(len(indices), 3, height, width)

    def subset(self, indices: np.ndarray) -> "CachedFolder":
        """Return the images with these `indices`, which share this object's `pixels`."""
        starts, sizes = self.starts[indices], self.sizes[indices]
        return replace(super().subset(indices), starts=starts, sizes=sizes)


@dataclass(frozen=True)
class ImageArray(Images):
    """Images in memory, all of one size. `pixels` is uint8 [N, 3, H, W]."""

    pixels: np.ndarray

    def read(self, i: int, _reduction: Reduction = full_size) -> Tensor:
        """Return image `i` at its full size."""
        return torch.from_numpy(self.pixels[i])

    def read_batch(self, indices: np.ndarray, accepts: Callable[[int, int], bool]) -> Tensor | None:
        """Return the images with these `indices` as one tensor; see `Images.read_batch`."""
        return torch.from_numpy(self.pixels[indices]) if accepts(*self.pixels.shape[2:]) else None

    def name(self, i: int) -> str:
        """Return the index `i` as text."""
        return str(i)

    def subset(self, indices: np.ndarray) -> "ImageArray":
        """Return the images with these `indices`; see `Images.subset`."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


_LARGE = 200_000  # bytes; decoding a larger JPEG takes so long that reading its header is free


def decode(path: str, reduction: Reduction = full_size) -> Tensor:
    """Return the image in `path` as RGB, uint8 [3, H, W].

    A large JPEG is decoded at 1 / `reduction(height, width)` of its size, which is faster. An
    animation yields its first frame. An image with more than 8 bits per channel is scaled to 8.

    Raises InputError, which names the file, if it cannot be read.
    """
    try:
        data = read_file(path)
        raw = memoryview(data.numpy())  # reading elements of a tensor is slow
        if raw[:2] != b"\xff\xd8":  # not a JPEG; torchvision crashes on damaged PNGs
            return _decode_with_pil(path)
        _check_size(path, raw)
        if len(data) > _LARGE:
            image = _decode_reduced(path, reduction)
            if image is not None:
                return image
        return decode_image(data, ImageReadMode.RGB)
    except (RuntimeError, ValueError, OSError, IndexError):
        return _decode_with_pil(path)


class _LargeJpegError(Exception):
    """Raised inside `decode_full` if `decode` asks for the reduction of a large JPEG."""


def decode_full(path: str) -> Tensor | None:
    """Decode an image at its full size. Return None for large JPEGs and unreadable files.

    `decode` may shrink a large JPEG by a factor that differs between crops, so one decoded copy
    cannot serve all crops.
    """

    def refuse(_height: int, _width: int) -> int:
        raise _LargeJpegError

    try:
        return decode(path, refuse)
    except (InputError, _LargeJpegError):
        return None


def decoded_size(path: str) -> int:
    """Return the bytes that `decode_full` returns, from the file's header; 0 if that is None."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return 0  # opening a pipe would block
        with _opened(path) as image:
            large = image.format in ("JPEG", "MPO") and os.path.getsize(path) > _LARGE
            return 0 if large else 3 * image.height * image.width
    except Exception:  # Pillow's plugins raise errors of many types
        return 0


_MAX_PIXELS = 10**9
# A JPEG cannot hold more pixels per byte: the densest, a progressive one in one colour, holds 341.
_MAX_PIXELS_PER_BYTE = 1000
# Markers from 0xC0 to 0xCF start the frame's header, which has the size, except for these.
_NO_FRAME = (0xC4, 0xC8, 0xCC)


def _check_size(path: str, data: memoryview) -> None:
    """Raise InputError if a JPEG's header claims more pixels than its bytes can hold.

    The decoder would allocate memory for all of them.
    """
    i = 2
    while i + 9 <= len(data) and data[i] == 0xFF:
        marker = data[i + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (i + 5, i + 7))
            if height * width > min(_MAX_PIXELS, max(_MAX_PIXELS_PER_BYTE * len(data), 1 << 20)):
                raise InputError(
                    f"{path}: unreadable image (claims {width} x {height} pixels in {len(data)} "
                    "bytes); remove or replace it"
                )
            return
        i += 1 if marker == 0xFF else 2 + int.from_bytes(data[i + 2 : i + 4], "big")


# Pillow recognizes a file by its content, whatever its name. Other formats are excluded: Pillow
# would, for example, run a PostScript file as a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open an image with Pillow. Hide its warnings, which every worker process would repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_FORMATS) as image:
            yield image


def _decode_reduced(path: str, reduction: Reduction) -> Tensor | None:
    """Decode a JPEG at a reduced size. Return None if `reduction` asks for the full size."""
    try:
        with _opened(path) as image:
            factor = reduction(image.height, image.width)
            image.draft("RGB", (image.width // factor, image.height // factor))
            return pil_to_tensor(image.convert("RGB")) if factor > 1 else None
    except Image.DecompressionBombError:
        # Pillow refuses images of more than 178 million pixels; torchvision reads them
        return None


def _decode_with_pil(path: str) -> Tensor:
    """Decode any image with Pillow. Raises InputError, with Pillow's reason, if that fails."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")  # opening a pipe would block
        if not status.st_size:
            raise ValueError("the file is empty")
        with _opened(path) as image:
            return from_pil(image)
    except Exception as error:  # Pillow's plugins raise errors of many types
        broken = isinstance(error, FileNotFoundError) and os.path.islink(path)
        reason = "a broken link" if broken else getattr(error, "strerror", None) or str(error)
        reason = reason.replace(f" '{path}'", "") or type(error).__name__
        raise InputError(f"{path}: unreadable image ({reason}); remove or replace it") from None


def from_pil(image: Image.Image) -> Tensor:
    """Return an image of Pillow as RGB, uint8 [3, H, W], as `decode` returns its file."""
    return pil_to_tensor(_to_8_bits(image).convert("RGB"))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale an image with more than 8 bits per channel to 8 bits. Pillow alone would clip it.

    White is 65535 in a 16-bit image. A file of 32-bit integers or floats does not say which value
    is white. White is then the smallest of 1 (floats only), 255 and 65535 that no pixel exceeds; if
    pixels exceed 65535, white is the brightest pixel.
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
