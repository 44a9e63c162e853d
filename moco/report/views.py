"""Draw the views that training sees: the one renderer of views."""

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
from moco.data.images import Images
from moco.errors import InputError
from moco.report.plots import printable
from moco.rng import Progress

CELL = 1.6  # inches of an image
DPI = 140  # one view of 224 pixels fills its cell pixel by pixel
LINE = 0.14  # inches of a line of text
COLUMNS = 12  # of views, at most, where --draws is left out


class Column(NamedTuple):
    """One column of a `grid`: its short title, what it shares with its neighbours of the same heading, and its images."""

    title: str
    heading: str
    images: Sequence[Tensor]  # [3, H, W] each, uint8 or float in [0, 1]


# What is drawn.


def views_figure(
    images: Images, picked: Sequence[int], recipe: Recipe, seed: int = 0, draws: int | None = None
) -> Figure:
    """A figure of the images numbered `picked` and of `draws` draws of each view of `recipe` (by default as many as are
    readable, 1 to 3). Raises InputError for an image that cannot be read.
    """
    columns = view_columns(
        images, picked, recipe, seed, draws or max(1, min(3, COLUMNS // len(recipe)))
    )
    width = CELL * len(columns) + 2 * LINE
    height = CELL * len(picked) + LINE * (_lines(columns) + 4)
    figure = Figure(figsize=(width, height), dpi=DPI)
    grid(figure, columns, [printable(images.name(i)) for i in picked])
    return figure


def view_columns(
    images: Images, picked: Sequence[int], recipe: Recipe, seed: int, draws: int
) -> list[Column]:
    """The columns of a `grid`: the images numbered `picked`, then `draws` draws of each view, made as for training."""
    cut = loader.Views(images, loader.RandomCrops(recipe, seed))
    crops = [_crops(cut, epoch, picked) for epoch in range(draws)]
    columns = [Column("", "image", [images.read(i) for i in picked])]
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
    """What may happen to a view, in the order in which it does, a line each; what cannot happen is left out."""
    jitter = "jitter " + " ".join(f"{strength:g}" for strength in view.jitter)
    colors = {
        "jitter": (jitter, view.jitter_p),
        "gray": ("gray", view.gray_p),
        "blur": ("blur sigma {:.3g} to {:.3g}".format(*view.blur_sigma), view.blur_p),
        "solarize": ("solarize", view.solarize_p),
    }
    happens = [colors[name] for name in view.order] + [("flip", view.flip_p)]
    lines = [
        "{} px, crop {:.3g} to {:.3g} % of area".format(
            view.size, *(100 * share for share in view.scale)
        )
    ]
    if view.randaugment[0]:
        lines.append("RandAugment {} of magnitude {}".format(*view.randaugment))
    return lines + [f"{what}, {'always' if p == 1 else f'p {p:g}'}" for what, p in happens if p]


def _crops(cut: loader.Views, epoch: int, picked: Sequence[int]) -> list[Tensor]:
    """One batch [B, 3, S, S] uint8 for each view."""
    samples = [cut[epoch, i] for i in picked]
    for sample in samples:
        if isinstance(sample, InputError):
            raise sample
    return [torch.stack(views) for views in zip(*(sample[0] for sample in samples), strict=True)]


def _headings(recipe: Recipe) -> list[str]:
    """For each view, the numbers and the settings of the run of equal views that it belongs to."""
    headings: list[str] = []
    for view, same in groupby(recipe):
        first, last = len(headings) + 1, len(headings) + len(list(same))
        name = (
            f"view {first}"
            if first == last
            else f"views {first} {'and' if last == first + 1 else 'to'} {last}"
        )
        headings += ["\n".join([name, *settings(view)])] * (last - first + 1)
    return headings


# How it is drawn.


def grid(figure: Figure | SubFigure, columns: Sequence[Column], names: Sequence[str] = ()) -> None:
    """Fill `figure` with the columns' images in cells of one size, the headings above, `names` of the rows at the left.

    Text keeps its size: a figure gives a cell about `CELL` inches where all is to be readable.
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
    """Of the longest heading."""
    return max(column.heading.count("\n") + 1 for column in columns)


def _pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _cell(x: int, y: int, height: int, width: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of an image in the middle of its cell, with its own proportions and a border."""
    half = 0.485 / max(height, width)
    return (
        x + 0.5 - half * width,
        x + 0.5 + half * width,
        y + 0.5 + half * height,
        y + 0.5 - half * height,
    )
