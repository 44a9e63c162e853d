"""Show the curves of the runs' logs: a panel for each logged quantity, in groups."""

from dataclasses import dataclass

import numpy as np

from moco.report import markup, plots
from moco.report.plots import Curve
from moco.report.runs import Run


@dataclass(frozen=True)
class Panel:
    """A picture of one metric.

    Attributes:
        name: name of the metric in the log.
        title: the title above the picture.
        text: a caption that explains the metric.
        percent: whether the metric is a fraction that is shown in per cent.
        baseline: whether the curve begins with the encoder before training, a random one.
        level: a line to draw, and its label, if any value of the metric is near it.
        log: whether the y axis is logarithmic if the values span decades.
    """

    name: str
    title: str
    text: str = ""
    percent: bool = False
    baseline: bool = False
    level: tuple[float, str] | None = None
    log: bool = False


PANELS = (
    Panel(
        "loss",
        "Loss",
        "Compare it only between runs of the same method, with the same number of negatives and "
        "the same temperature.",
        log=True,
    ),
    Panel(
        "knn",
        "k-NN top-1 on val, %",
        "Accuracy of the encoder's features, with the training images as neighbours.",
        percent=True,
        baseline=True,
    ),
    Panel(
        "probe",
        "Online probe, top-1 on val, %",
        "Accuracy of the linear classifier that learns while the encoder trains.",
        percent=True,
    ),
    Panel(
        "probe_train",
        "Online probe, top-1 on training batches, %",
        "Accuracy of the same classifier on the views that it learns from.",
        percent=True,
    ),
    Panel(
        "lr",
        "Learning rate",
        "Of the first parameter group.",
    ),
    Panel(
        "momentum",
        "Momentum",
        "Of the moving average of the encoder, which computes the keys or targets.",
    ),
    Panel(
        "hardness",
        "Hardness of negatives",
        "Cosine similarity of a query and its hardest negative, mean over queries.",
    ),
    Panel(
        "acc1",
        "Positive ranks first, %",
        "Queries whose positive is more similar than all negatives.",
        percent=True,
    ),
    Panel(
        "acc5",
        "Positive among the first five, %",
        "Queries whose positive is more similar than all negatives but four.",
        percent=True,
    ),
    Panel("cosine", "Cosine of positives", "Mean cosine similarity of positive pairs."),
    Panel(
        "alignment",
        "Alignment",
        "Mean squared distance of positive pairs. Lower is better (Wang and Isola, arXiv "
        "2005.10242).",
    ),
    Panel(
        "uniformity",
        "Uniformity",
        "Log of the mean of exp(-2 d²) over all pairs. Lower is better (same paper).",
    ),
    Panel(
        "feature_std",
        "Feature standard deviation times √C",
        "1 if the normalized features are evenly distributed, 0 if they have collapsed.",
        level=(0.1, "collapse warning"),
    ),
    Panel(
        "rankme",
        "RankMe",
        "A smooth count of the feature dimensions that the encoder uses (Garrido et al., arXiv "
        "2210.02885).",
        baseline=True,
    ),
    Panel("images_per_s", "Images per second", "Training speed, without evaluations."),
    Panel(
        "data_wait",
        "Time waiting for data, %",
        "If it is well above 0, loading images is slower than the model.",
        percent=True,
    ),
)
_MORE = (  # metrics that only one method has
    Panel(
        "u",
        "Moving averages u",
        "Mean of the images' u of SogCLR, which its loss divides by.",
        log=True,
    ),
    Panel("tau", "Mean temperature", "Of iSogCLR, over the images of the batch."),
    Panel("tau_min", "Lowest temperature", "Of iSogCLR, over all images."),
    Panel("tau_max", "Highest temperature", "Of iSogCLR, over all images."),
    Panel(
        "effective_negatives",
        "Effective fraction of the negatives",
        "Of HCL: 1 if all negatives have equal weights, lower if hard ones have more weight.",
        log=True,
    ),
    Panel(
        "at_floor",
        "Anchors at the lower bound, %",
        "Of HCL and the debiased loss: anchors whose sum over the negatives is at its lower bound. "
        "Their negatives get no gradient.",
        percent=True,
    ),
    Panel(
        "positive_weight_std",
        "Std of the positives' weights",
        "Standard deviation of DCLW's weights, whose mean is 1.",
    ),
    Panel("positives", "Positives", "Mean number of positives of an anchor, in SupCon."),
    Panel("fn_found", "False negatives found", "Number for each image, found by FNC."),
    Panel(
        "fn_precision",
        "Precision of false negatives, %",
        "Fraction of them that have the class of the image. Training does not use the labels.",
        percent=True,
    ),
)
_NOT_SHOWN = {"knn_gain"}  # it follows from knn
_EXACT = {"lr", "momentum"}  # metrics without noise
_TYPES = "hardness_"  # metrics of types of synthetic negatives
_CONTRAST = ("hardness", "acc1", "acc5")  # their panels come before that of the types


def panels(found: list[Run]) -> list[Panel]:
    """Return the panels for which a run has data.

    Metrics that are not in `PANELS` get panels of their own.
    """
    logged = {
        name for run in found for name, (_, y) in run.log.columns.items() if np.isfinite(y).any()
    }
    known = {panel.name for panel in (*PANELS, *_MORE)} | _NOT_SHOWN
    others = sorted(name for name in logged - known if not name.startswith(_TYPES))
    more = [
        Panel(name, f"Gradient norm: {name[5:]}", "Before clipping.", log=True)
        if name.startswith("grad_")
        else Panel(name, name, "As the method logs it.", log=True)
        for name in others
    ]
    return [panel for panel in (*PANELS, *_MORE, *more) if panel.name in logged]


def section(found: list[Run]) -> str:
    """Return the section with the curves of the runs' logs; "" without any."""
    shown = [_panel(panel, found) for panel in panels(found)]
    after = 1 + max((i for i, one in enumerate(panels(found)) if one.name in _CONTRAST), default=-1)
    types = [part for i, run in enumerate(found) if (part := _types(run, len(found) > 1, i))]
    text = "<p>Strong lines are running medians. The faint lines behind them are the logged "
    text += "values; if there are many, a faint area shows their range.</p>"
    drawn = markup.grid([*shown[:after], *types, *shown[after:]])
    return markup.section("Curves", text, drawn) if drawn else ""


def by_epoch(found: list[Run]) -> bool:
    """Return whether the x axis shows epochs; otherwise it shows steps."""
    return all(run.log.steps_per_epoch for run in found if run.log.columns)


def _curve(run: Run, name: str, epochs: bool, look: plots.Look, factor: float) -> Curve | None:
    """Return the curve of a metric of a run; None if no value is finite."""
    steps, y = run.log.columns.get(name, (np.zeros(0), np.zeros(0)))
    if not np.isfinite(y).any():
        return None
    return Curve(
        steps / run.log.steps_per_epoch if epochs else steps, factor * y, look, name in _EXACT
    )


def _panel(panel: Panel, found: list[Run]) -> str:
    epochs, factor = by_epoch(found), 100 if panel.percent else 1
    made = [
        (run, curve)
        for i, run in enumerate(found)
        if (curve := _curve(run, panel.name, epochs, plots.look(i), factor))
    ]
    levels, text = {}, panel.text
    if panel.baseline:
        before = [y for run, curve in made if (y := _before(run, curve, panel.name)) is not None]
        levels = _baselines(before)
        if before:
            text += " Dotted: the encoder before training, which is random unless --init was given."
    if panel.level and min(np.nanmin(curve.y) for _, curve in made) < 2.5 * panel.level[0]:
        levels = dict([panel.level])
    unit = "epoch" if epochs else "step"
    figure = plots.chart([curve for _, curve in made], unit, levels, panel.log)
    content = plots.svg(figure, f"{panel.title}, by {unit}")
    if len(found) > 1:
        content += markup.key({run.name: curve.look for run, curve in made})
    return markup.panel(panel.title, content, text)


def _before(run: Run, curve: Curve, name: str) -> float | None:
    """Return the value of the encoder before training, if the log has it."""
    return (
        float(curve.y[0]) if run.log.columns[name][0][0] <= 0 and np.isfinite(curve.y[0]) else None
    )


def _baselines(before: list[float]) -> dict[float, str]:
    """Return the labels of the lines for the encoders before training, by their values."""
    values = sorted(set(before))
    label = f"before training: {values[0]:.3g}" if len(values) == 1 else ""
    return dict.fromkeys(values, label)


def _types(run: Run, several: bool, number: int) -> str:
    """Return the panel of the hardness of a run's negatives by type; "" if it has no types."""
    names = [name for name in run.log.columns if name.startswith(_TYPES)]
    titles = {name: name.removeprefix(_TYPES) for name in names}
    if names and "hardness" in run.log.columns:
        titles = {"hardness": "hardest real negative", **titles}
    epochs = by_epoch([run])
    made = {
        title: curve
        for i, (name, title) in enumerate(titles.items())
        if (curve := _curve(run, name, epochs, plots.look(i), 1))
    }
    if not names or not made:
        return ""
    unit = "epoch" if epochs else "step"
    title = "Hardness by type of negative" + (f": {run.name}" if several else "")
    figure = plots.chart(list(made.values()), unit, {}, log=True)
    picture = plots.svg(figure, f"{title}, by {unit}, run {number + 1}")
    key = markup.key({title: curve.look for title, curve in made.items()})
    text = "Mean cosine similarity of the queries to their synthetic negatives of each type."
    return markup.panel(title, picture + key, text)
