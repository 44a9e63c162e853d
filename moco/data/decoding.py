"""Decode an image, from the bytes of its file to RGB, uint8 [3, H, W]."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
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


_LARGE = 200_000  # bytes; decoding a larger JPEG takes so long that reading its header is free


def read_bytes(path: str) -> np.ndarray:
    """Return the content of the image file `path`, uint8 [bytes].

    Raises InputError, which names the file, if it cannot be read or is empty.
    """
    try:
        # opening a pipe would wait for its writer, unless it is opened without blocking
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a file")
            if not status.st_size:
                raise OSError("the file is empty")
            return np.fromfile(file, np.uint8)
    except OSError as error:
        broken = isinstance(error, FileNotFoundError) and os.path.islink(path)
        raise _unreadable(path, "a broken link" if broken else error) from None


def decode_file(path: str, reduction: Reduction = full_size) -> Tensor:
    """Return the image in the file `path`; see `decode`. Raises InputError if it cannot be read."""
    return decode(read_bytes(path), path, reduction)


def decode(data: np.ndarray, name: str, reduction: Reduction = full_size) -> Tensor:
    """Return an encoded image as RGB, uint8 [3, H, W].

    A large JPEG is decoded at 1 / `reduction(height, width)` of its size, which is faster. An
    animation yields its first frame. An image with more than 8 bits per channel is scaled to 8.

    Args:
        data: the content of the image's file, uint8 [bytes].
        name: the path of the image, for messages.
        reduction: see `Reduction`.

    Raises InputError, which names the image, if it cannot be decoded.
    """
    raw = memoryview(data)  # reading elements of an array is slow
    if raw[:2] != b"\xff\xd8":  # not a JPEG; torchvision crashes on damaged PNGs
        return _decode_with_pil(raw, name)
    try:
        _check_size(raw, name)
        if len(raw) > _LARGE:
            image = _decode_reduced(raw, reduction)
            if image is not None:
                return image
        return decode_image(_tensor(data), ImageReadMode.RGB)
    except (RuntimeError, ValueError, OSError, IndexError):
        return _decode_with_pil(raw, name)


def _tensor(data: np.ndarray) -> Tensor:
    """Return a tensor that shares the memory of `data`, which may be read-only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing writes to the tensor
        return torch.from_numpy(data)


class _LargeJpegError(Exception):
    """Raised inside `decode_full` if `decode` asks for the reduction of a large JPEG."""


def decode_full(data: np.ndarray, name: str) -> Tensor | None:
    """Decode an image at its full size. Return None for large JPEGs and unreadable images.

    `decode` may shrink a large JPEG by a factor that differs between crops, so one decoded copy
    cannot serve all crops. The arguments are those of `decode`.
    """

    def refuse(_height: int, _width: int) -> int:
        raise _LargeJpegError

    try:
        return decode(data, name, refuse)
    except (InputError, _LargeJpegError):
        return None


def decoded_size(data: np.ndarray) -> int:
    """Return the bytes that `decode_full` returns, from the image's header; 0 if that is None."""
    try:
        with _opened(memoryview(data)) as image:
            large = image.format in ("JPEG", "MPO") and len(data) > _LARGE
            return 0 if large else 3 * image.height * image.width
    except Exception:  # Pillow's plugins raise errors of many types
        return 0


_MAX_PIXELS = 10**9
# A JPEG cannot hold more pixels per byte: the densest, a progressive one in one colour, holds 341.
_MAX_PIXELS_PER_BYTE = 1000
# Markers from 0xC0 to 0xCF start the frame's header, which has the size, except for these.
_NO_FRAME = (0xC4, 0xC8, 0xCC)


def _check_size(data: memoryview, name: str) -> None:
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
                    f"{name}: unreadable image (claims {width} x {height} pixels in {len(data)} "
                    "bytes); remove or replace it"
                )
            return
        i += 1 if marker == 0xFF else 2 + int.from_bytes(data[i + 2 : i + 4], "big")


# Pillow recognizes a file by its content, whatever its name. Other formats are excluded: Pillow
# would, for example, run a PostScript file as a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000")


@contextlib.contextmanager
def _opened(data: memoryview) -> Iterator[Image.Image]:
    """Open an image with Pillow. Hide its warnings, which every worker process would repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image


def _decode_reduced(data: memoryview, reduction: Reduction) -> Tensor | None:
    """Decode a JPEG at a reduced size. Return None if `reduction` asks for the full size."""
    try:
        with _opened(data) as image:
            factor = reduction(image.height, image.width)
            image.draft("RGB", (image.width // factor, image.height // factor))
            return pil_to_tensor(image.convert("RGB")) if factor > 1 else None
    except Image.DecompressionBombError:
        # Pillow refuses images of more than 178 million pixels; torchvision reads them
        return None


def _decode_with_pil(data: memoryview, name: str) -> Tensor:
    """Decode any image with Pillow. Raises InputError, with Pillow's reason, if that fails."""
    try:
        with _opened(data) as image:
            return pil_to_tensor(_to_8_bits(image).convert("RGB"))
    except UnidentifiedImageError:
        raise _unreadable(name, "cannot identify image file") from None
    except Exception as error:  # Pillow's plugins raise errors of many types
        raise _unreadable(name, error) from None


def _unreadable(name: str, reason: Exception | str) -> InputError:
    """Return the error to raise if image `name` cannot be read or decoded."""
    if isinstance(reason, Exception):
        text = getattr(reason, "strerror", None) or str(reason)
        reason = text or type(reason).__name__
    return InputError(f"{name}: unreadable image ({reason}); remove or replace it")


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
