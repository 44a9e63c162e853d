"""Draw maps of features: a point for each image, a look for each class, and the classes' names."""

import numpy as np
from matplotlib.figure import Figure

from moco.report import plots
from moco.report.plots import COLORS, MARKERS, Look, shortened

SIDE = 350  # of a map, in CSS pixels
_LINE, _LETTER = 15, 7  # height and width of a letter, in pixels
_LONGEST = 18  # letters of a name on the map


def class_look(i: int) -> Look:
    """Return the look of class number `i`: 7 colors with one marker, then with the next, ..."""
    return Look(COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)], None)


def scatter(places: np.ndarray, labels: np.ndarray, names: dict[int, str]) -> Figure:
    """Return a map of images, with the names of the classes at the middle of their images.

    If names would overlap, that of the class with more images is drawn.

    Args:
        places: positions of the images, [N, 2].
        labels: class of each image, [N]; images of classes without a name are grey.
        names: names of the classes to show, by class.
    """
    low, high = places.min(0), places.max(0)
    margin = 0.06 * np.maximum(high - low, 1e-9)
    figure = plots.blank(SIDE, SIDE)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
    axis.axis("off")
    size = float(np.clip(12_000 / len(places), 8, 90))
    other = ~np.isin(labels, list(names))
    looks = {label: class_look(i) for i, label in enumerate(names)}
    dots = {"linewidths": 0, "rasterized": True}
    axis.scatter(*places[other].T, s=size, color="#999999", alpha=0.6, **dots)
    for label, one in looks.items():
        found = places[labels == label]
        axis.scatter(*found.T, s=size, color=one.color, marker=one.marker, alpha=0.8, **dots)
    _write_names(axis, places, labels, names, looks)
    return figure


def _write_names(
    axis,
    places: np.ndarray,
    labels: np.ndarray,
    names: dict[int, str],
    looks: dict[int, Look],
) -> None:
    """Write the name of each class near the middle of its images, if there is room."""
    taken: list[tuple[float, float, float]] = []  # left, right and middle height, in pixels
    counts = {label: int((labels == label).sum()) for label in names}
    for label in sorted(names, key=lambda label: -counts[label]):
        if not counts[label]:
            continue
        own = places[labels == label]
        # the image nearest to the middle, which may be empty if a class has several groups
        middle = own[np.square(own - np.median(own, axis=0)).sum(1).argmin()]
        x, y = axis.transData.transform(middle)
        text = shortened(names[label], _LONGEST)
        half = _LETTER * len(text) / 2
        x = float(np.clip(x, half, SIDE - half))
        for offset in (0, _LINE, -_LINE):
            height = float(np.clip(y + offset, _LINE / 2, SIDE - _LINE / 2))
            if all(
                x + half < left or x - half > right or abs(height - other) >= _LINE
                for left, right, other in taken
            ):
                taken.append((x - half, x + half, height))
                written = axis.text(
                    *axis.transData.inverted().transform((x, height)),
                    "?",
                    fontsize=plots.FONT,
                    color=_darker(looks[label].color),
                    fontweight="bold",
                    ha="center",
                    va="center",
                )
                plots.plain([written], [text])
                break


def _darker(color: str) -> str:
    """Return a darker shade of a color, for text on white."""
    parts = [int(color[i : i + 2], 16) * 6 // 10 for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)
