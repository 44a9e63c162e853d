"""Stage 1 of benchmarks/gpu.py: check that the GPU computes what the CPU computes.

It also checks that a killed run resumes to the same bits. Without a GPU, the CPU is compared with
itself: this tests the code of the checks, and the differences are 0, or nearly.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import socket
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import faults
import numpy as np
import torch
import torch.distributed as dist
from gpu_setup import (
    Method,
    Notes,
    Setup,
    crops,
    finish,
    image_folder,
    kill_tree,
    killed_at_the_end,
    log_lines,
    python,
    relative,
    results,
    until,
    use_tf32,
)
from torch import Tensor, nn

from moco.augment import color, recipes
from moco.files import to_json
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
    size = setup.size(64, 32 if script == "main_moby" else 16)  # patches of 16 pixels
    common = f"-a resnet18 --image-size {size} -b {setup.size(32, 8)} --epochs 20 --amp {amp}"
    found = Method(script, f"{common} {options} {more}".split(), setup, device, contiguous)
    smooth(found.module)
    return found


def smooth(net: nn.Module) -> None:
    """Replace each ReLU of `net` by a GELU, and its max-pooling by one that takes every n-th pixel.

    The gradient of a ReLU jumps at 0, and that of max-pooling where two values are equal. Rounding
    carries a few of the millions of values over such a place, and gradients in fp32 then differ
    from those in fp64 by up to 1 %, on any device.
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

    AvgPool2d is measured, but not checked: our networks have none. When networks with it and with
    GELU ran on an H200 (torch 2.11), their gradients differed by 30 % between the two formats.
    """
    use_tf32(False)
    kinds = {
        "Conv2d": nn.Conv2d(32, 32, 3, 2, 1),
        "BatchNorm2d": nn.BatchNorm2d(32),
        "ReLU": nn.ReLU(),
        "GELU": nn.GELU(),
        "MaxPool2d": nn.MaxPool2d(3, 2, 1),
        "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
        "AvgPool2d": nn.AvgPool2d(3, 2, 1),
    }
    for name, layer in kinds.items():
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
    draw, hardest, waiting = synthetic.draw, synthetic.hardest, list(found)

    def draw_on_cpu(kind, n, dim, generator, *dtype):
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        draws = draw(kind, n, dim, on_cpu, *dtype)
        names = [field.name for field in dataclasses.fields(draws)]
        return type(draws)(**{name: getattr(draws, name).to(generator.device) for name in names})

    def the_same(similarity, n_hard):
        if replay:
            return waiting.pop(0).to(similarity.device)
        found.append(hardest(similarity, n_hard).cpu())
        return found[-1].to(similarity.device)

    modules = [
        importlib.import_module(f"moco.{name}")
        for name in ("loss.synthetic", "builder.moco", "builder.moby")
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
    """Compare networks and colour operations with --compile and without.

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
        color.fuse()
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
        found = synthetic.hardest(similarity.to(setup.device), n_hard).cpu()
        notes.check(
            f"{n_hard} of {columns}", torch.equal(found, synthetic.hardest(similarity, n_hard))
        )


# NCCL, and the scripts under torchrun.


def nccl(setup: Setup, notes: Notes) -> None:
    """Check the collectives of training, DDP and SyncBN in a process that torchrun starts."""
    found, log = setup.work / "collectives.json", setup.work / "collectives.log"
    words = ("benchmarks/gpu.py", "--collectives", found, "--device", setup.device.type)
    finish(python(setup, *torchrun(), *words, log=log, gpu=setup.cuda), log)
    for name, value in json.loads(found.read_text()).items():
        if isinstance(value, bool):
            notes.check(name, value)
        elif isinstance(value, float):
            notes.at_most(name, value, FP32)
        else:
            notes[name] = value


def torchrun() -> list[object]:
    """Return the words of a command that starts one process by torchrun, with a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["-m", "torch.distributed.run", "--nnodes", 1, "--nproc-per-node", 1]
    return [*words, "--master-addr", "127.0.0.1", "--master-port", port]


def collectives(file: Path, device: torch.device) -> None:
    """Run the checks of `nccl` in a group of one process, and write their results to `file`."""
    found: dict[str, object] = {}
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        use_tf32(False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    found["backend"] = backend
    x = torch.arange(12.0, device=device).view(4, 3)

    def attempt(name: str, check) -> None:
        try:
            found[name] = check()
        except Exception as error:
            found[name] = False
            found[f"{name}: error"] = f"{type(error).__name__}: {error}"[:500]

    def gather() -> bool:
        from moco.distributed import _all_gather_rows

        out = torch.empty_like(x)
        _all_gather_rows(out, x)
        return torch.equal(out, x)

    def exchange() -> bool:
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, [4], [4])
        return torch.equal(out, x)

    def reduce() -> bool:
        out = x.clone()
        dist.all_reduce(out)
        return torch.equal(out, x)

    def broadcast() -> bool:
        objects, out = [{"a": 1}], x.clone()
        dist.broadcast_object_list(objects)
        dist.broadcast(out, 0)
        return objects == [{"a": 1}] and torch.equal(out, x)

    def flag() -> bool:
        """Check a second group on the CPU, by which ranks agree that a signal has come."""
        group, value = dist.new_group(backend="gloo"), torch.ones(1, dtype=torch.int)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group, async_op=True).wait()
        return int(value) == 1

    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 36, 4),
        ]
        return nn.Sequential(*layers).to(device)

    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(net: nn.Module) -> list[Tensor]:
        net(images).square().sum().backward()
        return [p.grad for p in net.parameters()]

    def ddp() -> float:
        net = nn.parallel.DistributedDataParallel(network(), broadcast_buffers=False)
        return relative(gradients(net), gradients(network()))

    def sync_bn() -> float:
        return relative(
            gradients(nn.SyncBatchNorm.convert_sync_batchnorm(network())), gradients(network())
        )

    def sync_bn_kernels() -> float:
        """Call SyncBN's kernels directly, because torch uses them with several processes only."""
        from torch.nn.modules._functions import SyncBatchNorm

        def run(how) -> list[Tensor]:
            y = images.clone().requires_grad_()
            weight, bias = (
                torch.full((3,), v, device=device, requires_grad=True) for v in (1.5, 0.5)
            )
            mean, variance = torch.zeros(3, device=device), torch.ones(3, device=device)
            out = how(y, weight, bias, mean, variance)
            (out * torch.arange(8.0, device=device)).square().sum().backward()
            return [out, y.grad, weight.grad, bias.grad, mean, variance]

        group = dist.group.WORLD
        synced = run(lambda y, w, b, m, v: SyncBatchNorm.apply(y, w, b, m, v, 1e-5, 0.1, group, 1))
        return relative(
            synced,
            run(lambda y, w, b, m, v: nn.functional.batch_norm(y, m, v, w, b, True, 0.1, 1e-5)),
        )

    checks = [gather, exchange, reduce, broadcast, flag, ddp]
    if device.type == "cuda":
        checks += [sync_bn, sync_bn_kernels]
    for check in checks:
        attempt(check.__name__.replace("_", " "), check)
    dist.barrier()
    dist.destroy_process_group()
    file.write_text(to_json(found))


def data(setup: Setup) -> Path:
    """Return a folder of small images for the scripts."""
    return image_folder(
        setup.work / "images", 4, setup.size(64, 12), setup.size(16, 4), setup.size(64, 32)
    )


def script_options(setup: Setup) -> list[object]:
    """Return the options that all scripts get."""
    return ["-a", "resnet18", "--image-size", setup.size(64, 16), "-j", setup.size(2, 0)]


def under_torchrun(setup: Setup, notes: Notes) -> None:
    """Compare main_sogclr.py, which uses SyncBN, under torchrun with the same without torchrun.

    Both use accumulation and --grad-checkpoint.
    """
    batch = setup.size(32, 8)
    words = [
        "main_sogclr.py",
        data(setup),
        *script_options(setup),
        "--epochs",
        1,
        "--mlp-dim",
        64,
        "-p",
        1,
    ]
    words += ["-b", batch, "--accumulation-steps", 2, "--grad-checkpoint"]
    folders = {name: setup.work / f"sogclr-{name}" for name in ("torchrun", "plain")}
    logs = {name: folder.with_suffix(".log") for name, folder in folders.items()}
    # without TF32, whose rounding depends on the order of sums, which may differ between both
    start = partial(python, setup, gpu=setup.cuda, NVIDIA_TF32_OVERRIDE="0")
    plain = start(*words, "--save-dir", folders["plain"], log=logs["plain"])
    with killed_at_the_end(plain):
        by_torchrun = start(
            *torchrun(), *words, "--save-dir", folders["torchrun"], log=logs["torchrun"]
        )
        with killed_at_the_end(by_torchrun):
            finish(by_torchrun, logs["torchrun"])
            finish(plain, logs["plain"])
    losses = {
        name: [line["loss"] for line in log_lines(folder) if "loss" in line]
        for name, folder in folders.items()
    }
    notes["losses"] = losses["torchrun"]
    notes.check("steps", len(losses["torchrun"]) == len(losses["plain"]) > 0, f"differ: {losses}")
    first = abs(losses["torchrun"][0] - losses["plain"][0]) / max(1.0, abs(losses["plain"][0]))
    notes.at_most("first loss", first, FP32)


# Stop and resume.

# cuDNN's search may choose different algorithms in different processes, so disable it permanently.
DETERMINISTIC = """
import runpy, sys
import moco, torch
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cudnn.deterministic = True
type(torch.backends.cudnn).benchmark = property(lambda self: False, lambda self, value: None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def resume(setup: Setup, notes: Notes) -> None:
    """Compare the last checkpoints of a killed and resumed SynCo run and of one never stopped.

    The first is killed inside an epoch and continued by --resume auto. All bits must be equal.
    """
    batch, epochs = setup.size(16, 8), 2
    options = faults.METHODS["synco"].split()
    options += [data(setup), *script_options(setup), "-b", batch, "--epochs", epochs, "-p", 1]
    options += ["--save-every-steps", 2, "--keep", 2, "--resume", "auto"]
    options += ["--stem", "cifar"]  # no max-pooling: on a GPU its gradient sums in random order
    folders = {name: setup.work / f"synco-{name}" for name in ("whole", "stopped")}
    logs = {name: folder.with_suffix(".log") for name, folder in folders.items()}

    def start(name: str):
        words = ["-c", DETERMINISTIC, *options, "--save-dir", folders[name]]
        return python(
            setup, *words, log=logs[name], gpu=setup.cuda, CUBLAS_WORKSPACE_CONFIG=":4096:8"
        )

    whole, stopped = start("whole"), start("stopped")
    with killed_at_the_end(whole, stopped):
        until(
            lambda: any(folders["stopped"].glob("checkpoint_*_*.pth.tar")), stopped, logs["stopped"]
        )
        kill_tree(stopped.pid)
        stopped.wait()
        notes["killed after step"] = log_lines(folders["stopped"])[-1]["step"]
        again = start("stopped")
        with killed_at_the_end(again):
            finish(again, logs["stopped"])
        finish(whole, logs["whole"])
    last = {}
    for name, folder in folders.items():
        state = torch.load(
            max(folder.glob("checkpoint_*.pth.tar")), map_location="cpu", weights_only=True
        )
        last[name] = {
            key: state[key] for key in ("epoch", "state_dict", "optimizer", "scaler", "progress")
        }
    same = {key: faults.equal(last["whole"][key], last["stopped"][key]) for key in last["whole"]}
    notes["steps"] = last["whole"]["progress"]["step"]
    for key, equal in same.items():
        notes.check(key, equal, "differs from the run never stopped")
    a, b = (last[name]["state_dict"] for name in ("stopped", "whole"))
    floats = [name for name in b if b[name].is_floating_point()]
    notes["relative difference"] = relative(
        [a[name] for name in floats], [b[name] for name in floats]
    )


# Evaluations.


def knn(setup: Setup, notes: Notes) -> None:
    """Compare features and accuracy of main_knn.py, with a random encoder, on GPU and CPU."""
    evaluated = both(setup, "knn", ["main_knn.py", "--k", 5, 20], dump=True)
    for split in ("train", "val"):
        a, b = (
            torch.from_numpy(np.load(dump / f"{split}_features.npy"))
            for dump in evaluated["features"]
        )
        notes.at_most(f"{split} features", relative([a], [b]), FP32)
    mine, theirs = evaluated["metrics"]
    notes["top-1"] = [mine, theirs]
    few = 2 / (4 * setup.size(16, 4))  # two images of val/, whose neighbours may be equally near
    notes.at_most("top-1 difference", max(abs(mine[key] - theirs[key]) for key in theirs), few)


def probe(setup: Setup, notes: Notes) -> None:
    """Compare losses and accuracy of main_lincls.py, with a random encoder, on GPU and CPU."""
    words = ["main_lincls.py", "-b", setup.size(32, 8), "--epochs", setup.size(3, 1), "-p", 1]
    words += ["--lr", 0.002]  # at which the loss of a random encoder's features falls
    evaluated = both(setup, "probe", words)
    mine, theirs = evaluated["metrics"]
    notes["top-1"] = [mine.get("acc1"), theirs.get("acc1")]
    few = 2 / (4 * setup.size(16, 4))
    notes.at_most("top-1 difference", abs(mine["acc1"] - theirs["acc1"]), few)
    losses = [
        [line["loss"] for line in log_lines(folder) if "loss" in line]
        for folder in evaluated["folders"]
    ]
    for place, name in ((0, "first loss"), (-1, "last loss")):
        notes[name] = [found[place] for found in losses]
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(*losses, strict=True))
    # features differ by 1e-6, and the difference grows with the steps
    notes.at_most("loss difference", worst, 1e-3)


def both(setup: Setup, name: str, words: list[object], dump: bool = False) -> dict[str, list]:
    """Run an evaluation on GPU and CPU at once; return metrics, run folders and features."""
    found: dict[str, list] = {"metrics": [], "folders": [], "features": []}
    processes = []
    script, *options = words
    with contextlib.ExitStack() as stack:
        for place, gpu in (("gpu", True), ("cpu", False)) if setup.cuda else (("cpu", False),):
            folder, log = setup.work / f"{name}-{place}", setup.work / f"{name}-{place}.log"
            more = ["--dump-features", folder.with_name(f"{folder.name}-features")] if dump else []
            command = [
                script,
                data(setup),
                *script_options(setup),
                *options,
                "--save-dir",
                folder,
                *more,
            ]
            process = python(setup, *command, log=log, gpu=gpu, NVIDIA_TF32_OVERRIDE="0")
            stack.enter_context(killed_at_the_end(process))
            processes.append((process, log, folder))
            found["features"] += more[1:]
        for process, log, folder in processes:
            finish(process, log)
            found["metrics"].append(results(folder))
            found["folders"].append(folder)
    return found if setup.cuda else {key: 2 * value for key, value in found.items()}


# name: (check, lane). The checks of a lane run in order; lanes run at the same time.
PARTS = {f"step {name}": (partial(step, name), i % 4) for i, name in enumerate(TRIED)}
PARTS |= {
    "views": (views, 0),
    "hardest": (hardest, 0),
    "accumulation": (accumulation, 0),
    "checkpointing": (checkpointing, 0),
    "channels_last": (channels_last, 0),
    "resume": (resume, 1),
    "k-NN": (knn, 1),
    "compile": (compiled, 2),
    "NCCL": (nccl, 3),
    "torchrun": (under_torchrun, 3),
    "probe": (probe, 3),
    "waits": (waits, 1),
    "layers": (layers, 1),
}
