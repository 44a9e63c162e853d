#!/usr/bin/env python
"""Weighted k-NN: classify val/ by the features of a pre-trained encoder, with train/ as the bank.

Without --pretrained, the encoder is randomly initialised, which is the baseline to compare with.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
from dataclasses import dataclass
from typing import ClassVar

import torch

from moco import config, devices, distributed, sections
from moco.cli import entry
from moco.cli.parser import Parser
from moco.distributed import print_rank0
from moco.engine import features
from moco.errors import InputError
from moco.evaluate import inputs, results
from moco.sections import option


@dataclass(frozen=True)
class Neighbours:
    """The features to compare, and the neighbours that vote."""

    TITLE: ClassVar[str] = "k-NN"
    k: tuple[int, ...] = option(
        (10, 20, 100, 200),
        "number of neighbours that vote; several are tested in one pass",
        range=sections.POSITIVE,
        nargs="+",
    )
    temperature: float = option(
        0.07, "temperature of the neighbours' weights", range=sections.TEMPERATURE
    )
    features: str | None = option(
        None,
        "features to compare: those of the backbone, or those of the projection head",
        choices=("backbone", "head"),
        unset="backbone",
    )
    host_features: bool = option(
        False, "keep the features in the host's memory, not on the GPU", switch=False
    )


@dataclass(frozen=True)
class Config(config.Evaluation):
    """The settings of this script."""

    knn: Neighbours = Neighbours()

    @property
    def use_head_features(self) -> bool:
        """Return whether to use the features of the projection head, not of the backbone."""
        return self.knn.features == "head"

    @property
    def on_host(self) -> bool:
        """Return whether to keep features in the host's memory, not on the GPU."""
        return self.knn.host_features


def parser() -> Parser:
    p = Parser(__doc__, Config())
    on_cpu = "there is no GPU, so features are always in the host's memory"
    on_gpu = lambda args: devices.resolve_type(args.device) != "cpu"  # noqa: E731
    p.has_effect("host_features", on_gpu, on_cpu, refuse=False)
    return p


def complete(c: Config) -> Config:
    if c.use_head_features and not (c.encoder.pretrained or c.files.load_features):
        what = "needs a checkpoint with a projection head"
        raise InputError(f"--features head: {what}; give it with --pretrained")
    inputs.check_distinct("--k", c.knn.k)
    c = inputs.complete_features(c, multi_label=False)
    return config.replaced(c, features=c.knn.features or "backbone")


def worker(c: Config, device: torch.device) -> None:
    bank, queries, classes = inputs.frozen_features(c, device)
    entries = int(distributed.all_reduce_sum(torch.tensor([len(bank[1])], device=device)))
    if many := [k for k in c.knn.k if k > entries]:
        ks = " ".join(map(str, many))
        print_rank0(f"--k {ks}: the training set has only {entries} images, and all of them vote")
    accuracy = features.knn(*bank, *queries, len(classes), list(c.knn.k), c.knn.temperature)
    for k, top1 in accuracy.items():
        print_rank0(f"* k-NN Acc@1 {100 * top1:.3f} (k {k})")
    results.write_results(c, "knn", {f"knn_{k}": top1 for k, top1 in accuracy.items()})


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
