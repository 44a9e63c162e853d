"""Write the HTML page that compares pre-training runs."""

import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moco.errors import InputError
from moco.files import check_new, refuse_remote
from moco.messages import print_rank0
from moco.report import (
    comparison,
    curves,
    header,
    maps,
    markup,
    pictures,
    plots,
    runs,
    samples,
    scatter,
    thumbnails,
)
from moco.report.markup import escaped
from moco.report.runs import Run
from moco.report.samples import Sample

_FEW = 8  # classes whose key needs no panel of its own
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
    markup.save(page(runs.read(folders), pretrained, images, seed), out, force)


def page(found: list[Run], pretrained: Path | None, images: int, seed: int) -> str:
    """Return the page as HTML; see `write` for the arguments."""
    if len(found) == 1:
        heading = f"Pre-training run {escaped(found[0].name)}"
    else:
        heading = f"{len(found)} pre-training runs"
    parts = [
        header.section(found),
        comparison.section(found),
        curves.section(found),
        views(found),
        *encoders(found, pretrained, images, seed),
        markup.section("Options", comparison.options(found)),
        comparison.last_line(found),
    ]
    title = f"Pre-training: {', '.join(run.name for run in found)}"
    return markup.document(title, heading, parts)


def views(found: list[Run]) -> str:
    """Return the section with the views of the runs, once for each recipe and data set."""
    drawn, seen = [], set()

    def one(run: Run) -> str:
        name, recipe = pictures.recipe(run)
        shown = run.args["data"], run.args.get("file_list"), recipe
        if shown in seen:
            return ""
        seen.add(shown)
        title = f"Recipe {name}" + (f" ({run.name})" if len(found) > 1 else "")
        return markup.panel(title, thumbnails.views(run, draws=3 if len(found) == 1 else 2))

    for run in found:
        drawn.append(markup.or_why_not(run, lambda run=run: one(run)))
    text = "Each row shows a training image and then its views in epoch 0. If there are two views, "
    text += "those of the next epochs follow each of them."
    return thumbnails.section("Views as trained", text, list(filter(None, drawn)))


class RunFeatures(NamedTuple):
    """The features of a sample of images, computed by the encoder of one run."""

    run: Run
    source: str  # a text that names the checkpoint
    bank: Tensor  # features of training images [N, D]
    points: Tensor  # features of the images on the map [M, D]


def encoders(found: list[Run], pretrained: Path | None, images: int, seed: int) -> list[str]:
    """Return the sections with neighbours per run, and a map of features per encoder."""
    computed: dict[int, list[RunFeatures]] = defaultdict(list)  # by sample
    chosen, lines = {}, []
    for run in found:
        try:
            net, source = pictures.encoder(run, pretrained)
            sample = pictures.sample_of(run, images, seed)
            print_rank0(f"{plots.printable(run.name)}: features of {sample.counts}")
            bank, points = pictures.sample_features(net, sample, run)
            computed[id(sample)].append(RunFeatures(run, source, bank, points))
            chosen[id(sample)] = sample
        except (InputError, OSError) as error:
            lines.append(markup.note(run, f"{error}; no features are shown"))
    return [
        *(_neighbours(chosen[key], same) for key, same in computed.items()),
        *(_maps(chosen[key], same, seed) for key, same in computed.items()),
        *lines,
    ]


def _neighbours(sample: Sample, computed: list[RunFeatures]) -> str:
    """Return the section with the nearest neighbours of some images, for each encoder."""

    def one(of: RunFeatures) -> str:
        similarity, indices = pictures.nearest_others(sample, of.bank, of.points)
        decoding = pictures.decoding_of(of.run)
        content = thumbnails.neighbours(sample, similarity, indices, decoding)
        caption = f"{thumbnails.right_of(sample, indices)} Features: {of.source}.".strip()
        return markup.panel(of.run.name, content, caption)

    panels = [markup.or_why_not(of.run, lambda of=of: one(of)) for of in computed]
    return thumbnails.section("Nearest neighbours", sample.neighbours_text, panels)


def _maps(sample: Sample, computed: list[RunFeatures], seed: int) -> str:
    """Return the section with a map of features for each encoder, first a random one."""
    points, run = sample.points, computed[0].run
    if len(points) < maps.FEWEST:
        return markup.note(run, f"{len(points)} images are too few for a map")
    shown = {f"random {run.args['arch']}": _random_features(sample, run, seed)}
    shown |= {of.run.name: of.points for of in computed}
    method = maps.choose("auto", len(points))
    labels = samples.single_class(points)
    names = {int(i): points.classes[i] for i in samples.present(points)} if points.labelled else {}

    def one(name: str, x: Tensor) -> str:
        if x.std(0).max() < 1e-6:
            raise InputError("the encoder has collapsed: all images have the same features")
        figure = scatter.scatter(maps.points(x.numpy(), method), labels, names)
        return markup.panel(name, plots.svg(figure, f"map of features: {name}"))

    drawn = [
        markup.or_why_not(run, lambda name=name, x=x: one(name, x))
        for name, x in shown.items()
        if x is not None
    ]
    key = {name: scatter.class_look(i) for i, name in enumerate(names.values())}
    text = f"<p>{escaped(sample.map_text)}, by {method.title} of their features. Distances between "
    text += "groups mean little.</p>"
    if points.multi_label:
        text += "<p>Images that show several classes are grey.</p>"
    if len(key) > _FEW:
        drawn.append(markup.panel("Classes", f'<div class="classes">{markup.key(key, 30)}</div>'))
    elif key:
        text += markup.key(key, 30)
    return markup.section("Map of features", text, markup.grid(drawn))


def _random_features(sample: Sample, run: Run, seed: int) -> Tensor | None:
    """Return the features of a random encoder; None if they would take long."""
    began, points = time.perf_counter(), sample.points
    few = points.subset(np.arange(min(64, len(points))))
    net = pictures.random_encoder(run, seed)
    pictures.extract_features(net, few, run)
    if (time.perf_counter() - began) * len(points) / len(few) >= CHEAP:
        return None
    return pictures.extract_features(net, points, run)
