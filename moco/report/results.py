"""Read the results.json files of evaluations, and choose the best settings."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moco.errors import InputError
from moco.evaluate import few_shot
from moco.files import UnreadableError, read_json, to_json
from moco.report import seeds


class Encoder(NamedTuple):
    """An encoder: a row of the table."""

    method: str
    arch: str
    epochs: int | None  # of pre-training
    checkpoint: str | None  # several, if they differ only in the seed of their pre-training


class Result(NamedTuple):
    """The value of one metric in a results.json, and the settings of the evaluation."""

    encoder: Encoder
    protocol: str  # as in results.json
    column: tuple[str, str]  # data set and the protocol's title
    setting: str  # all settings except the seed, as JSON
    seed: int | None  # of the evaluation
    metric: str
    value: float
    top5: float | None  # top-5, if the metric is top-1
    held_out: float | None  # the metric on held-out training images, if any
    classifiers: int = 1  # number of classifiers trained in one pass, of which this is the best
    classifier: str = ""  # its learning rate and weight decay, if there were several
    pretrain_seed: int | None = None  # only if there are several


class Best(NamedTuple):
    """The best setting of one cell of the table.

    Attributes:
        results: the results of this setting, one for each seed.
        tried: number of settings tried. Each of several classifiers of one pass counts.
        varied: names of the options that differ between them.
        on_val: whether it was chosen among several settings on val/, the images of the test.
    """

    results: list[Result]
    tried: int
    varied: list[str]
    on_val: bool

    def mean(self) -> float:
        """Return the mean of the metric over seeds."""
        return statistics.mean(one.value for one in self.results)

    def std(self) -> float:
        """Return the standard deviation of the metric over seeds; there must be two at least."""
        return statistics.stdev(one.value for one in self.results)


def collect(folder: Path) -> dict[tuple[Encoder, tuple[str, str]], Best]:
    """Return the best setting of each cell, from all results.json files below `folder`.

    Raises InputError if there are none, or if one cannot be read.
    """
    files = sorted(folder.rglob("results.json"))
    found = seeds.merge([(one, file) for file in files for one in read(file)])
    groups = defaultdict(list)
    for one in found:
        groups[one.encoder, one.column].append(one)
    if not groups:
        raise InputError(
            f"{folder}: no results.json of an evaluation script below it; "
            "give a folder that holds their run folders"
        )
    return {cell: best(results) for cell, results in groups.items()}


def read(file: Path) -> Iterable[Result]:
    """Return the metrics of one results.json; none if no evaluation script has written it.

    Raises InputError if the file cannot be read.
    """
    again = "remove it or run its evaluation again"
    try:
        found = read_json(file)
    except UnreadableError as error:
        raise error.at(file) from None
    except InputError as error:
        raise InputError(f"{file}: cannot be read ({error}); {again}") from None
    if not isinstance(found, dict) or "protocol" not in found:
        return []
    try:
        return list(_results(found))
    except Exception:  # any key may be missing or have another type
        raise InputError(f"{file}: was not written by an evaluation script; {again}") from None


def _results(found: dict[str, Any]) -> Iterable[Result]:
    """Yield the metrics in the content of a results.json."""
    for name in ("method", "arch", "dataset", "protocol"):
        if not isinstance(found[name], str):
            raise TypeError(name)
    if not isinstance(found["checkpoint"], str | None):
        raise TypeError("checkpoint")
    encoder = Encoder(
        found["method"], found["arch"], found.get("pretrain_epochs"), found["checkpoint"]
    )
    settings, metrics = dict(found.get("settings", {})), found["metrics"]
    seed = settings.pop("seed", None)
    for name, default in (("test_resize", "scaled"), ("exif", "ignore")):
        if settings.get(name) == default:
            del settings[name]  # older versions do not write it
    settings = {name: value for name, value in settings.items() if value is not None}
    if not {"epochs", "optimizer"} & settings.keys():
        settings.pop("batch_size", None)  # nothing was trained: no result depends on it
    dataset = Path(found["dataset"]).name
    chosen = [
        f"{name} {metrics[f'best_{name}']:g}" for name in ("lr", "wd") if _best(metrics, name)
    ]
    for metric, protocol in figures(found["protocol"], metrics, settings):
        if metrics[metric] is None:  # NaN or infinite: nothing to put in a table
            continue
        yield Result(
            encoder=encoder,
            protocol=found["protocol"],
            column=(dataset, protocol),
            setting=to_json(settings, sort_keys=True),
            seed=seed,
            metric=metric,
            value=0.0 + metrics[metric],
            top5=metrics["acc5"] if metric == "acc1" else None,
            held_out=metrics.get(f"held_out_{metric}"),
            classifiers=sum(name.startswith(f"{metric}_lr") for name in metrics) or 1,
            classifier=", ".join(chosen),
        )


def _best(metrics: dict[str, float], name: str) -> bool:
    """Return whether the classifier was chosen among several values of the option `name`."""
    return isinstance(metrics.get(f"best_{name}"), int | float)


def figures(
    protocol: str, metrics: dict[str, float], settings: dict[str, Any]
) -> Iterable[tuple[str, str]]:
    """Yield the name of each metric that the table shows, and the title of its column.

    k-NN has a column for each k, temperature and type of features. Results of older versions lack
    the last two settings, so their titles only contain k.

    Args:
        protocol: the evaluation, such as linear, semisup10 or knn.
        metrics: values in [0, 1], by name.
        settings: the evaluation's settings.
    """
    knn = [name for name in metrics if name.startswith("knn_")]
    if knn:
        temperature, features = settings.get("temperature"), settings.get("features")
        how = "" if temperature is None else f", T {temperature}"
        how += "" if features is None else f", {features} features"
        yield from ((name, f"k-NN (k {name.removeprefix('knn_')}{how})") for name in knn)
        return
    if protocol.startswith("detection"):
        yield from ((name, f"{protocol}, {name.replace('_ap', ' AP')}") for name in metrics)
        return
    if protocol == "few_shot":
        episodes = [name for name in metrics if not name.endswith("_ci95")]
        yield from ((name, few_shot.title(name)) for name in episodes)
        return
    if protocol.startswith(("retrieval", "clusters")):
        several = f"k-means (k {settings.get('clusters')})"
        title = protocol.replace("clusters", several)
        yield from ((name, f"{title}, {SEVERAL[name]}") for name in SEVERAL if name in metrics)
        return
    name = next(name for name in METRICS if name in metrics)
    percent = re.fullmatch(r"semisup(\d+)(_frozen)?", protocol)
    title = f"{percent[1]} % labels{', frozen' if percent[2] else ''}" if percent else protocol
    yield name, f"{title}, {METRICS[name]}"


# Titles of the metrics of retrieval and clustering. All that a result has are shown.
SEVERAL = {f"map_{setting}": f"mAP {setting}" for setting in ("easy", "medium", "hard")}
SEVERAL |= {"map": "mAP", "recall_1": "Recall@1"}
SEVERAL |= {"nmi": "NMI", "ari": "ARI", "cluster_accuracy": "matched accuracy"}

# Titles of the metrics of classifiers. If a result has several of them, the first one is shown
METRICS = {"map11": "mAP", "mean_per_class": "mean per class", "acc1": "top-1 / top-5"}


def best(results: list[Result]) -> Best:
    """Return the best setting among `results`.

    Settings are compared on held-out images if all results have them, otherwise on val/. An
    evaluation that was run twice with the same result counts once.
    """
    settings = defaultdict(list)
    for one in dict.fromkeys(results):
        settings[one.setting].append(one)
    on_val = any(one.held_out is None for one in results)

    def mean_score(same: list[Result]) -> float:
        return statistics.mean(one.value if on_val else one.held_out for one in same)

    tried = [json.loads(setting) for setting in settings]
    names = sorted({name for one in tried for name in one})
    varied = [name for name in names if any(one.get(name) != tried[0].get(name) for one in tried)]
    best_results = max(settings.values(), key=mean_score)
    count = sum(max(one.classifiers for one in same) for same in settings.values())
    return Best(best_results, count, varied, on_val and count > 1)


def choice(encoder: Encoder, column: tuple[str, str], found: Best) -> str:
    """Return the line that says which of the settings tried was the best."""
    setting = json.loads(found.results[0].setting)
    chosen = dict.fromkeys(one.classifier for one in found.results if one.classifier)
    varied = [name for name in found.varied if not (chosen and name in ("lr", "wd"))]
    values = ", ".join(
        [
            *(f"{name} {setting.get(name)}" for name in varied),
            *([" or ".join(chosen)] * bool(chosen)),
        ]
    )
    where = f"{' '.join(column)}, {encoder.method} {encoder.arch}"
    return f"{where}: the best of {found.tried} settings is {values}"


def cell(found: Best | None, gain: float | None = None) -> str:
    """Return the text of a cell, in per cent.

    It is "67.5 ± 0.1 / 87.9 (+12.3)" for several seeds and a `gain` in [-1, 1], and "67.5 / 87.9"
    for one seed without a gain. A star marks a setting that was chosen on the test images.
    """
    if found is None:
        return ""
    text = f"{100 * found.mean():.1f}"
    if len(found.results) > 1:
        text += f" ± {100 * found.std():.1f}"
    if found.results[0].top5 is not None:
        text += f" / {100 * statistics.mean(one.top5 for one in found.results):.1f}"
    if gain is not None:
        text += f" ({100 * gain:+.1f})"
    return text + (" *" if found.on_val else "")
