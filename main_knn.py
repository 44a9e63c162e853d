#!/usr/bin/env python
"""Weighted k-NN: classify val/ by the frozen features of a pre-trained encoder, with train/ as the bank.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco import devices, distributed
from moco.cli import entry, options, values
from moco.cli.parser import Options, Parser
from moco.distributed import print_rank0
from moco.engine import features
from moco.errors import InputError
from moco.evaluate import inputs, results


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_input(p, batch=256, recipe=None, arch=None)
    options.add_evaluation(p)
    knn = p.add_argument_group("k-NN")
    knn.add_argument(
        "--k",
        type=values.positive,
        nargs="+",
        default=[10, 20, 100, 200],
        help="neighbours that vote; several in one pass",
    )
    knn.add_argument(
        "--temperature",
        type=values.temperature,
        default=0.07,
        help="temperature of the neighbours' weights",
    )
    whose = (
        "features of the encoder without projection head (the default), or of the projection head"
    )
    knn.add_argument("--features", choices=("backbone", "head"), help=whose)
    knn.add_argument(
        "--host-features",
        action="store_true",
        help="keep the features in the host's memory, not on the GPU",
    )
    on_cpu = "there is no GPU; features are in the host's memory anyway"
    on_gpu = lambda args: devices.chosen(args.device) != "cpu"  # noqa: E731
    p.has_effect("host_features", on_gpu, on_cpu, refuse=False)
    options.add_feature_rules(p)
    options.add_files(p)
    options.add_launch(p)
    return p


def check(args: Options) -> None:
    if args.features == "head" and not (args.pretrained or args.load_features):
        what = "needs a checkpoint with a projection head"
        raise InputError(f"--features head: {what}; give it with --pretrained")
    inputs.check_features(args, multi_label=False)
    args.features = args.features or "backbone"


def worker(args: Options, device: torch.device) -> None:
    bank, queries, classes = inputs.frozen_features(args, device)
    rows = int(distributed.all_reduce_sum(torch.tensor([len(bank[1])], device=device)))
    if many := [k for k in args.k if k > rows]:
        print_rank0(
            f"--k {' '.join(map(str, many))}: the bank has {rows} images, and all of them vote"
        )
    accuracy = features.knn(*bank, *queries, len(classes), args.k, args.temperature)
    for k, top1 in accuracy.items():
        print_rank0(f"* k-NN Acc@1 {100 * top1:.3f} (k {k})")
    results.write_results(args, "knn", {f"knn_{k}": top1 for k, top1 in accuracy.items()})


if __name__ == "__main__":
    entry.main(parser(), check, worker)
