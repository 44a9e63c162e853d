"""Write the HTML page about the negatives of pre-training checkpoints."""

from itertools import groupby
from pathlib import Path

import numpy as np

from moco.config import flat
from moco.files import check_new
from moco.loss.synthetic import TYPES
from moco.report import markup, pictures, plots, thumbnails
from moco.report.contrasts import PUBLISHED, Contrast, Options, has_classes, measure
from moco.report.markup import escaped
from moco.report.plots import Curve, Look
from moco.report.ridges import ridges
from moco.report.samples import Sample

Run = list[Contrast]  # the checkpoints of a run, in the order of epochs

_SYNTHETIC = [one.name for one in TYPES]
# looks of the types of negatives; those that are in one picture differ
LOOKS = {
    name: plots.look(i)
    for i, name in enumerate(["hardest", *_SYNTHETIC[:5], "", _SYNTHETIC[5], "learned"])
}
LOOKS |= {"all": Look("#767676", "v", (2.0, 2.0)), "positive": Look("#000000", "s")}
SHARES = (1, 10, 100)  # numbers k of hardest negatives whose false ones are shown over training
FEWEST = 3  # checkpoints of a run whose curves of false negatives are shown


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
        _over_training(runs),
        _numbers(runs),
    ]
    title = f"Negatives: {', '.join(run[0].run for run in runs)}"
    return markup.document(title, heading, parts)


# header


def _header(runs: list[Run], sample: Sample, options: Options) -> str:
    """Return what the page compares, and a card for each run."""
    n, queries = len(sample.bank), len(runs[0][0].measured.positive)
    data = options.data if options.dataset in ("imagenet", options.data) else options.dataset
    text = (
        f"The queries are {queries:,} training images of {Path(data).name}. The negatives of each are "
        f"the keys of {n - 1:,} other training images; the key of its own image is its positive. "
        "These keys take the place of the queue, whose entries have no images and no labels, or of "
        "the other images of a batch. The checkpoint's network computes them anew, in eval mode, "
        "from views as in training."
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
    names = [one.path.name for one in run]
    files = names[0] if len(run) == 1 else f"{names[0]} to {names[-1]}, {len(run)} in all"
    queue = f"{last.queue:,} entries in training" if last.queue else "none"
    average = "the moving average of the encoder" if last.average else "the encoder itself"
    rows = [
        ("Method", escaped(f"{last.config.run.method} (main_{script}.py)" if script else "")),
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
    """Return a text about the synthetic negatives of a run, or about those that are shown."""
    config = of.schedule.config if of.schedule else PUBLISHED
    counts = zip(_SYNTHETIC, config.counts, strict=True)
    listed = ", ".join(f"{count} {name}" for name, count in counts if count)
    sizes = f"sigma {config.sigma:g}, delta {config.delta:g}, eta {config.eta:g}"
    here = f"here from the hardest {of.n_hard:,} of {images - 1:,} negatives"
    if not of.schedule:
        return (
            f"none in training. The page shows what those of SynCo's paper would be: {sizes}; {here}"
        )
    when = f"they join after {of.schedule.first} epochs" if of.schedule.first else ""
    if of.schedule.last is not None:
        when = f"they are used from the end of epoch {of.schedule.first} to that of epoch "
        when += f"{of.schedule.last}"
    of_queue = f"from the hardest {config.n_hard:,} of {of.queue:,}"
    return "; ".join(filter(None, [f"{listed}, {of_queue}", sizes, when, here]))


# panels


def _title(of: Contrast, several: bool) -> str:
    """Return the title of a checkpoint's panel."""
    epochs = f"after {_epoch(of)} epoch{'s' * (of.epoch != 1)}"
    return f"{of.run}, {epochs}" if several else epochs.capitalize()


def _names(of: Contrast) -> dict[str, str]:
    """Return the names on the page of the types of negatives, by their names in `measured`."""
    titles = {"all": "all negatives", "hardest": f"hardest {of.n_hard:,}", "learned": "learned"}
    return {name: titles.get(name, name) for name in of.measured.groups}


def _values(of: Contrast) -> dict[str, np.ndarray]:
    """Return the similarities of positives and of each type of negative, by the name on the page."""
    found = {"positive": of.measured.positive.numpy()}
    for name, title in _names(of).items():
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
        looks |= {title: LOOKS[name] for name, title in _names(of).items()}
        title = _title(of, len(runs) > 1)
        label = f"similarity of queries and negatives: {title}, {of.run}"
        picture = plots.svg(ridges(rows, looks, limits, "positive"), label)
        drawn.append(markup.panel(title, picture, _hardness_caption(of)))
    text = (
        "<p>How similar are the negatives to their queries? Negatives further to the right are "
        "harder. Each row is a distribution: the marker is its median, the bar its middle half, "
        "and the dotted line the median positive.</p>"
    )
    return markup.section("Hardness", text, markup.grid(drawn))


def _hardness_caption(of: Contrast) -> str:
    """Return the sentence that says what a picture of distributions shows."""
    groups = {name: one for name, one in of.measured.groups.items() if name in _SYNTHETIC}
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
    caption = f"{top:.0f} % of the queries have a false negative as their hardest negative"
    caption += f" ({runs[0][-1].run}, {_title(runs[0][-1], several=False).lower()})."
    shares = "shares a class with" if sample.bank.multi_label else "has the class of"
    text = (
        f"<p>A false negative {shares} its query, and the loss pushes it away nevertheless. Labels "
        "are used for nothing else. Chance is the share among all negatives.</p>"
    )
    panel = markup.panel("False negatives among the k hardest, %", picture, caption)
    return markup.section("False negatives", text, markup.grid([panel, *_false_over(runs)]))


def _false_over(runs: list[Run]) -> list[str]:
    """Return the panels of the share of false negatives over training, for each run with one."""
    drawn = []
    for number, run in enumerate(runs):
        if len(run) < 2:
            continue
        curves = {}
        for i, k in enumerate(SHARES):
            y = [100 * float(one.measured.false[min(k, len(one.measured.false)) - 1]) for one in run]
            name = f"hardest {k}" if k > 1 else "hardest negative"
            curves[name] = Curve(_epochs(run), np.array(y), plots.look(i))
        chance = 100 * float(run[0].measured.false[-1])
        levels = {chance: f"chance: {chance:.3g} %"}
        figure = plots.chart(list(curves.values()), "epoch", levels, limits=(0, None))
        title = "False negatives over training, %"
        title += f": {run[0].run}" if len(runs) > 1 else ""
        picture = plots.svg(figure, f"{title}, run {number + 1}")
        picture += markup.key({name: curve.look for name, curve in curves.items()})
        text = "Share of false negatives among the hardest negatives of each query."
        drawn.append(markup.panel(title, picture, text))
    return drawn


def _nearest(runs: list[Run], sample: Sample) -> str:
    """Return the section with some images and their nearest negatives."""

    def one(of: Contrast) -> str:
        shown = slice(len(sample.queries))
        similarity, indices = of.measured.similarity[shown], of.measured.nearest[shown]
        content = thumbnails.neighbours(sample, similarity, indices, of.config.input, negatives=True)
        return markup.panel(_title(of, len(runs) > 1), content, _false_caption(sample, indices))

    text = (
        f"Left: random images. Right: the {pictures.NEIGHBOURS} hardest negatives of each, with "
        "their cosine similarity. The pictures are whole; the network saw random views of them."
    )
    if has_classes(sample.bank):
        text += " ✗ and a dashed frame: a false negative, of the same class."
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


# over training


def _epochs(run: Run) -> np.ndarray:
    return np.array([one.epoch for one in run])


def _over_training(runs: list[Run]) -> str:
    """Return the section that compares the checkpoints of a run; "" if each has one."""
    several = [run for run in runs if len(run) > 1]
    if not several:
        return ""
    drawn = []
    for i, run in enumerate(several):
        drawn += _by_type(run, i, len(runs) > 1)
    drawn += _quartiles(several, len(runs) > 1)
    text = "<p>How do the negatives move while the encoder learns? Points are the checkpoints.</p>"
    return markup.section("Over training", text, markup.grid(drawn))


def _by_type(run: Run, number: int, several: bool) -> list[str]:
    """Return the panels that compare the types of negatives of a run."""
    x, of = _epochs(run), f": {run[0].run}" * several
    names = _names(run[-1])
    medians = {
        title: Curve(x, np.array([one.measured.groups[n].quantiles(0.5)[0] for one in run]), LOOKS[n])
        for n, title in names.items()
    }
    positive = np.array([float(one.measured.positive.median()) for one in run])
    medians = {"positive": Curve(x, positive, LOOKS["positive"])} | medians
    synthetic = [name for name in names if name in _SYNTHETIC]

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
            "Synthetic negatives that are more similar to the query than its hardest real one.",
        ),
    ):
        picture = plots.svg(
            plots.chart(list(curves.values()), "epoch", {}, limits=limits),
            f"{title}, run {number + 1}",
        )
        picture += markup.key({name: curve.look for name, curve in curves.items()})
        drawn.append(markup.panel(title + of, picture, text))
    return drawn


def _quartiles(runs: list[Run], several: bool) -> list[str]:
    """Return a panel for each type of negative: its median and quartiles, of all runs.

    If there is one run, each panel also has the median positive.
    """
    titles = {"positive": "Positive"}
    for run in runs:
        for name, title in _names(run[-1]).items():
            titles[name] = "hardest negatives" if name == "hardest" and several else title
    found = {}
    for name in titles:
        for i, run in enumerate(runs):
            if name != "positive" and name not in run[-1].measured.groups:
                continue
            rows = np.array([_three(one, name) for one in run]).T
            look = plots.look(i) if several else LOOKS[name]
            curve = Curve(_epochs(run), rows[1], look, band=(rows[0], rows[2]))
            found.setdefault(name, {})[run[0].run] = curve
    every = [x for curves in found.values() for one in curves.values() for x in one.band]
    low, high = min(map(np.min, every)), max(map(np.max, every))
    limits = low - 0.05 * (high - low), high + 0.05 * (high - low)
    drawn = []
    for name, curves in found.items():
        title = titles[name][:1].upper() + titles[name][1:]
        shown, text = list(curves.values()), "Cosine similarity: median and middle half."
        if not several and name != "positive":
            shown.append(found["positive"][runs[0][0].run]._replace(band=None))
            text += " Black: the median positive."
        picture = plots.svg(
            plots.chart(shown, "epoch", {}, limits=limits), f"quartiles of the similarity: {title}"
        )
        if several:
            picture += markup.key({run: curve.look for run, curve in curves.items()})
        drawn.append(markup.panel(f"{title}: similarity", picture, text))
    return drawn


def _three(of: Contrast, name: str) -> list[float]:
    """Return the quartiles of the similarity of positives, or of a type of negative."""
    if name == "positive":
        return np.quantile(of.measured.positive.numpy(), (0.25, 0.5, 0.75)).tolist()
    return of.measured.groups[name].quantiles(0.25, 0.5, 0.75)


# numbers


def _numbers(runs: list[Run]) -> str:
    """Return the table with the numbers of the last checkpoint of each run."""
    heads = ["run", "negatives", "lower quartile", "median", "upper quartile"]
    heads += ["harder than the positive, %", "harder than every real one, %", "false negatives, %"]
    rows = []
    for run in runs:
        of = run[-1]
        name = f"{escaped(of.run)}, epoch {_epoch(of)}" if len(runs) > 1 else ""
        quartiles = [f"{value:.3f}" for value in _three(of, "positive")]
        rows.append([name, "positive", *quartiles, "", "", ""])
        for type_, title in _names(of).items():
            group = of.measured.groups[type_]
            false = "" if group.false is None else f"{100 * group.false:.1f}"
            real = f"{100 * group.above_real:.1f}" if type_ in (*_SYNTHETIC, "learned") else ""
            rows.append(
                [
                    name,
                    escaped(title),
                    *(f"{value:.3f}" for value in _three(of, type_)),
                    f"{100 * group.above_positive:.1f}",
                    real,
                    false,
                ]
            )
    text = f"<p>The last checkpoint{' of each run' * (len(runs) > 1)}, as numbers."
    if runs[0][0].measured.false is not None:
        text += " A synthetic negative counts as false if it is made from a false one."
    return markup.section("Numbers", f"{text}</p>", markup.table(heads, rows, 2))
