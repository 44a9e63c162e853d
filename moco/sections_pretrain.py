"""Define sections of settings that only pre-training has, like those of moco/sections.py."""

from dataclasses import dataclass
from typing import ClassVar

from moco.options import option


@dataclass(frozen=True)
class Listed:
    """The list of the images to pre-train on, if they are not those of the data folder."""

    TITLE: ClassVar[str] = "list of images"
    file_list: str | None = option(
        None,
        "pre-train on the images that FILE names, one path a line, without labels; relative paths "
        "start at DIR, or at FILE's folder if DIR is left out",
        metavar="FILE",
    )


@dataclass(frozen=True)
class Start:
    """The weights that a pre-training starts from."""

    TITLE: ClassVar[str] = "starting weights"
    init: str | None = option(
        None,
        "start from the weights in FILE, which is a checkpoint that --pretrained of the "
        "evaluations reads, or a folder with model.safetensors; torchvision:NAME: from "
        "torchvision's weights of this name for --arch, such as torchvision:IMAGENET1K_V1; "
        "timm: from timm's default weights for --arch",
        metavar="FILE",
        unset="random weights",
    )
