"""Functions and classes that the stages of benchmarks/gpu.py share.

They provide sizes, methods built from their scripts' options, images, and processes with a time
limit.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moco.augment import color, recipes
from moco.cli.scripts import config_and_builder
from moco.data.images import Images
from moco.engine import lr_schedule, optim, precision
from moco.rng import COLOR, Progress


class Failed(Exception):  # noqa: N818 (reads well in results: "Failed: ...")
    """Raised if a check finds a difference, or if a process fails."""


class Notes(dict):
    """The figures of one part by name, and the messages of failed checks."""

    def __init__(self):
        super().__init__()
        self.failures: list[str] = []

    def check(self, name: str, good: bool, what: str = "is wrong") -> None:
        """Record whether a check passed."""
        self[name] = bool(good)
        if not good:
            self.failures.append(f"{name} {what}")

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Record a figure that must not exceed `limit`. NaN fails."""
        self[name] = float(value)
        if not float(value) <= limit:
            self.failures.append(f"{name} {float(value):.2g} exceeds {limit:g}")


@dataclass(frozen=True)
class Setup:
    """The device of a part, whether its sizes are `tiny` (on a CPU), and a folder for its files."""

    device: torch.device
    tiny: bool
    work: Path

    @property
    def cuda(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def workers(self) -> int:
        """Return the number of loader processes for a script."""
        return 1 if self.tiny else min(16, os.cpu_count() or 1)

    def size(self, usual: int, tiny: int) -> int:
        """Return the size to use: `tiny` on a CPU, else `usual`."""
        return tiny if self.tiny else usual

    def synchronize(self) -> None:
        """Wait until the GPU has finished its work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


def duration(setup: Setup, run: Callable[[], object]) -> float:
    """Return how many seconds a call takes, until the device has finished."""
    setup.synchronize()
    began = time.perf_counter()
    run()
    setup.synchronize()
    return time.perf_counter() - began


def use_tf32(on: bool) -> None:
    """Switch TF32 on or off for matrix products and convolutions in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the norm of a - b over the norm of b, in float64, taken over all tensors."""
    pairs = [
        (x.detach().double().cpu(), y.detach().double().cpu()) for x, y in zip(a, b, strict=True)
    ]
    above = sum(float((x - y).square().sum()) for x, y in pairs)
    below = sum(float(y.square().sum()) for _, y in pairs)
    return (above / below) ** 0.5 if below else above**0.5


# Methods, built as their scripts build them.


class Method:
    """A method and its optimizer, built as its script builds them, but without data or run folder.

    Args:
        script: name of the script, such as main_synco.
        options: options of that script, without the data folder.
        contiguous: whether to keep the default memory format on a GPU.
        images: number of images in the data set.
    """

    def __init__(
        self,
        script: str,
        options: list[object],
        setup: Setup,
        device: torch.device | None = None,
        contiguous: bool = False,
        images: int = 64,
    ):
        self.device = device or setup.device
        self.config, build = config_and_builder(script, options, self.device)
        torch.manual_seed(self.config.run.seed)
        labels = np.arange(images, dtype=np.int64) % 2
        self.module: nn.Module = build(Images(Path("DIR"), labels, ("one", "two")))
        if contiguous:
            self.module.to(self.device)
        else:
            compute = self.config.compute
            precision.prepare_model(
                self.module, self.device, compute.compile, compute.grad_checkpoint
            )
        self.contiguous = contiguous
        self.recipe = recipes.from_settings(self.config.views)
        schedule, self.amp = self.config.optimizer, self.config.compute.amp
        scale = lr_schedule.lr_scale(schedule.learning_rate_scaling, self.config.input.batch_size)
        groups = self.module.parameter_groups(schedule.lr * scale, schedule.wd)
        self.optimizer = optim.make(groups, schedule, self.amp)
        self.scaler = precision.scaler(self.amp, self.device)
        self.module.train()

    def views(self, crops: list[Tensor], progress: Progress) -> list[Tensor]:
        """Augment uint8 crops on the method's device, with the same draws as in training."""
        draws = [progress.generator(COLOR, "cpu", 0, i) for i in range(len(crops))]
        found = color.augment_views(
            [x.to(self.device, non_blocking=True) for x in crops], self.recipe, draws
        )
        return found if self.contiguous else list(map(precision.prepare_images, found))

    def forward(self, views: list[Tensor], progress: Progress) -> Tensor:
        """Return the loss of `views`."""
        index = torch.arange(len(views[0]), device=self.device)
        with precision.autocast(self.amp, self.device):
            loss, _ = self.module(views, index, progress)
        return loss

    def backward(self, views: list[Tensor], progress: Progress, passes: int = 1) -> Tensor:
        """Add the gradients of the loss of one of `passes` passes; return the loss."""
        loss = self.forward(views, progress)
        self.scaler.scale(loss / passes).backward()
        return loss.detach()

    def update(self, follow: bool = True) -> None:
        """Take the optimizer's step and, if `follow`, update the moving averages and queues."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if follow:
            self.module.after_step()

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters that have one."""
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of the module's buffers (queue, bank, BN statistics) by name."""
        return {name: x.detach().clone() for name, x in self.module.named_buffers()}


def crops(recipe: recipes.Recipe, batch: int, seed: int = 0) -> list[Tensor]:
    """Return smooth random crops, uint8 [batch, 3, S, S], for each view of `recipe`.

    The views of one image resemble each other.
    """
    draw = torch.Generator().manual_seed(seed)
    base = torch.rand(batch, 3, 6, 6, generator=draw)
    found = []
    for view in recipe:
        coarse = (0.7 * base + 0.3 * torch.rand(batch, 3, 6, 6, generator=draw)).clamp(0, 1)
        image = nn.functional.interpolate(coarse, view.size, mode="bilinear", align_corners=False)
        found.append((image * 255).round().to(torch.uint8))
    return found


# Images in files.


def image_folder(
    root: Path, classes: int, train: int, val: int, pixels: int, test: str = "val"
) -> Path:
    """Write a small ImageNet-style folder of noise with one tint per class, unless it exists."""
    if root.exists():
        return root
    draw = np.random.default_rng(0)
    for split, count in (("train", train), (test, val)):
        for c in range(classes):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            tint = np.array([c % 2, c // 2 % 2, c // 4 % 2]) * 90
            for i in range(count):
                noise = draw.integers(0, 160, (pixels, pixels, 3)) + tint
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


def photographs(root: Path, unique: int, copies: int, width: int = 500, height: int = 375) -> Path:
    """Write `unique` JPEG files to root/train, each linked under `copies` names.

    The images are noise of several scales. They have the pixels and bytes (at most 110 KB) of
    ImageNet's photographs, so they take a decoder as long.
    """
    folder = root / "train" / "photo"
    if folder.exists():
        return root
    folder.mkdir(parents=True)

    def write(i: int) -> None:
        draw = np.random.default_rng(i)
        pixels = np.zeros((height, width, 3), np.float32)
        for scale in (3, 8, 25, 60, 150):
            coarse = draw.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8)
            pixels += np.asarray(
                Image.fromarray(coarse).resize((width, height), Image.BICUBIC), np.float32
            )
        image, file = Image.fromarray((pixels / 5).astype(np.uint8)), io.BytesIO()
        for quality in range(100, 30, -3):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            if file.tell() < 110_000:
                break
        first = folder / f"{i:05d}.jpg"
        first.write_bytes(file.getvalue())
        for copy in range(1, copies):
            os.link(first, folder / f"{i:05d}-{copy}.jpg")

    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        list(pool.map(write, range(unique)))
    return root


# Processes with a time limit.


def python(
    setup: Setup, *words: object, log: Path, gpu: bool = True, **environment: str
) -> subprocess.Popen:
    """Start `python WORDS` in the project's root, and append its output to `log`.

    Without `gpu`, hide the GPU from it. `environment` is added to the environment variables.
    """
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    if setup.tiny:
        env["OMP_NUM_THREADS"] = "1"
    if not gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=measure.ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


LONGEST = 120.0  # seconds for one process that a part starts


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for a process. Raise Failed if it ends in an error or takes longer than `LONGEST`."""
    try:
        status = process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.wait()
        raise Failed(f"did not end within {LONGEST:.0f} s: {tail(log)}") from None
    if status:
        raise Failed(f"ended with status {status}: {tail(log)}")


def tail(log: Path, most: int = 1500) -> str:
    """Return the last `most` characters of a log file."""
    try:
        return log.read_text(errors="replace")[-most:].strip()
    except OSError as error:
        return f"(no output: {error})"


def kill_tree(pid: int) -> None:
    """Kill a process that this program started, and all its descendants in any process group."""
    for one in [*_descendants(pid), pid]:
        with contextlib.suppress(OSError):
            os.kill(one, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        waiting += (mine := children.get(waiting.pop(), []))
        found += mine
    return found


def until(condition: Callable[[], object], process: subprocess.Popen, log: Path) -> None:
    """Wait until `condition()` is true.

    Raise Failed if the process ends before that, or if it takes longer than `LONGEST`.
    """
    end = time.monotonic() + LONGEST
    while not condition():
        if process.poll() is not None:
            raise Failed(f"ended early, with status {process.returncode}: {tail(log)}")
        if time.monotonic() > end:
            raise Failed(f"did not do what was waited for within {LONGEST:.0f} s: {tail(log)}")
        time.sleep(0.02)


@contextlib.contextmanager
def killed_at_the_end(*processes: subprocess.Popen) -> Iterator[None]:
    """Kill the processes that are still running when the block ends."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()


def results(folder: Path) -> dict[str, Any]:
    """Return the metrics in the results.json of an evaluation's run folder."""
    return json.loads((folder / "results.json").read_text())["metrics"]


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log.jsonl, without a line that is still being written.

    Return none if there is no log.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in (folder / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found
