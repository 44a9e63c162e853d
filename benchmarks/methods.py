#!/usr/bin/env python
"""Pre-train every method on `photos` in minutes and compare it with a random encoder.

The evaluations are k-NN, the linear probe, and fine-tuning on 10 % of the labels. The figures are
top-1 on val, as medians over the seeds; `seconds` is the time of pre-training. ResNets train as
long as in the demo; the methods with `-a test_vit` in the registry train timm's smallest ViT.

Fine-tuning is short, to show the effect of a few steps on few labels. Color separates these
classes, so a random encoder learns them, too, in 60 epochs.
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
    """A network, its image size, and the number of epochs of pre-training."""

    arch: str
    pixels: int
    epochs: int

    @property
    def options(self) -> list[object]:
        """Return the command-line options of the network."""
        return ["--arch", self.arch, "--image-size", self.pixels]

    def __str__(self) -> str:
        return f"{self.arch} at {self.pixels} pixels, {self.epochs} epochs"


RESNET, VIT = Network("resnet18", 32, 20), Network("test_vit", 64, 30)
FINE_TUNING = "--protocol synco --weights finetune --lr-backbone 0.001 --lr-classifier 0.01".split()
FINE_TUNING += "--train-percent 10 --batch-size 16".split()
# for each evaluation, the name of the random encoder's figure
RANDOM = {"knn": "random_knn", "linear": "random_linear", "semisup": "semisup_random"}


def main() -> None:
    """Run the benchmark."""
    parser = measure.bare_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=measure.at_least(0), nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--short",
        action="store_true",
        help="train for one epoch each: a quick check that all parts run",
    )
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
    """Return the network that a method trains."""
    return VIT if f"-a {VIT.arch}" in METHODS[method].tiny else RESNET


def pretrain(args: argparse.Namespace, seed: int, method: str, folder: Path) -> float:
    """Pre-train a method; return the seconds that it took."""
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
    """Return the top-1, in [0, 1], of each evaluation of a checkpoint or of a random encoder."""
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
    """Print each evaluation of the random and trained encoder, and the median gain over seeds."""
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
    measure.main(main)
