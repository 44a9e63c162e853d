#!/usr/bin/env python
"""Pre-train all methods with one recipe, and compare accuracy, time and memory.

All methods have the same ResNet-18 at 32 pixels, views, images per step, epochs, optimizer and
schedule. benchmarks/family_methods.py has the recipe and each method's own options. By default, the
images are the built-in photographs. With --minutes, a step of each method is timed first, to choose
the number of epochs. If the benchmark is stopped, the same command continues it, without repeating
finished runs. It writes table.md, family.png and a folder for each run to --out.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import argparse
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

import family_budget
import family_table
import measure
from family_methods import NAMES, RECIPES, Entry, Recipe, chosen
from family_runs import Family, Outcome
from gpu_setup import Failed

from moco import devices
from moco.cli import tool
from moco.encoder.metadata import is_count
from moco.engine.log import format_duration
from moco.errors import InputError
from moco.files import read_json, write_json

PLAN = "plan.json"  # in the folder of --out: what all its runs have in common


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=float,
        help="time limit, from which the number of epochs is chosen (default: 20, unless --epochs "
        "is given)",
    )
    length.add_argument("--epochs", type=int, help="the number of epochs of every method")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(NAMES),
        metavar="NAME",
        help=f"methods to compare, of {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="seeds (default: 0)"
    )
    parser.add_argument(
        "--dataset",
        choices=[name for name in RECIPES if name != "photos"],
        help="data set to use instead of the built-in photographs; give its folder with --data",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument(
        "--probe", action="store_true", help="also train a linear probe on every encoder"
    )
    parser.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="mixed precision (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="loader processes (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=measure.ROOT / "runs" / "benchmarks" / "family",
        metavar="DIR",
        help="folder of the runs; a call with the folder of an earlier one continues it (default: "
        "runs/benchmarks/family)",
    )
    measure.add_json(parser)
    # a terminated benchmark stops its current run, which saves a checkpoint
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return tool.run(parser, work)


def work(args: argparse.Namespace) -> int:
    """Run all methods and write the results; return 1 if a run has failed, else 0."""
    began = time.monotonic()
    family, entries = check(args), chosen(args.methods)
    epochs = plan(args, family, entries, began)
    total, spent = len(entries) * len(args.seeds), []
    found: dict[str, list[Outcome]] = {entry.name: [] for entry in entries}
    failed = []
    for seed in args.seeds:
        for entry in entries:
            done = sum(map(len, found.values())) + len(failed) + 1
            start = time.monotonic()
            try:
                outcome = family.run(entry, seed, epochs)
            except Failed as error:
                failed.append(f"{entry.name}, seed {seed}: {error}")
                print(f"{done:3} of {total}  {failed[-1]}", flush=True)
                continue
            found[entry.name].append(outcome)
            if not outcome.before_this_call:
                spent.append(time.monotonic() - start)
            left = (total - done) * statistics.mean(spent) if spent else 0
            print(
                f"{done:3} of {total}  {entry.title}, seed {seed}: {outcome}"
                + f"  left {format_duration(left)}" * bool(spent and left),
                flush=True,
            )
    random_probe = []
    try:
        random_probe += [family.probe_random(seed) for seed in args.seeds if family.probe]
    except Failed as error:
        failed.append(f"linear probe of a random encoder: {error}")
    write(args, family, epochs, found, random_probe)
    took = time.monotonic() - began
    print(f"this call took {format_duration(took)}")
    if args.minutes and took > 60 * args.minutes:
        print(f"that is more than --minutes {args.minutes:g}: the runs were slower than expected")
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if failed else 0


def check(args: argparse.Namespace) -> Family:
    """Return the settings that all runs share. Raises InputError if options do not fit."""
    if args.minutes is None and args.epochs is None:
        args.minutes = 20.0
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        raise InputError(f"--minutes {args.minutes:g}: must be above 0")
    if args.epochs is not None and args.epochs < 1:
        raise InputError(f"--epochs {args.epochs}: must be at least 1")
    if args.data and not args.dataset:
        raise InputError("--data: name the data set in the folder with --dataset, too")
    if args.dataset and not args.data:
        raise InputError(f"--dataset {args.dataset}: give its folder with --data, too")
    if args.data and not args.data.is_dir():
        raise InputError(f"--data {args.data}: no such folder")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise InputError("--seeds: give different numbers from 0 on")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must be at least 0")
    recipe = RECIPES[args.dataset or "photos"]
    words = ["photos"]
    if args.data:
        # a folder with train/ and test/ of image files has the layout of ImageNet
        files = (args.data / "train").is_dir()
        words = [str(args.data.resolve()), *["--dataset", recipe.dataset] * (not files)]
    common = [*words, "--workers", str(args.workers), "--amp", args.amp]
    # AdCo would use all GPUs
    common += ["--gpu", "0"] * (devices.resolve_type("auto") == "cuda")
    return Family(args.out.resolve(), recipe, common, args.probe)


def plan(args: argparse.Namespace, family: Family, entries: list[Entry], began: float) -> int:
    """Return the number of epochs: that of an earlier call, of --epochs, or what --minutes allows.

    Raises InputError if the folder of --out has runs with other settings, or if the time is too
    short.
    """
    path, shared = family.out / PLAN, {"common": family.common}
    if path.exists():
        epochs, common = earlier(path)
        if common != family.common or args.epochs not in (None, epochs):
            what = f"{epochs} epoch{'s' * (epochs != 1)} on {shlex.join(common)}"
            raise InputError(f"{args.out}: its runs are of {what}; give another --out")
        print(f"{args.out}: continues with {epochs} epochs, as before")
        return epochs
    family.out.mkdir(parents=True, exist_ok=True)
    epochs, budget = args.epochs, {}
    if epochs is None:
        measured = family_budget.calibrate(family, entries)
        left = 60 * args.minutes - (time.monotonic() - began)
        epochs = measured.epochs(entries, len(args.seeds), left, args.minutes)
        budget = {"minutes": args.minutes, **measured.facts()}
    write_json(path, {**shared, "epochs": epochs, **budget})
    return epochs


def earlier(path: Path) -> tuple[int, list[str]]:
    """Return the epochs and the common options of an earlier call's plan.

    Raises InputError if the file is damaged.
    """
    try:
        plan = read_json(path)
        if is_count(plan["epochs"]) and all(isinstance(word, str) for word in plan["common"]):
            return plan["epochs"], list(plan["common"])
    except (InputError, LookupError, TypeError):
        pass
    raise InputError(f"{path}: is damaged; give another --out")


def write(
    args: argparse.Namespace,
    family: Family,
    epochs: int,
    found: dict[str, list[Outcome]],
    random_probe: list[float],
) -> None:
    """Write the table, the plot and the JSON file, and print the table."""
    rows = family_table.rows(found)
    if not rows:
        return
    facts = facts_of(args, family.recipe, epochs)
    title = family_table.title(facts)
    text = family_table.markdown(rows, random_probe)
    (family.out / "table.md").write_text(f"{title}\n\n{text}")
    family_table.plot(rows, title, family.out / "family.png")
    print(f"\n{title}\n\n{text}")
    runs = {name: [one.facts() for one in outcomes] for name, outcomes in found.items()}
    results = {"benchmark": "family", **facts, "random_probe": random_probe}
    path = measure.write("family", args.json, {**results, "rows": rows, "runs": runs})
    print(family.out / "table.md", family.out / "family.png", path, sep="  ")


def facts_of(args: argparse.Namespace, recipe: Recipe, epochs: int) -> dict[str, object]:
    """Return the settings and versions that belong to the results."""
    import torch

    device = torch.device(devices.resolve_type("auto"))
    return {
        "data": args.dataset or "photos",
        "arch": f"resnet18, stem {recipe.stem}",
        "epochs": epochs,
        "batch": recipe.batch,
        "seeds": args.seeds,
        "amp": args.amp,
        "device": devices.describe(device),
        "torch": torch.__version__,
        "options": recipe.options(epochs),
        "own options": {
            entry.name: recipe.own_options(entry, epochs) for entry in chosen(args.methods)
        },
    }


if __name__ == "__main__":
    sys.exit(main())
