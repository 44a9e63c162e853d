"""Decode an image, from the bytes of its file to RGB, uint8 [3, H, W]."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from moco.data import depth, exif, jpeg
from moco.errors import InputError
from moco.sections_images import Decoding

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
DEFAULT = Decoding()  # the settings of a run without options


def read_bytes(path: str) -> np.ndarray:
    """Return the content of the image file `path`, uint8 [bytes].

    Raises InputError, which names the file, if it cannot be read or is empty.
    """
    try:
        # opening a pipe would wait for its writer, unless it is opened without blocking
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _read(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        if os.path.islink(path):
            raise _unreadable(path, "a broken link") from None
        raise InputError(f"{path}: unreadable image (the file is missing); restore it") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _read(descriptor: int) -> np.ndarray:
    """Return the content of an open file. NumPy's `fromfile` makes twice as many system calls."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a file")
    if not status.st_size:
        raise OSError("the file is empty")
    data, end = np.empty(status.st_size, np.uint8), 0
    while count := os.readv(descriptor, [data[end:]]):
        end += count
        if end == len(data):
            break
    return data[:end]


def decode(
    data: np.ndarray, name: str, settings: Decoding = DEFAULT, reduction: Reduction = full_size
) -> Tensor:
    """Return an encoded image as RGB, uint8 [3, H, W]. docs/data.md has the rules for each format.

    Args:
        data: the content of the image's file, uint8 [bytes].
        name: the path of the image, for messages.
        settings: how to decode it.
        reduction: see `Reduction`. It is used for large JPEGs if `settings.shrink_on_decode`.

    Raises InputError, which names the image, if it cannot be decoded.
    """
    raw = memoryview(data)  # reading elements of an array is slow
    if raw[:2] != b"\xff\xd8":  # not a JPEG; torchvision crashes on damaged PNGs
        return _decode_with_pil(raw, name, settings)
    try:
        header = jpeg.header(raw)
        _check_size(header, raw, name)
        turn = jpeg.orientation(raw, header) if settings.exif == "apply" else exif.UPRIGHT
        image = None
        if settings.shrink_on_decode and len(raw) > _LARGE:
            image = _decode_reduced(raw, reduction, turn)
        if image is None:
            _, decoder = jpeg.decoder()
            image = decoder(data, header)
        return exif.turned(image, turn)
    except (RuntimeError, ValueError, OSError, IndexError, SyntaxError):  # Pillow raises the last
        return _decode_with_pil(raw, name, settings)


class _LargeJpegError(Exception):
    """Raised inside `decode_full` if `decode` asks for the reduction of a large JPEG."""


def decode_full(data: np.ndarray, name: str, settings: Decoding = DEFAULT) -> Tensor | None:
    """Decode an image at its full size. Return None for unreadable images.

    With `settings.shrink_on_decode`, also return None for large JPEGs: `decode` may shrink them by
    a factor that differs between crops, so one decoded copy cannot serve all crops. The arguments
    are those of `decode`.
    """

    def refuse(_height: int, _width: int) -> int:
        raise _LargeJpegError

    try:
        return decode(data, name, settings, refuse)
    except (InputError, _LargeJpegError):
        return None


def decoded_size(data: np.ndarray, settings: Decoding = DEFAULT) -> int:
    """Return the bytes that `decode_full` returns, from the image's header; 0 if that is None."""
    try:
        with _opened(memoryview(data)) as image:
            large = image.format in ("JPEG", "MPO") and len(data) > _LARGE
            left = large and settings.shrink_on_decode
            return 0 if left else 3 * image.height * image.width
    except Exception:  # Pillow's plugins raise errors of many types
        return 0


def brightest(data: np.ndarray) -> int | None:
    """Return the largest value in an image of which 65535 is white by default; see `depth`.

    Return None for other images, and for unreadable ones.
    """
    raw = memoryview(data)
    try:
        with _opened(raw) as image:
            return depth.brightest(image, lambda: _open(raw))
    except Exception:  # Pillow's plugins raise errors of many types
        return None


_MAX_PIXELS = 10**9
# A JPEG cannot hold more pixels per byte: the densest, a progressive one in one color, holds 341.
_MAX_PIXELS_PER_BYTE = 1000


def _check_size(header: jpeg.Header, data: memoryview, name: str) -> None:
    """Raise InputError if a JPEG's header claims more pixels than its bytes can hold.

    The decoder would allocate memory for all of them.
    """
    _, height, width = header
    if height * width > min(_MAX_PIXELS, max(_MAX_PIXELS_PER_BYTE * len(data), 1 << 20)):
        raise InputError(
            f"{name}: unreadable image (claims {width} x {height} pixels in {len(data)} "
            "bytes); remove or replace it"
        )


# Pillow recognizes a file by its content, whatever its name. Other formats are excluded: Pillow
# would, for example, run a PostScript file as a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000")


@contextlib.contextmanager
def _opened(data: memoryview) -> Iterator[Image.Image]:
    """Open an image with Pillow. Hide its warnings, which every worker process would repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data) as image:
            yield image


def _open(data: memoryview) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _decode_reduced(data: memoryview, reduction: Reduction, turn: int) -> Tensor | None:
    """Decode a JPEG at a reduced size. Return None if `reduction` asks for the full size.

    The caller turns the image by the orientation `turn`. `reduction` gets its size after that.
    """
    try:
        with _opened(data) as image:
            size = (image.height, image.width)
            factor = reduction(*(size[::-1] if exif.is_sideways(turn) else size))
            image.draft("RGB", (image.width // factor, image.height // factor))
            return pil_to_tensor(image.convert("RGB")) if factor > 1 else None
    except Image.DecompressionBombError:
        # Pillow refuses images of more than 178 million pixels; torchvision reads them
        return None


def _decode_with_pil(data: memoryview, name: str, settings: Decoding) -> Tensor:
    """Decode any image with Pillow. Raises InputError, with Pillow's reason, if that fails."""
    try:
        with _opened(data) as image:
            return from_pil(image, settings, lambda: _open(data))
    except UnidentifiedImageError:
        raise _unreadable(name, _unidentified(data)) from None
    except Exception as error:  # Pillow's plugins raise errors of many types
        raise _unreadable(name, error) from None


def from_pil(image: Image.Image, settings: Decoding, again: depth.Open) -> Tensor:
    """Return an image of Pillow as RGB, uint8 [3, H, W], as `decode` returns its file.

    Args:
        image: an image that Pillow has opened and not yet loaded.
        settings: the settings of decoding.
        again: opens the image again.
    """
    # Pillow turns a TIFF upright while it loads it, and then forgets its orientation
    of_tiff = exif.orientation(image) if image.format == "TIFF" else None
    found = pil_to_tensor(depth.to_rgb(image, settings.white, again))
    apply = settings.exif == "apply"
    if of_tiff is not None:
        return found if apply else exif.turned(found, exif.INVERSE.get(of_tiff, of_tiff))
    return exif.turned(found, exif.orientation(image)) if apply else found


# the start of files in formats that are not supported, or bytes from the fifth on
_OTHER_FORMATS = {
    b"ftypavif": "AVIF",
    b"ftypavis": "AVIF",
    b"ftypheic": "HEIC",
    b"ftypheix": "HEIC",
    b"ftypmif1": "HEIC",
    b"ftypmsf1": "HEIC",
    b"JXL \r\n\x87\n": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}


def _unidentified(data: memoryview) -> str:
    """Return why Pillow did not recognize the format of an image."""
    starts = (bytes(data[:2]), bytes(data[4:12]))
    name = next((name for start, name in _OTHER_FORMATS.items() if start in starts), None)
    return f"{name} is not supported" if name else "cannot identify image file"


def _unreadable(name: str, reason: Exception | str) -> InputError:
    """Return the error to raise if image `name` cannot be read or decoded."""
    if isinstance(reason, Exception):
        text = getattr(reason, "strerror", None) or str(reason)
        reason = text or type(reason).__name__
    return InputError(f"{name}: unreadable image ({reason}); remove or replace it")
