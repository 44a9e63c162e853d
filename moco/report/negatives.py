"""Write the HTML page about the negatives of pre-training checkpoints."""

from itertools import groupby
from pathlib import Path

import numpy as np

from moco.config import flat
from moco.files import check_new
from moco.messages import counted
from moco.methods import trains_on_labels
from moco.report import markup, over_training, pictures, plots, thumbnails
from moco.report.contrasts import PUBLISHED, Contrast, has_classes, measure
from moco.report.markup import escaped
from moco.report.options import Options
from moco.report.over_training import LOOKS, SYNTHETIC, Run, names_of, quartiles
from moco.report.plots import Curve
from moco.report.ridges import ridges
from moco.report.samples import Sample

FEWEST = 3  # maximum number of checkpoints of a run in the plot of false negatives


def write(paths: list[Path], out: Path, options: Options, force: bool = False) -> None:
    """Write the page about the negatives of checkpoints.

    Args:
        paths: checkpoints of pre-training, of one or several runs.
        out: the file to write; it must not exist unless `force`.
        options: the images to measure on.
        force: whether to overwrite `out`.

    Raises InputError if a checkpoint or the images cannot be used, or if `out` cannot be written.
    """
    check_new(out, force)
    contrasts, sample = measure(paths, options)
    runs = [list(same) for _, same in groupby(contrasts, lambda one: one.run)]
    markup.save(page(runs, sample, options), out, force)


def page(runs: list[Run], sample: Sample, options: Options) -> str:
    """Return the page as HTML; see `write`."""
    heading = f"Negatives of {escaped(runs[0][0].run)}"
    if len(runs) > 1:
        heading = f"Negatives of {len(runs)} runs"
    parts = [
        _header(runs, sample, options),
        _hardness(runs),
        _false_negatives(runs, sample),
        _nearest(runs, sample),
        over_training.section(runs),
        _numbers(runs),
    ]
    title = f"Negatives: {', '.join(run[0].run for run in runs)}"
    return markup.document(title, heading, parts)


# header


def _header(runs: list[Run], sample: Sample, options: Options) -> str:
    """Return the introduction, and a card for each run."""
    n, queries = len(sample.bank), len(runs[0][0].measured.positive)
    data = options.data if options.dataset in ("imagenet", options.data) else options.dataset
    text = (
        f"The queries are {queries:,} training images of {Path(data).name}. The positive of a "
        f"query is the key of the same image. Its negatives are the keys of {n - 1:,} other "
        "training images. These keys replace the queue, whose images and labels are not known, or "
        "the batch. The checkpoint's network computes them in eval mode, from views as in training."
    )
    cards = "".join(_card(i, run, len(runs) > 1, n) for i, run in enumerate(runs))
    absent = ""
    if not has_classes(sample.bank):
        why = "The images have no labels" if not sample.bank.labelled else "There is one class only"
        absent = f'<p class="absent">{why}, so nothing is shown about false negatives.</p>'
    return f'<p>{escaped(text)}</p>{absent}<div class="cards">{cards}</div>'


def _card(i: int, run: Run, several: bool, images: int) -> str:
    last, title = run[-1], ""
    if several:
        title = f"<h3>{markup.sample(plots.look(i))} {escaped(last.run)}</h3>"
    settings, size = flat(last.config), last.config.views.image_size
    script = settings.get("script", "")
    method = last.config.run.method
    labels = ", trained on labels" * trains_on_labels(method)
    names = [one.path.name for one in run]
    files = names[0] if len(run) == 1 else f"{names[0]} to {names[-1]}, {len(run)} in all"
    queue = f"{last.queue:,} entries in training" if last.queue else ""
    if "learned" in last.measured.groups:
        queue = "none; the negatives are learned. The page shows keys of images as well"
    average = "the moving average of the encoder" if last.average else "the encoder itself"
    rows = [
        ("Method", escaped(f"{method} (main_{script}.py){labels}" if script else "")),
        ("Network", escaped(f"{last.config.network.arch}, {size} x {size} pixels")),
        ("Files", escaped(files)),
        ("Epochs", ", ".join(_epoch(one) for one in run)),
        ("Views", escaped(f"{last.config.views.recipe}: view 1 for queries, view 2 for keys")),
        ("Keys", average),
        ("Queue", queue),
        ("Synthetic", escaped(_synthetic(last, images))),
    ]
    return f'<div class="card">{title}{markup.facts(rows)}</div>'


def _epoch(of: Contrast) -> str:
    return f"{of.epoch:.4g}"


def _synthetic(of: Contrast, images: int) -> str:
    """Return a text about the synthetic negatives of a run, or about those shown instead."""
    config = of.schedule.config if of.schedule else PUBLISHED
    counts = zip(SYNTHETIC, config.counts, strict=True)
    listed = ", ".join(f"{count} {name}" for name, count in counts if count)
    sizes = f"sigma {config.sigma:g}, delta {config.delta:g}, eta {config.eta:g}"
    here = f"here from the hardest {of.n_hard:,} of {images - 1:,} negatives"
    if not of.schedule:
        would = "The page shows what those of SynCo's paper would be"
        return f"none in training. {would}: {sizes}; {here}"
    first = of.schedule.first
    when = f"they join after {counted(first, 'epoch')}" if first else "from the start"
    if of.schedule.last is not None:
        when += f" and leave after {of.schedule.last}"
    in_run = f"from the hardest {config.n_hard:,} of {of.negatives:,}"
    return "; ".join(filter(None, [f"{listed}, {in_run}", sizes, when, here]))


# panels


def _title(of: Contrast, several: bool) -> str:
    """Return the title of a checkpoint's panel."""
    epochs = f"after {_epoch(of)} epoch{'s' * (of.epoch != 1)}"
    return f"{of.run}, {epochs}" if several else epochs.capitalize()


def _values(of: Contrast) -> dict[str, np.ndarray]:
    """Return the similarities of positives and of each type of negative, by name on the page."""
    found = {"positive": of.measured.positive.numpy()}
    for name, title in names_of(of).items():
        found[title] = of.measured.groups[name].similarity.numpy().ravel()
    return found


def _ends(run: Run, several: bool) -> Run:
    """Return the checkpoints of a run whose distributions are shown: the last, or both ends."""
    return run[-1:] if several or len(run) == 1 else [run[0], run[-1]]


def _hardness(runs: list[Run]) -> str:
    """Return the section with the distributions of similarities."""
    shown = [one for run in runs for one in _ends(run, len(runs) > 1)]
    values = [_values(one) for one in shown]
    low = min(np.quantile(x, 0.002) for one in values for x in one.values())
    high = max(np.quantile(x, 0.998) for one in values for x in one.values())
    margin = 0.03 * (high - low)
    limits = max(-1.02, low - margin), min(1.02, high + margin)
    drawn = []
    for of, rows in zip(shown, values, strict=True):
        looks = {"positive": LOOKS["positive"]}
        looks |= {title: LOOKS[name] for name, title in names_of(of).items()}
        title = _title(of, len(runs) > 1)
        label = f"similarity of queries and negatives: {title}, {of.run}"
        picture = plots.svg(ridges(rows, looks, limits, "positive"), label)
        drawn.append(markup.panel(title, picture, _hardness_caption(of)))
    text = (
        "<p>How similar are the negatives to their queries? Negatives further to the right are "
        "harder. Each row is a distribution. The marker is its median, and the bar spans its "
        "quartiles. The dotted line is the median of the positives.</p>"
    )
    return markup.section("Hardness", text, markup.grid(drawn))


def _hardness_caption(of: Contrast) -> str:
    """Return the sentence that says what a picture of distributions shows."""
    groups = {name: one for name, one in of.measured.groups.items() if name in SYNTHETIC}
    medians = {name: one.quantiles(0.5)[0] for name, one in groups.items()}
    first, last = max(medians, key=medians.get), min(medians, key=medians.get)
    above = {name: f"{100 * one.above_positive:.0f} %" for name, one in groups.items()}
    return (
        f"Hardest type of synthetic negative: {first} (median {medians[first]:.2f}; {above[first]} "
        f"are more similar to the query than its positive). Easiest: {last} "
        f"({medians[last]:.2f}; {above[last]})."
    )


def _false_negatives(runs: list[Run], sample: Sample) -> str:
    """Return the section with the false negatives among the hardest; "" without labels."""
    if runs[0][0].measured.false is None:
        return ""
    if len(runs) > 1:
        shown = {run[-1].run: run[-1] for run in runs}
    else:
        run = runs[0]
        picked = sorted({round(i) for i in np.linspace(0, len(run) - 1, min(FEWEST, len(run)))})
        shown = {_title(run[i], several=False): run[i] for i in picked}
    curves = {}
    for i, (name, of) in enumerate(shown.items()):
        share = 100 * of.measured.false.numpy()
        k = np.unique(np.geomspace(1, len(share), 60).round().astype(int))
        curves[name] = Curve(k, share[k - 1], plots.look(i), exact=True)
    chance = 100 * float(runs[0][0].measured.false[-1])
    figure = plots.chart(
        list(curves.values()),
        "the k hardest negatives of each query",
        {chance: f"chance: {chance:.3g} %"},
        log_x=True,
        limits=(0, None),
    )
    picture = plots.svg(figure, "false negatives among the k hardest, %")
    picture += markup.key({name: curve.look for name, curve in curves.items()})
    last = runs[0][-1].measured.false
    top = 100 * float(last[0])
    caption = f"For {top:.0f} % of the queries, the hardest negative is a false negative"
    caption += f" ({runs[0][-1].run}, {_title(runs[0][-1], several=False).lower()})."
    shares = "shares a class with" if sample.bank.multi_label else "has the class of"
    text = (
        f"<p>A false negative {shares} its query, and the loss pushes it away nevertheless. "
        f"{_use_of_labels(runs)} Chance is the share among all negatives.</p>"
    )
    panel = markup.panel("False negatives among the k hardest, %", picture, caption)
    return markup.section(
        "False negatives", text, markup.grid([panel, *over_training.false_negatives(runs)])
    )


def _use_of_labels(runs: list[Run]) -> str:
    """Return whether labels have an effect on the training of a run, as a sentence in HTML."""
    known = [run[0].run for run in runs if trains_on_labels(run[0].config.run.method)]
    if not known:
        return "Labels are used for nothing else."
    which = f" of {escaped(', '.join(known))}" if len(known) < len(runs) else ""
    return f"The training{which} used labels: images of the query's class were no negatives there."


def _nearest(runs: list[Run], sample: Sample) -> str:
    """Return the section with some images and their nearest negatives."""

    def one(of: Contrast) -> str:
        shown = slice(len(sample.queries))
        similarity, indices = of.measured.similarity[shown], of.measured.nearest[shown]
        content = thumbnails.neighbours(
            sample, similarity, indices, of.config.input, negatives=True
        )
        return markup.panel(_title(of, len(runs) > 1), content, _false_caption(sample, indices))

    text = (
        f"Left: random images. Right: the {pictures.NEIGHBOURS} hardest negatives of each, with "
        "their cosine similarity. The pictures show full images; the network saw random views of "
        "them."
    )
    if has_classes(sample.bank):
        text += " ✗ and a dashed frame mark false negatives, which are of the same class."
    panels = [one(of) for run in runs for of in _ends(run, len(runs) > 1)]
    return thumbnails.section("Nearest negatives", text, panels)


def _false_caption(sample: Sample, indices) -> str:
    """Return how many of the negatives shown are false, as text; "" without labels."""
    if not has_classes(sample.bank):
        return ""
    false = sum(
        int(sample.same_class(query, near).sum())
        for query, near in zip(sample.queries, indices.numpy(), strict=True)
    )
    return f"{false} of these {indices.numel()} negatives are false."


# numbers


def _numbers(runs: list[Run]) -> str:
    """Return the table with the numbers of the last checkpoint of each run."""
    heads = ["run", "negatives", "lower quartile", "median", "upper quartile"]
    heads += [
        "harder than the positive, %",
        "harder than every real negative, %",
        "false negatives, %",
    ]
    rows = []
    for run in runs:
        of = run[-1]
        name = f"{escaped(of.run)}, epoch {_epoch(of)}" if len(runs) > 1 else ""
        shown = [f"{value:.3f}" for value in quartiles(of, "positive")]
        rows.append([name, "positive", *shown, "", "", ""])
        for type_, title in names_of(of).items():
            group = of.measured.groups[type_]
            false = "" if group.false is None else f"{100 * group.false:.1f}"
            real = f"{100 * group.above_real:.1f}" if type_ in (*SYNTHETIC, "learned") else ""
            rows.append(
                [
                    name,
                    escaped(title),
                    *(f"{value:.3f}" for value in quartiles(of, type_)),
                    f"{100 * group.above_positive:.1f}",
                    real,
                    false,
                ]
            )
    text = f"<p>The last checkpoint{' of each run' * (len(runs) > 1)}, as numbers."
    if runs[0][0].measured.false is not None:
        text += " A synthetic negative counts as false if it is made from a false negative."
    return markup.section("Numbers", f"{text}</p>", markup.table(heads, rows, 2))
