#!/usr/bin/env python
"""Every method, pre-trained on `photos` in minutes, beside a random encoder: k-NN, linear probe, 10 % of the labels.

ResNets have the demo's budget; those of main_moby.py train timm's smallest ViT. Medians over the seeds of top-1 on val; `seconds`
is pre-training's. The fine-tuning is short on purpose: it asks how far a few steps on few labels go. Colour tells these classes
apart, and in 60 epochs a random encoder learns it too.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import measure

from moco.files import new_folder
from tools import demo

SMALL_BATCH = (
    "--batch-size 32 --mlp-dim 512 --save-every 1000".split()
)  # the published rate: LARS, .075 sqrt(batch)
# the published rate; 2 of 512 rows, and not 10 of 65,536; at 32 pixels RandAugment leaves little to see
FNC = "--batch-size 32 --ema 0.99 --support-size 1 --fn-topk 2 --fn-threshold 0.8 --randaugment 0 0 --save-every 1000".split()
# few steps: a higher rate, no stochastic depth
TRANSFORMER = "--batch-size 32 --mlp-dim 512 --lr-warmup-epochs 1 --online-drop-path 0 --save-every 1000".split()
MOBY = [*TRANSFORMER, *"--lr 0.004 --queue 512".split()]
KINDS = "--n1 4 --n2 4 --n3 4 --n4 4 --n5 4 --n6 4".split()
METHODS = {
    "mocov1": ("main_synco.py", [*demo.SMALL, *"--moco-k 256 --schedule 12 16".split()]),
    "mocov2": ("main_synco.py", demo.MOCOV2),
    "mochi": (
        "main_synco.py",
        [*demo.MOCOV2, *"--n-hard 16 --warmup-epochs 4 --n1 4 --n3 4".split()],
    ),
    "synco": ("main_synco.py", demo.PRETRAIN),
    "adco": ("main_adco.py", [*demo.SMALL, *"--lr-final 0 --cluster 256".split()]),
    "simclr": ("main_sogclr.py", [*SMALL_BATCH, "--loss-type", "simclr"]),
    "sogclr": ("main_sogclr.py", SMALL_BATCH),
    "fnc": ("main_fnc.py", FNC),
    "moby": ("main_moby.py", [*MOBY, "--method", "moby"]),
    "synco-v2": (
        "main_moby.py",
        [
            *MOBY,
            *"--method synco --n-hard 32 --synthetic-first 4 --synthetic-last 24".split(),
            *KINDS,
        ],
    ),
    "byol": (
        "main_moby.py",
        [*TRANSFORMER, *"--method byol --lr 0.002 --wd 0.05 --moco-m 0.99".split()],
    ),
}


class Network(NamedTuple):
    """What the methods of one script train, and for how long."""

    arch: str
    pixels: int
    epochs: int

    @property
    def options(self) -> list[object]:
        return ["--arch", self.arch, "--image-size", self.pixels]

    def __str__(self) -> str:
        return f"{self.arch} at {self.pixels} pixels, {self.epochs} epochs"


RESNET, VIT = Network("resnet18", 32, 20), Network("test_vit", 64, 30)
FINE_TUNING = "--train-percent 10 --batch-size 16 --lr-backbone 0.001 --lr-classifier 0.01".split()
RANDOM = {
    "knn": "random_knn",
    "linear": "random_linear",
    "semisup": "semisup_random",
}  # what a random encoder's figure is called


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="an epoch each: shows that all runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=measure.ROOT / "runs" / "benchmarks" / "methods",
        help="folder of the runs; if it exists, NAME-2, NAME-3, ...",
    )
    measure.add_json(parser)
    args = parser.parse_args()
    args.out = new_folder(args.out)
    found = {method: defaultdict(list) for method in args.methods}
    for seed in args.seeds:
        random = {
            net: evaluate(args, seed, net, args.out / f"random-{net.arch}-{seed}")
            for net in dict.fromkeys(map(network, found))
        }
        for method, mine in found.items():
            net, folder = network(method), args.out / f"{method}-{seed}"
            seconds = pretrain(args, seed, method, folder)
            trained = evaluate(
                args, seed, net, folder, next((folder / "pretrain").glob("checkpoint_*.pth.tar"))
            )
            for name, value in trained.items():
                mine[RANDOM[name]].append(random[net][name])
                mine[name].append(value)
            mine["seconds"].append(seconds)
    medians = {
        method: {name: statistics.median(values) for name, values in mine.items()}
        for method, mine in found.items()
    }
    path = measure.write("methods", args.json, medians)
    show(medians, found, args)
    print(path)


def network(method: str) -> Network:
    """What this method trains."""
    return VIT if METHODS[method][0] == "main_moby.py" else RESNET


def pretrain(args: argparse.Namespace, seed: int, method: str, folder: Path) -> float:
    """Pre-train; returns the seconds that it took."""
    script, options = METHODS[method]
    net = network(method)
    began = time.perf_counter()
    demo.call(
        seed,
        script,
        folder / "pretrain",
        *net.options,
        *options,
        "--epochs",
        1 if args.short else net.epochs,
        quiet=True,
    )
    return time.perf_counter() - began


def evaluate(
    args: argparse.Namespace, seed: int, net: Network, folder: Path, checkpoint: Path | None = None
) -> dict[str, float]:
    """Top-1, in [0, 1], of each evaluation of a checkpoint, or of a random encoder."""
    source = ["--pretrained", checkpoint.resolve()] if checkpoint else []

    def call(script: str, *options: object) -> dict[str, float]:
        return demo.call(
            seed, script, folder / Path(script).stem, *net.options, *options, *source, quiet=True
        )

    return {
        "knn": call("main_knn.py", "--k", 20)["knn_20"],
        "linear": call("main_lincls.py", *demo.LINEAR, "--epochs", 1 if args.short else 12)["acc1"],
        "semisup": call("main_semisup.py", *FINE_TUNING, "--epochs", 1 if args.short else 6)[
            "acc1"
        ],
    }


def show(
    medians: dict[str, dict[str, float]],
    found: dict[str, dict[str, list[float]]],
    args: argparse.Namespace,
) -> None:
    """Print random -> trained for each evaluation, and the median over seeds of what pre-training gains."""
    nets = "; ".join(dict.fromkeys(str(network(method)) for method in medians))
    print(f"\nphotos, {nets}, median of seeds {args.seeds}: random encoder -> pre-trained (gain)")
    print(f"{'':10}{'k-NN':>24}{'linear':>24}{'10 % of the labels':>24}{'seconds':>10}")
    for method, figures in medians.items():
        cells = []
        for name, random in RANDOM.items():
            pairs = zip(found[method][name], found[method][random], strict=True)
            gain = statistics.median(mine - base for mine, base in pairs)
            cells.append(f"{figures[random]:.3f} -> {figures[name]:.3f} ({gain:+.3f})")
        print(
            f"{method:10}"
            + "".join(f"{cell:>24}" for cell in cells)
            + f"{figures['seconds']:>10.0f}"
        )


if __name__ == "__main__":
    main()
