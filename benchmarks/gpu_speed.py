"""Stage 2 of benchmarks/gpu.py: measure the speed of training, of its parts and of plain MoCo."""

import time
from collections.abc import Callable
from functools import partial

import measure
import step as plain_step
import torch
from gpu_setup import (
    Method,
    Notes,
    Setup,
    config_and_builder,
    crops,
    duration,
    finish,
    log_lines,
    photographs,
    python,
    use_tf32,
)

from moco.augment import color, recipes
from moco.data import loader, sources
from moco.rng import Progress

MOCO = "--mlp --moco-t 0.2 --aug-plus --cos"
SYNCO = f"{MOCO} --warmup-epochs 0"
PROGRESS = Progress(epoch=1, step=1, steps_per_epoch=5000, epochs=200)


def arch(setup: Setup) -> str:
    """Return the architecture to measure."""
    return "resnet18" if setup.tiny else "resnet50"


def pixels(setup: Setup) -> int:
    """Return the width and height of a view."""
    return setup.size(224, 32)


def batch(setup: Setup) -> int:
    """Return the number of images in a batch."""
    return setup.size(256, 8)


def rows(setup: Setup) -> int:
    """Return the number of negatives in the queue or bank."""
    return setup.size(65536, 512)


def methods(setup: Setup) -> dict[str, tuple[str, str]]:
    """Return script and options of each method, with the sizes of its paper."""
    k = rows(setup)
    hard = "--n-hard 1024 --n1 256 --n2 256 --n3 256 --n4 64 --n5 64 --n6 64"
    if setup.tiny:
        hard = "--n-hard 16 --n1 4 --n2 4 --n3 4 --n4 1 --n5 1 --n6 1"
    return {
        "moco": ("main_synco", f"{MOCO} --moco-k {k}"),
        "synco": ("main_synco", f"{SYNCO} --moco-k {k} {hard}"),
        "adco": ("main_adco", f"--cluster {k} --no-ad-init"),
        "sogclr": ("main_sogclr", ""),
        # only two views, to compare FNC with the other methods; its config has ten
        "fnc": ("main_fnc", "--support-size 0 --memory-multiplier 16 --randaugment 0 0"),
    }


class Ours:
    """A method on views that are already on the device. A call takes one step."""

    def __init__(self, name: str, setup: Setup, amp: str, size: int, more: str = ""):
        script, options = methods(setup)[name]
        words = (
            f"-a {arch(setup)} --image-size {pixels(setup)} -b {size} --amp {amp} {options} {more}"
        )
        self.method = Method(script, words.split(), setup, images=max(64, size))
        images = crops(self.method.recipe, min(size, 32))
        images = [x.repeat(-(-size // len(x)), 1, 1, 1)[:size] for x in images]
        self.crops = [x.to(setup.device) for x in images]
        self.views = self.method.views(self.crops, PROGRESS)

    def __call__(self) -> None:
        """Take one step."""
        self.method.backward(self.views, PROGRESS)
        self.method.update()


class Plain:
    """Plain MoCo (see benchmarks/step.py). A call takes one step."""

    def __init__(self, setup: Setup, amp: str, size: int, tf32: bool):
        sizes = plain_step.Sizes(arch(setup), pixels(setup), size, rows(setup), amp)
        self.step = plain_step.Step("plain", sizes, setup.device)
        self.size, self.tf32 = size, tf32
        self.step.amp = amp

    def __call__(self) -> None:
        """Take one step."""
        use_tf32(self.tf32)
        self.step(self.size)
        use_tf32(True)


def ready(setup: Setup, make: Callable[[], object], notes: Notes, name: str) -> object | None:
    """Return the candidate that `make` builds, and note its peak memory.

    If it does not fit into the GPU's memory, note that and return None.
    """
    try:
        candidate = make()
        for _ in range(setup.size(2, 0)):
            candidate()  # cuDNN's search for algorithms needs additional memory
        memory = measure.peak_memory(candidate, setup.device)
    except torch.OutOfMemoryError as error:
        notes[f"{name}: out of memory"] = str(error)[:200]
        notes.failures.append(f"{name} does not fit into memory")
        return None
    notes[f"{name} GiB"] = memory / 2**30
    return candidate


def timed(
    setup: Setup, makers: dict[str, Callable[[], object]], notes: Notes, size: int
) -> measure.Times:
    """Build candidates and time them in turns.

    Note milliseconds per step, image pairs per second, and memory in addition to the weights.
    """
    torch.backends.cudnn.benchmark = True  # as in training
    # With torch's limit of 10 algorithms, the search in fp32 takes longer than all measurements.
    torch.backends.cudnn.benchmark_limit = 4
    use_tf32(True)
    candidates = {name: ready(setup, make, notes, name) for name, make in makers.items()}
    candidates = {name: candidate for name, candidate in candidates.items() if candidate}
    times = in_turns(setup, candidates, setup.size(2, 1))
    for name, seconds in measure.medians(times).items():
        notes[f"{name} ms"] = 1e3 * seconds
        notes[f"{name} pairs/s"] = size / seconds
    return times


def in_turns(setup: Setup, candidates: measure.Candidates, repeat: int) -> measure.Times:
    """Return the seconds per call of each candidate in each round.

    A round has `repeat` calls without synchronization, so that the GPU need not wait for Python.
    """

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
    """Note, by name, the ratio of the times of each pair of candidates."""
    for name, (above, below) in pairs.items():
        if above in times and below in times:
            notes[name] = measure.ratio(times[above], times[below])


def steps(setup: Setup, notes: Notes) -> None:
    """Time MoCo, SynCo and AdCo in bf16, and plain MoCo in fp32 with TF32 and in bf16."""
    size = batch(setup)
    mixed = "bf16" if setup.cuda else "off"
    makers = {
        "moco": partial(Ours, "moco", setup, mixed, size),
        "synco": partial(Ours, "synco", setup, mixed, size),
        "adco": partial(Ours, "adco", setup, mixed, size),
        "moco, one BN group": partial(Ours, "moco", setup, mixed, size, "--bn-splits 1"),
        "plain bf16": partial(Plain, setup, mixed, size, True),
        "plain fp32, TF32": partial(Plain, setup, "off", size, True),
    }
    times = timed(setup, makers, notes, size)
    over = {
        "synco over moco": ("synco", "moco"),
        "adco over moco": ("adco", "moco"),
        "moco, one BN group over moco": ("moco, one BN group", "moco"),
        "plain bf16 over moco": ("plain bf16", "moco"),
        "plain fp32 TF32 over moco": ("plain fp32, TF32", "moco"),
    }
    quotients(notes, times, over)


def fp32(setup: Setup, notes: Notes) -> None:
    """Time MoCo in bf16 and in fp32 with TF32, and plain MoCo in fp32 without TF32."""
    size = batch(setup)
    mixed = "bf16" if setup.cuda else "off"
    makers = {
        "moco": partial(Ours, "moco", setup, mixed, size),
        "moco fp32, TF32": partial(Ours, "moco", setup, "off", size),
        "plain fp32": partial(Plain, setup, "off", size, False),
    }
    times = timed(setup, makers, notes, size)
    over = {
        "moco fp32 TF32 over moco": ("moco fp32, TF32", "moco"),
        "plain fp32 over moco": ("plain fp32", "moco"),
    }
    quotients(notes, times, over)


def larger(setup: Setup, notes: Notes) -> None:
    """Time MoCo, SynCo and plain MoCo at twice the batch size."""
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
    """Time SogCLR and FNC, whose encoder trains on both views, relative to MoCo."""
    size = batch(setup)
    mixed = "bf16" if setup.cuda else "off"
    makers = {name: partial(Ours, name, setup, mixed, size) for name in ("moco", "sogclr", "fnc")}
    times = timed(setup, makers, notes, size)
    quotients(
        notes, times, {"sogclr over moco": ("sogclr", "moco"), "fnc over moco": ("fnc", "moco")}
    )


def views(setup: Setup, notes: Notes) -> None:
    """Time color operations, flip and normalization of two views of a batch on the device."""
    ours = Ours("moco", setup, "off", batch(setup))
    times = in_turns(
        setup, {"views": lambda: ours.method.views(ours.crops, PROGRESS)}, setup.size(5, 1)
    )
    seconds = measure.medians(times)["views"]
    notes["ms"], notes["pairs/s"] = 1e3 * seconds, batch(setup) / seconds


def files(setup: Setup) -> str:
    """Return a folder of JPEG files: on a GPU 5,120 names for 512 images, 20 steps of 256."""
    return str(photographs(setup.work / "photographs", setup.size(512, 4), setup.size(10, 4)))


def loading(setup: Setup, notes: Notes) -> None:
    """Time the loader alone, on JPEG files, with all workers and with one."""
    folder, size = files(setup), batch(setup)
    for workers, batches in ((setup.workers, setup.size(40, 1)), (1, setup.size(4, 1))):
        words = ["-b", size, "-j", workers, "--image-size", pixels(setup), *MOCO.split()]
        config, _ = config_and_builder("main_synco", words, setup.device)
        images = sources.scan(sources.find(folder, ("train",)), "train")
        # batches that may already be read when the first one arrives
        ahead = 4 * workers + 1 if setup.cuda else 1
        order = loader.TrainBatchSampler(len(images), size, 1, 0, 0, min(ahead, batches) + batches)
        found = loader.batches(
            images,
            loader.RandomCrops(recipes.from_settings(config.views), 0),
            order,
            config.input,
            setup.device,
        )
        for _ in range(min(ahead, batches)):
            next(found)
        seconds = duration(setup, lambda found=found: list(found))
        rate = batches * size / seconds
        notes["images/s" if workers > 1 or setup.tiny else "images/s of one worker"] = rate
        if workers == setup.workers:
            notes["workers"], notes["images/s per worker"] = workers, rate / workers


def end_to_end(setup: Setup, notes: Notes) -> None:
    """Run main_synco.py (MoCo v2) on JPEG files; note its speed and data wait from its log."""
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
    # without the start of the workers and cuDNN's search for algorithms
    lines = lines[len(lines) // 2 :]
    notes["pairs/s"] = sorted(line["images_per_s"] for line in lines)[len(lines) // 2]
    notes["share of time waited for data"] = sorted(line["data_wait"] for line in lines)[
        len(lines) // 2
    ]


def compiled(setup: Setup, notes: Notes) -> None:
    """Time MoCo in bf16 and its views with --compile and without. On a CPU that takes too long."""
    if not setup.cuda:
        notes["skipped"] = "runs on a GPU only"
        return
    size = batch(setup)
    makers = {
        "moco": partial(Ours, "moco", setup, "bf16", size),
        "compiled": partial(Ours, "moco", setup, "bf16", size, "--compile"),
    }
    quotients(
        notes, timed(setup, makers, notes, size), {"moco over compiled": ("moco", "compiled")}
    )
    color.compile_operations()  # cannot be undone, so this part is the last of its process
    views(setup, fused := Notes())
    notes["compiled views ms"] = fused["ms"]
