#!/usr/bin/env python
"""Weighted k-NN: classify val/ by the frozen features of a pre-trained encoder, with train/ as the bank.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco.engine import classify, cli, features
from moco.engine.log import say
from moco.errors import InputError


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    cli.add_input(p, batch=256, recipe=None, arch=None)
    cli.add_evaluation(p)
    knn = p.add_argument_group("k-NN")
    knn.add_argument(
        "--k", type=cli.positive, nargs="+", default=[10, 20, 100, 200], help="neighbours that vote; several in one pass"
    )
    knn.add_argument("--temperature", type=float, default=0.07, help="of the neighbours' weights")
    knn.add_argument("--host-features", action="store_true", help="keep the features in the host's memory, not on the GPU")
    features.add_files(p)
    cli.add_launch(p)
    return p


def check(args: cli.Options) -> None:
    if not args.temperature > 0:
        raise InputError(f"--temperature {args.temperature:g}: must be above 0")
    classify.check_features(args, many=False)


def worker(args: cli.Options, device: torch.device) -> None:
    bank, queries, classes = classify.frozen_features(args, device)
    accuracy = features.knn(*bank, *queries, len(classes), args.k, args.temperature)
    for k, top1 in accuracy.items():
        say(f"* k-NN Acc@1 {100 * top1:.3f} (k {k})")
    classify.write_results(args, "knn", {f"knn_{k}": top1 for k, top1 in accuracy.items()})


if __name__ == "__main__":
    cli.main(parser(), check, worker)
