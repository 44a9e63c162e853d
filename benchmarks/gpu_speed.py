"""Stage 2 of benchmarks/gpu.py: how fast training is, whole and in parts, and what a plain MoCo takes."""

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import measure
import step as plain_step
import torch
from gpu_setup import (
    Method,
    Notes,
    Setup,
    crops,
    finish,
    log_lines,
    options_and_builder,
    photographs,
    python,
    use_tf32,
)
from torch import Tensor

from moco.augment import color, recipes
from moco.data import datasets, loader
from moco.rng import Progress

MOCO = "--mlp --moco-t 0.2 --aug-plus --cos"
SYNCO = f"{MOCO} --warmup-epochs 0"
PROGRESS = Progress(epoch=1, step=1, steps_per_epoch=5000, epochs=200)


def arch(setup: Setup) -> str:
    return "resnet18" if setup.tiny else "resnet50"


def pixels(setup: Setup) -> int:
    return setup.size(224, 32)


def batch(setup: Setup) -> int:
    return setup.size(256, 8)


def rows(setup: Setup) -> int:
    """Negatives in the queue or bank."""
    return setup.size(65536, 512)


def methods(setup: Setup) -> dict[str, tuple[str, str]]:
    """Scripts and options at the published sizes."""
    k = rows(setup)
    hard = "--n-hard 1024 --n1 256 --n2 256 --n3 256 --n4 64 --n5 64 --n6 64"
    if setup.tiny:
        hard = "--n-hard 16 --n1 4 --n2 4 --n3 4 --n4 1 --n5 1 --n6 1"
    return {
        "moco": ("main_synco", f"{MOCO} --moco-k {k}"),
        "synco": ("main_synco", f"{SYNCO} --moco-k {k} {hard}"),
        "adco": ("main_adco", f"--cluster {k} --no-ad-init"),
        "sogclr": ("main_sogclr", ""),
        # its two first views; ten would be another task
        "fnc": ("main_fnc", "--support-size 0 --memory-multiplier 16 --randaugment 0 0"),
    }


class Ours:
    """One step of a method on views that lie ready."""

    def __init__(self, name: str, setup: Setup, amp: str, size: int, more: str = ""):
        script, options = methods(setup)[name]
        words = f"-a {arch(setup)} --image-size {pixels(setup)} -b {size} --amp {amp} {options} {more}"
        self.method = Method(script, words.split(), setup, images=max(64, size))
        images = crops(self.method.recipe, min(size, 32))
        images = [x.repeat(-(-size // len(x)), 1, 1, 1)[:size] for x in images]
        self.crops = [x.to(setup.device) for x in images]
        self.views = self.method.views(self.crops, PROGRESS)

    def __call__(self) -> None:
        self.method.backward(self.views, PROGRESS)
        self.method.update()


class Plain:
    """One step of MoCo written plainly (benchmarks/step.py)."""

    def __init__(self, setup: Setup, amp: str, size: int, tf32: bool):
        options = {
            "arch": arch(setup),
            "size": pixels(setup),
            "batch": size,
            "k": rows(setup),
            "amp": amp,
        }
        self.step, self.size, self.tf32 = (
            plain_step.Step("plain", Namespace(**options), setup.device),
            size,
            tf32,
        )
        self.step.amp = amp

    def __call__(self) -> None:
        use_tf32(self.tf32)
        self.step(self.size)
        use_tf32(True)


def ready(setup: Setup, make: Callable[[], object], notes: Notes, name: str) -> object | None:
    """The candidate, or None with a note if it does not fit into the GPU's memory."""
    try:
        candidate = make()
        for _ in range(setup.size(2, 0)):
            candidate()  # the search for algorithms takes memory of its own
        memory = measure.peak_memory(candidate, setup.device)
    except torch.OutOfMemoryError as error:
        notes[f"{name}: out of memory"] = str(error)[:200]
        notes.failures.append(f"{name} does not fit into memory")
        return None
    notes[f"{name} GiB"] = memory / 2**30
    return candidate


def timed(setup: Setup, makers: dict[str, Callable[[], object]], notes: Notes, size: int) -> measure.Times:
    """Build candidates, let them take turns, and note milliseconds, image pairs per second and memory beyond the weights."""
    torch.backends.cudnn.benchmark = True  # as in training
    use_tf32(True)
    candidates = {name: ready(setup, make, notes, name) for name, make in makers.items()}
    candidates = {name: candidate for name, candidate in candidates.items() if candidate}
    times = in_turns(setup, candidates, setup.size(3, 1))
    for name, seconds in measure.medians(times).items():
        notes[f"{name} ms"] = 1e3 * seconds
        notes[f"{name} pairs/s"] = size / seconds
    return times


def in_turns(setup: Setup, candidates: measure.Candidates, repeat: int) -> measure.Times:
    """Seconds of each candidate in each round. `repeat` calls in a row, in which the GPU need not wait for Python."""

    def seconds(run: Callable[[], object]) -> float:
        setup.synchronize()
        began = time.perf_counter()
        for _ in range(repeat):
            run()
        setup.synchronize()
        return (time.perf_counter() - began) / repeat

    turns = {name: partial(seconds, run) for name, run in candidates.items()}
    return measure.side_by_side(turns, setup.size(5, 1), setup.device, warm=setup.size(1, 0))


def quotients(notes: Notes, times: measure.Times, pairs: dict[str, tuple[str, str]]) -> None:
    for name, (above, below) in pairs.items():
        if above in times and below in times:
            notes[name] = measure.ratio(times[above], times[below])


def steps(setup: Setup, notes: Notes) -> None:
    """MoCo, SynCo and AdCo in bf16 next to plain MoCo in fp32 with TF32 and without, and in bf16."""
    size = batch(setup)
    mixed = "bf16" if setup.cuda else "off"
    makers = {
        "moco": partial(Ours, "moco", setup, mixed, size),
        "synco": partial(Ours, "synco", setup, mixed, size),
        "adco": partial(Ours, "adco", setup, mixed, size),
        "moco fp32": partial(Ours, "moco", setup, "off", size),
        "plain fp32, TF32": partial(Plain, setup, "off", size, True),
        "plain fp32": partial(Plain, setup, "off", size, False),
        "plain bf16": partial(Plain, setup, mixed, size, True),
    }
    times = timed(setup, makers, notes, size)
    over = {
        "synco over moco": ("synco", "moco"),
        "adco over moco": ("adco", "moco"),
        "plain fp32 TF32 over moco": ("plain fp32, TF32", "moco"),
        "plain fp32 over moco": ("plain fp32", "moco"),
        "plain bf16 over moco": ("plain bf16", "moco"),
    }
    quotients(notes, times, over)


def larger(setup: Setup, notes: Notes) -> None:
    """The same at twice the batch."""
    size = 2 * batch(setup)
    mixed = "bf16" if setup.cuda else "off"
    makers = {
        "moco": partial(Ours, "moco", setup, mixed, size),
        "synco": partial(Ours, "synco", setup, mixed, size),
        "plain fp32, TF32": partial(Plain, setup, "off", size, True),
    }
    times = timed(setup, makers, notes, size)
    over = {
        "synco over moco": ("synco", "moco"),
        "plain fp32 TF32 over moco": ("plain fp32, TF32", "moco"),
    }
    quotients(notes, times, over)


def others(setup: Setup, notes: Notes) -> None:
    """SogCLR and FNC, whose encoder trains on both views, relative to MoCo."""
    size = batch(setup)
    mixed = "bf16" if setup.cuda else "off"
    makers = {name: partial(Ours, name, setup, mixed, size) for name in ("moco", "sogclr", "fnc")}
    times = timed(setup, makers, notes, size)
    quotients(notes, times, {"sogclr over moco": ("sogclr", "moco"), "fnc over moco": ("fnc", "moco")})


def views(setup: Setup, notes: Notes) -> None:
    """Two views of a batch of crops on the device: colour operations, flip, normalization."""
    ours = Ours("moco", setup, "off", batch(setup))
    times = in_turns(setup, {"views": lambda: ours.method.views(ours.crops, PROGRESS)}, setup.size(5, 1))
    seconds = measure.medians(times)["views"]
    notes["ms"], notes["pairs/s"] = 1e3 * seconds, batch(setup) / seconds


def files(setup: Setup) -> str:
    """A folder of JPEG files: on a GPU 5,120 names of 512 photographs, 20 steps of 256."""
    return str(photographs(setup.work / "photographs", setup.size(512, 4), setup.size(10, 4)))


def loading(setup: Setup, notes: Notes) -> None:
    """Batches of crops from JPEG files alone, by all workers and by one."""
    folder, size = files(setup), batch(setup)
    for workers, batches in ((setup.workers, setup.size(40, 1)), (1, setup.size(4, 1))):
        words = ["-b", size, "-j", workers, "--image-size", pixels(setup), *MOCO.split()]
        args, _ = options_and_builder("main_synco", words, setup.device)
        images = datasets.scan(datasets.find(folder, ("train",)), "train")
        ahead = 4 * workers + 1 if setup.cuda else 1  # what may have been read while the first batch was waited for
        order = loader.TrainOrder(len(images), size, 1, 0, 0, min(ahead, batches) + batches)
        found = loader.batches(images, loader.RandomCrops(recipes.of_options(args), 0), order, args, setup.device)
        for _ in range(min(ahead, batches)):
            next(found)
        seconds = _seconds(setup, lambda found=found: list(found))
        rate = batches * size / seconds
        notes["images/s" if workers > 1 or setup.tiny else "images/s of one worker"] = rate
        if workers == setup.workers:
            notes["workers"], notes["images/s per worker"] = workers, rate / workers


def _seconds(setup: Setup, run: Callable[[], object]) -> float:
    setup.synchronize()
    began = time.perf_counter()
    run()
    setup.synchronize()
    return time.perf_counter() - began


def end_to_end(setup: Setup, notes: Notes) -> None:
    """main_synco.py (MoCo v2) on JPEG files: images per second by its own log, and the share of time waited for data."""
    folder, log = setup.work / "end-to-end", setup.work / "end-to-end.log"
    words = [
        "main_synco.py",
        files(setup),
        "-a",
        arch(setup),
        "--image-size",
        pixels(setup),
        "-b",
        batch(setup),
    ]
    words += ["-j", setup.workers, *MOCO.split(), "--moco-k", rows(setup), "-p", setup.size(5, 1)]
    words += ["--epochs", setup.size(4, 2), "--save-every", 1000, "--save-dir", folder]
    words += ["--amp", "bf16" if setup.cuda else "off"]
    finish(python(setup, *words, log=log, gpu=setup.cuda), log)
    lines = [line for line in log_lines(folder) if "images_per_s" in line]
    lines = lines[len(lines) // 2 :]  # the first ones search for algorithms and start the workers
    notes["pairs/s"] = sorted(line["images_per_s"] for line in lines)[len(lines) // 2]
    notes["share of time waited for data"] = sorted(line["data_wait"] for line in lines)[len(lines) // 2]


def profile(setup: Setup, notes: Notes) -> None:
    """The ten kernels of one MoCo step, views included, that take the longest."""
    torch.backends.cudnn.benchmark = True
    use_tf32(True)
    ours = Ours("moco", setup, "bf16" if setup.cuda else "off", batch(setup))

    def whole() -> None:
        ours.views = ours.method.views(ours.crops, PROGRESS)
        ours()
        setup.synchronize()

    for _ in range(setup.size(3, 1)):
        whole()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * setup.cuda]) as found:
        whole()
    events = list(found.key_averages())
    if setup.cuda:
        events = [event for event in events if "CUDA" in str(event.device_type)] or events

    def microseconds(event) -> float:
        names = ("self_device_time_total", "self_cuda_time_total") if setup.cuda else ("self_cpu_time_total",)
        return next((float(getattr(event, name)) for name in names if hasattr(event, name)), 0.0)

    total = sum(map(microseconds, events)) or 1.0
    events.sort(key=microseconds, reverse=True)
    notes["kernels' ms"] = total / 1e3
    notes["top ten"] = [
        {
            "ms": microseconds(e) / 1e3,
            "share": microseconds(e) / total,
            "calls": e.count,
            "kernel": e.key[:100],
        }
        for e in events[:10]
    ]
    notes["step and views ms"] = 1e3 * _seconds(setup, whole)


def cifar_step(setup: Setup, notes: Notes) -> None:
    """A step of configs/cifar10/moco.yaml with views ready, and its views, in fp32 and bf16: what 97 x 200 steps are made of."""
    torch.backends.cudnn.benchmark = True
    use_tf32(True)
    config = measure.ROOT / "configs" / "cifar10" / "moco.yaml"
    size, small = setup.size(512, 8), ["--image-size", 16, "--moco-k", 64] if setup.tiny else []

    def candidate(amp: str, *more: str) -> tuple[Callable[[], Tensor], Callable[[], object]]:
        method = Method("main_synco", ["--cfg", config, "-b", size, "--amp", amp, *small, *more], setup)
        images = [x.to(setup.device) for x in crops(method.recipe, size)]
        views = method.views(images, PROGRESS)

        def train() -> None:
            method.backward(views, PROGRESS)
            method.update()

        return train, lambda: method.views(images, PROGRESS)

    precisions = ("off", "bf16") if setup.cuda else ("off",)
    candidates: dict[str, Callable[[], object]] = {}
    for amp in precisions:
        candidates[f"step, amp {amp}"], candidates["views"] = candidate(amp)
    for run in candidates.values():
        run()
    times = in_turns(setup, candidates, setup.size(10, 1))
    for name, seconds in measure.medians(times).items():
        notes[f"{name} ms"] = 1e3 * seconds
    best = min(seconds for name, seconds in measure.medians(times).items() if name != "views")
    notes["minutes of 19,400 steps with views"] = 19400 * (best + measure.medians(times)["views"]) / 60


def compiled(setup: Setup, notes: Notes) -> None:
    """MoCo in bf16 by --compile next to without, and its views. A CPU has no time for it."""
    if not setup.cuda:
        notes["skipped"] = "on a GPU only"
        return
    size = batch(setup)
    makers = {
        "moco": partial(Ours, "moco", setup, "bf16", size),
        "compiled": partial(Ours, "moco", setup, "bf16", size, "--compile"),
    }
    quotients(notes, timed(setup, makers, notes, size), {"moco over compiled": ("moco", "compiled")})
    color.fuse()  # for the rest of this process, of which this is the last part
    views(setup, fused := Notes())
    notes["compiled views ms"] = fused["ms"]


PARTS = {
    "steps": (steps, 0),
    "CIFAR-10 step": (cifar_step, 0),
    "end to end": (end_to_end, 0),
    "loading": (loading, 0),
    "views": (views, 0),
    "profile": (profile, 0),
    "others": (others, 0),
    "larger batch": (larger, 0),
    "compiled": (compiled, 0),
}
