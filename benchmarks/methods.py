#!/usr/bin/env python
"""Every method, pre-trained on `photos` with the demo's budget, beside a random encoder: k-NN, linear probe, 10 % of the labels.

Medians over the seeds of top-1 on val; `seconds` is pre-training's. The fine-tuning is short on purpose: it asks how far a few
steps on few labels go. Colour tells these classes apart, and in 60 epochs a random encoder learns it too.
"""

import argparse
import shutil
import statistics
import time
from collections import defaultdict
from pathlib import Path

import measure  # also makes the project's modules importable

from moco.engine.log import write_json
from tools import demo

SMALL_BATCH = "--batch-size 32 --mlp-dim 512 --save-every 1000".split()  # the published rate: LARS, .075 sqrt(batch)
# the published rate; 2 of 512 rows, and not 10 of 65,536; at 32 pixels RandAugment leaves little to see
FNC = "--batch-size 32 --ema 0.99 --support-size 1 --fn-topk 2 --fn-threshold 0.8 --randaugment 0 0 --save-every 1000".split()
METHODS = {
    "mocov1": ("main_synco.py", [*demo.SMALL, *"--moco-k 256 --schedule 12 16".split()]),
    "mocov2": ("main_synco.py", demo.MOCOV2),
    "mochi": ("main_synco.py", [*demo.MOCOV2, *"--n-hard 16 --warmup-epochs 4 --n1 4 --n3 4".split()]),
    "synco": ("main_synco.py", demo.PRETRAIN),
    "adco": ("main_adco.py", [*demo.SMALL, *"--lr-final 0 --cluster 256".split()]),
    "simclr": ("main_sogclr.py", [*SMALL_BATCH, "--loss-type", "simclr"]),
    "sogclr": ("main_sogclr.py", SMALL_BATCH),
    "fnc": ("main_fnc.py", FNC),
}
FINE_TUNING = "--train-percent 10 --batch-size 16 --lr-backbone 0.001 --lr-classifier 0.01".split()
RANDOM = {"knn": "random_knn", "linear": "random_linear", "semisup": "semisup_random"}  # what a random encoder's figure is called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="an epoch each: shows that all runs")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "runs" / "benchmarks" / "methods", help="run folders, made anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="by default methods.json in --out")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    found = {method: defaultdict(list) for method in args.methods}
    for seed in args.seeds:
        random = evaluate(args, seed, args.out / f"random-{seed}")
        for method, mine in found.items():
            folder = args.out / f"{method}-{seed}"
            seconds = pretrain(args, seed, method, folder)
            trained = evaluate(args, seed, folder, next((folder / "pretrain").glob("checkpoint_*.pth.tar")))
            for name, value in trained.items():
                mine[RANDOM[name]].append(random[name])
                mine[name].append(value)
            mine["seconds"].append(seconds)
    medians = {method: {name: statistics.median(values) for name, values in mine.items()} for method, mine in found.items()}
    path = args.json or args.out / "methods.json"
    write_json(path, medians)
    show(medians, found, args)
    print(path)


def pretrain(args: argparse.Namespace, seed: int, method: str, folder: Path) -> float:
    """Pre-train; returns the seconds that it took."""
    script, options = METHODS[method]
    began = time.perf_counter()
    demo.call(seed, script, folder / "pretrain", *options, "--epochs", 1 if args.short else 20, quiet=True)
    return time.perf_counter() - began


def evaluate(args: argparse.Namespace, seed: int, folder: Path, checkpoint: Path | None = None) -> dict[str, float]:
    """Top-1, in [0, 1], of each evaluation of a checkpoint, or of a random encoder."""
    source = ["--pretrained", checkpoint.resolve()] if checkpoint else []

    def call(script: str, *options: object) -> dict[str, float]:
        return demo.call(seed, script, folder / Path(script).stem, *options, *source, quiet=True)

    return {
        "knn": call("main_knn.py", "--k", 20)["knn_20"],
        "linear": call("main_lincls.py", *demo.LINEAR, "--epochs", 1 if args.short else 12)["acc1"],
        "semisup": call("main_semisup.py", *FINE_TUNING, "--epochs", 1 if args.short else 6)["acc1"],
    }


def show(medians: dict[str, dict[str, float]], found: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> None:
    """Print random -> trained for each evaluation, and the median over seeds of what pre-training gains."""
    title = f"photos, ResNet-18 at 32 pixels, {1 if args.short else 20} epochs, median of seeds {args.seeds}"
    print(f"\n{title}: random encoder -> pre-trained (gain)")
    print(f"{'':10}{'k-NN':>24}{'linear':>24}{'10 % of the labels':>24}{'seconds':>10}")
    for method, figures in medians.items():
        cells = []
        for name, random in RANDOM.items():
            pairs = zip(found[method][name], found[method][random], strict=True)
            gain = statistics.median(mine - base for mine, base in pairs)
            cells.append(f"{figures[random]:.3f} -> {figures[name]:.3f} ({gain:+.3f})")
        print(f"{method:10}" + "".join(f"{cell:>24}" for cell in cells) + f"{figures['seconds']:>10.0f}")


if __name__ == "__main__":
    main()
