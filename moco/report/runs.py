"""Read the folder of a pre-training run: its options, its log and its evaluations."""

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
from moco.files import UnreadableError, read_yaml, unreadable
from moco.report import results

Column = tuple[np.ndarray, np.ndarray]  # steps in ascending order and values, [N] each


@dataclass(frozen=True)
class Log:
    """The content of a log.jsonl.

    Attributes:
        columns: each metric whose values are numbers, by name. Values may be infinite or NaN.
        steps_per_epoch: steps in an epoch; None if the log does not show it.
        last_step: the last step logged; None if the log is empty.
        seconds: total time, over all starts of the run.
        damaged: number of lines that cannot be read.
    """

    columns: dict[str, Column]
    steps_per_epoch: float | None
    last_step: float | None
    seconds: float
    damaged: int


@dataclass(frozen=True)
class Run:
    """A pre-training run: its folder, its name on the page, its options and its log."""

    folder: Path
    name: str
    args: dict
    log: Log

    def checkpoints(self) -> list[Path]:
        """Return the run's checkpoints, the latest first."""
        return checkpoint.list_checkpoints(self.folder)


def read(folders: list[Path]) -> list[Run]:
    """Return the runs in `folders`, without duplicates.

    Raises InputError if a folder is not that of a pre-training run.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    read_args = [_args(folder) for folder in unique]
    return [
        Run(folder, name, args, read_log(folder / "log.jsonl"))
        for folder, name, args in zip(unique, unique_names(unique), read_args, strict=True)
    ]


def _args(folder: Path) -> dict:
    """Return the options of a run. Raises InputError if it is not a pre-training."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; give run folders, which hold args.yaml and log.jsonl"
        )
    absent = [name for name in ("args.yaml", "log.jsonl") if not (folder / name).is_file()]
    if absent:
        raise InputError(
            f"{folder}: holds no {' and no '.join(absent)}; "
            "give the folder that a pre-training script wrote"
        )
    try:
        args = read_yaml(folder / "args.yaml")
    except UnreadableError as error:
        raise error.at(folder / "args.yaml") from None
    except InputError as error:
        raise InputError(
            f"{folder / 'args.yaml'}: {error}; give the folder that a pre-training script wrote"
        ) from None
    if args.get("script") in ("lincls", "semisup", "knn", "voc07"):
        raise InputError(
            f"{folder}: is the folder of an evaluation (main_{args['script']}.py); "
            "give the folder of a pre-training"
        )
    return args


def unique_names(folders: list[Path]) -> list[str]:
    """Return the end of each path, long enough to be unique."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next(n for n in range(1, 1000) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def read_log(path: Path) -> Log:
    """Return the content of a log.jsonl. Skips damaged lines, which killed processes leave.

    Raises InputError if the file cannot be read.
    """
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
    # each start counts its time from 0
    ends = times[np.append(np.diff(times) < 0, True)] if len(times) else times
    epochs, last_step = columns.pop("epoch", None), columns.pop("step", ([], [None]))[1][-1]
    return Log(
        columns, _steps_per_epoch(epochs, columns.get("knn")), last_step, float(ends.sum()), damaged
    )


def _entry(line: bytes) -> dict[str, float] | None:
    """Return the numbers of one line, including `epoch` and `step`; None if it is damaged."""
    try:
        found = json.loads(line)
        # null stands for NaN and infinity, which JSON cannot hold
        numbers = {n: math.nan if v is None else v for n, v in found.items()}
        kept = {
            n: float(v)
            for n, v in numbers.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    position = (kept.get("epoch", math.nan), kept.get("step", math.nan))
    return kept if all(map(math.isfinite, position)) else None


def _steps_per_epoch(epochs: Column | None, knn: Column | None) -> float | None:
    """Return the steps in an epoch; None if the log has no line of an epoch's last step.

    Such a line is the k-NN monitor's, or the last line before the next epoch.
    """
    if epochs is None:
        return None
    step, epoch = epochs
    complete = (epoch >= 0) & ((epoch < epoch.max()) | np.isin(step, [] if knn is None else knn[0]))
    if not complete.any():
        return None
    last = np.flatnonzero(complete)[-1]
    return step[last] / (epoch[last] + 1) if step[last] > 0 else None


def evaluations(run: Run) -> tuple[list[results.Result], list[str]]:
    """Return the metrics of the run's evaluations, and an error line for each unreadable file.

    Reads the results.json files in the run folder and next to it. Those next to it count if they
    evaluate a checkpoint of this run, or a random encoder with the same architecture.
    """
    found, trouble = [], []
    next_to = {
        *run.folder.resolve().parent.glob("*/results.json"),
        *run.folder.resolve().parent.glob("*/*/results.json"),
    }
    below = set(run.folder.resolve().rglob("results.json"))
    for file in sorted(next_to | below):
        try:
            figures = list(results.read(file))
            of = [figure for figure in figures if file in below or _is_of(figure, run)]
        except InputError as error:
            trouble.append(str(error))
        # the file may hold any JSON
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            trouble.append(f"{file}: was not written by an evaluation script")
        else:
            found += of
    return found, trouble


def _is_of(figure: results.Result, run: Run) -> bool:
    """Return whether an evaluation is of a checkpoint of `run`, or of its random encoder."""
    if figure.encoder.checkpoint is None:
        return figure.encoder.arch == run.args.get("arch")
    folder = Path(figure.encoder.checkpoint).parent
    # both folders may have been moved together
    return (
        folder.resolve() == run.folder.resolve()
        or folder.parts[-2:] == run.folder.resolve().parts[-2:]
    )


def by_checkpoint(
    figures: list[results.Result],
) -> Iterator[tuple[str, dict[tuple[str, str], results.Best]]]:
    """Yield the file name of each checkpoint, and the best setting of each of its columns.

    The file name of a random encoder is empty.
    """
    groups = defaultdict(lambda: defaultdict(list))
    for figure in figures:
        groups[Path(figure.encoder.checkpoint or "").name][figure.column].append(figure)
    for name, columns in sorted(groups.items()):
        yield name, {column: results.best(same) for column, same in columns.items()}
