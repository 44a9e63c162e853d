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

from moco.cli.run_on_photos import LINEAR, run_on_photos
from moco.files import new_folder
from moco.methods import METHODS


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
    return VIT if METHODS[method].script == "main_moby" else RESNET


def pretrain(args: argparse.Namespace, seed: int, method: str, folder: Path) -> float:
    """Pre-train; returns the seconds that it took."""
    net = network(method)
    began = time.perf_counter()
    run_on_photos(
        seed,
        METHODS[method].script,
        folder / "pretrain",
        *net.options,
        *METHODS[method].photos.split(),
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
        return run_on_photos(
            seed, script, folder / script, *net.options, *options, *source, quiet=True
        )

    return {
        "knn": call("main_knn", "--k", 20)["knn_20"],
        "linear": call("main_lincls", *LINEAR, "--epochs", 1 if args.short else 12)["acc1"],
        "semisup": call("main_semisup", *FINE_TUNING, "--epochs", 1 if args.short else 6)["acc1"],
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
