"""A pre-training run as its folder tells it: the options, the columns of the log, the evaluations that were made of it."""

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco.engine import checkpoint
from moco.errors import InputError
from moco.files import Unreadable, read_yaml, unreadable
from moco.report import results

Column = tuple[np.ndarray, np.ndarray]  # steps and values, [N] each, by step


@dataclass(frozen=True)
class Log:
    """log.jsonl by columns.

    `columns` lacks nothing but what is no number; values may be infinite or NaN. `steps_per_epoch` is None where the log does
    not tell, `seconds` is the time of all starts of the run together, and `damaged` counts the lines that cannot be read.
    """

    columns: dict[str, Column]
    steps_per_epoch: float | None
    last_step: float | None
    seconds: float
    damaged: int


@dataclass(frozen=True)
class Run:
    """A run folder, what the page calls it, its options and its log."""

    folder: Path
    name: str
    args: dict
    log: Log

    def checkpoints(self) -> list[Path]:
        """The furthest first."""
        return checkpoint.found(self.folder)


def read(folders: list[Path]) -> list[Run]:
    """The runs in `folders`, each once. Raises InputError for a folder that is not one of a pre-training run."""
    unique = list({folder.resolve(): folder for folder in folders}.values())
    read_args = [_args(folder) for folder in unique]
    return [
        Run(folder, name, args, read_log(folder / "log.jsonl"))
        for folder, name, args in zip(unique, _names(unique), read_args, strict=True)
    ]


def _args(folder: Path) -> dict:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; give run folders, which hold args.yaml and log.jsonl"
        )
    absent = [name for name in ("args.yaml", "log.jsonl") if not (folder / name).is_file()]
    if absent:
        raise InputError(
            f"{folder}: holds no {' and no '.join(absent)}; give the folder that a pre-training script wrote"
        )
    try:
        args = read_yaml(folder / "args.yaml")
    except Unreadable as error:
        raise error.at(folder / "args.yaml") from None
    except InputError as error:
        raise InputError(
            f"{folder / 'args.yaml'}: {error}; give the folder that a pre-training script wrote"
        ) from None
    if args.get("script") in ("lincls", "semisup", "knn", "voc07"):
        raise InputError(
            f"{folder}: is of an evaluation (main_{args['script']}.py); give the folder of a pre-training"
        )
    return args


def _names(folders: list[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next(n for n in range(1, 1000) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def read_log(path: Path) -> Log:
    """Read log.jsonl; what a killed process left of a line is skipped. Raises InputError where the file cannot be read."""
    steps, values = defaultdict(lambda: array("d")), defaultdict(lambda: array("d"))
    damaged = 0
    try:
        with path.open("rb") as file:
            for line in file:
                entry = _entry(line)
                if entry is None:
                    damaged += bool(line.strip())
                    continue
                for name, value in entry.items():
                    steps[name].append(entry["step"])
                    values[name].append(value)
    except OSError as error:
        raise unreadable(error).at(path) from None
    times = np.array(values.pop("time", []))
    columns = {}
    for name in values:
        order = np.array(steps[name]).argsort(kind="stable")
        columns[name] = np.array(steps[name])[order], np.array(values[name])[order]
    ends = (
        times[np.append(np.diff(times) < 0, True)] if len(times) else times
    )  # each start counts from 0
    epochs, last_step = columns.pop("epoch", None), columns.pop("step", ([], [None]))[1][-1]
    return Log(
        columns, _steps_per_epoch(epochs, columns.get("knn")), last_step, float(ends.sum()), damaged
    )


def _entry(line: bytes) -> dict[str, float] | None:
    """The numbers of one line, `epoch` and `step` among them; None where it is not a log line."""
    try:
        found = json.loads(line)
        # null is a number that is not finite
        numbers = {n: math.nan if v is None else v for n, v in found.items()}
        kept = {
            n: float(v)
            for n, v in numbers.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return (
        kept
        if math.isfinite(kept.get("epoch", math.nan)) and math.isfinite(kept.get("step", math.nan))
        else None
    )


def _steps_per_epoch(epochs: Column | None, knn: Column | None) -> float | None:
    """From the last line of an epoch, which is that of its last step: k-NN's, or one before another epoch's first line."""
    if epochs is None:
        return None
    step, epoch = epochs
    whole = (epoch >= 0) & ((epoch < epoch.max()) | np.isin(step, [] if knn is None else knn[0]))
    if not whole.any():
        return None
    last = np.flatnonzero(whole)[-1]
    return step[last] / (epoch[last] + 1) if step[last] > 0 else None


def evaluations(run: Run) -> tuple[list[results.Run], list[str]]:
    """The figures in results.json files below the run folder or beside it, and a line for each file that cannot be read.

    What lies beside counts where it is of a checkpoint of this run; a random encoder's has no checkpoint.
    """
    found, trouble = [], []
    beside = {
        *run.folder.resolve().parent.glob("*/results.json"),
        *run.folder.resolve().parent.glob("*/*/results.json"),
    }
    below = set(run.folder.resolve().rglob("results.json"))
    for file in sorted(beside | below):
        try:
            figures = list(results.read(file))
            of = [figure for figure in figures if file in below or _is_of(figure, run)]
        except (
            InputError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
        ) as error:  # any JSON may be there
            trouble.append(
                str(error)
                if isinstance(error, InputError)
                else f"{file}: not as an evaluation script writes it"
            )
        else:
            found += of
    return found, trouble


def _is_of(figure: results.Run, run: Run) -> bool:
    if figure.encoder.checkpoint is None:
        return figure.encoder.arch == run.args.get("arch")
    folder = Path(figure.encoder.checkpoint).parent
    # both may have been moved since, together
    return (
        folder.resolve() == run.folder.resolve()
        or folder.parts[-2:] == run.folder.resolve().parts[-2:]
    )


def by_checkpoint(
    figures: list[results.Run],
) -> Iterator[tuple[str, dict[tuple[str, str], results.Best]]]:
    """The best of each column for each checkpoint, by its file name; the random encoder's is empty."""
    groups = defaultdict(lambda: defaultdict(list))
    for figure in figures:
        groups[Path(figure.encoder.checkpoint or "").name][figure.column].append(figure)
    for name, columns in sorted(groups.items()):
        yield name, {column: results.best(same) for column, same in columns.items()}
