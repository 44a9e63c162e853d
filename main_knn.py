#!/usr/bin/env python
"""Weighted k-NN: classify val/ by the features of a pre-trained encoder, with train/ as the bank.

With --few-shot, classify val/ in few-shot episodes instead. Without --pretrained, the encoder is
randomly initialised, which is the baseline to compare with.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco import config, sections, sections_eval
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device
from moco.messages import counted, print_rank0
from moco.sections import option


@dataclass(frozen=True)
class Neighbours(sections_eval.Compared):
    """The features to compare, and the neighbours that vote."""

    TITLE: ClassVar[str] = "k-NN"
    k: tuple[int, ...] = option(
        (10, 20, 100, 200),
        "number of neighbours that vote; several are tested in one pass",
        range=sections.POSITIVE,
        nargs="+",
    )
    temperature: float | None = option(
        0.07, "temperature of the neighbours' weights", range=sections.TEMPERATURE
    )


@dataclass(frozen=True)
class Config(config.Evaluation):
    """The settings of this script."""

    knn: Neighbours = Neighbours()
    few_shot: sections_eval.FewShot = sections_eval.FewShot()
    other: sections_eval.OtherTest = sections_eval.OtherTest()

    @property
    def compared(self) -> sections_eval.Compared:
        """Return the settings of the features to compare."""
        return self.knn

    @property
    def other_test(self) -> sections_eval.OtherTest:
        """Return the settings of test images in another folder than the training images."""
        return self.other


def parser() -> Parser:
    p = Parser(__doc__, Config())
    episodes = "it is for --few-shot; give both, or leave it out"
    names = "ways shots queries episodes few_shot_classifier"
    p.has_effect(names, lambda args: args.few_shot, episodes)
    neighbours = "--few-shot takes the place of k-NN, and reads val/ only; leave out either"
    names = "k temperature dump_features eval_data"
    p.has_effect(names, lambda args: not args.few_shot, neighbours)
    files = "saved features are those of train/ and val/, not of --eval-data; leave out either"
    has_files = lambda args: args.load_features or args.dump_features  # noqa: E731
    p.has_effect("eval_data", lambda args: not has_files(args), files)
    return p


def complete(c: Config) -> Config:
    from moco.evaluate import inputs

    inputs.check_head(c)
    inputs.check_distinct("--k", c.knn.k)
    inputs.check_distinct("--shots", c.few_shot.shots)
    inputs.check_distinct("--few-shot-classifier", c.few_shot.few_shot_classifier)
    c = inputs.complete_features(c, multi_label=False)
    c = config.replaced(c, features=c.knn.features or "backbone")
    if c.few_shot.few_shot:
        return config.replaced(c, temperature=None)
    return config.replaced(c, ways=None, queries=None, episodes=None)


def worker(c: Config, device: Device) -> None:
    import torch

    from moco import distributed
    from moco.engine import features
    from moco.evaluate import inputs, results

    if c.few_shot.few_shot:
        classify_episodes(c, device)
        return
    bank, queries, classes = inputs.frozen_features(c, device)
    entries = int(distributed.all_reduce_sum(torch.tensor([len(bank[1])], device=device)))
    if many := [k for k in c.knn.k if k > entries]:
        ks = " ".join(map(str, many))
        few = counted(entries, "image")
        print_rank0(f"--k {ks}: the training set has only {few}, and all of them vote")
    accuracy = features.knn(*bank, *queries, len(classes), list(c.knn.k), c.knn.temperature)
    for k, top1 in accuracy.items():
        print_rank0(f"* k-NN Acc@1 {100 * top1:.3f} (k {k})")
    results.write_results(c, "knn", {f"knn_{k}": top1 for k, top1 in accuracy.items()})


def classify_episodes(c: Config, device: Device) -> None:
    from moco.engine import features
    from moco.evaluate import few_shot, inputs, results

    check = lambda labels: few_shot.check(labels, c.few_shot)  # noqa: E731
    val, _ = inputs.frozen_split(c, device, "val", check)
    x, labels = (features.gather_in_order(part).cpu().numpy() for part in val)
    found = few_shot.evaluate(x, labels, c.few_shot, c.run.seed)  # the same on every rank
    for name, accuracy in found.items():
        if f"{name}_ci95" in found:
            title, half = few_shot.title(name), found[f"{name}_ci95"]
            print_rank0(f"* {title} Acc@1 {100 * accuracy:.3f} +- {100 * half:.3f}")
    results.write_results(c, "few_shot", found)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
