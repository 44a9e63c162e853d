"""What a run says: a progress bar or plain lines, log.jsonl, TensorBoard events, args.yaml. Rank 0 writes."""

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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from moco import devices, distributed
from moco.config import Config, Training, flat
from moco.distributed import print_rank0
from moco.errors import InputError
from moco.files import replacing, to_json

STARTED = time.perf_counter()  # when this process started


CPU = torch.device("cpu")


Metrics = dict[
    str, Tensor | tuple[Tensor, Tensor]
]  # scalars, or a sum and the count of what it sums up


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
        wide = devices.widest(next(iter(self.sums.values())).device)
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
    """Write args.yaml to the run folder, which `run_folder.claim` has made this run's own."""
    with replacing(Path(config.run.save_dir) / "args.yaml") as file:
        file.write(yaml.safe_dump(flat(config), sort_keys=True).encode())


class RunLog:
    """The run folder's log, and the line or bar that a person reads.

    Args:
        config: the run's settings. A new run writes them to args.yaml here, and a resumed one with its first
            checkpoint, so that the file always says how the checkpoints were made.
        steps: of the whole run; the time left is counted from them.
        start: the step that this start begins at, below 0 where steps come before epoch 0. Lines of an earlier start beyond
            it are dropped, so that a resumed run's log is that of one never stopped.
        device: the device that the run trains on.
    """

    def __init__(self, config: Training, steps: int, start: int = 0, device: torch.device = CPU):
        self.steps, self.start, self.device = steps, start, device
        self.images_per_step = (
            config.input.batch_per_process
            * distributed.world_size()
            * config.optimizer.accumulation_steps
        )
        self.began = self.marked = time.perf_counter()
        self.marked_step, self.waited, self.first = start, 0.0, True
        self.bar, self.before = None, 0.0  # seconds trained in earlier starts
        if distributed.rank() != 0:
            return
        folder = Path(config.run.save_dir)
        self.path = folder / "log.jsonl"
        kept: list[str] = []
        if config.log.resume:  # from the same folder, or from the run that this one branches off
            before = Path(config.log.resume).with_name("log.jsonl")
            kept = [line for line in _lines(before) if _step(line) <= start]
        self.before = _seconds(kept)
        try:
            if not (config.log.resume and (folder / "args.yaml").exists()):
                write_options(config)
            with replacing(self.path) as file:
                file.write("".join(kept).encode())
        except OSError as error:
            raise InputError(
                f"--save-dir {folder}: cannot be written: {error.strerror}; choose another folder"
            ) from None
        self.board = SummaryWriter(
            str(folder), purge_step=start + 1 if config.log.resume and start >= 0 else None
        )
        if sys.stdout.isatty():
            total, initial = steps - min(start, 0), max(start, 0)
            self.bar = tqdm(
                total=total, initial=initial, dynamic_ncols=True, file=sys.stdout, bar_format=BAR
            )

    def wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self.waited += seconds

    def tick(self) -> None:
        """Count a step; after the first one of this start, print how long it took."""
        if self.first:
            self.first = False
            torch.get_device_module(self.device).synchronize()
            took = time.perf_counter() - self.began
            whole = clock(took * (self.steps - self.start))
            print_rank0(
                f"first step took {took:.1f} s, of which {self.waited:.1f} s for data; at this pace {whole} for the run"
            )
        if self.bar is not None:
            self.bar.update()

    def line(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Write one log line: `metrics` and, where steps were taken since the last line, the speed."""
        now = time.perf_counter()
        done = step - self.marked_step
        speed = {}
        if done:
            span = now - self.marked
            speed = {
                "images_per_s": done * self.images_per_step / span,
                "data_wait": min(1.0, self.waited / span),
            }
        self.marked, self.marked_step, self.waited = now, step, 0.0
        if distributed.rank() != 0:
            return
        entry = {"epoch": epoch, "step": step, **metrics, **speed, "time": round(self.seconds(), 3)}
        try:
            with self.path.open("a") as file:
                file.write(f"{to_json(entry)}\n")
            for name, value in {**metrics, **speed}.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written: {error.strerror}; make room, and go on with --resume auto"
            ) from None
        facts = [f"{name} {_short(name, value)}" for name, value in {**metrics, **speed}.items()]
        if self.bar is not None and speed:
            width = (
                shutil.get_terminal_size().columns - 30 - 2 * len(str(self.steps))
            )  # next to the bar
            self.bar.set_postfix_str(fold([f"epoch {epoch}", *facts], width)[0])
            return
        left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
        facts = [f"epoch {epoch}", f"step {step}/{self.steps}", *facts, f"left {clock(left)}"]
        width = shutil.get_terminal_size().columns - 3 if self.bar is not None else math.inf
        print_rank0("\n  ".join(fold(facts, width)))

    def seconds(self) -> float:
        """Return how long the run has trained, earlier starts included."""
        return self.before + time.perf_counter() - self.began

    def close(self) -> None:
        """Flush and end."""
        if self.bar is not None:
            self.bar.close()
            sys.stdout.flush()
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):  # of a full disk a line has spoken already
                self.board.close()


BAR = "|{bar:8}| {n_fmt}/{total_fmt}  {remaining} left{postfix}"


def fold(facts: list[str], width: float) -> list[str]:
    """Join facts to lines of at most `width` characters; a fact that is longer has its own line."""
    lines = facts[:1]
    for fact in facts[1:]:
        if len(lines[-1]) + 2 + len(fact) <= width:
            lines[-1] += f"  {fact}"
        else:
            lines.append(fact)
    return lines


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> float:
    """Of a line of log.jsonl; beyond all steps where it is damaged, as the last one of a run that was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _seconds(lines: list[str]) -> float:
    """Return the time of the last line that a resumed run keeps; 0 if there is none."""
    try:
        return max(0.0, float(json.loads(lines[-1])["time"]))
    except (IndexError, ValueError, KeyError, TypeError, RecursionError):
        return 0.0


def _short(name: str, value: float) -> str:
    if name == "data_wait":
        return f"{value:.0%}"
    if name == "images_per_s":
        return f"{value:.0f}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """Return a duration as hours:minutes:seconds."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
