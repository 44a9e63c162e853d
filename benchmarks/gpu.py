#!/usr/bin/env python
"""Check and measure everything on one GPU in minutes.

The script needs this repository, its requirements and CIFAR-10, but no network.

    python benchmarks/gpu.py --minutes 9                      all stages, in order of importance
    python benchmarks/gpu.py --minutes 6 --stages 3           continue an earlier CIFAR-10 run
    python benchmarks/gpu.py --stages 1 --parts compile NCCL  single parts

Stages:
  1  correctness: a step of each method on the GPU against the CPU, mixed precision, views, memory
     format, --compile, NCCL, a killed run that resumes to the same bits, k-NN and linear probe
  2  speed: ResNet-50 at 224 pixels, end to end and with views that are already on the GPU, next to
     plain MoCo (benchmarks/step.py); loader, views, profile
  3  reproduction: configs/cifar10/moco.yaml next to the published log; a later visit continues the
     run in --run-folder
  4  the other configs in configs/cifar10/ with a ResNet-18, several seeds; the runs take turns

One call of this script is a visit. The results are in runs/benchmarks/gpu-DEVICE.json, which is
rewritten after each part and keeps the results of earlier visits. Each part has a time limit and
runs in a process that can be killed. Parts for which --minutes leaves no time are reported as not
run. The table is printed last, also after Ctrl-C. The exit status is 1 if a check of this visit
failed, 2 if an option is wrong, and 130 after Ctrl-C.

On a CPU, everything runs in tiny sizes. This tests the script; the figures mean nothing.
"""

import argparse
import math
import sys
import tarfile
from pathlib import Path

import gpu_cifar
import gpu_runs
import gpu_worker
import measure
import torch
from gpu_parts import PARTS
from gpu_setup import Failed, Setup
from gpu_table import TITLES
from gpu_visit import Visit

from moco.cli import tool


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    p = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=9.0, help="length of the visit (default: 9)")
    p.add_argument(
        "--stages", type=int, nargs="+", choices=TITLES, default=list(TITLES), help="default: all"
    )
    p.add_argument(
        "--parts", nargs="+", metavar="NAME", help="parts of stages 1 and 2 (default: all)"
    )
    p.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10: a folder with train/ and test/ or cifar-10-batches-py, or an archive",
    )
    folder = measure.ROOT / "runs" / "gpu" / "cifar10-moco"
    p.add_argument(
        "--run-folder",
        type=Path,
        default=folder,
        help="run folder of stage 3; the run folders of stage 4 are next to it",
    )
    p.add_argument(
        "--seeds",
        type=measure.at_least(0),
        nargs="+",
        help="seeds of stage 4 (default: 0 1 2; on a CPU 0)",
    )
    p.add_argument(
        "--amp",
        choices=("off", "bf16"),
        help="mixed precision of stages 3 and 4 (default: bf16 on a GPU)",
    )
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="default: runs/benchmarks/gpu-DEVICE.json"
    )
    p.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    # internal: a process with --worker runs parts and writes events to this file
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--collectives", type=Path, help=argparse.SUPPRESS)
    return p


def main() -> int:
    """Run a visit or, in a process that a visit started, its parts; return the exit status."""
    args = parser().parse_args()
    device = torch.device(args.device)
    if args.collectives:
        gpu_runs.collectives(args.collectives, device)
        return 0
    if args.worker:
        return gpu_worker.work(
            Setup(device, device.type == "cpu", args.work), args.stages[0], args.parts, args.worker
        )
    if line := mistake(args):
        print(line, file=sys.stderr)
        return 2
    return Visit(args, device).run()


def mistake(args: argparse.Namespace) -> str:
    """Return a line about the first wrong option, or "". Unpacks an archive given by --data."""
    if not 0 < args.minutes < math.inf:
        return f"--minutes {args.minutes:g}: no time for any stage; give a number above 0"
    parts = set(args.parts or ())
    if unknown := sorted(parts - {name for parts in PARTS.values() for name in parts}):
        known = ", ".join(name for parts in PARTS.values() for name in parts)
        return f"--parts {' '.join(unknown)}: no such part; choose from {known}"
    stages = " ".join(map(str, args.stages))
    if parts and not set(args.stages) & set(PARTS):
        return (
            f"--parts: stages 1 and 2 have parts, but --stages is {stages}; leave one of them out"
        )
    here = {name for stage in set(args.stages) & set(PARTS) for name in PARTS[stage]}
    if parts and not parts & here:
        of = " ".join(str(stage) for stage in PARTS if parts & set(PARTS[stage]))
        names = " ".join(args.parts)
        return f"--parts {names}: not in --stages {stages}; give --stages {of}"
    if args.data is not None:
        try:
            gpu_cifar.find(
                args.data, args.run_folder.parent, Setup(torch.device("cpu"), True, Path())
            )
        except Failed as error:
            return str(error)
        except (OSError, tarfile.TarError) as error:
            return f"--data {args.data}: cannot be read ({error}); give another folder or archive"
    return ""


if __name__ == "__main__":
    measure.main(main)
