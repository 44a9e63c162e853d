"""Views are data: a recipe is a tuple of frozen `View`s, one per view that the method sees."""

from dataclasses import dataclass, replace

from moco.errors import InputError, unknown

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]


@dataclass(frozen=True)
class View:
    """One random view. Probabilities in [0, 1]; `scale` is the crop's share of the image's area.

    `jitter` is (brightness, contrast, saturation, hue) as in torchvision's ColorJitter; `blur_sigma` is in pixels of
    the view; `order` is the order of the colour operations.
    """

    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_p: float = 0.0
    solarize_p: float = 0.0
    flip_p: float = 0.5
    order: tuple[str, ...] = ("jitter", "gray", "blur", "solarize")


Recipe = tuple[View, ...]

_MOCOV1 = View(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_p=0.2, order=("gray", "jitter"))
_MOCOV2 = View(jitter_p=0.8, gray_p=0.2, blur_p=0.5)
_BYOL = View(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)
_MULTICROP = tuple(
    replace(_MOCOV2, size=size, scale=scale)
    for size, scale in ((224, (0.2, 1.0)), (192, (0.172, 0.86)), (160, (0.143, 0.715)), (128, (0.114, 0.571)), (96, (0.086, 0.429)))
)

RECIPES: dict[str, Recipe] = {
    "mocov1": (_MOCOV1, _MOCOV1),
    "mocov2": (_MOCOV2, _MOCOV2),
    "byol": (replace(_BYOL, blur_p=1.0), replace(_BYOL, blur_p=0.1, solarize_p=0.2)),
    "sogclr": (replace(_BYOL, blur_p=1.0),) * 2,
    "multicrop": (_MOCOV2, *_MULTICROP),  # the key view, then the queries
    "probe": (View(scale=(0.08, 1.0)),),
}


def recipe(name: str, size: int = 224, crop_min: float | None = None) -> Recipe:
    """The recipe `name` with its views scaled from 224 to `size` pixels, and `crop_min` for the least share of a crop.

    Raises InputError for an unknown name, or where `crop_min` is no share, or above a view's largest.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    views = tuple(replace(view, size=max(1, round(view.size * size / 224))) for view in RECIPES[name])
    if crop_min is None:
        return views
    largest = min(view.scale[1] for view in views)
    if not 0 < crop_min <= largest:
        raise InputError(f"--crop-min {crop_min:g}: must lie above 0 and be at most {largest:g} for the recipe {name}")
    return tuple(replace(view, scale=(crop_min, view.scale[1])) for view in views)
