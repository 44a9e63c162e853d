#!/usr/bin/env python
"""Measure the start of programs: --help, a refused option, the first step, and listing a folder.

The first rounds, which read the packages from the disk, do not count. The first
step is that of ResNet-18 on `photos` at 64 pixels, in one process with the default number of loader
processes. Listing is compared with torchvision's ImageFolder.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import measure
import torch
from torchvision.datasets import ImageFolder

from moco.data import sources

CPU = torch.device("cpu")
PROGRAMS = [
    path.relative_to(measure.ROOT)
    for pattern in ("main_*.py", "tools/*.py")
    for path in sorted(measure.ROOT.glob(pattern))
    if path.name != "__init__.py"
]
FIRST_STEP = "photos -a resnet18 --image-size 64 --batch-size 64 --epochs 1".split()
TARGETS = {
    "slowest_help_s": measure.Target(0.4),
    "refused_s": measure.Target(0.4),
    "first_step_s": measure.Target(5),
    "torchvision_over_ours": measure.Target(1, least=True),
}


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--files", type=measure.at_least(1), default=100_000)
    parser.add_argument("--classes", type=measure.at_least(1), default=1000)
    args = parser.parse_args()
    if args.files < args.classes:
        parser.error(f"--files {args.files}: each of --classes {args.classes} needs a file")
    helps = {f"{path} --help": python(str(path), "--help") for path in PROGRAMS}
    refused = "main_synco.py --batch-size many"
    others = {
        refused: python(*refused.split(), status=2),
        "import moco": python("-c", "import moco"),
        "import torch": python("-c", "import torch"),
        "the first step": first_step,
    }
    times = measure.side_by_side(helps | others, args.rounds, CPU)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root / "train", args.files, args.classes)

        def ours() -> None:
            assert len(sources.scan(root, "train")) == args.files

        def torchvision() -> None:
            assert len(ImageFolder(str(root / "train"))) == args.files

        listing = measure.side_by_side(
            {"list: ours": ours, "list: torchvision": torchvision}, args.rounds, CPU
        )
    medians = measure.medians(times | listing)
    table = [{"start": name, "ms": 1e3 * value} for name, value in medians.items()]
    figures = {
        "slowest_help_s": max(medians[name] for name in helps),
        "refused_s": medians[refused],
        "import_torch_s": medians["import torch"],
        "first_step_s": medians["the first step"],
        "first_step_over_import_torch": measure.ratio(
            times["the first step"], times["import torch"]
        ),
        "torchvision_over_ours": measure.ratio(listing["list: torchvision"], listing["list: ours"]),
    }
    facts = {"files": args.files, "classes": args.classes}
    measure.report("startup", table, figures, facts, args.json, TARGETS)


def python(*words: str, status: int = 0) -> Callable[[], None]:
    """Return a function that runs Python in a new process, which must end with `status`."""

    def run() -> None:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
        assert done.returncode == status, done

    return run


def first_step() -> float:
    """Return the seconds from the command to the line of the log after the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main_synco.py", *FIRST_STEP, "--save-dir", f"{folder}/run"]
        began = perf_counter()
        with subprocess.Popen(
            command, cwd=measure.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("first step took"):
                    seconds = perf_counter() - began
                    break
            else:
                raise RuntimeError(f"no first step: {''.join(lines)}")
            process.terminate()
            process.stdout.read()  # until it has saved and ended
        return seconds


def make(root: Path, files: int, classes: int) -> None:
    """Write empty files; listing reads only their names."""
    for i in range(files):
        folder = root / f"class{i % classes:05d}"
        if i < classes:
            folder.mkdir(parents=True)
        (folder / f"image_{i:08d}.jpg").touch()


if __name__ == "__main__":
    measure.main(main)
