"""The section of settings for decoding images; see moco/sections.py for the other sections."""

from dataclasses import dataclass

from moco.options import option

EXIF = ("ignore", "apply")


@dataclass(frozen=True)
class Decoding:
    """The settings for decoding the files of images, which `moco.data.decoding` follows.

    None stands for the default, which is the checkpoint's setting in evaluations and with --resume.
    """

    exif: str | None = option(
        None,
        "orientation that a camera writes to a file; ignore: use the pixels as they are stored, "
        "as torchvision's ImageFolder does; apply: turn the image upright",
        choices=EXIF,
        unset="the checkpoint's, else ignore",
    )
    white: float | None = option(
        None,
        "value that is shown as white in TIFF and PNG files with more than 8 bits a channel; "
        "larger values are clipped",
        range="(0, 4294967295]",
        metavar="LEVEL",
        unset="the checkpoint's, else that of the file's type",
    )
    shrink_on_decode: bool | None = option(
        None,
        "decode JPEGs above 200 kB at 1/2, 1/4 or 1/8 of their size if their random crops are "
        "large enough; faster, and changes the views slightly",
        unset="the checkpoint's with --resume, else off",
    )
