"""Measure candidates side by side.

The candidates take turns. The figures are medians of times and ratios over the rounds. They are
printed as a table and written to a JSON file.
"""

import argparse
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco import devices
from moco.cli import actions, tool, values
from moco.encoder import networks
from moco.errors import InputError
from moco.files import numbered_paths, write_json
from moco.options import PIXELS

ROOT = Path(__file__).resolve().parent.parent

Times = dict[str, list[float]]
# A candidate may measure its own time and return it as a float, in seconds.
Candidates = dict[str, Callable[[], object]]


def main(work: Callable[[], int | None]) -> None:
    """Run a benchmark and exit. A user's mistake ends with one line and status 2."""
    sys.exit(tool.attempt(Path(sys.argv[0]).name, work))


def parser(description: str) -> tool.OneLineParser:
    """Return a parser with the options of benchmarks that measure in rounds."""
    p = bare_parser(description)
    p.add_argument(
        "--rounds",
        type=at_least(1),
        default=15,
        help="number of rounds; every candidate runs once in each",
    )
    add_json(p)
    return p


def bare_parser(description: str) -> tool.OneLineParser:
    """Return a parser that shows defaults. Its errors are one line."""
    return tool.OneLineParser(description=description, formatter_class=actions.Help)


def at_least(least: int) -> Callable[[str], int]:
    """Return a `type` of argparse for integers from `least` on."""
    return values.in_range(int, f"[{least}, 2147483647]")


pixels = values.in_range(int, PIXELS)
above_0 = values.in_range(float, "(0, 1e9]")


def arch(text: str) -> str:
    """Return the full name of an architecture. Raises argparse's error if it is unknown."""
    try:
        return networks.canonical(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_device(p: argparse.ArgumentParser) -> None:
    """Add the option --device, a device that this machine has."""
    p.add_argument("--device", type=_device, default=devices.resolve_type("auto"))


def _device(text: str) -> str:
    if text not in devices.TYPES:
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(devices.TYPES)}")
    try:
        return devices.resolve_type(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_json(p: argparse.ArgumentParser) -> None:
    """Add the option --json, the file for the results."""
    p.add_argument(
        "--json",
        type=_new_file,
        metavar="FILE",
        help="file for the results (default: runs/benchmarks/NAME.json, or NAME-2.json, ...)",
    )


def _new_file(text: str) -> Path:
    if os.path.lexists(text):
        raise argparse.ArgumentTypeError(f"{text} exists; choose another file")
    return Path(text)


def write(name: str, file: Path | None, results: object) -> Path:
    """Write results as JSON to `file`, or to the first free default name; return the path."""
    default = ROOT / "runs" / "benchmarks" / f"{name}.json"
    path = file or next(path for path in numbered_paths(default) if not path.exists())
    write_json(path, results)
    return path


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def side_by_side(candidates: Candidates, rounds: int, device: torch.device, warm: int = 2) -> Times:
    """Return the seconds of each candidate in each round.

    The candidates take turns, so that slow phases of the machine affect all of them. Each round has
    another order, because a candidate leaves data in the caches for the next one.
    """
    times: Times = {name: [] for name in candidates}
    order = random.Random(0)  # the same in all processes
    for i in range(warm + rounds):
        for name, run in order.sample(list(candidates.items()), len(candidates)):
            began = time.perf_counter()
            own = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= warm:
                times[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return times


def medians(times: Times) -> dict[str, float]:
    """Return the median seconds of each candidate."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median over rounds of above / below.

    Ratios are computed within a round, because its times are measured one right after the other.
    """
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def extra(more: list[float], base: list[float]) -> float:
    """Return the median over rounds of more - base, in seconds."""
    return statistics.median(a - b for a, b in zip(more, base, strict=True))


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the bytes that `run` allocates, as counted by PyTorch's allocators."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    held = peak = 0
    for event in sorted(
        profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()
    ):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Target:
    """The limit of a figure: at most `limit`, or at least `limit` if `least`."""

    limit: float
    least: bool = False

    def __str__(self) -> str:
        """Return the target as it is printed, such as "<= 1.35"."""
        return f"{'>=' if self.least else '<='} {self.limit:g}"

    def is_met(self, value: float) -> bool:
        """Return whether `value` is within the limit."""
        return value >= self.limit if self.least else value <= self.limit


def report(
    name: str,
    table: list[dict[str, object]],
    ratios: dict[str, float],
    facts: dict[str, object],
    file: Path | None,
    targets: dict[str, Target] | None = None,
) -> None:
    """Print the rows and the ratios; write them, with versions and settings, to a JSON file.

    Args:
        name: name of the benchmark, and of the file by default.
        table: the rows; all have the same keys.
        ratios: figures by name.
        facts: settings of the measurement.
        file: the JSON file; None: the first free default name.
        targets: the targets of some of `ratios`, by name. Each is printed next to its figure.
    """
    targets = targets or {}
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), **facts}
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    columns = list(table[0])
    rows = [
        [value if isinstance(value, str) else f"{value:.4g}" for value in row.values()]
        for row in table
    ]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    for key, value in ratios.items():
        verdict = ""
        if target := targets.get(key):
            verdict = f"  (target {target}: {'met' if target.is_met(value) else 'missed'})"
        print(f"{key} {value:.3g}{verdict}")
    wanted = {key: asdict(target) for key, target in targets.items()}
    results = {"benchmark": name, **facts, **ratios, "rows": table}
    print(write(name, file, {**results, "figures": list(ratios), "targets": wanted}))
