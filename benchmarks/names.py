#!/usr/bin/env python
"""Measure time and memory of a list of millions of images, next to a Python list of names.

Each measurement runs in its own process. "start" checks the list, reads it, shuffles the images and
takes the paths of the first batch. "resume" does the same from the middle of epoch 1; a run that
resumes checks its list again. "MiB of a worker" is the memory that a loader process does not share.
"python list" reads all names as Python objects, and is measured on fewer names.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch

from moco.data import file_lists
from moco.data.loader import TrainBatchSampler
from moco.files import to_json

BATCH = 256  # images
READ = 100_000  # names that a loader process reads
TARGETS = {"seconds": measure.Target(10), "GiB": measure.Target(2)}


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument(
        "--names", type=measure.at_least(BATCH), default=10_000_000, help="names in the list"
    )
    parser.add_argument(
        "--compared",
        type=measure.at_least(0),
        default=1_000_000,
        help="names next to the Python list; 0: none",
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if 0 < args.compared < BATCH:
        parser.error(f"--compared {args.compared}: give 0, or {BATCH} or more")
    if args.one:
        kind, moment, file = args.one
        print(to_json(measured(kind, moment, Path(file))))
        return
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for n, kinds in ((args.compared, ("python list", "ours")), (args.names, ("ours",))):
            if not n:
                continue
            file = Path(folder) / "list.txt"
            write(file, n)
            cases = [(kind, moment) for kind in kinds for moment in ("start", "resume")]
            runs = [
                {case: in_new_process(*case, file) for case in cases} for _ in range(args.rounds)
            ]
            for kind, moment in cases:
                found = [run[kind, moment] for run in runs]
                row = {"names": f"{n:,}", "kind": kind, "moment": moment}
                for key in found[0]:
                    row[key] = statistics.median(one[key] for one in found)
                table.append(row)
    ours = [row for row in table if row["names"] == f"{args.names:,}" and row["kind"] == "ours"]
    figures = {key: max(row[key] for row in ours) for key in TARGETS}
    facts = {"MB": round(size(args.names) / 1e6), "rounds": args.rounds}
    measure.report("names", table, figures, facts, args.json, TARGETS)


def line(i: int) -> bytes:
    """Return line `i` of the list. Names that follow each other are in different folders."""
    return b"shard%04d/class%05d/image_%016d.jpg\n" % (i % 1000, i % 20000, i)


def size(n: int) -> int:
    """Return the size of a list of `n` names in bytes."""
    return n * len(line(0))


def write(file: Path, n: int) -> None:
    """Write a list of `n` names, and the images that the check of a list looks up."""
    with open(file, "wb") as out:
        for first in range(0, n, 100_000):
            out.write(b"".join(map(line, range(first, min(n, first + 100_000)))))
    for i in np.linspace(0, n - 1, file_lists.CHECKED).astype(int):
        image = file.parent / os.fsdecode(line(int(i)).strip())
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()


def in_new_process(kind: str, moment: str, file: Path) -> dict[str, float]:
    """Measure in a new process; see `measured`."""
    command = [sys.executable, __file__, "--one", kind, moment, file]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def measured(kind: str, moment: str, file: Path) -> dict[str, float]:
    """Return the seconds of each part, and the memory of this process and of a loader process."""
    imported = peak()
    marks = [time.perf_counter()]
    count, name = (ours if kind == "ours" else python_list)(file)
    marks.append(time.perf_counter())
    epoch = count // BATCH  # steps
    start = 0 if moment == "start" else epoch + epoch // 2
    batches = iter(TrainBatchSampler(count, BATCH, 1, 0, start, 2 * epoch))
    first = next(batches)
    marks.append(time.perf_counter())
    for _, i in first:
        os.path.join(file.parent, name(i))
    marks.append(time.perf_counter())
    listed, shuffled, named = np.diff(marks)
    return {
        "list s": listed,
        "shuffle s": shuffled,
        "first batch ms": 1e3 * named,
        "seconds": marks[-1] - marks[0],
        "GiB": peak(),
        "GiB of imports": imported,
        "MiB of a worker": worker(count, name),
    }


def peak() -> float:
    """Return the peak of this process's resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(file: Path) -> tuple[int, Callable[[int], str]]:
    """Check and read the list as training does. Return the number of names, and how to get one."""
    file_lists.check(str(file), file.parent)
    images = file_lists.read(str(file), file.parent)
    return len(images), images.name


def python_list(file: Path) -> tuple[int, Callable[[int], str]]:
    """Check and read the list twice as Python objects, and return it as one array of bytes."""
    for _ in range(2):
        lines = file.read_bytes().splitlines()
        assert all(name.lower().endswith(b".jpg") for name in lines)
        assert len(set(lines)) == len(lines)
        paths = np.array(lines)
    return len(paths), lambda i: os.fsdecode(paths[i])


def worker(count: int, name: Callable[[int], str]) -> float:
    """Return the MiB that a forked process holds alone after it has read `READ` names."""

    def read(answer) -> None:
        for i in torch.randint(count, (READ,)).tolist():
            name(i)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        answer.send(sum(int(x.split()[1]) for x in lines if x.startswith("Private_")) / 1024)

    forked = multiprocessing.get_context("fork")
    ours, theirs = forked.Pipe()
    process = forked.Process(target=read, args=(theirs,))
    process.start()
    found = ours.recv()
    process.join()
    return found


if __name__ == "__main__":
    measure.main(main)
