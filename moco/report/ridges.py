"""Draw a ridge plot: a row for each distribution, with its median and quartiles."""

import numpy as np
from matplotlib.figure import Figure

from moco.report import plots
from moco.report.plots import FONT, INK, WIDTH, Look

ROW = 36  # height of a row, in CSS pixels
_BELOW = 34  # height of the x axis
_BINS, _SMOOTH = 240, 2.5  # bins of a histogram; standard deviation of its smoothing, in bins


def ridges(
    rows: dict[str, np.ndarray], looks: dict[str, Look], limits: tuple[float, float], marked: str
) -> Figure:
    """Return a ridge plot of distributions of the cosine similarity.

    All rows have the same height. A bar spans the quartiles, and its marker is the median.

    Args:
        rows: the values of each distribution, by its name; at least one value is finite.
        looks: the look of each.
        limits: ends of the x axis.
        marked: name of the row whose median is drawn as a dotted line through all rows.
    """
    height = ROW * len(rows) + _BELOW
    figure = plots.blank(WIDTH, height)
    # the margins leave room for half of a number below either end of the axis
    axis = figure.add_axes((0.06, _BELOW / height, 0.88, 1 - (_BELOW + 4) / height))
    for i, (name, values) in enumerate(rows.items()):
        base, look = len(rows) - 1 - i, looks[name]
        x, y = _density(values, limits)
        axis.fill_between(x, base, base + 0.66 * y, color=look.color, alpha=0.35, linewidth=0)
        axis.plot(x, base + 0.66 * y, color=look.color, linewidth=1.2)
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        axis.plot((low, high), (base, base), color=look.color, linewidth=4, solid_capstyle="butt")
        ink = {"markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 4}
        axis.plot(middle, base, marker=look.marker, color=look.color, markersize=7, **ink)
        written = axis.text(
            0.005, base + 0.16, "?", color=INK, fontsize=FONT, transform=axis.get_yaxis_transform()
        )
        plots.plain([written], [name])
    axis.axvline(np.median(rows[marked]), color=INK, linewidth=1, linestyle=":", zorder=0)
    axis.set_xlim(limits)
    axis.set_ylim(-0.25, len(rows) - 0.1)
    axis.set_yticks([])
    axis.tick_params(labelsize=FONT, colors=INK, length=3, pad=2)
    axis.set_xlabel("cosine similarity to the query", fontsize=FONT, color=INK, labelpad=1)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _density(values: np.ndarray, limits: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the density of values: x, and heights whose maximum is 1.

    It is a histogram, smoothed by a normal distribution.
    """
    counts, edges = np.histogram(values, _BINS, limits)
    reach = np.arange(-int(4 * _SMOOTH), int(4 * _SMOOTH) + 1)
    weights = np.exp(-np.square(reach / _SMOOTH) / 2)
    heights = np.convolve(counts, weights, "same")
    return (edges[:-1] + edges[1:]) / 2, heights / max(heights.max(), 1e-12)
