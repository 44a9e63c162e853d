"""Draw the curves of a report as SVG: a picture for each logged quantity, a line for each run.

A picture is as wide as a phone, and wide screens show several side by side. Its text stays text, so
that browsers scale, search and print it.
"""

import html
import io
import re
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

WIDTH, HEIGHT = 350, 205  # of a picture, in CSS pixels
FONT = 12.0  # size of its text, in CSS pixels
POINTS = 400  # maximum number of points of a curve: about one for each pixel
# the colors of Okabe and Ito, which color-blind readers can tell apart; yellow is too light
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# lengths of dashes and gaps, in line widths
DASHES = ((), (5.0, 2.0), (1.0, 1.2), (6.0, 1.5, 1.0, 1.5))
MARKERS = "osD^v"
INK = "#333333"
_DECADES = 2.0  # a y axis is logarithmic if its positive values span more powers of ten than this


class Look(NamedTuple):
    """The look of a curve or a class, which differs in more than its color.

    Attributes:
        color: the color.
        marker: matplotlib's name of the marker.
        dashes: lengths of dashes and gaps, in line widths; () for a solid line, None for no line.
    """

    color: str
    marker: str
    dashes: tuple[float, ...] | None = ()


def look(i: int) -> Look:
    """Return the look of curve number `i`, the same in every picture."""
    return Look(
        COLORS[i % len(COLORS)],
        MARKERS[i % len(MARKERS)],
        DASHES[(i + i // len(COLORS)) % len(DASHES)],
    )


class Curve(NamedTuple):
    """A curve: its values, its look, whether it has no noise, and a band of values around it."""

    x: np.ndarray
    y: np.ndarray
    look: Look
    exact: bool = False
    band: tuple[np.ndarray, np.ndarray] | None = None


def chart(
    curves: list[Curve],
    unit: str,
    levels: dict[float, str],
    log: bool = False,
    log_x: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Return a picture of curves: smoothed, with the logged values faint behind them.

    Args:
        curves: the curves; each has a finite value.
        unit: label of the x axis.
        levels: labels of dotted horizontal lines, by their y values.
        log: whether the y axis is logarithmic if the values span decades.
        log_x: whether the x axis is logarithmic.
        limits: ends of the y axis; by default those of the curves.
    """
    figure = blank(WIDTH, HEIGHT, layout="constrained")
    axis = figure.subplots()
    for curve in curves:
        _draw(axis, curve)
    for level, text in levels.items():
        axis.axhline(level, color=INK, linewidth=1, linestyle=":")
        place = {"transform": axis.get_yaxis_transform(), "va": "bottom"}
        place["ha"] = "left" if log_x else "right"
        axis.text(0.01 if log_x else 0.99, level, text, color=INK, fontsize=FONT, **place)
    _scale(axis, curves, log)
    axis.set_xlabel(unit, fontsize=FONT, color=INK, labelpad=1)
    if log_x:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(labelsize=FONT, colors=INK, length=3, pad=2)
    axis.grid(alpha=0.25)
    axis.margins(x=0.02, y=0.08)
    if limits:
        axis.set_ylim(limits)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def blank(width: float, height: float, **more) -> Figure:
    """Return an empty figure of this size, in CSS pixels."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, **more)


def _scale(axis, curves: list[Curve], log: bool) -> None:
    """Choose the scale and the ticks of the y axis."""
    y = np.concatenate([curve.y for curve in curves])
    y = y[np.isfinite(y)]
    if log and y.min() > 0 and np.log10(y.max() / y.min()) > _DECADES:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(numticks=6))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        return
    axis.yaxis.set_major_locator(MaxNLocator(5))
    if y.max() == y.min():
        half = abs(y[0]) / 50 or 1.0
        axis.set_ylim(y[0] - half, y[0] + half)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _draw(axis, curve: Curve) -> None:
    """Draw the finite values of a curve."""
    color, marker, dashes = curve.look
    finite = np.isfinite(curve.y)
    x, y = curve.x[finite], curve.y[finite]
    if curve.band:
        axis.fill_between(curve.x, *curve.band, color=color, alpha=0.2, linewidth=0)
    line = {"color": color, "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.8}
    middle, low, high, center = thinned(x, y)
    every = max(1, len(middle) // 6)
    if curve.exact:
        axis.plot(middle, center, marker=marker, markersize=4.5, markevery=every, **line)
        return
    if len(y) <= 40:  # few enough to see each point
        axis.plot(x, y, marker=marker, markersize=4.5, **line)
        return
    if len(center) == len(y):
        axis.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    else:
        axis.fill_between(middle, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(middle, smooth(center), marker=marker, markersize=4.5, markevery=every, **line)


def thinned(
    x: np.ndarray, y: np.ndarray, points: int = POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return a curve with at most `points` points, each for a group of neighbours.

    Returns:
        The mean x, and the minimum, maximum and median y of each group, each [points].
    """
    edges = np.linspace(0, len(y), min(points, len(y)) + 1).astype(int)
    starts, counts = edges[:-1], np.diff(edges)
    median = np.array([np.median(part) for part in np.split(y, edges[1:-1])])
    return (
        np.add.reduceat(x, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
        median,
    )


def smooth(y: np.ndarray) -> np.ndarray:
    """Return `y` smoothed by a running median, and then by a running mean.

    Both windows are a fiftieth of the curve. They shrink towards the ends, to stay symmetric.
    """
    n, width = len(y), max(2, len(y) // 100)
    for average in (np.median, np.mean):
        reach = np.minimum(width, np.minimum(np.arange(n), np.arange(n)[::-1]))
        y = np.array([average(y[i - r : i + r + 1]) for i, r in enumerate(reach)])
    return y


def svg(figure: Figure, label: str, dots: float = 144) -> str:
    """Return a picture as SVG inside HTML, as wide as the page gives it.

    Args:
        figure: the picture.
        label: a text for readers who do not see it; no other picture of the page has it.
        dots: resolution of its rasterized parts, per 72 pixels.
    """
    file = io.BytesIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # labels and salts of equal pictures differ, and with them the ids of their parts
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, **_FONTS}):
        figure.savefig(file, format="svg", dpi=dots, metadata=none, transparent=True)
    text = file.getvalue().decode()
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.S)
    width, height = figure.get_size_inches() * 72
    name = html.escape(printable(label))
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}"'
    head += ' stroke-linejoin="round"'
    return head + ">" + text[text.index(">") + 1 :]


_FONTS = {"font.family": ["DejaVu Sans", "sans-serif"]}


def plain(texts, names) -> None:
    """Set the strings of matplotlib's texts, without a special meaning of any character.

    Otherwise matplotlib reads $ as mathematics, and hides labels that start with an underscore.
    """
    for text, name in zip(texts, names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def printable(text: object) -> str:
    """Return `text` in one line, with ? for characters that cannot be drawn or encoded."""
    text = str(text).encode(errors="replace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(name: object, most: int = 44) -> str:
    """Shorten a name to at most `most` characters. Keeps the end, which tells runs apart."""
    name = printable(name)
    start = min(8, most // 4)
    return name if len(name) <= most else f"{name[:start]}...{name[start + 3 - most :]}"
