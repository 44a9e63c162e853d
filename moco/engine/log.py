"""Log a run on rank 0: a progress bar or lines, log.jsonl and args.yaml.

TensorBoard events (board.py) and the tracker of `--track` (tracking.py) get the same metrics.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from moco import devices, distributed
from moco.augment.recipes import Recipe
from moco.config import Config, Training, flat
from moco.engine import tracking
from moco.engine.board import Board, tagged
from moco.errors import InputError
from moco.files import replacing, to_json
from moco.messages import counted, print_rank0

STARTED = time.perf_counter()  # when this process started


CPU = torch.device("cpu")


# metrics by name: a scalar, or a sum and the number of values in it
Metrics = dict[str, Tensor | tuple[Tensor, Tensor]]


class Mean:
    """The running means of metrics over steps and ranks.

    A metric is a scalar, or a sum and a count. With a count, each value weighs the same, whatever
    its step. `add` does not wait for the device, `read` does.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}

    def add(self, values: Metrics, weight: float = 1) -> None:
        """Add the metrics of one pass of this rank. A scalar counts `weight` times."""
        for name, value in values.items():
            total, count = value if isinstance(value, tuple) else (value * weight, weight)
            self.sums[name] = self.sums.get(name, 0) + total.detach()
            self.counts[name] = self.counts.get(name, 0) + count

    def read(self) -> dict[str, float]:
        """Return the mean of each metric since the last call, and reset.

        Metrics without samples are left out. Every rank must call this method.
        """
        if not self.sums:
            return {}
        wide = devices.widest_float(next(iter(self.sums.values())).device)
        pairs = [
            torch.stack([total.to(wide), torch.ones_like(total, dtype=wide) * self.counts[name]])
            for name, total in self.sums.items()
        ]
        totals = distributed.all_reduce_sum(torch.stack(pairs)).tolist()
        values = {
            name: total / count
            for name, (total, count) in zip(self.sums, totals, strict=True)
            if count
        }
        self.sums, self.counts = {}, {}
        return values


def write_options(config: Config) -> None:
    """Write the settings to args.yaml in the run folder, which this run has locked."""
    with replacing(Path(config.run.save_dir) / "args.yaml") as file:
        file.write(yaml.safe_dump(flat(config), sort_keys=True).encode())


class RunLog:
    """The log of a run: the files in its folder, and the lines or the progress bar on the terminal.

    Args:
        config: the settings of the run. A new run writes them to args.yaml at once. A resumed run
            does so with its first checkpoint, so that args.yaml always describes the checkpoints.
        steps: number of steps of the full run, to estimate the time left.
        start: the step to begin at. It is negative if steps come before epoch 0. If the run was
            resumed, old log lines of later steps are dropped.
        device: the device that the run trains on.

    Raises InputError if the folder cannot be written.
    """

    def __init__(self, config: Training, steps: int, start: int = 0, device: torch.device = CPU):
        self.steps, self.start, self.device = steps, start, device
        self.began = self.marked = time.perf_counter()
        self.marked_step, self.waited, self.images, self.first = start, 0.0, 0, True
        self.bar, self.before = None, 0.0  # seconds trained in earlier starts
        self.trained = (0, 0.0)  # images, and the seconds that their steps took, in this start
        if distributed.rank() != 0:
            return
        folder = Path(config.run.save_dir)
        self.path = folder / "log.jsonl"
        kept: list[str] = []
        if config.log.resume:
            # the checkpoint is in this run's folder, or in that of the run it branches off from
            before = Path(config.log.resume).with_name("log.jsonl")
            kept = [line for line in _lines(before) if _step(line) <= start]
        self.before = _seconds(kept)
        try:
            if not (config.log.resume and (folder / "args.yaml").exists()):
                write_options(config)
            with replacing(self.path) as file:
                file.write("".join(kept).encode())
            self.board = Board(config, start)
        except OSError as error:
            raise InputError(
                f"--save-dir {folder}: cannot be written: {error.strerror}; choose another folder"
            ) from None
        tracking.begin(config)
        if sys.stdout.isatty():
            total, initial = steps - min(start, 0), max(start, 0)
            self.bar = tqdm(
                total=total, initial=initial, dynamic_ncols=True, file=sys.stdout, bar_format=BAR
            )

    def wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self.waited += seconds

    def views(self, views: list[Tensor], recipe: Recipe) -> None:
        """Log an image of the first views of the run; see `Board.views`."""
        if distributed.rank() == 0:
            self.board.views(views, recipe)

    def tick(self, images: int) -> None:
        """Count a step with so many images, over all ranks. Print the duration of the first one."""
        self.images += images
        if self.first:
            self.first = False
            torch.get_device_module(self.device).synchronize()
            took = time.perf_counter() - self.began
            full = format_duration(took * (self.steps - self.start))
            print_rank0(
                f"first step took {took:.1f} s, of which {self.waited:.1f} s for data; "
                f"at this pace {full} for the run"
            )
        if self.bar is not None:
            self.bar.update()

    def line(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Log `metrics`, and the speed if steps were taken since the last line.

        Args:
            epoch: the epoch, counted from 0.
            step: number of steps done.
            metrics: values by name.

        Raises InputError if the log cannot be written.
        """
        now = time.perf_counter()
        speed = {}
        if step != self.marked_step:
            span = now - self.marked
            self.trained = self.trained[0] + self.images, self.trained[1] + span
            speed = {
                "images_per_s": self.images / span,
                "data_wait": min(1.0, self.waited / span),
            }
        self.marked, self.marked_step, self.waited, self.images = now, step, 0.0, 0
        if distributed.rank() != 0:
            return
        entry = {"epoch": epoch, "step": step, **metrics, **speed, "time": round(self.seconds(), 3)}
        try:
            with self.path.open("a") as file:
                file.write(f"{to_json(entry)}\n")
            shown = tagged({name: value for name, value in entry.items() if name != "step"})
            self.board.scalars(shown, step)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written: {error.strerror}; "
                "make room, and continue with --resume auto"
            ) from None
        tracking.log(shown, step)
        facts = [
            f"{name} {_short(name, value)}"
            for name, value in {**metrics, **speed}.items()
            if not name.startswith(_NOT_PRINTED)
        ]
        # steps before epoch 0, such as those that fill AdCo's bank, have negative numbers
        early = f"before epoch 0: {counted(-step, 'step')} left" if epoch < 0 else ""
        if self.bar is not None and speed:
            # the bar and its counts take the rest of the line
            width = shutil.get_terminal_size().columns - 30 - 2 * len(str(self.steps))
            self.bar.set_postfix_str(fold([early or f"epoch {epoch}", *facts], width)[0])
            return
        left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
        where = [early] if early else [f"epoch {epoch}", f"step {step}/{self.steps}"]
        facts = [*where, *facts, f"left {format_duration(left)}"]
        width = shutil.get_terminal_size().columns - 3 if self.bar is not None else math.inf
        print_rank0("\n  ".join(fold(facts, width)))

    def seconds(self) -> float:
        """Return how many seconds the run has trained, over all starts."""
        return self.before + time.perf_counter() - self.began

    def images_per_second(self) -> float | None:
        """Return the mean speed of this start's steps; None if it has taken none.

        Evaluation between epochs does not count.
        """
        images, seconds = self.trained
        return images / seconds if images else None

    def close(self) -> None:
        """Close the bar, and flush the TensorBoard events."""
        if self.bar is not None:
            self.bar.close()
            sys.stdout.flush()
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):  # `line` has reported a full disk already
                self.board.close(finished=self.marked_step >= self.steps)


# metrics that would fill the terminal: the hardness of each type of synthetic negative
_NOT_PRINTED = "hardness_"

BAR = "|{bar:8}| {n_fmt}/{total_fmt}  {remaining} left{postfix}"


def fold(facts: list[str], width: float) -> list[str]:
    """Return lines of at most `width` characters that join `facts` by two spaces.

    A longer fact gets a line of its own. At least one fact must be given.
    """
    lines = facts[:1]
    for fact in facts[1:]:
        if len(lines[-1]) + 2 + len(fact) <= width:
            lines[-1] += f"  {fact}"
        else:
            lines.append(fact)
    return lines


def _lines(path: Path) -> list[str]:
    """Return the lines of a file with their line ends, or an empty list if there is no file."""
    return path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> float:
    """Return the step of a line of log.jsonl, or infinity if the line is damaged.

    The last line is damaged if the run was killed while writing it.
    """
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _seconds(lines: list[str]) -> float:
    """Return the seconds trained up to the last of these lines of log.jsonl; 0 without lines."""
    try:
        return max(0.0, float(json.loads(lines[-1])["time"]))
    except (IndexError, ValueError, KeyError, TypeError, RecursionError):
        return 0.0


def _short(name: str, value: float) -> str:
    """Return the value of a metric as text for the terminal."""
    if name == "data_wait":
        return f"{value:.0%}"
    if name == "images_per_s":
        return f"{value:.0f}"
    return f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds as hours:minutes:seconds."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
