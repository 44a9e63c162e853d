"""Decode JPEGs with torchcodec, torchvision or Pillow, whichever is there first.

All three decode with libjpeg-turbo and return the same pixels, so that a run does not depend on
what is installed. Pillow is the slowest (docs/data.md has times).
"""

import functools
import io
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from moco.data import exif

SCAN = 0xDA  # the marker after which the pixels begin
# Markers from 0xC0 to 0xCF start the frame's header, which has the size, except for these.
_NO_FRAME = (0xC4, 0xC8, 0xCC)


class Header(NamedTuple):
    """The header of a JPEG: everything before its pixels. The height and width are 0 if missing."""

    content: bytes
    height: int
    width: int


def header(data: memoryview) -> Header:
    """Return the header of a JPEG. If the header is damaged, `content` is the full file."""
    i, end, height, width = 2, len(data), 0, 0
    while i + 4 <= len(data) and data[i] == 0xFF:
        marker = data[i + 1]
        if marker == 0xFF:  # a byte that fills a gap
            i += 1
            continue
        if marker == SCAN:
            end = i
            break
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME and not height and i + 9 <= end:
            height, width = data[i + 5] << 8 | data[i + 6], data[i + 7] << 8 | data[i + 8]
        i += 2 + (data[i + 2] << 8 | data[i + 3])
    return Header(bytes(data[:end]), height, width)


# A function from the content of a file, uint8 [bytes], and its header to the image as it is stored,
# uint8 [3, H, W]. It raises errors of many types.
Decoder = Callable[[np.ndarray, Header], Tensor]

_RGB = 3  # in torchvision's operators
_EXIF = b"Exif\0\0"  # the start of a JPEG's EXIF data
# The start of a segment (the group), and of EXIF data in it. Like torchcodec, this ignores `_EXIF`.
_TIFF = re.compile(rb"(\xff\xe1.{8})(?:II\*\0|MM\0\*)", re.DOTALL)


@functools.cache
def decoder() -> tuple[str, Decoder]:
    """Return the name of the decoder to use, and the decoder.

    Call it before worker processes are forked, so that they need not import it themselves.
    """
    return next(working())


def working() -> Iterator[tuple[str, Decoder]]:
    """Yield the name and the function of each decoder that works here, the preferred one first."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    small = np.frombuffer(file.getvalue(), np.uint8).copy()
    for name, load in (("torchcodec", _torchcodec), ("torchvision", _torchvision)):
        try:
            found = load()
            if found(small, header(memoryview(small))).shape == (3, 8, 8):
                yield name, found
        except Exception:  # not installed, too old, or built for another version of torch
            continue
    yield "pillow", _with_pillow


def _torchcodec() -> Decoder:
    """Return torchcodec's decoder (from version 0.16 on). It needs no FFmpeg."""
    from torchcodec.decoders import decode_jpeg  # an optional package, slow to import

    def decode(data: np.ndarray, header: Header) -> Tensor:
        # torchcodec always turns an image by its EXIF data, so these are hidden from it
        head = header.content
        if _TIFF.search(head):
            data = data.copy()
            data[: len(head)] = np.frombuffer(_TIFF.sub(rb"\1\0\0\0\0", head), np.uint8)
        return decode_jpeg(_tensor(data), mode="RGB")

    return decode


def _torchvision() -> Decoder:
    """Return torchvision's decoder."""
    import torchvision.io  # noqa: F401 (defines the operator)

    # called without torchvision's function, which warns in every process that it is deprecated
    operator = torch.ops.image.decode_jpeg
    return lambda data, _header: operator(_tensor(data), _RGB, False)


def _with_pillow(data: np.ndarray, _header: Header) -> Tensor:
    """Decode a JPEG with Pillow."""
    # Image.open would refuse images of more than 178 million pixels
    with JpegImageFile(io.BytesIO(memoryview(data))) as image:
        return pil_to_tensor(image.convert("RGB"))


def _tensor(data: np.ndarray) -> Tensor:
    """Return `data` as a tensor. It shares the memory of `data` if that is writable."""
    # torch warns of read-only arrays
    return torch.from_numpy(data if data.flags.writeable else data.copy())


def orientation(data: memoryview, header: Header) -> int:
    """Return the orientation in a JPEG's EXIF data; see `exif`."""
    if _EXIF not in header.content:
        return exif.UPRIGHT
    try:
        with JpegImageFile(io.BytesIO(data)) as image:
            return exif.orientation(image)
    except Exception:  # damaged JPEGs raise errors of many types
        return exif.UPRIGHT
