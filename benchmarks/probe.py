#!/usr/bin/env python
"""Time the linear probe with five learning rates in one pass, next to one learning rate.

The script fails if a head's accuracy differs from that of a run with its learning rate alone.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import torch

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", default="photos")
    parser.add_argument("--arch", type=measure.arch, default="resnet18")
    parser.add_argument("--size", type=measure.pixels, default=64, help="image size in pixels")
    parser.add_argument("--epochs", type=measure.at_least(1), default=1)
    parser.set_defaults(rounds=len(RATES))  # one for each learning rate
    args = parser.parse_args()
    if args.data != "photos" and not Path(args.data).is_dir():
        parser.error(f"--data {args.data}: no such folder; give one, or the word photos")
    alone: dict[float, float] = {}  # top-1 of each lr so far
    rates = itertools.cycle(RATES)

    def one() -> float:
        lr = next(rates)
        metrics, seconds = probe(args, lr)
        alone[lr] = metrics["acc1"]
        return seconds

    def five() -> float:
        metrics, seconds = probe(args, *RATES)
        for lr, top1 in alone.items():
            assert metrics[f"acc1_lr{lr:g}"] == top1, (
                f"the head with lr {lr:g} differs from the head of a run with only this lr"
            )
        return seconds

    times = measure.side_by_side(
        {"one rate": one, "five rates": five}, args.rounds, torch.device("cpu"), warm=0
    )
    table = [{"probe": name, "s": value} for name, value in measure.medians(times).items()]
    ratios = {"five_over_one": measure.ratio(times["five rates"], times["one rate"])}
    facts = {"data": args.data, "arch": args.arch, "pixels": args.size, "epochs": args.epochs}
    measure.report("probe", table, ratios, facts, args.json)


def probe(args, *rates: float) -> tuple[dict[str, float], float]:
    """Return the metrics of a run of main_lincls.py, and the seconds of training and testing."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable,
            "main_lincls.py",
            args.data,
            "-a",
            args.arch,
            "--image-size",
            args.size,
            "-b",
            32,
            "-j",
            1,
        ]
        command += ["--epochs", args.epochs, "--save-dir", run, "--lr", *rates]
        subprocess.run(
            [str(word) for word in command], cwd=measure.ROOT, check=True, stdout=subprocess.DEVNULL
        )
        metrics = json.loads((run / "results.json").read_text())["metrics"]
        last = (run / "log.jsonl").read_text().splitlines()[-1]
    return metrics, json.loads(last)["time"]


if __name__ == "__main__":
    measure.main(main)
