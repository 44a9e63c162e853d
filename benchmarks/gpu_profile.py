"""Count and time the kernels of a step, and time the steps of CIFAR-10."""

from collections.abc import Callable
from functools import partial

import measure
import torch
from gpu_setup import Method, Notes, Setup, crops, duration, use_tf32
from gpu_speed import PROGRESS, Ours, batch, in_turns
from torch import Tensor, nn

from moco.builder import batch_norm


def profile(setup: Setup, notes: Notes) -> None:
    """Note the ten longest kernels of one MoCo step with its views."""
    ours = Ours("moco", setup, "bf16" if setup.cuda else "off", batch(setup))
    kernels(setup, notes, ours.method, ours.crops)


def cifar_profile(setup: Setup, notes: Notes) -> None:
    """Note the ten longest kernels of one step of configs/cifar10/moco.yaml with its views."""
    method = cifar(setup, "bf16" if setup.cuda else "off")
    kernels(
        setup, notes, method, [x.to(setup.device) for x in crops(method.recipe, setup.size(512, 8))]
    )


def kernels(setup: Setup, notes: Notes, method: Method, images: list[Tensor]) -> None:
    """Note the ten longest kernels of one step of `method` with its views.

    If all kernels together take much less time than the step, the GPU waits for Python.
    """
    torch.backends.cudnn.benchmark = True
    use_tf32(True)

    def full_step() -> None:
        method.backward(method.views(images, PROGRESS), PROGRESS)
        method.update()
        setup.synchronize()

    for _ in range(setup.size(3, 1)):
        full_step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * setup.cuda]) as found:
        full_step()
    events = list(found.key_averages())
    if setup.cuda:
        events = [event for event in events if "CUDA" in str(event.device_type)] or events

    def microseconds(event) -> float:
        names = (
            ("self_device_time_total", "self_cuda_time_total")
            if setup.cuda
            else ("self_cpu_time_total",)
        )
        return next(
            (float(time) for name in names if (time := getattr(event, name, None)) is not None), 0.0
        )

    total = sum(map(microseconds, events)) or 1.0
    events.sort(key=microseconds, reverse=True)
    notes["kernels' ms"], notes["kernels"] = total / 1e3, sum(event.count for event in events)
    notes["top ten"] = [
        {
            "ms": microseconds(e) / 1e3,
            "share": microseconds(e) / total,
            "calls": e.count,
            "kernel": e.key[:100],
        }
        for e in events[:10]
    ]
    notes["step and views ms"] = 1e3 * duration(setup, full_step)


def cifar(setup: Setup, amp: str, *more: str) -> Method:
    """Return the method of configs/cifar10/moco.yaml."""
    config = measure.ROOT / "configs" / "cifar10" / "moco.yaml"
    small = ["--image-size", 16, "--moco-k", 64] if setup.tiny else []
    return Method(
        "main_synco",
        ["--cfg", config, "-b", setup.size(512, 8), "--amp", amp, *small, *more],
        setup,
    )


def cifar_step(setup: Setup, notes: Notes) -> None:
    """Time a step of configs/cifar10/moco.yaml in fp32 and bf16, and the making of its views.

    From both, estimate the time of the 97 x 200 steps of a run.
    """
    torch.backends.cudnn.benchmark = True
    use_tf32(True)

    def candidate(amp: str, *more: str) -> tuple[Callable[[], None], Callable[[], object]]:
        method = cifar(setup, amp, *more)
        images = [x.to(setup.device) for x in crops(method.recipe, setup.size(512, 8))]
        views = method.views(images, PROGRESS)

        def train() -> None:
            method.backward(views, PROGRESS)
            method.update()

        return train, lambda: method.views(images, PROGRESS)

    precisions = ("off", "bf16") if setup.cuda else ("off",)
    candidates: dict[str, Callable[[], object]] = {}
    for amp in precisions:
        candidates[f"step, amp {amp}"], candidates["views"] = candidate(amp)
    candidates["step, one BN group"], _ = candidate(
        precisions[-1], "--bn-splits", "1", "--no-bn-splits-query"
    )
    for run in candidates.values():
        run()
    times = in_turns(setup, candidates, setup.size(10, 1))
    for name, seconds in measure.medians(times).items():
        notes[f"{name} ms"] = 1e3 * seconds
    best = min(measure.medians(times)[f"step, amp {amp}"] for amp in precisions)
    notes["minutes of 19,400 steps with views"] = (
        19400 * (best + measure.medians(times)["views"]) / 60
    )


def groups(setup: Setup, notes: Notes) -> None:
    """Time a batch norm in 8 groups by both ways of computing it, forward and backward.

    `moco.builder.batch_norm` uses the second way on a GPU if the groups have equal sizes.
    """
    dtype = torch.bfloat16 if setup.cuda else torch.float32
    shapes = ((512, 64, 32, 32), (512, 512, 4, 4), (256, 64, 112, 112), (256, 256, 14, 14))
    for shape in shapes if setup.cuda else ((16, 8, 4, 4),):
        norm = nn.BatchNorm2d(shape[1]).to(setup.device)
        batch_norm.split_batch_norm(norm, 8)
        x = torch.randn(shape, device=setup.device, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        x.requires_grad_()

        def run(name: str, norm: nn.Module = norm, x: Tensor = x) -> None:
            getattr(norm, name)(x, 8)[0].sum().backward()

        ways = ("group_by_group", "groups_as_channels")
        times = in_turns(setup, {name: partial(run, name) for name in ways}, setup.size(10, 1))
        for name, seconds in measure.medians(times).items():
            notes[f"{'x'.join(map(str, shape))}, {name} ms"] = 1e3 * seconds
