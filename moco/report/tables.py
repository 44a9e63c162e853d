"""Write the best results as a table in Markdown, LaTeX or CSV."""

import csv
import io
import json
import re
import statistics
from collections.abc import Callable

from moco.report.results import Best, Encoder, cell, choice

Column = tuple[str, str]  # data set and the protocol's title
Cells = dict[tuple[Encoder, Column], Best]


def encoders(cells: Cells) -> list[Encoder]:
    """Return the encoders, the rows of the table. Random encoders, the baselines, come first."""
    return sorted(
        {encoder for encoder, _ in cells},
        key=lambda e: (e.method != "random", e.method, e.arch, e.epochs or 0, e.checkpoint or ""),
    )


def columns(cells: Cells) -> list[Column]:
    """Return the columns of the table in alphabetical order, but with numbers in numeric order."""
    return sorted({column for _, column in cells}, key=lambda column: list(map(_natural, column)))


def _natural(text: str) -> list[tuple[float, str]]:
    """Return a key that sorts "k 20" before "k 100"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def gain(cells: Cells, encoder: Encoder, column: Column) -> float | None:
    """Return the gain of a cell over the random encoder of the same architecture, in [-1, 1].

    It is None without such an encoder, or if that was tested at another image size.
    """
    found = cells.get((encoder, column))
    if found is None or encoder.method == "random":
        return None
    for (other, of), baseline in cells.items():
        if other.method == "random" and (other.arch, of) == (encoder.arch, column):
            sizes = [
                json.loads(one.results[0].setting).get("image_size") for one in (found, baseline)
            ]
            if sizes[0] == sizes[1]:
                return found.mean() - baseline.mean()
    return None


def grid(cells: Cells) -> list[list[str]]:
    """Return the header and the rows of the table as plain text, with accuracies in per cent."""
    rows = encoders(cells)
    # encoders of the same method, network and epochs differ only in their files
    names = [(e.method, e.arch, e.epochs) for e in rows]
    twice = any(names.count(name) > 1 for name in names)
    lines = [["method", "arch", "epochs", *(["checkpoint"] if twice else [])]]
    lines[0] += [" ".join(column) for column in columns(cells)]
    for e in rows:
        row = [e.method, e.arch, "" if e.epochs is None else str(e.epochs)]
        row += [e.checkpoint or ""] if twice else []
        row += [cell(cells.get((e, c)), gain(cells, e, c)) for c in columns(cells)]
        lines.append(row)
    return lines


def notes(cells: Cells) -> list[str]:
    """Return the lines below the table: the settings chosen, and what its marks mean."""
    lines = sorted(choice(*key, found) for key, found in cells.items() if found.tried > 1)
    counts = sorted({len(found.results) for found in cells.values()} - {1})
    if counts:
        seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append(f"±: standard deviation over {seeds} runs that differ only in their seeds")
    if any(gain(cells, *key) is not None for key in cells):
        points = "gain over the random encoder of the same architecture, in percentage points"
        lines.append(f"(+): {points}")
    if any(found.on_val for found in cells.values()):
        lines.append("* the best of several settings, chosen on the test images")
    return lines


def markdown(cells: Cells) -> str:
    """Return the table and its notes in Markdown."""
    head, *rows = grid(cells)
    lines = [_each(_escape_markdown, head), ["---"] * len(head)]
    lines += [_each(_escape_markdown, row) for row in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{_escape_markdown(line)}\n" for line in notes(cells))


def latex(cells: Cells) -> str:
    """Return the table in LaTeX, for the package booktabs, with its notes as comments."""
    head, *rows = grid(cells)
    labels = next(i for i, name in enumerate(head) if name not in LABELS)
    lines = ["% needs \\usepackage{booktabs}", *(f"% {_one_line(line)}" for line in notes(cells))]
    lines += [f"\\begin{{tabular}}{{{'l' * labels}{'r' * (len(head) - labels)}}}", "\\toprule"]
    for i, row in enumerate((head, *rows)):
        lines.append(f"{' & '.join(_each(_escape_latex, row))} \\\\")
        lines += ["\\midrule"] * (i == 0)
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


LABELS = ("method", "arch", "epochs", "checkpoint")  # columns that describe the encoder


def _each(escape: Callable[[str], str], row: list[str]) -> list[str]:
    return [escape(text) for text in row]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escape_markdown(text: str) -> str:
    """Return `text` as one line that Markdown shows as it is, also in a cell of a table."""
    # an underscore between letters is shown as it is, and so is a bracket that begins no link
    return re.sub(r"[\\`*|<>]|\](?=[(\[])|(?<!\w)_|_(?!\w)", r"\\\g<0>", _one_line(text))


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"}
_LATEX |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
_LATEX |= {"±": "$\\pm$", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}


def _escape_latex(text: str) -> str:
    """Return `text` as LaTeX shows it as it is. A star at the end of a cell is raised."""
    text = "".join(_LATEX.get(c, c) for c in _one_line(text))
    return re.sub(r" \*$", "$^{*}$", text)


def as_csv(cells: Cells) -> str:
    """Return the table as CSV: a line for each cell, with the chosen setting."""
    names = "method arch pretrain_epochs checkpoint dataset protocol metric value std top5 seeds "
    names += "settings_tried chosen_on settings gain pretrain_seeds"
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(names.split())
    for encoder, column in ((e, c) for e in encoders(cells) for c in columns(cells)):
        found = cells.get((encoder, column))
        if found is None:
            continue
        one = found.results[0]
        std = found.std() if len(found.results) > 1 else ""
        top5 = "" if one.top5 is None else statistics.mean(one.top5 for one in found.results)
        chosen = "" if found.tried == 1 else "val" if found.on_val else "held out"
        seeds = " ".join(str(one.seed) for one in found.results)
        pretraining = [one.pretrain_seed for one in found.results]
        row = [*encoder, *column, one.metric, found.mean(), std, top5, seeds, found.tried, chosen]
        row += [one.setting, "" if (up := gain(cells, encoder, column)) is None else up]
        table.writerow([*row, "" if None in pretraining else " ".join(map(str, pretraining))])
    return file.getvalue()
