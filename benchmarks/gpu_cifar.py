"""Stages 3 and 4 of benchmarks/gpu.py: train the configs in configs/cifar10/.

Each run continues where an earlier visit stopped it (--resume auto). When its time is over, it
receives SIGTERM, saves a checkpoint and ends.
"""

import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cost
import measure
from gpu_setup import (
    Failed,
    Setup,
    image_folder,
    kill_tree,
    killed_at_the_end,
    log_lines,
    python,
    tail,
)

CONFIGS = measure.ROOT / "configs" / "cifar10"
# The log of MoCo's authors (notebook of August 2020, 200 epochs).
# epoch: (mean loss, k-NN top-1 in %)
PUBLISHED: dict[int, tuple[float | None, float]] = {
    1: (6.957, 31.98),
    2: (7.250, 33.52),
    3: (7.290, 34.71),
    5: (6.862, 37.95),
    10: (5.991, 48.03),
    20: (4.341, 61.38),
    30: (3.692, 67.05),
    40: (3.384, 71.32),
    50: (3.195, 73.30),
    152: (None, 81.40),
    160: (2.376, 81.79),
    180: (2.291, 82.59),
    200: (2.272, 82.58),
}
EPOCHS = 200
SAVING = 15.0  # seconds between SIGTERM and SIGKILL
LEAST = 45.0  # seconds for one turn in stage 4 on a GPU, of which the start takes about 10
PLACES = ("data", "data/cifar10", "shared/data/cifar10", "../shared/data/cifar10", "runs/data")
ARCHIVES = ("cifar10_jpeg.tar.gz", "cifar-10-python.tar.gz")


class Data(NamedTuple):
    """A copy of CIFAR-10: the words for a script's command line, and a name for the results."""

    words: tuple[str, ...]
    name: str


def find(given: Path | None, folder: Path, setup: Setup) -> Data | None:
    """Find CIFAR-10 at `given`, or in `PLACES`; return None if it is nowhere.

    An archive is unpacked to `folder`. On a CPU, unless `given`, make a tiny folder of images
    instead. Raise Failed if `given` does not hold CIFAR-10.
    """
    if given is not None:
        found = _at(given, folder)
        if found is None:
            known = f"train/ and test/, cifar-10-batches-py, {' or '.join(ARCHIVES)}"
            raise Failed(f"--data {given}: holds no CIFAR-10; give a folder with one of: {known}")
        return found
    if setup.tiny:
        images = image_folder(setup.work / "cifar", 4, 8, 4, 32, test="test")
        return Data((str(images),), "a few images made on the spot")
    return next(filter(None, (_at(measure.ROOT / place, folder) for place in PLACES)), None)


def _at(place: Path, folder: Path) -> Data | None:
    place = place.absolute()
    if place.is_file():
        return _at(_unpacked(place, folder), folder) if tarfile.is_tarfile(place) else None
    if (place / "data_batch_1").is_file():
        place = place.parent
    if (place / "cifar-10-batches-py").is_dir():
        return Data((str(place), "--dataset", "cifar10"), "lossless")
    if (place / "train").is_dir():
        return _images(place)
    if archive := next((place / name for name in ARCHIVES if (place / name).is_file()), None):
        return _at(_unpacked(archive, folder), folder)
    inside = (
        [child for child in sorted(place.glob("*")) if (child / "train").is_dir()]
        if place.is_dir()
        else []
    )
    return _images(inside[0]) if inside else None


def _images(place: Path) -> Data | None:
    """Return a folder of image files as Data; None if it lacks both val/ and test/."""
    tested = any((place / split).is_dir() for split in ("val", "test"))
    return Data((str(place),), "image files") if tested else None


def _unpacked(archive: Path, folder: Path) -> Path:
    """Unpack an archive, unless an earlier visit did; return the folder."""
    name = archive.name.partition(".")[0]
    target, part = folder / name, folder / f"{name}.part"
    if target.is_dir():
        return target
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:  # tar is several times as fast as Python
        status = subprocess.run(
            ["tar", "-xzf", archive, "-C", part, "--no-same-owner"], timeout=120
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        status = 1
    if status:
        with tarfile.open(archive) as file:
            file.extractall(part, filter="data")
    part.rename(target)
    return target


# One run.

# Save rarely: a checkpoint takes a considerable fraction of an epoch, and SIGTERM saves one anyway.
USUAL = "--knn-every 10 --save-every 10"
# on a CPU: two epochs of a few small images
TINY = "--epochs 2 --image-size 16 -b 8 -j 0 -p 1 --knn-every 1"
TINY_OF = {"main_adco": "--no-ad-init", "main_fnc": "--fn-topk 2"}


def train(
    setup: Setup, data: Data, config: Path, folder: Path, end: float, amp: str, seed: int = 0
) -> str:
    """Train `config` until it is done or until `end` (of time.monotonic).

    Return "finished" or "stopped". Raise Failed if the script ends in an error.
    """
    script = cost.script(config)
    words = [
        f"{script}.py",
        *data.words,
        "--cfg",
        config,
        "--seed",
        seed,
        "--save-dir",
        folder,
        "--resume",
        "auto",
    ]
    words += ["--amp", amp]
    words += [*TINY.split(), *TINY_OF.get(script, "").split()] if setup.tiny else USUAL.split()
    log = folder.with_name(f"{folder.name}.log")
    process = python(setup, *words, log=log, gpu=setup.cuda)
    with killed_at_the_end(process):
        try:
            status = process.wait(max(1.0, end - SAVING - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(SAVING)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                raise Failed(
                    f"did not save within {SAVING:.0f} s of SIGTERM: {tail(log)}"
                ) from None
    if status not in (0, 75, -signal.SIGTERM):  # -SIGTERM: Python had not started yet
        raise Failed(f"{script}.py ended with status {status}: {tail(log)}")
    return "finished" if status == 0 else "stopped"


def progress(folder: Path) -> dict[int, dict[str, float]]:
    """Return the logged figures of a run by epoch, counted from 1.

    The figures are the mean `loss`, `knn` in %, and the `seconds` from the start of the run to the
    end of the epoch.
    """
    epochs: dict[int, dict[str, float]] = {}
    sums: dict[int, tuple[float, int]] = {}
    before = 0
    for line in log_lines(folder):
        epoch, step = line["epoch"] + 1, line["step"]
        if epoch < 1:
            before = max(before, step)
            continue
        mine = epochs.setdefault(epoch, {})
        mine["seconds"] = line.get("time", 0.0)
        if line.get("knn") is not None:
            mine["knn"] = 100 * line["knn"]
        if line.get("loss") is not None and step > before:
            total, count = sums.get(epoch, (0.0, 0))
            sums[epoch] = total + line["loss"] * (step - before), count + step - before
            mine["loss"] = sums[epoch][0] / sums[epoch][1]
        before = max(before, step)
    return epochs


def rows(folder: Path) -> list[dict[str, float | int | None]]:
    """Return a run's loss and k-NN next to the published ones.

    There is a row for each epoch of the published log, and for each with a k-NN accuracy.
    """
    mine = progress(folder)
    shown = [
        epoch
        for epoch in sorted({*PUBLISHED, *mine})
        if epoch in mine and (epoch in PUBLISHED or "knn" in mine[epoch])
    ]
    found = []
    for epoch in shown:
        loss, knn = PUBLISHED.get(epoch, (None, None))
        one = {"epoch": epoch, "loss": mine[epoch].get("loss"), "published loss": loss}
        found.append({**one, "k-NN": mine[epoch].get("knn"), "published k-NN": knn})
    return found


def summary(folder: Path) -> dict[str, object]:
    """Return the number of epochs of a run, its speed, and its last k-NN accuracy in %."""
    mine = progress(folder)
    if not mine:
        return {"epochs": 0}
    last = max(mine)
    seconds = [mine[e]["seconds"] - mine[e - 1]["seconds"] for e in mine if e - 1 in mine]
    accuracies = {epoch: one["knn"] for epoch, one in mine.items() if "knn" in one}
    found: dict[str, object] = {
        "epochs": last,
        "seconds": mine[last]["seconds"],
        "loss": mine[last].get("loss"),
    }
    if seconds:
        found["seconds per epoch"] = statistics.median(seconds)
        found["minutes of 200 epochs"] = statistics.mean(seconds) * EPOCHS / 60
    if accuracies:
        found["k-NN"], found["k-NN epoch"] = accuracies[max(accuracies)], max(accuracies)
    return found


# Stage 4.


def run_folder(first: Path, config: str, seed: int) -> Path:
    """Return the run folder of stage 4 for a config and a seed, next to `first`.

    `first` is the run folder of stage 3, whose run is that of the config moco with seed 0.
    """
    if (config, seed) == ("moco", 0):
        return first
    return first.with_name(f"cifar10-{config}" + f"-seed{seed}" * bool(seed))


def others(
    setup: Setup,
    data: Data,
    first: Path,
    end: float,
    amp: str,
    seeds: list[int],
    record: Callable[[str, str, dict[str, object]], None],
) -> None:
    """Train all configs with a ResNet-18 in turns, seed after seed, until `end`.

    Configs with a ResNet-50 would take almost all of the time. Call `record(name, error, figures)`
    after each turn.
    """
    configs = sorted(
        path.stem for path in CONFIGS.glob("*.yaml") if "arch: resnet18\n" in path.read_text()
    )
    waiting = [
        (config, seed) for seed in seeds for config in configs if (config, seed) != ("moco", 0)
    ]
    least = 20.0 if setup.tiny else LEAST
    while waiting:
        together = [run for run in waiting if run[1] == waiting[0][1]]
        turn = max(least, (end - time.monotonic()) / len(together))
        for config, seed in together:
            now = time.monotonic()
            if end - now < least + SAVING:
                for name, number in waiting:
                    if not summary(run_folder(first, name, number))["epochs"]:
                        record(f"{name}, seed {number}", "not run: no time left", {})
                return
            folder, error, state = run_folder(first, config, seed), "", "failed"
            try:
                state = train(
                    setup,
                    data,
                    CONFIGS / f"{config}.yaml",
                    folder,
                    min(end, now + turn + SAVING),
                    amp,
                    seed,
                )
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
            if state != "stopped":
                waiting.remove((config, seed))
            figures = summary(folder)
            if error or figures["epochs"]:
                record(f"{config}, seed {seed}", error, {"state": state, **figures})


if __name__ == "__main__":
    sys.exit("run benchmarks/gpu.py --stages 3 4 instead")
