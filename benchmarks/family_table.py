"""The table and the plot of benchmarks/family.py."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from family_methods import chosen
from family_runs import GIB, Outcome
from matplotlib.figure import Figure

from moco.report.plots import COLORS, INK

Row = dict[str, object]
GREY = "#8a8a8a"
MEANS = ("knn_before", "knn", "gain", "seconds", "images_per_s", "memory", "probe")


def rows(found: dict[str, list[Outcome]]) -> list[Row]:
    """Return a row for each method with a finished run: means and standard deviations.

    The standard deviation over seeds is NaN with a single seed. `found` has the runs by method.
    """
    table = []
    for entry in chosen(found):
        runs = found[entry.name]
        if not runs:
            continue
        row: Row = {"method": entry.name, "title": entry.title, "runs": len(runs)}
        for name in MEANS:
            values = [getattr(run, name) for run in runs]
            if None in values:
                continue
            row[name] = statistics.fmean(values)
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        table.append(row)
    return table


def markdown(table: list[Row], random_probe: Sequence[float] = ()) -> str:
    """Return the table in Markdown, with the random encoder in the first row.

    Args:
        table: the rows.
        random_probe: accuracies of linear probes on random encoders.
    """
    columns = ["method", "k-NN", "gain"]
    columns += ["linear probe"] * any("probe" in row for row in table)
    columns += ["random encoder's k-NN", "training, s", "images/s", "peak memory, GiB"]
    random = ["random encoder", _value([row["knn_before"] for row in table]), ""]
    if random_probe:
        random.append(_value(random_probe))
    lines = [columns, random + [""] * (len(columns) - len(random))]
    for row in table:
        cells = [row["title"], _mean(row, "knn"), _mean(row, "gain", "+.3f")]
        if "linear probe" in columns:
            cells.append(_mean(row, "probe") if "probe" in row else "")
        cells.append(_mean(row, "knn_before"))
        cells += [f"{row['seconds']:.0f}", f"{row['images_per_s']:.0f}"]
        lines.append([*cells, f"{row['memory'] / GIB:.2f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _mean(row: Row, name: str, form: str = ".3f") -> str:
    """Return a mean and, with several seeds, its standard deviation as text."""
    text, std = f"{row[name]:{form}}", row[f"{name}_std"]
    return text if math.isnan(std) else f"{text} ± {std:.3f}"


def _value(values: Sequence[float]) -> str:
    """Return one value, or the range of several different ones, as text."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} - {high}"


def title(facts: dict[str, object]) -> str:
    """Return one line about the runs: data, network, length, seeds and device."""
    epochs, seeds = facts["epochs"], facts["seeds"]
    return (
        f"{facts['data']}, {facts['arch']}, {epochs} epoch{'s' * (epochs > 1)} of batches of "
        f"{facts['batch']}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}, "
        f"{facts['device']}"
    )


def plot(table: list[Row], heading: str, file: Path) -> None:
    """Draw k-NN before and after training, training time and memory, with one line per method."""
    height = 1.5 + 0.3 * len(table)
    figure = Figure(figsize=(9.5, height), dpi=130, layout="constrained")
    accuracy, seconds, memory = figure.subplots(1, 3, sharey=True, width_ratios=(3, 1.2, 1.2))
    y = range(len(table))
    before = [row["knn_before"] for row in table]
    after = [row["knn"] for row in table]
    errors = [0 if math.isnan(row["knn_std"]) else row["knn_std"] for row in table]
    accuracy.hlines(y, before, after, color=GREY, linewidth=1.5)
    accuracy.plot(before, y, "o", color="white", markeredgecolor=INK, label="random encoder")
    label = "pre-trained, mean and standard deviation" if any(errors) else "pre-trained"
    errors = errors if any(errors) else None
    shown = {"markersize": 7, "capsize": 3, "elinewidth": 1.5}
    accuracy.errorbar(after, y, xerr=errors, fmt="o", color=COLORS[0], label=label, **shown)
    accuracy.set_xlabel("k-NN top-1")
    accuracy.set_yticks(y, [row["title"] for row in table])
    accuracy.set_ylim(len(table) - 0.4, -0.6)
    accuracy.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    for axis, name, unit, scale in (
        (seconds, "seconds", "training, s", 1),
        (memory, "memory", "peak memory, GiB", GIB),
    ):
        values = [row[name] / scale for row in table]
        bars = axis.barh(y, values, height=0.55, color=COLORS[5])
        form = "{:.0f}" if name == "seconds" else "{:.2f}"
        axis.bar_label(bars, [form.format(value) for value in values], padding=3, color=INK)
        axis.set_xlabel(unit)
        axis.margins(x=0.3)
        axis.tick_params(axis="y", length=0)
    for axis in (accuracy, seconds, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=10)
    figure.savefig(file)
