"""Draw the curves of a report: a picture for each logged quantity, a colour for each run."""

import base64
import io
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from moco.report.runs import Run

POINTS = 1000  # maximum number of points of a curve
COLORS = [mpl.colors.to_hex(color) for color in mpl.colormaps["tab10"].colors]
DASHES = ("-", "--", ":", "-.")  # line styles of the first ten runs, the next ten, ...
INK = "#333333"


@dataclass(frozen=True)
class Panel:
    """A picture with an axis for each metric.

    Attributes:
        title: the title above the picture.
        names: label of the y axis of each metric, by its name in the log.
        text: a caption that explains the metrics.
        levels: labels of horizontal lines, by their y values.
        log_scale: whether the y axes are logarithmic.
    """

    title: str
    names: dict[str, str]
    text: str = ""
    levels: dict[float, str] = field(default_factory=dict)
    log_scale: bool = False


PANELS = (
    Panel(
        "Loss",
        {"loss": "loss"},
        "Compare it only between runs of the same method, with the same number of negatives and "
        "the same temperature.",
    ),
    Panel(
        "k-NN top-1",
        {"knn": "top-1 on val", "knn_gain": "gain over the encoder before training"},
        "Accuracy of the encoder's features on val/, with train/ as neighbours, in [0, 1]. The "
        "curve begins with the encoder before training.",
    ),
    Panel(
        "Online probe",
        {"probe": "top-1 on val", "probe_train": "top-1 on the batches"},
        "Accuracy of the linear classifier that learns while the encoder trains, in [0, 1].",
    ),
    Panel(
        "RankMe",
        {"rankme": "dimensions in use"},
        "A smooth count of the feature dimensions that the encoder uses (Garrido et al., arXiv "
        "2210.02885). The curve begins with the encoder before training.",
    ),
    Panel("Learning rate", {"lr": "learning rate"}, "Learning rate of the first parameter group."),
    Panel(
        "Contrast accuracy",
        {"acc1": "positive is first", "acc5": "positive is among first five"},
        "Fraction of queries, in [0, 1], whose positive is more similar than all negatives, or all "
        "but four.",
    ),
    Panel(
        "Hardness of negatives",
        {"hardness": "cosine similarity"},
        "Similarity of a query and its hardest negative, mean over queries, in [-1, 1].",
    ),
    Panel(
        "Alignment and uniformity",
        {"alignment": "alignment", "uniformity": "uniformity"},
        "Alignment: mean squared distance of positive pairs. Uniformity: log of the mean of "
        "exp(-2 d²) over all pairs. Lower is better for both (Wang and Isola, arXiv 2005.10242).",
    ),
    Panel(
        "Feature standard deviation",
        {"feature_std": "std times √C"},
        "Standard deviation of normalized features in each dimension, times √C: 1 if they are "
        "evenly distributed, 0 if they have collapsed.",
        levels={0.1: "collapse warning"},
    ),
    Panel("Gradient norm", {}, "Gradient norm of each part, before clipping.", log_scale=True),
    Panel(
        "Throughput",
        {"images_per_s": "images per second", "data_wait": "fraction of time waiting for data"},
        "If the fraction is well above 0, loading images is slower than the model.",
    ),
)


EXACT = {"lr"}  # metrics without noise
GRADIENT = "Gradient norm"


def panels(runs: list[Run]) -> list[Panel]:
    """Return the panels for which a run has data, each with the metrics that are logged.

    The last panel shows all metrics that are not in `PANELS`.
    """
    logged = {
        name for run in runs for name, (_, y) in run.log.columns.items() if np.isfinite(y).any()
    }
    gradients = {
        name: name.removeprefix("grad_") for name in sorted(logged) if name.startswith("grad_")
    }
    known = {name for panel in PANELS for name in panel.names} | gradients.keys()
    found = []
    for panel in (
        *PANELS,
        Panel("Method-specific metrics", {name: name for name in sorted(logged - known)}),
    ):
        names = (
            gradients
            if panel.title == GRADIENT
            else {n: label for n, label in panel.names.items() if n in logged}
        )
        if names:
            found.append(Panel(panel.title, names, panel.text, panel.levels, panel.log_scale))
    return found


def by_epoch(runs: list[Run]) -> bool:
    """Return whether the x axis shows epochs; otherwise it shows steps."""
    return all(run.log.steps_per_epoch for run in runs if run.log.columns)


def draw(panel: Panel, runs: list[Run]) -> Figure:
    """Return the picture of a panel: smoothed curves, with the logged values faint behind them."""
    columns = min(3, len(panel.names))
    rows = -(-len(panel.names) // columns)
    figure = Figure(
        figsize=(5.6 if columns == 1 else 11.4, 3.1 * rows + 0.25), dpi=110, layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).flat
    epochs = by_epoch(runs)
    shown = set()
    for axis, (name, label) in zip(axes, panel.names.items(), strict=False):
        for i, run in enumerate(runs):
            if name in run.log.columns:
                steps, y = run.log.columns[name]
                x = steps / run.log.steps_per_epoch if epochs else steps
                if _curve(axis, x, y, i, name in EXACT):
                    shown.add(i)
        _finish(axis, panel, label, "epoch" if epochs else "step")
    for axis in list(axes)[len(panel.names) :]:
        axis.axis("off")
    if len(runs) > 1:
        legend(figure, {run_label(runs[i].name): style(i) for i in sorted(shown)})
    return figure


def style(i: int) -> dict[str, str]:
    """Return the colour and line style of run number `i`, the same in every picture."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def legend(figure: Figure, styles: dict[str, dict[str, str]]) -> None:
    """Add a legend above a picture, given the line style of each name."""
    longest = max(map(len, styles)) + 6
    columns = max(1, int(figure.get_figwidth() * 13 // longest))
    lines = [Line2D([], [], linewidth=2, **of) for of in styles.values()]
    plain(
        figure.legend(
            lines,
            [""] * len(lines),
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=8,
        ).get_texts(),
        styles,
    )


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


def run_label(name: str, most: int = 44) -> str:
    """Shorten a name to at most `most` characters. Keeps the end, which tells runs apart."""
    name = printable(name)
    return name if len(name) <= most else f"{name[:8]}...{name[-(most - 11) :]}"


def _curve(axis, x: np.ndarray, y: np.ndarray, i: int, exact: bool) -> bool:
    """Draw the values of run number `i`. Return False if there are none."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if not len(y):
        return False
    look = style(i)
    if len(y) <= 40:  # few enough to see each point
        axis.plot(x, y, marker="o", markersize=3, linewidth=1.4, **look)
        return True
    middle, low, high, center = thinned(x, y)
    if exact:
        axis.plot(middle, center, linewidth=1.6, **look)
        return True
    if len(center) == len(y):
        axis.plot(x, y, color=look["color"], alpha=0.25, linewidth=0.8)
    else:
        axis.fill_between(middle, low, high, color=look["color"], alpha=0.2, linewidth=0)
    axis.plot(middle, smooth(center), linewidth=1.6, **look)
    return True


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


def _finish(axis, panel: Panel, label: str, unit: str) -> None:
    for level, says in panel.levels.items():
        axis.axhline(level, color="#b22222", linewidth=1, linestyle="--")
        axis.text(
            0.01,
            level,
            says,
            transform=axis.get_yaxis_transform(),
            va="bottom",
            color="#b22222",
            fontsize=8,
        )
        axis.set_ylim(bottom=0)
    if panel.log_scale and all((line.get_ydata() > 0).all() for line in axis.lines):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(unit, fontsize=9, color=INK)
    plain([axis.set_ylabel("?", fontsize=9, color=INK)], [printable(label)])
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(alpha=0.25)
    axis.margins(x=0.02)
    axis.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> str:
    """Return the picture as a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
