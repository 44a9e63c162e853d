"""Compare runs in tables: their last metrics, their evaluations, and their options."""

import json
import math
from collections.abc import Callable, Iterable

import numpy as np

from moco.engine import record
from moco.engine.log import format_duration
from moco.messages import counted
from moco.report import header, markup, plots, results, runs
from moco.report.markup import escaped
from moco.report.results import Best
from moco.report.runs import Run

_STAR = "★"
# metrics of the log, their titles, factors to show them in per cent, and whether higher is better
_METRICS = (
    ("knn", "k-NN", 100, True),
    ("probe", "probe", 100, True),
)
_WITHOUT_LABELS = (
    ("rankme", "RankMe", 1, True),
    ("alignment", "alignment", 1, False),
    ("uniformity", "uniformity", 1, False),
)


def section(found: list[Run]) -> str:
    """Return the section with the tables of results."""
    return markup.section("Results", _summary(found), _evaluations(found))


def _summary(found: list[Run]) -> str:
    """Return a table of the runs, with the last value of each metric, and the best run marked."""
    labelled = any(name in run.log.columns for run in found for name, *_ in _METRICS)
    metrics = _METRICS if labelled else _WITHOUT_LABELS
    columns: list[tuple[str, list[str]]] = [
        ("run", [markup.run_name(i, run) for i, run in enumerate(found)]),
        ("method", [escaped(run.args.get("method", "")) for run in found]),
        ("network", [escaped(run.args.get("arch", "")) for run in found]),
        ("epochs", [escaped(header.epochs(run)) for run in found]),
        ("loss", _numbers(found, "loss", _last, "{:.4g}")),
    ]
    for name, title, factor, higher in metrics:
        form = "{:.4g}" if factor == 1 else "{:.1f}"
        last = [_value(run, name, _last, factor) for run in found]
        unit = ", %" if factor == 100 else ""
        columns.append((f"{title} last{unit}", marked(last, form, higher)))
        if factor == 100:
            best = [_value(run, name, np.nanmax, factor) for run in found]
            columns.append((f"{title} best, %", marked(best, form)))
        if name == "knn":
            gains = [_value(run, "knn_gain", _last, factor) for run in found]
            columns.append(("k-NN gain, %", marked(gains, "{:+.1f}")))
    columns += [
        ("images/s", _numbers(found, "images_per_s", np.nanmedian, "{:.0f}")),
        ("time", [format_duration(run.log.seconds) if run.log.seconds else "" for run in found]),
    ]
    if not any(run.log.columns for run in found):
        return ""
    texts = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    table = markup.table([title for title, _ in columns], texts, left=4)
    several = len(found) > 1 and _STAR in table
    text = "Measured during training. The gain is relative to the encoder before training."
    text = f"<p>{text}{f' {_STAR} marks the best of a column.' * several}</p>"
    return f"<h3>Metrics of the log</h3>{text if labelled else ''}{table}"


def marked(values: list[float | None], form: str, higher: bool = True) -> list[str]:
    """Return numbers as HTML, with the best marked if there are several different ones.

    Args:
        values: the numbers; None becomes an empty cell.
        form: how to write a number.
        higher: whether higher is better.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    best = (max(finite) if higher else min(finite)) if len(set(finite)) > 1 else None
    texts = ["" if value is None else form.format(value) for value in values]
    return [
        f"<b>{_STAR} {text}</b>" if value is not None and value == best else text
        for value, text in zip(values, texts, strict=True)
    ]


def _value(
    run: Run, name: str, of: Callable[[np.ndarray], float], factor: float = 1
) -> float | None:
    """Return a number that sums up a metric of the log; None if it is not logged."""
    _, y = run.log.columns.get(name, (None, np.zeros(0)))
    return factor * float(of(y)) if len(y) and np.isfinite(y).any() else None


def _numbers(
    found: list[Run], name: str, of: Callable[[np.ndarray], float], form: str
) -> list[str]:
    values = [_value(run, name, of) for run in found]
    return ["" if value is None else form.format(value) for value in values]


def _last(y: np.ndarray) -> float:
    return y[-1]


def _evaluations(found: list[Run]) -> str:
    """Return the table of the runs' results.json files, with random encoders for comparison."""
    rows, random, lines = [], set(), []
    for i, run in enumerate(found):
        figures, trouble = runs.evaluations(run)
        lines += [markup.note(run, line) for line in trouble]
        random |= {figure for figure in figures if figure.encoder.checkpoint is None}
        mine = [figure for figure in figures if figure.encoder.checkpoint is not None]
        arch = str(run.args.get("arch"))
        name = markup.run_name(i, run)
        rows += [(name, escaped(file), arch, cells) for file, cells in runs.by_checkpoint(mine)]
    baselines = {}
    for arch in sorted({figure.encoder.arch for figure in random}):
        same = sorted((figure for figure in random if figure.encoder.arch == arch), key=str)
        baselines[arch] = dict(runs.by_checkpoint(same))[""]
    if not rows and not baselines:
        return "".join(lines)
    everything = [cells for *_, cells in rows] + list(baselines.values())
    columns = sorted({column for cells in everything for column in cells})
    texts = [[f"random {escaped(arch)}", ""] for arch in baselines]
    texts += [[name, file] for name, file, *_ in rows]
    for column in columns:
        first = [_cell(cells.get(column)) for cells in baselines.values()]
        found_here = [cells.get(column) for *_, cells in rows]
        gains = [
            gain(best, baselines.get(arch, {}).get(column))
            for best, (_, _, arch, _) in zip(found_here, rows, strict=True)
        ]
        for text, cell in zip(texts, first + _cells(found_here, gains), strict=True):
            text.append(cell)
    note = "From the results.json files in the run folders and next to them, in per cent."
    if baselines and rows:
        note += " The gain over the random encoder is in parentheses."
    if any(_STAR in cell for text in texts for cell in text):
        note += f" {_STAR} marks the best of a column."
    if any(best.on_val for cells in everything for best in cells.values()):
        note += " * is the best of several settings, chosen on the test images."
    heads = ["encoder", "checkpoint", *(" ".join(column) for column in columns)]
    table = markup.table(heads, texts, left=2)
    choices = "".join(f"<li>{escaped(line)}</li>" for line in _choices(everything))
    choices = choices and f"<ul>{choices}</ul>"
    return f"<h3>Evaluations</h3><p>{note}</p>{table}{choices}{''.join(lines)}"


def _cells(found: list[Best | None], gains: list[float | None]) -> list[str]:
    """Return the cells of a column, with the best marked if there are several different ones."""
    means = [best.mean() for best in found if best]
    several = len(set(means)) > 1
    texts = []
    for best, gained in zip(found, gains, strict=True):
        text = _cell(best, gained)
        is_best = several and best is not None and best.mean() == max(means)
        texts.append(f"<b>{_STAR} {text}</b>" if is_best else text)
    return texts


def _cell(best: Best | None, gained: float | None = None) -> str:
    return escaped(results.cell(best, gained))


def gain(best: Best | None, baseline: Best | None) -> float | None:
    """Return the gain over a random encoder, in [-1, 1].

    It is None without such an encoder, or if that was tested at another image size.
    """
    if best is None or baseline is None:
        return None
    sizes = {json.loads(one.results[0].setting).get("image_size") for one in (best, baseline)}
    return best.mean() - baseline.mean() if len(sizes) == 1 else None


def _choices(cells: Iterable[dict[tuple[str, str], Best]]) -> list[str]:
    """Return the lines that say which of several settings was the best."""
    return sorted(
        {
            results.choice(best.results[0].encoder, column, best)
            for found in cells
            for column, best in found.items()
            if best.tried > 1
        }
    )


_NOT_COMPARED = {"save_dir", "dist_url", "output", "tag", "cfg", "resume"}


def options(found: list[Run]) -> str:
    """Return the table of the options: those in which runs differ, or those of a single run."""
    names = sorted({name for run in found for name in map(str, run.args)})
    if len(found) == 1:
        shown = [name for name in names if run_value(found[0], name)]
        heading, heads = "All options", ["option", "value"]
    else:
        names = [name for name in names if name not in _NOT_COMPARED]
        shown = [name for name in names if len({repr(run.args.get(name)) for run in found}) > 1]
        heading = f"{counted(len(shown), 'option')} in which the runs differ"
        heads = ["option", *(run.name for run in found)]
    if not shown:
        return ""
    rows = [[escaped(name), *(escaped(run_value(run, name)) for run in found)] for name in shown]
    inner = markup.table(heads, rows, left=len(heads))
    return f"<details><summary>{heading}</summary>{inner}</details>"


def run_value(run: Run, name: str) -> str:
    """Return the value of an option as text; "" if it is not set."""
    value = run.args.get(name)
    return "" if value is None else plots.shortened(value)


def last_line(found: list[Run]) -> str:
    """Return the sentence that says which versions made the page."""
    made = ", ".join(f"{name} {version}" for name, version in record.versions().items())
    many = f"{len(found)} runs" if len(found) > 1 else "one run"
    return f"<p>Report of {many}, written with {escaped(made)}.</p>"
