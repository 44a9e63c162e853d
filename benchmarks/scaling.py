#!/usr/bin/env python
"""Predict step time, memory and communication on 8, 64 and 512 GPUs, for each method.

The bytes of all collectives follow from formulas. `--check` compares them with those of real
processes, and fails if they differ by more than 1 %. The speeds of networks and disks are
assumptions; options change them. Results are added to a JSON file, from which `--write` makes the
tables and the plot of docs/scaling.md.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import measure
import scaling_check
import scaling_page
import scaling_shards
import torch
from scaling_counts import TABLE
from scaling_predict import ASSUMPTIONS, Cluster, averages, measured, predict, queue

from moco.cli import values
from moco.files import write_json

RESULTS = measure.ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = measure.ROOT / "docs" / "scaling.md"
GPUS = (1, 8, 64, 512)
BATCHES = (256, 32)
QUEUE = 2**20  # entries of the large queue
AVERAGES = 100_000_000  # images of the large data set
COUNT, LATENCY = "[1, 1000000]", "[0, 1e9]"
# ranges of assumptions other than (0, 1e9]
RANGES = {"--node": COUNT, "--adapters": COUNT, "--efficiency": "(0, 1]"}
RANGES |= dict.fromkeys(("--start", "--hop", "--hop-out"), LATENCY)


def main() -> int:
    """Run the parts that the options name; return the exit status."""
    p = parser()
    options = p.parse_args()
    if not (options.predict or options.check or options.shards or options.write):
        p.error("nothing to do; give --predict, --check, --shards or --write")
    file = options.json or RESULTS
    found = json.loads(file.read_text()) if file.exists() else {}
    status = 0
    if options.check:
        status = check(options, found, file)
    if options.shards:
        status |= shards(options, found, file)
    if options.predict:
        status |= predictions(options, found)
        write_json(file, found)
        print(file)
    if options.write:
        scaling_page.write(PAGE, found)
        print(PAGE)
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    p = measure.bare_parser(__doc__)
    p.add_argument("--predict", action="store_true", help="predict with the assumptions below")
    p.add_argument(
        "--check",
        action="store_true",
        help="compare the counted bytes with those of real processes",
    )
    p.add_argument(
        "--shards",
        action="store_true",
        help="compare sharded with replicated queues and moving averages",
    )
    p.add_argument(
        "--write",
        action="store_true",
        help="write tables and plot of docs/scaling.md from the results",
    )
    p.add_argument(
        "--ranks",
        type=measure.at_least(2),
        nargs="+",
        default=[2, 4, 8],
        help="numbers of processes for --check and --shards",
    )
    p.add_argument(
        "--methods", nargs="+", choices=TABLE, default=list(TABLE), help="methods for --check"
    )
    p.add_argument(
        "--json", type=Path, help="file of the results (default: benchmarks/results/scaling.json)"
    )
    group = p.add_argument_group("assumptions")
    for field in fields(Cluster):
        name = f"--{field.name.replace('_', '-')}"
        number = values.in_range(type(field.default), RANGES.get(name, "(0, 1e9]"))
        group.add_argument(name, type=number, default=field.default, help=ASSUMPTIONS[name])
    return p


def check(options: argparse.Namespace, found: dict, file: Path) -> int:
    """Compare formulas and processes; return 1 if they differ by more than the limit, else 0."""
    loopback = scaling_check.in_namespace(sys.argv)
    if not loopback:
        print("this system allows no network namespace: the bytes on the wire are not measured")
    found["torch"] = torch.__version__
    checks = {(one["method"], one["ranks"]): one for one in found.get("checks", [])}
    for ranks in options.ranks:
        if loopback:
            found.setdefault("factors", {})[str(ranks)] = scaling_check.factors(ranks)
        for one in scaling_check.compare(options.methods, ranks, loopback):
            checks[one["method"], ranks] = one
            worst = scaling_check.worst([one])
            print(one["method"], f"{ranks} processes", {k: f"{v:.2%}" for k, v in worst.items()})
        found["checks"] = list(checks.values())
        write_json(file, found)
    worst = scaling_check.worst(found["checks"])
    print("largest differences:", {key: f"{value:.3%}" for key, value in worst.items()})
    return int(max(worst.values()) > scaling_check.LIMIT)


def shards(options: argparse.Namespace, found: dict, file: Path) -> int:
    """Compare sharded with replicated state; return 1 if results or bytes differ, else 0."""
    found["shards"], status = [], 0
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            one = scaling_shards.measure(ranks, Path(folder), 2**14, AVERAGES)
        found["shards"].append(one)
        write_json(file, found)
        print(one)
        status |= not scaling_shards.agrees(one)
    return int(status)


def predictions(options: argparse.Namespace, found: dict) -> int:
    """Predict every method at every size. Return 0."""
    values = {field.name: vars(options)[field.name] for field in fields(Cluster)}
    cluster, one = Cluster(**values), measured()
    found["cluster"], found["measured"] = asdict(cluster), asdict(one)
    found["predictions"] = [
        predict(method, batch, ranks, cluster, one)
        for method in TABLE
        for batch in BATCHES
        for ranks in GPUS
    ]
    slow = replace(cluster, adapters=1)
    found["slow_network"] = [
        predict(method, BATCHES[0], ranks, slow, one) for method in TABLE for ranks in (64, 512)
    ]
    found["queue"] = [
        queue(ranks, batch, QUEUE, 128, cluster) for batch in BATCHES for ranks in GPUS[1:]
    ]
    found["averages"] = [averages(ranks, BATCHES[0], AVERAGES, cluster) for ranks in GPUS[1:]]
    return 0


if __name__ == "__main__":
    measure.main(main)
