"""The runs of benchmarks/family.py. Each run calls a script as a user would."""

import json
import shlex
import signal
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from family_methods import Entry, Recipe
from gpu_setup import Failed, Setup, kill_tree, log_lines, python

from moco.engine import record
from moco.errors import InputError

GIB = 2**30
SAVING = 20.0  # seconds between SIGTERM and SIGKILL of a run that is stopped


@dataclass(frozen=True)
class Outcome:
    """The measurements of a finished run.

    Attributes:
        seed: the seed.
        knn_before: k-NN top-1 of the random encoder, in [0, 1].
        knn: k-NN top-1 after training.
        seconds: seconds of training, without the start of the script and without k-NN.
        images_per_s: training images per second.
        memory: peak memory in bytes; see `moco.devices.peak_memory`.
        probe: top-1 of the linear probe, or None without one.
        before_this_call: whether an earlier call of the benchmark made the run.
    """

    seed: int
    knn_before: float
    knn: float
    seconds: float
    images_per_s: float
    memory: float
    probe: float | None = None
    before_this_call: bool = False

    @property
    def gain(self) -> float:
        """Return the gain in k-NN top-1 over the random encoder."""
        return self.knn - self.knn_before

    def facts(self) -> dict[str, object]:
        """Return the measurements by name."""
        found = asdict(self)
        del found["before_this_call"]
        return found

    def __str__(self) -> str:
        probe = "" if self.probe is None else f", probe {self.probe:.3f}"
        earlier = " (an earlier call)" * self.before_this_call
        return (
            f"k-NN {self.knn_before:.3f} -> {self.knn:.3f}{probe}, {self.seconds:.0f} s, "
            f"{self.images_per_s:.0f} images/s, {self.memory / GIB:.2f} GiB{earlier}"
        )


@dataclass(frozen=True)
class Family:
    """The settings that all runs of a call share.

    Attributes:
        out: folder of all runs.
        recipe: the recipe of the data set.
        common: the data, and the options that do not change what is learned.
        probe: whether each encoder gets a linear probe.
    """

    out: Path
    recipe: Recipe
    common: list[str]
    probe: bool = False

    def command(self, entry: Entry, seed: int, epochs: int, folder: Path) -> list[str]:
        """Return the words after `python` that train a method."""
        words = [f"{entry.script}.py", *self.common, *self.recipe.options(epochs)]
        words += self.recipe.own_options(entry, epochs)
        return [*words, "--seed", str(seed), "--save-dir", str(folder), "--resume", "auto"]

    def run(self, entry: Entry, seed: int, epochs: int) -> Outcome:
        """Train a method, unless it is trained already; return its measurements.

        Raises InputError if the folder has a run with other options, and Failed if the script
        fails.
        """
        folder = self.out / f"{entry.name}-{seed}"
        words = self.command(entry, seed, epochs, folder)
        before = record.read(folder)
        if before and before.get("command") != f"python {shlex.join(words)}":
            raise InputError(f"{folder}: contains a run with other options; give another --out")
        finished = before.get("state") == "finished"
        if not finished:
            call(words, folder.with_suffix(".log"))
        probe = None
        if self.probe:
            saved = next(iter(sorted(folder.glob("checkpoint_*.pth.tar"))))
            probe = self._probe(seed, folder.with_name(f"{folder.name}-probe"), saved)
        return outcome(folder, seed, probe, finished)

    def probe_random(self, seed: int) -> float:
        """Return the accuracy of a linear probe on a random encoder."""
        network = f"--arch resnet18 --stem {self.recipe.stem}".split()
        recipe = self.recipe
        network += f"--image-size 32 --mean {recipe.mean} --std {recipe.std}".split()
        return self._probe(seed, self.out / f"random-{seed}-probe", None, network)

    def _probe(
        self, seed: int, folder: Path, encoder: Path | None, network: list[str] | None = None
    ) -> float:
        """Train a linear probe, unless its results exist; return its accuracy."""
        results = folder / "results.json"
        if not results.exists():
            words = ["main_lincls.py", *self.common, *self.recipe.probe.split(), "--seed", seed]
            words += [*(["--pretrained", encoder] if encoder else network or [])]
            call([*words, "--save-dir", folder, "--resume", "auto"], folder.with_suffix(".log"))
        return json.loads(results.read_text())["metrics"]["acc1"]


def call(words: list[object], log: Path) -> None:
    """Run `python WORDS` and append its output to `log`. Raises Failed if it fails."""
    process = python(Setup(torch.device("cpu"), False, log.parent), *words, log=log)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C or SIGTERM: let the run save a checkpoint
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SAVING)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait()
        raise
    if status:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise Failed(f"status {status}: {lines[-1]} (all output: {log})")


def outcome(folder: Path, seed: int, probe: float | None, earlier: bool) -> Outcome:
    """Return the measurements in a run folder. Raises Failed if some are missing."""
    lines, facts = log_lines(folder), record.read(folder)
    knn = [line["knn"] for line in lines if line.get("knn") is not None]
    trained = [line for line in lines if line.get("loss") is not None and line["epoch"] >= 0]
    speeds = [line["images_per_s"] for line in trained if "images_per_s" in line]
    if len(knn) < 2 or not speeds:
        raise Failed(f"{folder}: log.jsonl lacks k-NN before and after training, or the speed")
    return Outcome(
        seed=seed,
        knn_before=knn[0],
        knn=knn[-1],
        seconds=trained[-1]["time"],
        images_per_s=statistics.median(speeds),  # the first steps of a run are slower
        memory=facts.get("peak_memory") or float("nan"),
        probe=probe,
        before_this_call=earlier,
    )
