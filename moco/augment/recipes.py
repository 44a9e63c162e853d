"""Recipes: the settings of each view that a method sees, as a tuple of frozen `View`s.

`moco/augment/crop.py` and `moco/augment/color.py` compute the views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from moco.config import MEAN, STD
from moco.errors import InputError, unknown
from moco.sections import Views


@dataclass(frozen=True)
class View:
    """The settings of a random view. The names that end in `_p` are probabilities in [0, 1]."""

    size: int = 224  # height and width in pixels
    scale: tuple[float, float] = (0.2, 1.0)  # range of the crop's fraction of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width / height
    # strengths of brightness, contrast, saturation and hue, as in torchvision's ColorJitter
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # range in pixels of the view
    blur_p: float = 0.0
    solarize_p: float = 0.0
    flip_p: float = 0.5  # horizontally
    vertical_flip_p: float = 0.0
    rotate: float = 0.0  # largest angle in degrees, in [0, 180]
    randaugment: tuple[int, int] = (0, 0)  # number of operations, and magnitude in [0, 10]
    order: tuple[str, ...] = ("jitter", "randaugment", "gray", "blur", "solarize")
    interpolation: str = "bilinear"  # or bicubic, of the crop
    mean: tuple[float, ...] = MEAN  # of the RGB channels, in [0, 1]; the last step normalizes
    std: tuple[float, ...] = STD


Recipe = tuple[View, ...]


_MOCOV1 = View(
    jitter=(0.4, 0.4, 0.4, 0.4),
    jitter_p=1.0,
    gray_p=0.2,
    order=("gray", "jitter", "randaugment", "blur", "solarize"),
)


_MOCOV2 = View(jitter_p=0.8, gray_p=0.2, blur_p=0.5)


_BYOL = View(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)


_MULTICROP = tuple(
    replace(_MOCOV2, size=size, scale=scale)
    for size, scale in (
        (224, (0.2, 1.0)),
        (192, (0.172, 0.86)),
        (160, (0.143, 0.715)),
        (128, (0.114, 0.571)),
        (96, (0.086, 0.429)),
    )
)


_FNC = View(
    scale=(0.08, 1.0),
    jitter=(0.8, 0.8, 0.8, 0.2),
    jitter_p=0.8,
    gray_p=0.2,
    blur_p=0.5,
    randaugment=(2, 7),
    interpolation="bicubic",
)


RECIPES: dict[str, Recipe] = {
    "mocov1": (_MOCOV1, _MOCOV1),
    "mocov2": (_MOCOV2, _MOCOV2),
    "byol": (replace(_BYOL, blur_p=1.0), replace(_BYOL, blur_p=0.1, solarize_p=0.2)),
    "sogclr": (replace(_BYOL, blur_p=1.0),) * 2,
    "multicrop": (_MOCOV2, *_MULTICROP),  # the key view, then the query views
    "fnc": (_FNC,) * 10,  # two views and eight support views
    "simclr": (replace(_FNC, randaugment=(0, 0)),) * 2,
    # MoCo's demo on CIFAR-10, without blur
    "small": (View(scale=(0.08, 1.0), jitter_p=0.8, gray_p=0.2),) * 2,
    "probe": (View(scale=(0.08, 1.0)),),
}


# the fields of the views' section whose options change the random views of a recipe
CHANGES = tuple(
    one
    for one in fields(Views)
    if "option" in one.metadata and one.name not in ("recipe", "image_size", "mean", "std")
)
# the options that set one field of every view, and the field
_FIELDS = {
    "crop_scale": "scale",
    "jitter": "jitter",
    "jitter_p": "jitter_p",
    "grayscale_p": "gray_p",
    "blur_p": "blur_p",
    "solarize_p": "solarize_p",
    "flip_p": "flip_p",
    "vertical_flip_p": "vertical_flip_p",
    "rotate": "rotate",
}


def _check(option: str, value: float | Sequence[float]) -> None:
    """Raise InputError if the value of one of `_FIELDS` is out of range."""
    wrong, largest = "", 180 if option == "rotate" else 1
    if option == "crop_scale":
        least, most = value
        if not 0 < least <= most <= 1:
            wrong = "give the smaller one first, and both above 0 and at most 1"
    elif option == "jitter":
        *strengths, hue = value
        if len(strengths) != 3 or not all(one >= 0 for one in strengths) or not 0 <= hue <= 0.5:
            wrong = "give four strengths of at least 0, the last one (hue) at most 0.5"
    elif not 0 <= value <= largest:
        wrong = f"must be in [0, {largest}]"
    if wrong:
        shown = " ".join(f"{one:g}" for one in (value if isinstance(value, Sequence) else [value]))
        raise InputError(f"--{option.replace('_', '-')} {shown}: {wrong}")


def check_name(name: str) -> None:
    """Raise InputError if there is no recipe `name`."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)


def recipe(
    name: str,
    size: int = 224,
    crop_min: float | None = None,
    views: int | None = None,
    randaugment: Sequence[int] | None = None,
    blur_sigma: Sequence[float] | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    **same: float | Sequence[float] | None,
) -> Recipe:
    """Return the recipe `name`, with view sizes and blur scaled from 224 to `size` pixels.

    Settings that are not given are those of the recipe. Raises InputError for an unknown name, or
    if a setting is out of range.

    Args:
        name: one of `RECIPES`.
        size: size of a view that has 224 pixels in the recipe.
        crop_min: smallest fraction of the image's area that a crop covers, unless `same` has
            crop_scale.
        views: number of views. The recipe's last view is repeated if it has fewer.
        randaugment: number of operations, and magnitude in [0, 10].
        blur_sigma: range in pixels; it is not scaled.
        mean: mean of the RGB channels, in [0, 1].
        std: standard deviation of the RGB channels, in [0, 1].
        same: options of moco/sections_views.py that set one field of every view, see `_FIELDS`.
    """
    check_name(name)
    scale = size / 224
    all_views = [
        replace(
            view,
            size=max(1, round(view.size * scale)),
            blur_sigma=tuple(blur_sigma or (scale * sigma for sigma in view.blur_sigma)),
            mean=tuple(mean),
            std=tuple(std),
        )
        for view in RECIPES[name]
    ]
    if blur_sigma and blur_sigma[0] > blur_sigma[1]:
        raise InputError(
            f"--blur-sigma {blur_sigma[0]:g} {blur_sigma[1]:g}: give the smaller one first"
        )
    same = {option: value for option, value in same.items() if value is not None}
    for option, value in same.items():
        _check(option, value)
        value = tuple(value) if isinstance(value, Sequence) else value
        all_views = [replace(view, **{_FIELDS[option]: value}) for view in all_views]
    if views is not None:
        all_views = [*all_views, *all_views[-1:] * views][:views]
    if crop_min is not None and "crop_scale" not in same:
        largest = min(view.scale[1] for view in all_views)
        if not 0 < crop_min <= largest:
            raise InputError(
                f"--crop-min {crop_min:g}: must be above 0 and at most {largest:g}"
                f" for the recipe {name}"
            )
        all_views = [replace(view, scale=(crop_min, view.scale[1])) for view in all_views]
    if randaugment is not None:
        operations, magnitude = randaugment
        if operations < 0 or not 0 <= magnitude <= 10:
            raise InputError(
                f"--randaugment {operations} {magnitude}: give the number of operations, and their"
                " magnitude from 0 to 10; 0 0 turns it off"
            )
        all_views = [replace(view, randaugment=(operations, magnitude)) for view in all_views]
    return tuple(all_views)


def from_settings(views: Views) -> Recipe:
    """Return the recipe of a run, with the changes that its settings make."""
    return recipe(
        views.recipe,
        views.image_size,
        views.crop_min,
        mean=views.mean or MEAN,
        std=views.std or STD,
        views=views.views,
        randaugment=views.randaugment,
        blur_sigma=views.blur_sigma,
        **{option: vars(views)[option] for option in _FIELDS},
    )


# Options that have no effect on some recipes: the condition under which they have one, and why they
# have none otherwise. The condition gets the recipe, with the changes of the settings, and these.
EFFECTS: dict[str, tuple[Callable[[Recipe, Views], bool], str]] = {
    "crop_min": (
        lambda recipe, views: views.crop_scale is None,
        "--crop-scale already has the smallest fraction; leave out one of them",
    ),
    "jitter": (
        lambda recipe, views: any(view.jitter_p for view in recipe),
        "the views have no color jitter; give --jitter-p as well, or leave it out",
    ),
    "jitter_p": (
        lambda recipe, views: any(any(view.jitter) for view in recipe),
        "--jitter 0 0 0 0 changes no color; leave out one of them",
    ),
    "blur_sigma": (
        lambda recipe, views: any(view.blur_p for view in recipe),
        "the recipe's views are not blurred; leave it out, or give --blur-p or another recipe",
    ),
}
