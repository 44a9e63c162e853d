#!/usr/bin/env python
"""VOC07 classification: train linear classifiers on the frozen features of trainval, and test them on test by mAP.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import math

import numpy as np
import torch

from moco import distributed
from moco.cli import entry, options, values
from moco.cli.parser import Options, Parser
from moco.distributed import print_rank0
from moco.engine import features
from moco.evaluate import inputs, metrics, results, voc

COSTS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_input(p, batch=256, recipe=None, arch=None)
    options.add_evaluation(p)
    p.set_defaults(dataset="voc2007")
    group = p.add_argument_group("classifiers, one for each class, on features of length 1")
    group.add_argument(
        "--classifier",
        choices=("svm", "linear"),
        default="svm",
        help="linear: binary cross entropy, by LBFGS",
    )
    cost = "of errors against weights; each class has the best in 3-fold cross-validation"
    group.add_argument(
        "--c", type=values.real("(0, 1000000000]"), nargs="+", default=COSTS, metavar="C", help=cost
    )
    options.add_feature_rules(p)
    options.add_files(p)
    options.add_launch(p)
    return p


def check(args: Options) -> None:
    args.c = sorted(set(args.c))
    inputs.check_features(args, multi_label=True)


def worker(args: Options, device: torch.device) -> None:
    trainval, test, classes = inputs.frozen_features(args, device, unit_norm=False)
    x, y, test_x, test_y = (features.in_order(part).cpu().numpy() for part in (*trainval, *test))
    if distributed.rank() == 0:
        scores, chosen = voc.classify(x, y, test_x, args.classifier, args.c, args.seed)
        report(args, classes, scores, test_y, chosen)


def report(
    args: Options,
    classes: tuple[str, ...],
    scores: np.ndarray,
    labels: np.ndarray,
    chosen: list[float | None],
) -> None:
    """Print the average precision of each class and their means, and write results.json.

    Args:
        scores, labels: of the test images, [M, classes].
        chosen: costs [classes]; None where trainval does not tell the class.
    """
    found = metrics.mean_average_precision(scores, labels)
    for c, (name, eleven, area) in enumerate(
        zip(classes, *metrics.average_precisions(scores, labels), strict=True)
    ):
        how = (
            "(no classifier: no image of trainval shows it, or all do)"
            if chosen[c] is None
            else f"(C {chosen[c]:g})"
        )
        if math.isnan(eleven):
            print_rank0(f"{name:>12}  no test image shows it")
            continue
        found[f"ap_{name}"] = float(eleven)
        print_rank0(f"{name:>12}  AP {100 * eleven:.3f}  area {100 * area:.3f}  {how}")
    edge = [
        name
        for name, c in zip(classes, chosen, strict=True)
        if len(args.c) > 2 and c in (args.c[0], args.c[-1])
    ]
    if edge:
        print_rank0(
            f"an end of --c {args.c[0]:g} ... {args.c[-1]:g} was best for {', '.join(edge)}: more costs there may do better"
        )
    print_rank0(f"* mAP {100 * found['map11']:.3f} (11 points)  {100 * found['map']:.3f} (area)")
    results.write_results(args, "voc07" if args.classifier == "svm" else "voc07_linear", found)


if __name__ == "__main__":
    entry.main(parser(), check, worker)
