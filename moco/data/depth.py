"""Convert images with more than 8 bits per channel to RGB with 8 bits.

Pillow alone would clip grey values, and would keep only the higher 8 of the 16 bits of colors.
"""

import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

FULL = 65535.0  # white in a 16-bit file that does not say otherwise
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANES = 258, 262, 277, 284  # tags of TIFF
_WHITE_IS_0, _SEPARATE = 0, 2  # values of _PHOTOMETRIC and _PLANES
# In Pillow's name of the layout of colors in a file, the last letter says which of the two bytes
# of a value comes first: the lower (L), the higher (B), or that of this machine (N).
_DEEP_COLOURS = re.compile("(RGB|RGBA|RGBX|CMYK|LA|RGBa);16[LBN]")
_OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}

Open = Callable[[], Image.Image]  # opens the same image again


class UnsupportedError(Exception):
    """Raised for an image that Pillow reads wrongly, or that has no RGB colors."""


class _Deep(NamedTuple):
    """The values of an image with more than 8 bits per channel.

    Attributes:
        values: [H, W], or [H, W, 3] for colors; at least 0.
        white: The value that is white.
        inverted: Whether 0 is white instead, and `white` is black.
    """

    values: np.ndarray
    white: float
    inverted: bool = False


def to_rgb(image: Image.Image, white: float | None, again: Open) -> Image.Image:
    """Return an image as RGB with 8 bits per channel. Alpha is dropped.

    Args:
        image: an image that Pillow has opened and not yet loaded.
        white: see `moco.sections_images.Decoding`.
        again: opens the image again.

    Raises UnsupportedError for channels that are not colors. Pillow raises errors of many types.
    """
    _check(image)
    given = white if _takes_white(image) else None
    deep = _deep(image, again, colours=given is not None)
    if deep is None:
        return image.convert("RGB")
    white = given or deep.white
    values = deep.values.clip(0, white)
    values = white - values if deep.inverted else values
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def brightest(image: Image.Image, again: Open) -> int | None:
    """Return the largest value in an image if 65535 is white in it by default, else None.

    The arguments are those of `to_rgb`.
    """
    deep = _deep(image, again, colours=True) if _takes_white(image) else None
    return int(deep.values.max()) if deep and deep.white == FULL and not deep.inverted else None


def white_for(value: int) -> int | None:
    """Return a --white to suggest for images whose largest value is `value`; None if bright.

    The suggestion is the largest number with as many bits as `value`.
    """
    return (1 << value.bit_length()) - 1 if 0 < value < FULL / 4 else None


def _check(image: Image.Image) -> None:
    """Raise UnsupportedError for a TIFF whose channels are not colors, or are read wrongly."""
    if image.format != "TIFF":
        return
    samples, bits = image.tag_v2.get(_SAMPLES, 1), image.tag_v2.get(_BITS, (1,))
    if samples > 4:
        raise UnsupportedError(f"it has {samples} channels, and 1 to 4 are supported")
    if samples > 1 and max(bits) > 8 and image.tag_v2.get(_PLANES) == _SEPARATE:
        raise UnsupportedError("its channels are stored one after the other, with more than 8 bits")


def _takes_white(image: Image.Image) -> bool:
    """Return whether `--white` applies to an image; other formats say which value is white."""
    return image.mode == "F" or image.format in ("TIFF", "PNG")


def _deep(image: Image.Image, again: Open, colours: bool) -> _Deep | None:
    """Return the values of an image; None if it has 8 bits per channel, or `colours` is false.

    `colours` is whether to return the values of an image with 16-bit colors.

    White is 65535 in a 16-bit image, and the largest value in a 12-bit TIFF. A file of 32-bit
    integers or floats does not say which value is white. White is then the smallest of 1 (floats
    only), 255 and 65535 that no pixel exceeds; if pixels exceed 65535, white is the brightest.
    """
    if not image.mode.startswith(("I", "F")):
        layout = _layout(image)
        return _Deep(_colours(image, layout, again), FULL) if layout and colours else None
    # loading the image removes some tags
    tags = dict(image.tag_v2) if image.format == "TIFF" else {}
    bits, inverted = max(tags.get(_BITS, (16,))), tags.get(_PHOTOMETRIC) == _WHITE_IS_0
    pixels = np.asarray(image).astype(np.float64)
    pixels = np.nan_to_num(pixels, posinf=pixels[np.isfinite(pixels)].max(initial=0)).clip(0)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = float((1 << bits) - 1) if bits < 16 else FULL
    else:
        levels = (1.0, 255.0, FULL) if image.mode == "F" else (255.0, FULL)
        white = next((level for level in levels if pixels.max() <= level), pixels.max())
    return _Deep(pixels, white, inverted)


def _layout(image: Image.Image) -> str:
    """Return Pillow's name of the layout of 16-bit colors in a file; "" for other images."""
    options = image.tile[0][3] if getattr(image, "tile", None) else ""
    name = options if isinstance(options, str) else options[0] if options else ""
    return name if isinstance(name, str) and _DEEP_COLOURS.fullmatch(name) else ""


def _colours(image: Image.Image, layout: str, again: Open) -> np.ndarray:
    """Return the 16-bit colors of an image, [H, W, 3].

    Pillow keeps one byte of each value. The image is therefore read twice: as it is, and with the
    other byte of each value. Raises UnsupportedError if Pillow cannot read the other byte.
    """
    if not layout.startswith(("RGB;", "RGBA;", "RGBX;")):
        raise UnsupportedError(f"--white: 16-bit colors in the layout {layout} are not supported")
    other = layout[:-1] + _OTHER_BYTE[layout[-1]]
    with again() as low:
        low.tile = [_with_layout(tile, other) for tile in low.tile]
        lower = np.asarray(low)[:, :, :3].astype(np.float64)
    return np.asarray(image)[:, :, :3] * 256.0 + lower


def _with_layout(tile: tuple, layout: str) -> tuple:
    """Return an entry of Pillow's list of tiles with another layout."""
    codec, box, offset, options = tile
    new = (codec, box, offset, layout if isinstance(options, str) else (layout, *options[1:]))
    return new if type(tile) is tuple else type(tile)(*new)  # a named tuple in newer Pillows
