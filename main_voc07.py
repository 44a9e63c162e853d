#!/usr/bin/env python
"""VOC07 classification: train linear classifiers on features of trainval, and test them on test.

The result is the mean average precision (mAP). Without --pretrained, the encoder is randomly
initialised, which is the baseline to compare with.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from moco import config, distributed, sections, sections_eval
from moco.cli import entry
from moco.cli.parser import Parser
from moco.distributed import print_rank0
from moco.engine import features
from moco.evaluate import inputs, metrics, results, voc
from moco.sections import option

COSTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Classifiers:
    """The classifiers, one for each class, on features of norm 1."""

    TITLE: ClassVar[str] = "classifiers, one for each class, on features of norm 1"
    protocol: str | None = sections_eval.protocol()
    classifier: str = option(
        "svm", "svm, or linear: binary cross entropy with LBFGS", choices=("svm", "linear")
    )
    c: tuple[float, ...] = option(
        COSTS,
        "costs C of errors; for each class, 3-fold cross-validation chooses the best",
        range="(0, 1000000000]",
        nargs="+",
        metavar="C",
    )


@dataclass(frozen=True)
class Config(config.Evaluation):
    """The settings of this script."""

    input: sections.Input = sections.Input(dataset="voc2007")
    svm: Classifiers = Classifiers()


def parser() -> Parser:
    return Parser(__doc__, Config())


def complete(c: Config) -> Config:
    c = config.replaced(c, c=tuple(sorted(set(c.svm.c))))
    return inputs.complete_features(c, multi_label=True)


def worker(c: Config, device: torch.device) -> None:
    trainval, test, classes = inputs.frozen_features(c, device, unit_norm=False)
    x, y, test_x, test_y = (
        features.gather_in_order(part).cpu().numpy() for part in (*trainval, *test)
    )
    if distributed.rank() == 0:
        scores, chosen = voc.classify(x, y, test_x, c.svm.classifier, list(c.svm.c), c.run.seed)
        report(c, classes, scores, test_y, chosen)


def report(
    c: Config,
    classes: tuple[str, ...],
    scores: np.ndarray,
    labels: np.ndarray,
    chosen: list[float | None],
) -> None:
    """Print the average precision of each class and their means, and write results.json.

    Args:
        c: the settings.
        classes: names of the classes.
        scores: scores of the test images, [M, classes].
        labels: labels of the test images, [M, classes].
        chosen: cost of each class; None if trainval cannot train a classifier for it.
    """
    found = metrics.mean_average_precision(scores, labels)
    precisions = zip(classes, chosen, *metrics.average_precisions(scores, labels), strict=True)
    for name, cost, eleven, area in precisions:
        if math.isnan(eleven):
            print_rank0(f"{name:>12}  no test image shows it")
            continue
        how = "(no classifier, because no image of trainval shows it, or all do)"
        if cost is not None:
            how = f"(C {cost:g})"
        found[f"ap_{name}"] = float(eleven)
        print_rank0(f"{name:>12}  AP {100 * eleven:.3f}  area {100 * area:.3f}  {how}")
    costs, ends = c.svm.c, (c.svm.c[0], c.svm.c[-1])
    edge = [name for name, cost in zip(classes, chosen, strict=True) if cost in ends]
    if edge and len(costs) > 2:
        print_rank0(
            f"the first or last of --c {costs[0]:g} ... {costs[-1]:g} was best for "
            f"{', '.join(edge)}; costs beyond it may be better"
        )
    print_rank0(f"* mAP {100 * found['map11']:.3f} (11 points)  {100 * found['map']:.3f} (area)")
    results.write_results(c, "voc07" if c.svm.classifier == "svm" else "voc07_linear", found)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
