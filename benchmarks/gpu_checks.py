"""Stage 1 of benchmarks/gpu.py: check that the GPU computes what the CPU computes.

It also checks that a killed run resumes to the same bits. Without a GPU, the CPU is compared with
itself, which tests the code of the checks; the differences are then (nearly) 0.
"""

import contextlib
import dataclasses
import importlib
import traceback
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from gpu_setup import Method, Notes, Setup, crops, relative, use_tf32
from torch import Tensor, nn

from moco.augment import color, recipes
from moco.loss import hardest as search
from moco.loss import synthetic
from moco.methods import METHODS
from moco.rng import COLOR, Progress

FP32, MIXED = 1e-4, 2e-2  # relative differences allowed
PROGRESS = Progress(seed=0, epoch=1, step=3, steps_per_epoch=10, epochs=20)

SPLITS = {"main_synco": " --bn-splits 4", "main_adco": " --bn-splits 4"}
TRIED = {
    name: (method.script, method.tiny + SPLITS.get(method.script, ""))
    for name, method in METHODS.items()
}
TRIED["symmetric"] = ("main_synco", f"{TRIED['mocov2'][1]} --symmetric --bn-splits-query")


def method(
    name: str,
    setup: Setup,
    device: torch.device | None = None,
    amp: str = "off",
    more: str = "",
    contiguous=False,
) -> Method:
    """Build a method with a small smooth network, with the same weights on any device."""
    script, options = TRIED[name]
    size = setup.size(64, 32 if "-a test_vit" in options else 16)  # patches of 16 pixels
    common = f"-a resnet18 --image-size {size} -b {setup.size(32, 8)} --epochs 20 --amp {amp}"
    found = Method(script, f"{common} {options} {more}".split(), setup, device, contiguous)
    smooth(found.module)
    return found


def smooth(net: nn.Module) -> None:
    """Replace each ReLU of `net` by a GELU, and its max-pooling by one that takes every n-th pixel.

    The gradient of a ReLU jumps at 0, and that of max-pooling jumps if two values are equal.
    Rounding moves a few of the millions of values across such a point. Gradients in fp32 then
    differ from those in fp64 by up to 1 %, on any device.
    """
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, EveryNth(child.stride))


class EveryNth(nn.Module):
    """A layer that keeps every n-th row and column of images [B, C, H, W]."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        """Return the reduced images."""
        return x[..., :: self.n, :: self.n]


def layers(setup: Setup, notes: Notes) -> None:
    """Compare the gradients of single layers in channels last with those in the default format.

    AvgPool2d is measured, but not checked, because our networks have none. On an H200 (torch 2.11),
    the gradients of networks with AvgPool2d and GELU differed by 30 % between the formats.
    """
    use_tf32(False)
    modules = {
        "Conv2d": nn.Conv2d(32, 32, 3, 2, 1),
        "BatchNorm2d": nn.BatchNorm2d(32),
        "ReLU": nn.ReLU(),
        "GELU": nn.GELU(),
        "MaxPool2d": nn.MaxPool2d(3, 2, 1),
        "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
        "AvgPool2d": nn.AvgPool2d(3, 2, 1),
    }
    for name, layer in modules.items():
        layer.to(setup.device)
        found = []
        for form in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(16, 32, 16, 16, generator=torch.Generator().manual_seed(0))
            x = x.to(setup.device).contiguous(memory_format=form).requires_grad_()
            y = layer(x)
            y.backward(
                torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(setup.device)
            )
            found.append([y, x.grad])
        if name == "AvgPool2d":
            notes[f"{name}, not checked"] = relative(*found)
        else:
            notes.at_most(name, relative(*found), FP32)


@contextlib.contextmanager
def same_choices(found: list[Tensor], replay: bool) -> Iterator[None]:
    """Give two devices the same synthetic negatives.

    The random generators of devices differ, so draw on the CPU and move the draws. Rounding may
    change the order of almost equally similar queue entries. So append the hardest entries of the
    first run to `found`, and use the same ones in the second run (`replay`).
    """
    draw, waiting = synthetic.draw, list(found)

    def draw_on_cpu(config, n, dim, generator, *dtype):
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        draws = draw(config, n, dim, on_cpu, *dtype)
        names = [field.name for field in dataclasses.fields(draws)]
        return type(draws)(**{name: getattr(draws, name).to(generator.device) for name in names})

    def the_same(similarity, n_hard):
        if replay:
            return waiting.pop(0).to(similarity.device)
        found.append(search.hardest(similarity, n_hard).cpu())
        return found[-1].to(similarity.device)

    modules = [
        importlib.import_module(f"moco.{name}")
        for name in ("loss.synthetic", "builder.moco", "builder.synco", "builder.moby")
    ]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, function in (("draw", draw_on_cpu), ("hardest", the_same)):
                if name in vars(module):
                    stack.enter_context(mock.patch.object(module, name, function))
        yield


# One step of each method.


def step(name: str, setup: Setup, notes: Notes) -> None:
    """Compare the losses, gradients and buffers of one step on the GPU with those on the CPU.

    In bf16 and fp16, compare the loss only, and check that it falls in several steps.
    """
    use_tf32(False)
    batch = setup.size(32, 8)
    first = method(name, setup, torch.device("cpu"))
    images, chosen = crops(first.recipe, batch), []
    with same_choices(chosen, replay=False):
        loss = first.backward(first.views(images, PROGRESS), PROGRESS)
    gradients = first.gradients()
    first.update()

    other = method(name, setup)
    with same_choices(chosen, replay=True):
        again = other.backward(other.views(images, PROGRESS), PROGRESS)
    notes["loss"] = float(loss)
    notes.at_most("fp32 loss", relative([again], [loss]), FP32)
    notes.at_most("fp32 gradient", relative(other.gradients(), gradients), FP32)
    other.update()
    mine, theirs = other.buffers(), first.buffers()
    floats = [key for key in theirs if theirs[key].is_floating_point()]
    difference = {key: relative([mine[key]], [theirs[key]]) for key in floats}
    notes.at_most("fp32 buffers", max(difference.values(), default=0.0), FP32)

    for amp in ("bf16", "fp16") if setup.cuda else ("off",):
        mixed = method(name, setup, amp=amp)
        # A scale at which no gradient overflows. Training finds one by skipping steps.
        mixed.scaler = torch.amp.GradScaler(
            setup.device.type, init_scale=1024.0, enabled=amp == "fp16"
        )
        with same_choices(chosen, replay=True):
            found = mixed.backward(mixed.views(images, PROGRESS), PROGRESS)
        mixed.scaler.unscale_(mixed.optimizer)
        # A surrogate loss may be near 0, where a relative difference is meaningless.
        notes.at_most(f"{amp} loss", abs(float(found - loss)) / max(1.0, abs(float(loss))), MIXED)
        notes[f"{amp} gradient"] = relative(mixed.gradients(), gradients)
        notes.check(
            f"{amp} gradient finite", all(bool(g.isfinite().all()) for g in mixed.gradients())
        )
        losses = falls(method(name, setup, amp=amp), images, setup.size(20, 4))
        notes[f"{amp} losses"] = [losses[0], losses[-1]]
        finite = bool(np.isfinite(losses).all())
        notes.check(
            f"{amp} falls",
            finite and losses[-1] < losses[0],
            f"is false: the loss went from {losses[0]:.4g} to {losses[-1]:.4g}",
        )


def falls(method: Method, images: list[Tensor], steps: int) -> list[float]:
    """Return the losses of several steps on one batch, with queue and key encoder held fixed."""
    views, before = method.views(images, PROGRESS), method.buffers()
    losses = []
    for _ in range(steps):
        losses.append(method.backward(views, PROGRESS))
        method.update(follow=False)
        for name, buffer in method.module.named_buffers():
            buffer.copy_(before[name])
    return torch.stack(losses).double().cpu().tolist()


# Different ways to compute the same step.


def loss_and_gradients(
    method: Method, images: list[Tensor], passes: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and gradients of a step, in one or several passes over parts of the batch."""
    losses = []
    for micro in range(passes):
        progress = dataclasses.replace(PROGRESS, micro=micro)
        part = [x.chunk(passes)[micro] for x in images]
        losses.append(method.backward(method.views(part, progress), progress, passes))
    return torch.stack(losses).mean(), method.gradients()


def agree(
    notes: Notes, name: str, mine: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]
) -> None:
    """Check that two losses agree, and their gradients."""
    notes.at_most(f"{name} loss", relative([mine[0]], [theirs[0]]), FP32)
    notes.at_most(f"{name} gradient", relative(mine[1], theirs[1]), FP32)


def accumulation(setup: Setup, notes: Notes) -> None:
    """Compare a step of two passes on the GPU with the same on the CPU."""
    use_tf32(False)
    for name in ("mocov2", "byol"):
        first = method(name, setup, torch.device("cpu"))
        images = crops(first.recipe, 2 * setup.size(32, 8))
        mine = loss_and_gradients(method(name, setup), images, 2)
        agree(notes, name, mine, loss_and_gradients(first, images, 2))


def checkpointing(setup: Setup, notes: Notes) -> None:
    """Compare a step with --grad-checkpoint with one without."""
    use_tf32(False)
    for name in ("mocov2", "byol"):
        plain, recomputed = method(name, setup), method(name, setup, more="--grad-checkpoint")
        images = crops(plain.recipe, setup.size(32, 8))
        agree(
            notes, name, loss_and_gradients(recomputed, images), loss_and_gradients(plain, images)
        )


def channels_last(setup: Setup, notes: Notes) -> None:
    """Compare the memory format used on a GPU (channels last) with the default one."""
    use_tf32(False)
    for name in ("mocov2", "simclr"):
        plain, last = method(name, setup, contiguous=True), method(name, setup)
        images = crops(plain.recipe, setup.size(32, 8))
        weights = [
            p
            for p in last.module.parameters()
            if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1
        ]
        form = torch.channels_last if setup.cuda else torch.contiguous_format
        notes.check(f"{name} format", all(p.is_contiguous(memory_format=form) for p in weights))
        agree(notes, name, loss_and_gradients(last, images), loss_and_gradients(plain, images))


def compiled(setup: Setup, notes: Notes) -> None:
    """Compare networks and color operations with --compile and without.

    On a CPU the networks are only traced, because compiling takes too long.
    """
    use_tf32(False)
    if setup.cuda:
        one = method("mocov2", setup, more="--compile")
    else:
        one = method("mocov2", setup)
        for child in one.module.children():
            child.compile(backend="aot_eager")
    plain = method("mocov2", setup)
    images = crops(plain.recipe, setup.size(32, 8))
    expected, views = loss_and_gradients(plain, images), plain.views(images, PROGRESS)
    if setup.cuda:
        color.compile_operations()
        pairs = zip(one.views(images, PROGRESS), views, strict=True)
        notes.at_most("views", max(float((a - b).abs().max()) for a, b in pairs), FP32)
    agree(notes, "mocov2", loss_and_gradients(one, images), expected)


def views(setup: Setup, notes: Notes) -> None:
    """Compare each recipe's views on the GPU with those on the CPU, for small and large images."""
    for size, batch in ((64, 64), (224, 32)) if setup.cuda else ((32, 4), (144, 2)):
        for name in recipes.RECIPES:
            recipe = recipes.recipe(name, size, views=min(2, len(recipes.RECIPES[name])))
            images = crops(recipe, batch, seed=1)
            for tf32 in (False, True):
                use_tf32(tf32)
                worst = 0.0
                for i, (x, view) in enumerate(zip(images, recipe, strict=True)):
                    a, b = (
                        color.augment(x.to(d), view, PROGRESS.generator(COLOR, "cpu", 0, i))
                        for d in (setup.device, "cpu")
                    )
                    worst = max(worst, float((a.cpu() - b).abs().max()))
                if tf32:
                    notes[f"{name} {size} with TF32"] = worst  # training uses TF32; not checked
                else:
                    notes.at_most(f"{name} {size}", worst, FP32)
    use_tf32(False)


def waits(setup: Setup, notes: Notes) -> None:
    """Check that a training step never waits for the GPU: PyTorch raises an error if it would.

    With several steps queued, the GPU need not wait for Python either. A CPU has nothing to check.
    """
    if not setup.cuda:
        notes["skipped"] = "runs on a GPU only"
        return
    for name in TRIED:
        trained = method(name, setup, amp="bf16")
        images = crops(trained.recipe, 32)
        waited = ""
        for mode in (
            "default",
            "error",
        ):  # the first step may wait, for instance for cuDNN's search
            torch.cuda.set_sync_debug_mode(mode)
            try:
                trained.backward(trained.views(images, PROGRESS), PROGRESS)
                trained.update()
            except RuntimeError as error:
                waited = f"waits: {error} {''.join(traceback.format_tb(error.__traceback__)[-2:])}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
        notes.check(name, not waited, waited)


def hardest(setup: Setup, notes: Notes) -> None:
    """Check that GPU and CPU find the same hardest negatives, given similarities without ties."""
    for columns, n_hard in ((4096, 64), (65536, 1024)) if setup.cuda else ((4096, 64),):
        draw = torch.Generator().manual_seed(0)
        similarity = (
            torch.stack([torch.randperm(columns, generator=draw) for _ in range(32)]).float()
            / columns
        )
        found = search.hardest(similarity.to(setup.device), n_hard).cpu()
        expected = search.hardest(similarity, n_hard)
        notes.check(f"{n_hard} of {columns}", torch.equal(found, expected))
