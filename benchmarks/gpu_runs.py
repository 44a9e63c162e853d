"""Check runs that need processes: NCCL, torchrun, stop and resume, and evaluations."""

import contextlib
import json
import os
import socket
from functools import partial
from pathlib import Path

import faults
import numpy as np
import torch
import torch.distributed as dist
from gpu_checks import FP32
from gpu_setup import (
    Notes,
    Setup,
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

from moco.files import to_json
from moco.methods import METHODS

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
    """Run the checks of `nccl` in a group of one process, and write the results to `file`."""
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
        """Check a second group on the CPU, with which ranks agree that a signal has arrived."""
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
    # without TF32, whose rounding depends on the order of sums, which may differ between the runs
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
    """Compare the last checkpoints of a killed and resumed SynCo run and of an uninterrupted one.

    The first run is killed inside an epoch and continued by --resume auto. All bits must be equal.
    """
    batch, epochs = setup.size(16, 8), 2
    synco = METHODS["synco"]
    options = [f"{synco.script}.py", *synco.tiny.split()]
    options += [data(setup), *script_options(setup), "-b", batch, "--epochs", epochs, "-p", 1]
    options += ["--save-every-steps", 2, "--keep", 2, "--resume", "auto"]
    options += ["--stem", "cifar"]  # no max-pooling: on a GPU its gradient sums in random order
    folders = {name: setup.work / f"synco-{name}" for name in ("uninterrupted", "stopped")}
    logs = {name: folder.with_suffix(".log") for name, folder in folders.items()}

    def start(name: str):
        words = ["-c", DETERMINISTIC, *options, "--save-dir", folders[name]]
        return python(
            setup, *words, log=logs[name], gpu=setup.cuda, CUBLAS_WORKSPACE_CONFIG=":4096:8"
        )

    uninterrupted, stopped = start("uninterrupted"), start("stopped")
    with killed_at_the_end(uninterrupted, stopped):
        until(
            lambda: any(folders["stopped"].glob("checkpoint_*_*.pth.tar")), stopped, logs["stopped"]
        )
        kill_tree(stopped.pid)
        stopped.wait()
        notes["killed after step"] = log_lines(folders["stopped"])[-1]["step"]
        again = start("stopped")
        with killed_at_the_end(again):
            finish(again, logs["stopped"])
        finish(uninterrupted, logs["uninterrupted"])
    last = {}
    for name, folder in folders.items():
        state = torch.load(
            max(folder.glob("checkpoint_*.pth.tar")), map_location="cpu", weights_only=True
        )
        last[name] = {
            key: state[key] for key in ("epoch", "state_dict", "optimizer", "scaler", "progress")
        }
    same = {
        key: faults.equal(last["uninterrupted"][key], last["stopped"][key])
        for key in last["uninterrupted"]
    }
    notes["steps"] = last["uninterrupted"]["progress"]["step"]
    for key, equal in same.items():
        notes.check(key, equal, "differs from the uninterrupted run")
    a, b = (last[name]["state_dict"] for name in ("stopped", "uninterrupted"))
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
    few = 2 / (4 * setup.size(16, 4))  # two images of val/, which may have equally near neighbours
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
