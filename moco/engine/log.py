"""What a run says: a progress bar or plain lines, log.jsonl, TensorBoard events, args.yaml. Rank 0 writes."""

import contextlib
import json
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from moco import distributed
from moco.errors import InputError
from moco.files import replacing

Metrics = dict[str, Tensor | tuple[Tensor, Tensor]]  # scalars, or a sum and the count of what it sums up


class Mean:
    """Means of named scalars over steps and ranks; adding waits for no device, reading does.

    A value is one scalar, or a sum and the count of what it sums up: a step in which there is much counts for more.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}

    def add(self, values: Metrics) -> None:
        for name, value in values.items():
            total, count = value if isinstance(value, tuple) else (value, 1)
            self.sums[name] = self.sums.get(name, 0) + total.detach()
            self.counts[name] = self.counts.get(name, 0) + count

    def read(self) -> dict[str, float]:
        """The means since the last reading, without those of nothing; starts anew."""
        if not self.sums:
            return {}
        pairs = [
            torch.stack([total.double(), torch.ones_like(total).double() * self.counts[name]]) for name, total in self.sums.items()
        ]
        totals = distributed.all_reduce_sum(torch.stack(pairs)).tolist()
        values = {name: total / count for name, (total, count) in zip(self.sums, totals, strict=True) if count}
        self.sums, self.counts = {}, {}
        return values


def say(message: str) -> None:
    """Print one line, on rank 0 only, above any progress bar."""
    if distributed.rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, replacing the file at once."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def write_options(args: Namespace) -> None:
    """Write args.yaml to the run folder, which `run_folder.claim` has made this run's own."""
    with replacing(Path(args.save_dir) / "args.yaml") as file:
        file.write(yaml.safe_dump(vars(args), sort_keys=True).encode())


class RunLog:
    """The run folder's log, and the line or bar that a person reads.

    Args:
        args: the options; written to args.yaml.
        steps: of the whole run; the time left is counted from them.
        start: the step that this start begins at, below 0 where steps come before epoch 0. Lines of an earlier start beyond
            it are dropped, so that a resumed run's log is that of one never stopped.
    """

    def __init__(self, args: Namespace, steps: int, start: int = 0):
        self.steps, self.start = steps, start
        self.images_per_step = args.batch_per_process * distributed.world() * args.accumulation_steps
        self.began = self.marked = time.perf_counter()
        self.marked_step, self.waited = start, 0.0
        self.bar = None
        if distributed.rank() != 0:
            return
        folder = Path(args.save_dir)
        self.path = folder / "log.jsonl"
        kept: list[str] = []
        if args.resume:  # from the same folder, or from the run that this one branches off
            before = Path(args.resume).with_name("log.jsonl")
            kept = [line for line in _lines(before) if _step(line) <= start]
        try:
            write_options(args)
            with replacing(self.path) as file:
                file.write("".join(kept).encode())
        except OSError as error:
            raise InputError(f"--save-dir {folder}: cannot be written: {error.strerror}; choose another folder") from None
        self.board = SummaryWriter(str(folder), purge_step=start + 1 if args.resume and start >= 0 else None)
        if sys.stdout.isatty():
            self.bar = tqdm(total=steps - min(start, 0), initial=max(start, 0), unit="step", dynamic_ncols=True)

    def wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self.waited += seconds

    def tick(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update()

    def line(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Write one log line: `metrics` and, where steps were taken since the last line, the speed."""
        now = time.perf_counter()
        done = step - self.marked_step
        speed = {}
        if done:
            span = now - self.marked
            speed = {"images_per_s": done * self.images_per_step / span, "data_wait": min(1.0, self.waited / span)}
        self.marked, self.marked_step, self.waited = now, step, 0.0
        if distributed.rank() != 0:
            return
        entry = {"epoch": epoch, "step": step, **metrics, **speed, "time": round(now - self.began, 3)}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            for name, value in {**metrics, **speed}.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}; make room, and go on with --resume auto") from None
        text = "  ".join(f"{name} {_short(name, value)}" for name, value in {**metrics, **speed}.items())
        if self.bar is not None and speed:
            self.bar.set_postfix_str(f"epoch {epoch}  {text}")
        else:
            left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
            say(f"epoch {epoch}  step {step}/{self.steps}  {text}  left {_clock(left)}")

    def close(self) -> None:
        """Flush and end."""
        if self.bar is not None:
            self.bar.close()
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):  # of a full disk a line has spoken already
                self.board.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> float:
    """Of a line of log.jsonl; beyond all steps where it is damaged, as the last one of a run that was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _short(name: str, value: float) -> str:
    if name == "data_wait":
        return f"{value:.0%}"
    if name == "images_per_s":
        return f"{value:.0f}"
    return f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
