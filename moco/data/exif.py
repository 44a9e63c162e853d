"""Turn images by the orientation in their files: a number from 1 (upright) to 8."""

import torch
from PIL import Image
from torch import Tensor

_TAG = 0x0112  # of the orientation, in EXIF and in TIFF
UPRIGHT = 1
INVERSE = {6: 8, 8: 6}  # orientations that undo each other; all others undo themselves
# (whether rows and columns are exchanged, dimensions that are reversed afterwards)
_TURNS = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


def orientation(image: Image.Image) -> int:
    """Return the orientation of an image that Pillow has opened; `UPRIGHT` if it has none."""
    try:
        found = image.getexif().get(_TAG)
    except Exception:  # damaged EXIF data raises errors of many types
        return UPRIGHT
    return found if isinstance(found, int) and found in _TURNS else UPRIGHT


def is_sideways(orientation: int) -> bool:
    """Return whether `turned` exchanges an image's height and width."""
    return orientation in _TURNS and _TURNS[orientation][0]


def turned(image: Tensor, orientation: int) -> Tensor:
    """Return an image [3, H, W] that was stored in `orientation`, turned upright."""
    if orientation == UPRIGHT:
        return image
    exchanged, reversed_ = _TURNS[orientation]
    image = image.transpose(1, 2) if exchanged else image
    return torch.flip(image, reversed_).contiguous()
