#!/usr/bin/env python
"""Pre-train SynCo on `photos` and evaluate it, in minutes on a laptop.

The demo compares the pre-trained encoder with a randomly initialised one. It prints a table and
writes OUT/results.json and OUT/report.html. It exits with status 1 unless SynCo beats the random
encoder in both evaluations. If OUT exists, it writes to OUT-2, OUT-3, ... instead.
"""

import argparse
import sys
import time
from pathlib import Path

from moco.cli import tool
from moco.cli.run_on_photos import LINEAR, run_on_photos
from moco.files import new_folder, write_json
from moco.methods import METHODS


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--short",
        action="store_true",
        help="train for two epochs only and require no gain: a quick check that all parts run",
    )
    args = parser.parse_args()
    from moco.engine.log import format_duration
    from moco.report import page

    epochs, probe_epochs = (2, 2) if args.short else (20, 12)

    began = time.perf_counter()
    given, args.out = args.out, new_folder(args.out)
    if args.out != given:
        print(f"{given} exists; this demo writes to {args.out}")
    run = args.out / "pretrain"
    minutes = "1 or 2 minutes" if args.short else "2 to 5 minutes"
    print(
        f"this takes {minutes} on two idle cores, and several times as long on busy ones; "
        f"files are written to {args.out}"
    )

    def part(number: int, what: str) -> None:
        so_far = f" ({format_duration(time.perf_counter() - began)} so far)" * (number > 1)
        print(f"\n{number} of 5{so_far}: {what}", flush=True)

    part(
        1,
        f"pre-train an encoder with SynCo, without labels, for {epochs} epochs; this is the "
        "longest part, and each line ends with the time left",
    )
    run_on_photos(
        args.seed, "main_synco", run, *METHODS["synco"].photos.split(), "--epochs", epochs
    )
    encoder = ["--pretrained", next(run.glob("checkpoint_*.pth.tar"))]
    results = {}
    for i, (prefix, source) in enumerate((("random_", []), ("", encoder))):
        encoder_name = "the pre-trained encoder" if source else "a random encoder, to compare with"
        part(
            2 * i + 2,
            f"classify val images by their nearest neighbours in train, with {encoder_name}",
        )
        knn = run_on_photos(args.seed, "main_knn", args.out / f"{prefix}knn", "--k", 20, *source)
        part(
            2 * i + 3,
            f"train a linear classifier on the frozen features of {encoder_name}, for "
            f"{probe_epochs} epochs",
        )
        linear = run_on_photos(
            args.seed,
            "main_lincls",
            args.out / f"{prefix}linear",
            *LINEAR,
            "--epochs",
            probe_epochs,
            *source,
        )
        results |= {f"{prefix}knn": knn["knn_20"], f"{prefix}linear": linear["acc1"]}
    results |= {"seed": args.seed, "seconds": round(time.perf_counter() - began, 1)}
    write_json(args.out / "results.json", results)
    print("\nwrite the report", flush=True)
    page.write([run], args.out / "report.html")
    return show(results, args)


def show(results: dict[str, float], args: argparse.Namespace) -> int:
    """Print the table; return the exit status."""
    print(
        f"\nphotos, ResNet-18 at 32 pixels, seed {args.seed}: top-1 on val, "
        f"{results['seconds']:.0f} seconds in all"
    )
    print(f"{'':12}{'random init':>12}{'SynCo':>12}{'gain':>12}")
    gains = []
    for name in ("knn", "linear"):
        random, ours = results[f"random_{name}"], results[name]
        gains.append(ours - random)
        print(f"{name:12}{random:12.3f}{ours:12.3f}{ours - random:+12.3f}")
    print(f"{args.out / 'results.json'}  {args.out / 'report.html'}")
    if args.short:
        return 0
    passed = min(gains) > 0
    print(
        "SynCo beats the random encoder"
        if passed
        else "FAILED: SynCo does not beat the random encoder"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(tool.attempt("demo.py", main))
