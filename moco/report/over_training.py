"""Draw how the similarity of the negatives changes over training."""

import numpy as np

from moco.loss.synthetic import TYPES
from moco.report import markup, plots
from moco.report.contrasts import Contrast
from moco.report.plots import Curve, Look

Run = list[Contrast]  # the checkpoints of a run, in the order of epochs

SYNTHETIC = [one.name for one in TYPES]
# looks of the types of negatives; they differ within a picture
LOOKS = {
    name: plots.look(i)
    for i, name in enumerate(["hardest", *SYNTHETIC[:5], "", SYNTHETIC[5], "learned"])
}
LOOKS |= {"all": Look("#767676", "v", (2.0, 2.0)), "positive": Look("#000000", "s")}
SHARES = (1, 10, 100)  # values of k: false negatives among the k hardest, over training


def names_of(of: Contrast) -> dict[str, str]:
    """Return the names on the page of the types of negatives, by their names in `measured`."""
    titles = {"all": "all negatives", "hardest": f"hardest {of.n_hard:,}", "learned": "learned"}
    return {name: titles.get(name, name) for name in of.measured.groups}


def _epochs(run: Run) -> np.ndarray:
    return np.array([one.epoch for one in run])


def section(runs: list[Run]) -> str:
    """Return the section that compares the checkpoints of a run; "" if each has one."""
    several = [run for run in runs if len(run) > 1]
    if not several:
        return ""
    drawn = []
    for i, run in enumerate(several):
        drawn += _by_type(run, i, len(runs) > 1)
    drawn += _panels_of_quartiles(several, len(runs) > 1)
    text = "<p>How do the negatives change during training? Each point is a checkpoint.</p>"
    return markup.section("Over training", text, markup.grid(drawn))


def _by_type(run: Run, number: int, several: bool) -> list[str]:
    """Return the panels that compare the types of negatives of a run."""
    x, of = _epochs(run), f": {run[0].run}" * several
    names = names_of(run[-1])
    medians = {
        title: Curve(
            x, np.array([one.measured.groups[n].quantiles(0.5)[0] for one in run]), LOOKS[n]
        )
        for n, title in names.items()
    }
    positive = np.array([float(one.measured.positive.median()) for one in run])
    medians = {"positive": Curve(x, positive, LOOKS["positive"])} | medians
    synthetic = [name for name in names if name in SYNTHETIC]

    def shares(field: str) -> dict[str, Curve]:
        return {
            name: Curve(
                x,
                np.array([100 * getattr(one.measured.groups[name], field) for one in run]),
                LOOKS[name],
            )
            for name in synthetic
        }

    drawn = []
    for title, curves, limits, text in (
        (
            "Median similarity by type",
            medians,
            None,
            "Median cosine similarity of a query to its positive and to its negatives.",
        ),
        (
            "Harder than the positive, %",
            shares("above_positive"),
            (0, 104),
            "Synthetic negatives that are more similar to the query than its positive.",
        ),
        (
            "Harder than every real negative, %",
            shares("above_real"),
            (0, 104),
            "Synthetic negatives that are more similar to the query than all real negatives.",
        ),
    ):
        picture = plots.svg(
            plots.chart(list(curves.values()), "epoch", {}, limits=limits),
            f"{title}, run {number + 1}",
        )
        picture += markup.key({name: curve.look for name, curve in curves.items()})
        drawn.append(markup.panel(title + of, picture, text))
    return drawn


def _panels_of_quartiles(runs: list[Run], several: bool) -> list[str]:
    """Return a panel for each type of negative: its median and quartiles, of all runs.

    If there is one run, each panel also has the median positive.
    """
    titles = {"positive": "Positive"}
    for run in runs:
        for name, title in names_of(run[-1]).items():
            titles[name] = "hardest negatives" if name == "hardest" and several else title
    found = {}
    for name in titles:
        for i, run in enumerate(runs):
            if name != "positive" and name not in run[-1].measured.groups:
                continue
            rows = np.array([quartiles(one, name) for one in run]).T
            look = plots.look(i) if several else LOOKS[name]
            curve = Curve(_epochs(run), rows[1], look, band=(rows[0], rows[2]))
            found.setdefault(name, {})[run[0].run] = curve
    every = [x for curves in found.values() for one in curves.values() for x in one.band]
    low, high = min(map(np.min, every)), max(map(np.max, every))
    limits = low - 0.05 * (high - low), high + 0.05 * (high - low)
    drawn = []
    for name, curves in found.items():
        title = titles[name][:1].upper() + titles[name][1:]
        shown, text = list(curves.values()), "Cosine similarity: median and quartiles."
        if not several and name != "positive":
            shown.append(found["positive"][runs[0][0].run]._replace(band=None))
            text += " Black: median of the positives."
        picture = plots.svg(
            plots.chart(shown, "epoch", {}, limits=limits), f"quartiles of the similarity: {title}"
        )
        if several:
            picture += markup.key({run: curve.look for run, curve in curves.items()})
        drawn.append(markup.panel(f"{title}: similarity", picture, text))
    return drawn


def quartiles(of: Contrast, name: str) -> list[float]:
    """Return the quartiles of the similarity of positives, or of a type of negative."""
    if name == "positive":
        return np.quantile(of.measured.positive.numpy(), (0.25, 0.5, 0.75)).tolist()
    return of.measured.groups[name].quantiles(0.25, 0.5, 0.75)


def false_negatives(runs: list[Run]) -> list[str]:
    """Return a panel of false negatives over training for each run with several checkpoints."""
    drawn = []
    for number, run in enumerate(runs):
        if len(run) < 2:
            continue
        curves = {}
        for i, k in enumerate(SHARES):
            y = [
                100 * float(one.measured.false[min(k, len(one.measured.false)) - 1]) for one in run
            ]
            name = f"hardest {k}" if k > 1 else "hardest negative"
            curves[name] = Curve(_epochs(run), np.array(y), plots.look(i))
        chance = 100 * float(run[0].measured.false[-1])
        levels = {chance: f"chance: {chance:.3g} %"}
        figure = plots.chart(list(curves.values()), "epoch", levels, limits=(0, None))
        title = "False negatives over training, %"
        title += f": {run[0].run}" if len(runs) > 1 else ""
        picture = plots.svg(figure, f"{title}, run {number + 1}")
        picture += markup.key({name: curve.look for name, curve in curves.items()})
        text = "Fraction of false negatives among the hardest negatives of each query."
        drawn.append(markup.panel(title, picture, text))
    return drawn
