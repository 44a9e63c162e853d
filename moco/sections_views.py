"""The section of the views' settings; see moco/sections.py for the other sections of every run."""

from dataclasses import dataclass
from typing import Any, ClassVar

from moco.options import PIXELS, PROBABILITY, option


def _probability(operation: str, *names: str) -> Any:
    """Return a field for the probability of an operation, with the recipe's as default."""
    text = f"probability of {operation}, for all views of the recipe"
    return option(None, text, *names, range=PROBABILITY, metavar="P", unset="the recipe's")


@dataclass(frozen=True)
class Views:
    """The views of each image: recipe, size, normalization and augmentation.

    Each option of the augmentation holds for all views of the recipe.
    """

    TITLE: ClassVar[str] = "views"
    recipe: str | None = option(None, "name of a recipe of views, see moco/augment/recipes.py")
    image_size: int | None = option(
        224,
        "width and height of a full-size view",
        range=PIXELS,
        metavar="PIXELS",
        unset="the checkpoint's, else 224",
    )
    mean: tuple[float, ...] | None = option(
        None,
        "mean of RGB values in [0, 1], to normalize images with",
        range="[0, 1]",
        nargs=3,
        metavar=("R", "G", "B"),
        unset="the {whose}, else ImageNet's",
    )
    std: tuple[float, ...] | None = option(
        None,
        "standard deviation of RGB values in [0, 1], to normalize images with",
        range="(0, 1]",
        nargs=3,
        metavar=("R", "G", "B"),
        unset="the {whose}, else ImageNet's",
    )
    crop_min: float | None = option(
        None,
        "smallest fraction of the image that a crop covers",
        range="(0, 1]",
        metavar="FRACTION",
        unset="the recipe's",
    )
    crop_scale: tuple[float, ...] | None = option(
        None,
        "range of the fraction of the image that a crop covers",
        range="(0, 1]",
        nargs=2,
        metavar=("LEAST", "MOST"),
        unset="the recipe's",
    )
    jitter: tuple[float, ...] | None = option(
        None,
        "strengths of the color jitter: brightness, contrast, saturation, and hue, which is at "
        "most 0.5",
        range="[0, 100]",
        nargs=4,
        metavar=("B", "C", "S", "H"),
        unset="the recipe's",
    )
    jitter_p: float | None = _probability("the color jitter")
    grayscale_p: float | None = _probability("grey views")
    blur_sigma: tuple[float, ...] | None = option(
        None,
        "range of the blur's standard deviation in pixels",
        range="[0.01, 100]",
        nargs=2,
        metavar=("LEAST", "MOST"),
        unset="the recipe's, scaled by --image-size / 224",
    )
    blur_p: float | None = _probability("the blur")
    solarize_p: float | None = _probability("solarization")
    flip_p: float | None = _probability("the horizontal flip")
    vertical_flip_p: float | None = _probability("a vertical flip", "--vertical-flip")
    rotate: float | None = option(
        None,
        "rotate each view by a random angle of at most DEGREES in either direction; the view is "
        "reflected at its borders",
        range="[0, 180]",
        metavar="DEGREES",
        unset="the recipe's, 0",
    )
    randaugment: tuple[int, ...] | None = option(
        None,
        "operations and magnitude, 0 to 10, of RandAugment; 0 0: none",
        range="[0, 16]",
        nargs=2,
        metavar=("N", "M"),
        unset="the recipe's",
    )
    views: int | None = None  # number of views that the method needs; None: all of the recipe
    test_resize: str | None = "scaled"  # of the k-NN monitor; evaluations have an option
