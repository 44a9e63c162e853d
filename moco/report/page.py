"""Write the HTML page that compares pre-training runs."""

import html
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from moco.distributed import print_rank0
from moco.errors import InputError
from moco.files import check_new, creating, refuse_remote
from moco.report import pictures, plots, results, runs
from moco.report.runs import Run
from moco.report.samples import Sample

THUMBNAIL = 96  # side of an image among its neighbours, in pixels
CHEAP = 20.0  # seconds; a random encoder is also shown if its features take less time


def write(
    folders: list[Path],
    out: Path,
    pretrained: Path | None = None,
    images: int = 2000,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write the page about the runs in `folders`.

    Args:
        folders: run folders of pre-trainings.
        out: the file to write; it must not exist unless `force`.
        pretrained: the checkpoint to show; by default the last one of each run.
        images: maximum number of training images to search for neighbours.
        seed: seed of the sample of images.
        force: whether to overwrite `out`.

    Raises InputError if a folder is not that of a pre-training, or if `out` cannot be written. If
    checkpoints or images are missing, the page says so.
    """
    if images < 1 or seed < 0:
        raise InputError(
            f"--images {images} --seed {seed}: give at least one image, and a seed of at least 0"
        )
    refuse_remote(str(pretrained or ""), "--pretrained")
    if pretrained and (len(folders) > 1 or not pretrained.is_file()):
        why = "is for one run" if len(folders) > 1 else "no such file"
        raise InputError(
            f"--pretrained {pretrained}: {why}; without it, the last checkpoint of each run is used"
        )
    check_new(out, force)
    text = page(runs.read(folders), pretrained, images, seed)
    try:
        with creating(out, force) as file:
            file.write(text.encode())
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written: {error.strerror}; choose another file"
        ) from None


def page(found: list[Run], pretrained: Path | None, images: int, seed: int) -> str:
    """Return the page as HTML; see `write` for the arguments."""
    body = [summary(found), evaluations(found), differences(found), curves(found), views(found)]
    body.append(encoders(found, pretrained, images, seed))
    title = escaped(f"Pre-training: {', '.join(run.name for run in found)}")
    # this policy forbids the browser to load anything from elsewhere
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += '<meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    body = "\n".join(filter(None, body))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><h1>Pre-training runs</h1>\n{body}\n</body></html>\n"
    )


def escaped(text: object) -> str:
    """Return untrusted text, escaped so that the browser does not interpret it as HTML."""
    return html.escape(plots.printable(text))


# tables

SUMMARY = (
    "run",
    "method",
    "arch",
    "data",
    "epochs",
    "batch",
    "peak lr",
    "loss",
    "k-NN last, %",
    "best, %",
    "gain, %",
    "images/s",
    "time",
)


def summary(found: list[Run]) -> str:
    """Return the table of the runs, with their progress, and lines about damaged logs."""
    rows = [
        [_name(i, run), *(escaped(cell) for cell in _facts(run))] for i, run in enumerate(found)
    ]
    lines = [
        _line(run, f"{n} damaged line(s) of log.jsonl left out")
        for run in found
        if (n := run.log.damaged)
    ]
    lines += [_line(run, "nothing is logged yet") for run in found if not run.log.columns]
    return table(SUMMARY, rows, left=4) + "".join(lines)


def _facts(run: Run) -> list[object]:
    args, log = run.args, run.log
    lists = [args[name] for name in ("class_list", "file_list") if args.get(name)]
    data = Path(str(args.get("data", ""))).name
    data += "".join(f" ({Path(str(file)).name})" for file in lists)
    total = f"{args.get('epochs', '')}"
    done = (
        f"{log.last_step / log.steps_per_epoch:.4g}"
        if log.steps_per_epoch
        else f"{log.last_step or 0:.0f} steps"
    )
    knn = (
        [f"{100 * of(log.columns['knn'][1]):.1f}" for of in (lambda y: y[-1], np.nanmax)]
        if "knn" in log.columns
        else ["", ""]
    )
    # the last accuracy minus that of the encoder before training
    gain = f"{100 * log.columns['knn_gain'][1][-1]:+.1f}" if "knn_gain" in log.columns else ""
    speed = (
        f"{np.nanmedian(log.columns['images_per_s'][1]):.0f}"
        if "images_per_s" in log.columns
        else ""
    )
    loss = f"{log.columns['loss'][1][-1]:.4g}" if "loss" in log.columns else ""
    lr = f"{np.nanmax(log.columns['lr'][1]):.3g}" if "lr" in log.columns else args.get("lr", "")
    clock = timedelta(seconds=round(log.seconds))
    facts = [
        args.get("method", ""),
        args.get("arch", ""),
        data,
        f"{done} of {total}",
        _batch(args),
        lr,
        loss,
        *knn,
        gain,
        speed,
        clock,
    ]
    return [plots.run_label(fact) for fact in map(str, facts)]


def _batch(args: dict) -> str:
    sizes = [args.get(name, 1) for name in ("batch_size", "nodes", "accumulation_steps")]
    if args.get("batch_is_of_all_nodes"):
        sizes[1] = 1
    if not all(isinstance(size, int) for size in sizes) or "batch_size" not in args:
        return ""
    if args.get("batch_is_per_process"):
        return f"{sizes[0] * sizes[2]} a process"
    return f"{sizes[0] * sizes[1] * sizes[2]}"


def evaluations(found: list[Run]) -> str:
    """Return the table of the runs' results.json files, with random encoders for comparison."""
    rows, random, lines = [], set(), []
    for i, run in enumerate(found):
        figures, trouble = runs.evaluations(run)
        lines += [_line(run, line) for line in trouble]
        random |= {figure for figure in figures if figure.encoder.checkpoint is None}
        mine = [figure for figure in figures if figure.encoder.checkpoint is not None]
        rows += [(_name(i, run), escaped(name), cells) for name, cells in runs.by_checkpoint(mine)]
    for arch in sorted({figure.encoder.arch for figure in random}):
        same = sorted((figure for figure in random if figure.encoder.arch == arch), key=str)
        rows += [(f"random {escaped(arch)}", "", cells) for _, cells in runs.by_checkpoint(same)]
    columns = sorted({column for *_, cells in rows for column in cells})
    if not rows:
        return "".join(lines)
    texts = [
        [name, file, *(results.cell(cells.get(column)).replace("\\", "") for column in columns)]
        for name, file, cells in rows
    ]
    note = "From the results.json files in the run folders and next to them, in per cent."
    if any(best.on_val for *_, cells in rows for best in cells.values()):
        note += " * the best of several settings, chosen on the images of the test."
    chosen = {
        results.choice(best.results[0].encoder, column, best)
        for *_, cells in rows
        for column, best in cells.items()
        if best.tried > 1
    }
    lines = [*(f"<p>{escaped(line)}</p>" for line in sorted(chosen)), *lines]
    heads = ["run", "checkpoint", *(" ".join(column) for column in columns)]
    return f"<h2>Evaluations</h2><p>{note}</p>{table(heads, texts, left=2)}{''.join(lines)}"


NOT_COMPARED = {"save_dir", "dist_url", "output", "tag", "cfg", "resume"}


def differences(found: list[Run]) -> str:
    """Return the table of the options in which the runs differ."""
    names = sorted({name for run in found for name in map(str, run.args)} - NOT_COMPARED)
    differ = [name for name in names if len({repr(run.args.get(name)) for run in found}) > 1]
    if not differ:
        return ""
    rows = [
        [escaped(name), *(escaped(plots.run_label(run.args.get(name, ""))) for run in found)]
        for name in differ
    ]
    inner = table(["option", *(run.name for run in found)], rows, left=1)
    heading = f"{len(differ)} options in which the runs differ"
    return f"<details><summary>{heading}</summary>{inner}</details>"


def table(heads: Iterable[str], rows: list[list[str]], left: int) -> str:
    """Return a table as HTML.

    Args:
        heads: titles of the columns.
        rows: cells, as HTML.
        left: number of columns to align to the left; the others hold numbers.
    """
    classes = [' class="number"' if i >= left else "" for i in range(len(rows[0]))]
    top = "".join(f"<th{c}>{escaped(head)}</th>" for c, head in zip(classes, heads, strict=True))
    body = ""
    for row in rows:
        cells = (f"<td{c}>{cell}</td>" for c, cell in zip(classes, row, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _name(i: int, run: Run) -> str:
    swatch = f'<span class="swatch" style="background:{plots.style(i)["color"]}"></span>'
    return f'{swatch}<span title="{escaped(run.folder)}">{escaped(run.name)}</span>'


def _line(run: Run, text: object) -> str:
    return f'<p class="absent">{escaped(run.name)}: {escaped(text)}</p>'


# pictures


def figure(title: str, picture: Figure, text: str) -> str:
    """Return a picture as HTML, with a title above it and a caption below.

    A wide picture has a row of its own.
    """
    wide = ' class="alone"' if picture.get_figwidth() > 7 else ""
    source = f'<img src="{plots.png(picture)}" alt="{escaped(f"{title}. {text}")}">'
    caption = f"<figcaption>{escaped(text)}</figcaption>"
    return f"<figure{wide}><h3>{escaped(title)}</h3>{source}{caption}</figure>"


def section(title: str, figures: list[str], text: str = "") -> str:
    """Return a section of the page: a heading, a paragraph if there is a text, and figures."""
    paragraph = text and f"<p>{escaped(text)}</p>"
    return f'<h2>{title}</h2>{paragraph}<div class="figures">{"".join(figures)}</div>'


def curves(found: list[Run]) -> str:
    """Return the section with the curves of the runs' logs."""
    drawn = [
        figure(panel.title, plots.draw(panel, found), panel.text) for panel in plots.panels(found)
    ]
    text = "Strong lines are running medians. The faint lines behind them are the logged values; "
    text += "if there are many, a faint area shows their range."
    return section("Curves", drawn, text) if drawn else ""


def _or_why_not(run: Run, make: Callable[[], str]) -> str:
    """Return the HTML that `make` returns, or a line with its error."""
    try:
        return make()
    except (InputError, OSError) as error:
        return _line(run, error)


def views(found: list[Run]) -> str:
    """Return the section with the views of the runs, once for each recipe and data set."""
    drawn, seen = [], set()

    def one(run: Run) -> str:
        name, recipe = pictures.recipe(run)
        shown = run.args["data"], run.args.get("file_list"), recipe
        if shown in seen:
            return ""
        seen.add(shown)
        return figure(
            f"{run.name}: recipe {name}",
            pictures.views(run),
            "Each row shows a training image, and its views in epoch 0.",
        )

    for run in found:
        drawn.append(_or_why_not(run, lambda run=run: one(run)))
    return section("Views", drawn)


class RunFeatures(NamedTuple):
    """The features of a sample of images, computed by the encoder of one run."""

    run: Run
    source: str  # a text that names the checkpoint
    bank: Tensor  # features of training images [N, D]
    points: Tensor  # features of the images on the map [M, D]


def encoders(found: list[Run], pretrained: Path | None, images: int, seed: int) -> str:
    """Return the sections with a map of features per data set, and neighbours per run."""
    computed: dict[int, list[RunFeatures]] = defaultdict(list)  # by sample
    samples, lines = {}, []
    for run in found:
        try:
            net, source = pictures.encoder(run, pretrained)
            sample = pictures.sample_of(run, images, seed)
            print_rank0(f"{plots.printable(run.name)}: features of {sample.counts}")
            bank, points = pictures.sample_features(net, sample, run)
            computed[id(sample)].append(RunFeatures(run, source, bank, points))
            samples[id(sample)] = sample
        except (InputError, OSError) as error:
            lines.append(_line(run, f"{error}; only curves are shown"))
    maps, strips = [], []
    for key, same in computed.items():
        maps.append(
            _or_why_not(same[0].run, lambda key=key, same=same: _map(samples[key], same, seed))
        )
        strips += [
            _or_why_not(one.run, lambda key=key, one=one: _strips(samples[key], one))
            for one in same
        ]
    parts = (
        [section("Map of features", maps), section("Nearest neighbours", strips)]
        if computed
        else []
    )
    return "".join([*parts, *lines])


def _map(sample: Sample, computed: list[RunFeatures], seed: int) -> str:
    began, run, points = time.perf_counter(), computed[0].run, sample.points
    shown = {one.run.name: one.points for one in computed}
    few = points.subset(np.arange(min(64, len(points))))
    net = pictures.random_encoder(run, seed)
    pictures.extract_features(net, few, run)
    if (time.perf_counter() - began) * len(points) / len(few) < CHEAP:
        shown[f"random {run.args['arch']}"] = pictures.extract_features(net, points, run)
    title = f"Images of {Path(run.args['data']).name}"
    return figure(title, pictures.feature_map(points, shown), sample.map_text)


def _strips(sample: Sample, one: RunFeatures) -> str:
    picture = pictures.neighbours(
        sample, one.bank, one.points, THUMBNAIL, pictures.decoding_of(one.run)
    )
    text = f"{sample.neighbours_text} {one.source}."
    return figure(one.run.name, picture, text)


STYLE = """
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif;
  color: #222; background: #fafafa;
  max-width: 1180px; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.6em }
h2 { font-size: 1.25em; margin: 1.8em 0 .5em; border-bottom: 1px solid #ddd }
h3 { font-size: 1em; margin: 0 0 .4em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9em; margin: .6em 0; background: #fff }
th, td { padding: .3em .7em; border-bottom: 1px solid #e2e2e2; text-align: left;
  white-space: nowrap }
th { background: #f0f0f0; white-space: normal; vertical-align: bottom }
.number { text-align: right; font-variant-numeric: tabular-nums }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em;
  border-radius: 2px }
.figures { display: grid; gap: 1em; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)) }
figure { margin: 0; padding: .8em; background: #fff; border: 1px solid #e2e2e2;
  border-radius: 4px; min-width: 0 }
figure.alone { grid-column: 1 / -1 }
h3, figcaption, .absent { overflow-wrap: anywhere }
img { max-width: 100%; height: auto; display: block; margin: 0 auto }
figcaption { color: #555; font-size: .87em; margin-top: .4em }
.absent { color: #7a4a00; background: #fff6e0; padding: .4em .8em; border-radius: 4px;
  grid-column: 1 / -1; margin: .3em 0 }
summary { cursor: pointer }
"""
