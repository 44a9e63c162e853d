"""Draw the views of images exactly as training sees them."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from moco import rng
from moco.augment import color
from moco.augment.recipes import Recipe, View
from moco.data import loader
from moco.data.decoding import DEFAULT, Decoding
from moco.data.images import Images
from moco.errors import InputError
from moco.report.plots import printable
from moco.rng import Progress

CELL = 1.6  # side of an image's cell, in inches
DPI = 140  # one view of 224 pixels fills its cell pixel by pixel
LINE = 0.14  # height of a line of text, in inches
COLUMNS = 12  # maximum number of columns with views, unless --draws is given


class Column(NamedTuple):
    """A column of a `grid`.

    Attributes:
        title: a short title.
        heading: a longer heading, shown once for neighbouring columns that have the same.
        images: [3, H, W] each, uint8 or float in [0, 1].
    """

    title: str
    heading: str
    images: Sequence[Tensor]


# the views


def views_figure(
    images: Images,
    picked: Sequence[int],
    recipe: Recipe,
    seed: int = 0,
    draws: int | None = None,
    settings: Decoding = DEFAULT,
) -> Figure:
    """Return a figure of some images and their views.

    Args:
        images: the data set.
        picked: indices of the images to show.
        recipe: the views.
        seed: seed of the views.
        draws: number of random draws of each view; by default 1 to 3, as many as fit.
        settings: how to decode the images.

    Raises InputError if an image cannot be read.
    """
    columns = view_columns(
        images, picked, recipe, seed, draws or max(1, min(3, COLUMNS // len(recipe))), settings
    )
    width = CELL * len(columns) + 2 * LINE
    height = CELL * len(picked) + LINE * (_lines(columns) + 4)
    figure = Figure(figsize=(width, height), dpi=DPI)
    grid(figure, columns, [printable(images.name(i)) for i in picked])
    return figure


def view_columns(
    images: Images,
    picked: Sequence[int],
    recipe: Recipe,
    seed: int,
    draws: int,
    settings: Decoding = DEFAULT,
) -> list[Column]:
    """Return the columns of a `grid`: the images, then `draws` draws of each view.

    See `views_figure` for the arguments.
    """
    samples = loader.Views(images, loader.RandomCrops(recipe, seed), settings=settings)
    crops = [_crops(samples, epoch, picked) for epoch in range(draws)]
    columns = [Column("", "image", [images.read(i, settings) for i in picked])]
    for v, (view, heading) in enumerate(zip(recipe, _headings(recipe), strict=True)):
        for epoch in range(draws):
            generator = Progress(seed, epoch, step=epoch).generator(rng.COLOR, "cpu", 0, v)
            seen = color.augment(crops[epoch][v], view, generator)
            title = f"view {v + 1}" + (f", draw {epoch + 1}" if draws > 1 else "")
            columns.append(
                Column(title, heading, list(color.denormalize(seen, view.mean, view.std)))
            )
    return columns


def settings(view: View) -> list[str]:
    """Return a line for each operation on a view, in order, except those that are off."""
    jitter = "jitter " + " ".join(f"{strength:g}" for strength in view.jitter)
    colors = {
        "jitter": (jitter, view.jitter_p),
        "gray": ("gray", view.gray_p),
        "blur": ("blur sigma {:.3g} to {:.3g}".format(*view.blur_sigma), view.blur_p),
        "solarize": ("solarize", view.solarize_p),
        "randaugment": (
            "RandAugment {} of magnitude {}".format(*view.randaugment),
            float(view.randaugment[0] > 0),
        ),
    }
    happens = [colors[name] for name in view.order] + [("flip", view.flip_p)]
    happens += [("vertical flip", view.vertical_flip_p)]
    happens += [(f"rotation by up to {view.rotate:g} degrees", float(view.rotate > 0))]
    least, most = (100 * fraction for fraction in view.scale)
    crop = "crop" if view.interpolation == "bilinear" else f"{view.interpolation} crop"
    lines = [f"{view.size} px, {crop} {least:.3g} to {most:.3g} % of area"]
    return lines + [f"{name}, {'always' if p == 1 else f'p {p:g}'}" for name, p in happens if p]


def _crops(views: loader.Views, epoch: int, picked: Sequence[int]) -> list[Tensor]:
    """Return the crops of the picked images, a uint8 batch [B, 3, S, S] for each view."""
    samples = [views[epoch, i] for i in picked]
    for sample in samples:
        if isinstance(sample, InputError):
            raise sample
    return [torch.stack(crops) for crops in zip(*(sample[0] for sample in samples), strict=True)]


def _headings(recipe: Recipe) -> list[str]:
    """Return the heading of each view. Neighbouring equal views share one, with their numbers."""
    headings: list[str] = []
    for view, same in groupby(recipe):
        first, last = len(headings) + 1, len(headings) + len(list(same))
        several = f"views {first} {'and' if last == first + 1 else 'to'} {last}"
        name = f"view {first}" if first == last else several
        headings += ["\n".join([name, *settings(view)])] * (last - first + 1)
    return headings


# the grid


def grid(figure: Figure | SubFigure, columns: Sequence[Column], names: Sequence[str] = ()) -> None:
    """Fill `figure` with a grid of images in cells of equal size.

    Text has a fixed size, which fits if the figure has about `CELL` inches for each cell.

    Args:
        figure: the figure to draw on.
        columns: the columns, whose headings are shown above.
        names: names of the rows, shown at the left.
    """
    rows, top = len(columns[0].images), (_lines(columns) + 2.5) * LINE / CELL
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-2 * LINE / CELL, len(columns)), ylim=(rows, -top), aspect="equal")
    axis.axis("off")
    for x, column in enumerate(columns):
        for y, image in enumerate(column.images):
            axis.imshow(_pixels(image), extent=_cell(x, y, *image.shape[1:]))
        axis.text(x + 0.5, -0.05, column.title, ha="center", va="bottom", fontsize=7)
    axis.set(xlim=(-2 * LINE / CELL, len(columns)), ylim=(rows, -top))  # imshow changes them
    for y, name in enumerate(names):
        short = name if len(name) <= 26 else f"...{name[-23:]}"
        axis.text(
            -LINE / CELL,
            y + 0.5,
            short,
            ha="center",
            va="center",
            rotation=90,
            fontsize=6,
            parse_math=False,
        )
    left = 0
    for heading, same in groupby(columns, key=lambda column: column.heading):
        right = left + len(list(same))
        title, *lines = heading.split("\n")
        axis.text(left + 0.04, -top + 0.04, title, va="top", fontsize=9, fontweight="bold")
        axis.text(
            left + 0.04,
            -top + 0.04 + 1.4 * LINE / CELL,
            "\n".join(lines),
            va="top",
            fontsize=7,
            linespacing=1.3,
        )
        axis.plot(
            (left + 0.04, right - 0.04), (-1.4 * LINE / CELL,) * 2, color="black", linewidth=0.8
        )
        left = right


def _lines(columns: Sequence[Column]) -> int:
    """Return the number of lines of the longest heading."""
    return max(column.heading.count("\n") + 1 for column in columns)


def _pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _cell(x: int, y: int, height: int, width: int) -> tuple[float, float, float, float]:
    """Return the left, right, bottom and top of an image in its cell, with a border around it."""
    half = 0.485 / max(height, width)
    return (
        x + 0.5 - half * width,
        x + 0.5 + half * width,
        y + 0.5 + half * height,
        y + 0.5 - half * height,
    )
