"""Choose the number of epochs of benchmarks/family.py from a time limit."""

import math
import shutil
import time
from dataclasses import dataclass

import torch
from family_methods import Entry
from family_runs import Family, call
from gpu_setup import Failed, Method, Setup, duration, log_lines

from moco import devices
from moco.engine import record
from moco.errors import InputError
from moco.rng import Progress

SPARE = 0.15  # fraction of the time that is kept in reserve, because the speed varies
STEPS, WARM = 6, 1  # timed steps, and warm-up steps before them


@dataclass(frozen=True)
class Budget:
    """The measured costs of the methods.

    Attributes:
        step: seconds of a training step, by method.
        fill: steps before epoch 0, by method.
        start: seconds of a run without its steps: starting the script, k-NN and saving.
        steps_per_epoch: steps of an epoch.
        probe: seconds of a linear probe; 0 without one.
    """

    step: dict[str, float]
    fill: dict[str, int]
    start: float
    steps_per_epoch: int
    probe: float = 0.0

    def seconds(self, entries: list[Entry], seeds: int, epochs: int) -> float:
        """Return the expected seconds of all runs with this number of epochs."""
        per_seed = self.probe  # of the random encoder
        for entry in entries:
            steps = epochs * self.steps_per_epoch + self.fill[entry.name]
            per_seed += self.start + self.probe + steps * self.step[entry.name]
        return seeds * per_seed

    def epochs(self, entries: list[Entry], seeds: int, left: float, minutes: float) -> int:
        """Return the largest number of epochs that fits in `left` seconds.

        Raises InputError if not even one fits. `minutes` is the limit to name in the message.
        """
        fixed = self.seconds(entries, seeds, 0)
        each = self.seconds(entries, seeds, 1) - fixed
        fits = math.floor(((1 - SPARE) * left - fixed) / each)
        if fits < 1:
            needed = minutes + ((fixed + each) / (1 - SPARE) - left) / 60
            raise InputError(
                f"--minutes {minutes:g}: one epoch of {len(entries)} methods with {seeds} "
                f"seed{'s' * (seeds > 1)} takes about {math.ceil(needed)} minutes; raise "
                "--minutes, or give fewer --methods or --seeds"
            )
        print(
            f"{fits} epoch{'s' * (fits > 1)} of {len(entries)} methods: about "
            f"{self.seconds(entries, seeds, fits) / 60:.1f} minutes",
            flush=True,
        )
        return fits

    def facts(self) -> dict[str, object]:
        """Return the costs by name, for the results."""
        return {"step": self.step, "start": self.start, "probe": self.probe}


def calibrate(family: Family, entries: list[Entry]) -> Budget:
    """Return the costs of the methods.

    A step of each method is timed in this process, on random images. One run of the first method
    shows how long a script takes to start and how much slower its steps are with loading.
    """
    print("timing a step of each method, and one epoch of a run", flush=True)
    device = torch.device(devices.resolve_type("auto"))
    timed = {entry.name: time_step(family, entry, device) for entry in entries}
    first, folder = entries[0], family.out / "calibration"
    # an interrupted calibration is repeated
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    try:
        call(family.command(first, 0, 1, folder), folder.with_suffix(".log"))
    except Failed as error:
        raise InputError(f"{first.name}: the run of one epoch failed: {error}") from None
    full = time.monotonic() - began
    steps = record.read(folder)["steps_per_epoch"]
    trained = [line["time"] for line in log_lines(folder) if line.get("loss") is not None]
    slower = max(1.0, trained[-1] / steps / timed[first.name][0])
    probe = 0.0
    if family.probe:
        began = time.monotonic()
        family.probe_random(0)
        probe = time.monotonic() - began
    found = Budget(
        step={name: slower * seconds for name, (seconds, _) in timed.items()},
        fill={name: math.ceil(images / family.recipe.batch) for name, (_, images) in timed.items()},
        start=full - trained[-1],
        steps_per_epoch=steps,
        probe=probe,
    )
    each = [found.step[entry.name] * steps for entry in entries]
    print(
        f"an epoch takes {min(each):.0f} to {max(each):.0f} s; start, k-NN and end of a run take "
        f"{found.start:.0f} s" + f", and a linear probe {probe:.0f} s" * family.probe,
        flush=True,
    )
    return found


def time_step(family: Family, entry: Entry, device: torch.device) -> tuple[float, int]:
    """Return the seconds of a step of a method, and its number of images before epoch 0."""
    recipe = family.recipe
    options = [*recipe.options(1), *recipe.own_options(entry, 1)]
    method = Method(
        entry.script, options, Setup(device, False, family.out), images=max(64, recipe.batch)
    )
    count = len(method.recipe)
    crops = [
        torch.randint(0, 256, (recipe.batch, 3, 32, 32), dtype=torch.uint8) for _ in range(count)
    ]
    times = []
    for i in range(WARM + STEPS):
        progress = Progress(step=i)

        def step(progress: Progress = progress) -> None:
            method.backward(method.views(crops, progress), progress)
            method.update()

        seconds = duration(Setup(device, False, family.out), step)
        times += [seconds] * (i >= WARM)
    # take the shortest, because other programs slow down some steps; `calibrate` corrects for it
    return min(times), method.module.images_before_epoch_0
