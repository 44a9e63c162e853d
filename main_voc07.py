#!/usr/bin/env python
"""VOC07 classification: train linear classifiers on frozen features, and test them on test.

--classifier svm and linear train on trainval; sgd trains on train, and chooses the epoch on val.
The result is the mean average precision (mAP). Without --pretrained, the encoder is randomly
initialised, which is the baseline to compare with.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco import config, sections, sections_eval
from moco.cli import entry
from moco.cli.effects import Options
from moco.cli.parser import Parser
from moco.cli.types import Device
from moco.messages import print_rank0
from moco.sections import option

COSTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Classifiers:
    """The classifiers of the classes."""

    TITLE: ClassVar[str] = "classifiers, one for each class"
    protocol: str | None = sections_eval.protocol()
    classifier: str = option(
        "svm",
        "svm, or linear (binary cross entropy with LBFGS): on features of norm 1; sgd: a linear "
        "layer trained on augmented images, as by AdCo's authors",
        choices=("svm", "linear", "sgd"),
    )
    c: tuple[float, ...] = option(
        COSTS,
        "costs C of errors; for each class, 3-fold cross-validation chooses the best",
        range="(0, 1000000000]",
        nargs="+",
        metavar="C",
    )
    epochs: int | None = option(None, "epochs of sgd", range=sections.EPOCHS, unset="100")
    lr: float | None = option(
        None, "learning rate of sgd", range=sections.LEARNING_RATE, metavar="LR", unset="0.05"
    )


@dataclass(frozen=True)
class Config(config.Evaluation):
    """The settings of this script."""

    input: sections.Input = sections.Input(dataset="voc2007")
    svm: Classifiers = Classifiers()


def uses_sgd(options: Classifiers | Options) -> bool:
    return options.classifier == "sgd"


def parser() -> Parser:
    p = Parser(__doc__, Config())
    p.has_effect("epochs lr", uses_sgd, "it is for --classifier sgd; give both, or leave it out")
    own = "--classifier sgd has its own views and no costs; leave it out, or give --classifier svm"
    names = "c test_resize dump_features load_features"
    p.has_effect(names, lambda args: not uses_sgd(args), own)
    return p


def complete(c: Config) -> Config:
    from moco.data import registry
    from moco.evaluate import inputs

    c = config.replaced(c, c=tuple(sorted(set(c.svm.c))))
    c = inputs.complete_features(c, multi_label=True)
    if not uses_sgd(c.svm):
        return c
    if not c.files.load_features:
        registry.load_voc_halves(c.run.data)  # raises InputError if the lists are missing
    lr = 0.05 if c.svm.lr is None else c.svm.lr
    return config.replaced(c, epochs=c.svm.epochs or 100, lr=lr, test_resize=None)


def worker(c: Config, device: Device) -> None:
    from moco import distributed
    from moco.engine import features
    from moco.evaluate import inputs, metrics, results, voc, voc_layer

    if uses_sgd(c.svm):
        classes, *tested, on_val = voc_layer.classify(c, device, c.svm.epochs, c.svm.lr)
        found = metrics.print_average_precisions(classes, *tested, [""] * len(classes))
        results.write_results(c, "voc07_sgd", {**found, "held_out_map11": on_val})
        return
    trainval, test, classes = inputs.frozen_features(c, device, unit_norm=False)
    x, y, test_x, test_y = (
        features.gather_in_order(part).cpu().numpy() for part in (*trainval, *test)
    )
    if distributed.rank() != 0:
        return
    scores, chosen = voc.classify(x, y, test_x, c.svm.classifier, list(c.svm.c), c.run.seed)
    none = "(no classifier, because no image of trainval shows it, or all do)"
    notes = [none if cost is None else f"(C {cost:g})" for cost in chosen]
    found = metrics.print_average_precisions(classes, scores, test_y, notes)
    costs, ends = c.svm.c, (c.svm.c[0], c.svm.c[-1])
    edge = [name for name, cost in zip(classes, chosen, strict=True) if cost in ends]
    if edge and len(costs) > 2:
        print_rank0(
            f"the first or last of --c {costs[0]:g} ... {costs[-1]:g} was best for "
            f"{', '.join(edge)}; costs beyond it may be better"
        )
    results.write_results(c, "voc07" if c.svm.classifier == "svm" else "voc07_linear", found)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
