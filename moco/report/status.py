"""Find runs below folders, and say how far each is, whether it still runs, and why it ended.

Only the ends of long logs are read. Damaged files make a field empty, never an error.
"""

import fcntl
import itertools
import json
import math
import mmap
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.engine import checkpoint, record, run_folder
from moco.engine.log import format_duration
from moco.errors import InputError
from moco.files import read_yaml
from moco.report import results

TAIL = 1 << 14  # bytes at the end of a log that are parsed
REACH = 1 << 22  # bytes at the end of a log in which the last k-NN accuracy is searched
SILENT = 600.0  # seconds without a log line, at least, after which a run counts as silent
_LIFE = ("log.jsonl", record.STATUS, "results.json")  # files that a live run writes


@dataclass(frozen=True)
class Status:
    """The progress of a run. A field is None if nothing is known.

    Attributes:
        folder: the run folder.
        method: the method, and for an evaluation its protocol.
        data: name of the data set or of its folder.
        epochs_done: epochs done, with a fraction.
        epochs: epochs in all.
        loss: the last loss; NaN if it is not finite.
        metric: name of `accuracy`.
        accuracy: the last accuracy, in [0, 1].
        gain: its difference to that of the encoder before training, if the log has it.
        seconds_left: estimated time that a running run needs.
        seen: time of the last sign of life, in seconds since 1970.
        state: running, silent, finished, stopped, failed, diverged, crashed, killed or unfinished.
        reason: why the run ended, or what is wrong.
    """

    folder: str
    method: str | None = None
    data: str | None = None
    epochs_done: float | None = None
    epochs: int | None = None
    loss: float | None = None
    metric: str | None = None
    accuracy: float | None = None
    gain: float | None = None
    seconds_left: float | None = None
    seen: float | None = None
    state: str = "unfinished"
    reason: str | None = None


def find(folders: list[Path]) -> Iterator[Path]:
    """Yield the run folders among `folders` and below them, in alphabetical order.

    Raises InputError if one of `folders` is not a folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give run folders, or a folder above them")
    seen = set()
    for top in folders:
        for name, below, files in os.walk(top):
            below[:] = sorted(one for one in below if not one.startswith("."))
            folder = Path(name)
            if _is_run(folder, set(files)) and (real := folder.resolve()) not in seen:
                seen.add(real)
                yield folder


def _is_run(folder: Path, files: set[str]) -> bool:
    """Return whether a script has started a run in `folder`, which has these `files`."""
    if record.STATUS in files and record.read(folder):
        return True
    if "log.jsonl" in files and ("args.yaml" in files or _tail(folder / "log.jsonl")):
        return True
    return "results.json" in files and bool(_evaluation(folder))


def read(folder: Path, now: float | None = None) -> Status:
    """Return the status of the run in `folder` at time `now`, by default the present."""
    now = time.time() if now is None else now
    noted, lines = record.read(folder), _tail(folder / "log.jsonl")
    if not {"script", "epochs"} <= noted.keys():
        noted = {**_options(folder), **noted}
    found, done = _evaluation(folder), _epochs_done(lines, noted)
    life = [mtime for name in _LIFE if (mtime := _mtime(folder / name)) is not None]
    seen = max(life, default=None)
    state, reason = _state(folder, noted, lines, done, seen, now)
    metric, accuracy, gain = _accuracy(folder, lines, found)
    return Status(
        folder=str(folder),
        method=_method(noted, found),
        data=_data(noted, found),
        epochs_done=done,
        epochs=_count(noted.get("epochs")) if lines or not found else None,
        loss=next((_number(line["loss"]) for line in reversed(lines) if "loss" in line), None),
        metric=metric,
        accuracy=accuracy,
        gain=gain,
        seconds_left=_seconds_left(lines, noted, seen, now) if state == "running" else None,
        seen=seen,
        state=state,
        reason=reason,
    )


def _tail(path: Path) -> list[dict[str, Any]]:
    """Return the last lines of a log that have a step, without damaged ones."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL)
            file.seek(start)
            lines = file.read().split(b"\n")[bool(start) :]  # the first one may begin earlier
    except OSError:
        return []
    return [entry for line in lines if (entry := _entry(line))]


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return a line of a log; None if it is damaged, or is not of a run."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(found, dict) and all(
        math.isfinite(_number(found.get(name))) for name in ("epoch", "step")
    )
    return found if good else None


def _number(value: object) -> float:
    """Return a number of a log; NaN for null, which stands for NaN and infinity."""
    try:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if good else math.nan
    except OverflowError:
        return math.nan


def _count(value: object) -> int | None:
    """Return `value` if it is a positive whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _options(folder: Path) -> dict[str, Any]:
    """Return the options of a run of an older version; an empty dict if they cannot be read."""
    try:
        return read_yaml(folder / "args.yaml")
    except InputError:
        return {}


def _evaluation(folder: Path) -> list[results.Result]:
    """Return the metrics in the folder's results.json; none if it is not an evaluation's."""
    if not (folder / "results.json").is_file():
        return []
    try:
        return list(results.read(folder / "results.json"))
    except InputError:
        return []


def _method(noted: dict[str, Any], found: list[results.Result]) -> str | None:
    """Return the method of a pre-training, or the encoder's method and the evaluation."""
    if found:
        return f"{found[0].encoder.method} {found[0].protocol}"
    words = [noted.get("encoder_method"), noted.get("method") or noted.get("script")]
    return " ".join(word for word in words if isinstance(word, str)) or None


def _data(noted: dict[str, Any], found: list[results.Result]) -> str | None:
    """Return the name of the data set, or of the folder with the images."""
    if found:
        return found[0].column[0]
    data, dataset = noted.get("data"), noted.get("dataset")
    name = data if dataset in (None, "imagenet") else dataset
    return Path(name).name or name if isinstance(name, str) else None


def _steps_per_epoch(lines: list[dict[str, Any]], noted: dict[str, Any]) -> float | None:
    """Return the steps in an epoch, from the record, or from the last end of an epoch in `lines`.

    Such a line is followed by one of a later epoch, or has an accuracy.
    """
    if steps := _count(noted.get("steps_per_epoch")):
        return steps
    for i in range(len(lines) - 1, -1, -1):
        epoch, step = _number(lines[i]["epoch"]), _number(lines[i]["step"])
        last = i + 1 < len(lines) and _number(lines[i + 1]["epoch"]) > epoch
        if (last or "knn" in lines[i]) and epoch >= 0 and step > 0:
            return step / (epoch + 1)
    return None


def _epochs_done(lines: list[dict[str, Any]], noted: dict[str, Any]) -> float | None:
    if not lines:
        return None
    epoch, step = _number(lines[-1]["epoch"]), _number(lines[-1]["step"])
    per_epoch = _steps_per_epoch(lines, noted)
    return max(0.0, step / per_epoch if per_epoch else epoch)


def _seconds_left(
    lines: list[dict[str, Any]], noted: dict[str, Any], seen: float | None, now: float
) -> float | None:
    """Return the time that the remaining steps take at the pace of the last lines of the log."""
    per_epoch, epochs = _steps_per_epoch(lines, noted), _count(noted.get("epochs"))
    points = [(_number(line["step"]), _number(line.get("time"))) for line in lines]
    points = [point for point in points if math.isfinite(point[1])]
    if not per_epoch or not epochs or len(points) < 2:
        return None
    (first, began), (last, ended) = points[0], points[-1]
    if last <= first or ended <= began:
        return None
    left = (per_epoch * epochs - last) * (ended - began) / (last - first)
    return max(0.0, left - max(0.0, now - (seen or now)))


def _accuracy(
    folder: Path, lines: list[dict[str, Any]], found: list[results.Result]
) -> tuple[str | None, float | None, float | None]:
    """Return the name and the value of the last accuracy, and its gain in training."""
    if found:
        metric = found[0].metric
        knn = metric.startswith("knn_")
        name = f"k-NN (k {metric.removeprefix('knn_')})" if knn else found[0].column[1]
        return TITLES.get(metric, name), found[0].value, None
    classifier = next((line for line in reversed(lines) if "val_acc1" in line), None)
    if classifier:
        return "top-1", _known(classifier["val_acc1"]), None
    last = _last_with(folder / "log.jsonl", lines, "knn")
    accuracy = _known(last.get("knn"))
    if accuracy is None:
        return None, None, None
    return "k-NN", accuracy, _known(last.get("knn_gain"))


TITLES = {"acc1": "top-1", "map11": "mAP", "mean_per_class": "mean per class"}


def _known(value: object) -> float | None:
    """Return a number, or None if `value` is not a finite number."""
    return number if math.isfinite(number := _number(value)) else None


def _last_with(path: Path, lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the last line of a log that has the metric `name`; an empty dict without one.

    An epoch may have more lines than `lines`, so this searches back through `REACH` bytes.
    """
    for line in reversed(lines):
        if name in line:
            return line
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
            at = log.rfind(f'"{name}":'.encode(), max(0, len(log) - REACH))
            start, end = log.rfind(b"\n", 0, max(at, 0)) + 1, log.find(b"\n", max(at, 0))
            return _entry(log[start : end if end >= 0 else len(log)]) or {} if at >= 0 else {}
    except (OSError, ValueError):  # no file, or an empty one
        return {}


def is_locked(folder: Path) -> bool | None:
    """Return whether a run holds the lock of `folder`; None if that cannot be found out."""
    try:
        with (folder / run_folder.LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def _state(
    folder: Path,
    noted: dict[str, Any],
    lines: list[dict[str, Any]],
    done: float | None,
    seen: float | None,
    now: float,
) -> tuple[str, str | None]:
    """Return the state and the reason of a run; the arguments are those of `read`."""
    state, reason, host = noted.get("state"), noted.get("reason"), noted.get("host")
    reason = reason if isinstance(reason, str) else None
    age, patience = now - (seen or now), _patience(lines)
    if is_locked(folder):
        if age > patience:
            return "silent", f"no log line for {format_duration(age)}, but its process exists"
        return "running", None
    if state == "running" and host != socket.gethostname():  # its lock may not be visible here
        if age <= patience:
            return "running", f"on {host}"
        return "killed", f"no sign of life from {host} for {format_duration(age)}"
    if state == "running":
        return (
            "killed",
            "ended without recording why: killed, out of memory, or the machine restarted",
        )
    if isinstance(state, str):
        return state, reason
    # a run of an older version, which has no record
    epochs = _count(noted.get("epochs"))
    if (folder / "results.json").is_file() or (done and epochs and done >= epochs):
        return "finished", None
    if epochs and epochs in {_epoch_after(path) for path in _checkpoints(folder)}:
        return "finished", None
    return "unfinished", "has no record of its end"


def _patience(lines: list[dict[str, Any]]) -> float:
    """Return the seconds without a log line after which a run is silent: 3 x the longest pause."""
    times = [_number(line.get("time")) for line in lines]
    gaps = [b - a for a, b in itertools.pairwise(times) if b > a]
    return max(SILENT, 3 * max(gaps, default=0.0))


def _checkpoints(folder: Path) -> list[Path]:
    try:
        return checkpoint.numbered(folder, mid_epoch=False)
    except InputError:
        return []


def _epoch_after(path: Path) -> int:
    return checkpoint.epoch_of(path) + 1
