"""Views are data: a recipe is a tuple of frozen `View`s, one per view that the method sees."""

from dataclasses import dataclass, replace

from moco.errors import unknown

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

RECIPES: dict[str, Recipe] = {
    "mocov1": (_MOCOV1, _MOCOV1),
    "mocov2": (_MOCOV2, _MOCOV2),
    "byol": (replace(_BYOL, blur_p=1.0), replace(_BYOL, blur_p=0.1, solarize_p=0.2)),
    "probe": (View(scale=(0.08, 1.0)),),
}


def recipe(name: str, size: int = 224) -> Recipe:
    """The recipe `name` with its views scaled from 224 to `size` pixels. Raises InputError for an unknown name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return tuple(replace(view, size=round(view.size * size / 224)) for view in RECIPES[name])
