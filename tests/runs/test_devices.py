"""The choice of the device, and that the host never waits for the device between two log lines.

The tests need no accelerator: its availability is patched, and `Accelerator` simulates one.
"""

import contextlib
import functools
import math
import os
import traceback
from collections.abc import Iterator

import pytest
import torch
from conftest import in_process
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

import main_adco
from moco import devices, rng
from moco.config import Pretraining, replaced
from moco.data import loader
from moco.data.loader import Batch
from moco.encoder import networks
from moco.engine import log, precision, trainer
from moco.errors import InputError
from moco.launch import processes
from moco.loss import contrastive

pytestmark = pytest.mark.slow

META = torch.device("meta")


class OnDevice(Tensor):
    """A tensor that reports META as its device. Its values are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        layout = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        return Tensor._make_wrapper_subclass(cls, held.shape, device=META, **layout)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of the simulated accelerator")


class Accelerator(TorchDispatchMode):
    """A simulated accelerator. While `counts`, `waits` gets each operation at which the host waits.

    The host waits for numbers and truth values (`.item()`, `if x > 0`), for copies to the CPU, and
    for results whose shape depends on values, such as the entries that a mask selects. It also
    waits for copies from the CPU that are not queued (non_blocking). Operations on CPU tensors are
    not recorded. `wide` gets the operations that made a float64 tensor on the device.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.counts, self.waits, self.wide = False, [], set()
        tensor = torch.tensor  # patched below: a dispatch mode does not see its copies to a device

        def copied(data: object, device: torch.device | None = None, **more: object) -> Tensor:
            return tensor(data, **more).to(device or "cpu")

        monkeypatch.setattr(torch, "tensor", copied)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        makes = wanted is not None and torch.device(wanted) == META
        if not (makes or _any_on_device((*args, *kwargs.values()))):
            return function(*args, **kwargs)
        if self.counts and self.waits_for(function.overloadpacket.__name__, args, kwargs):
            own = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            where = [line for line in own if "/torch/" not in line]
            self.waits.append(f"{function} at {where[-1]}")
        held = {name: _held(value) for name, value in kwargs.items()} | (
            {"device": "cpu"} if makes else {}
        )
        plain = [_held(arg) for arg in args]
        result = function(*plain, **held)
        if wanted is not None and not makes:
            return result  # a copy on the CPU
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.wide.add(str(function))
        changed = (*args, *kwargs.values()) if function._schema.is_mutable else ()
        given = {id(_held(x)): x for x in changed if isinstance(x, Tensor)}
        return _on_device(result, given)

    def waits_for(self, name: str, args: tuple, kwargs: dict) -> bool:
        first = args[0] if args else None
        if name == "_to_copy":
            to = torch.device(kwargs.get("device") or first.device)
            return first.device != to and (to != META or not kwargs.get("non_blocking"))
        if name == "copy_":
            from_to = (args[1].device, first.device)
            queued = (len(args) > 2 and args[2]) or kwargs.get("non_blocking")
            return from_to[0] != from_to[1] and (from_to[1] != META or not queued)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            indices = [i for i in args[1] if i is not None]
            return any(i.dtype in (torch.bool, torch.uint8) or i.device != META for i in indices)
        return name in DEPENDS_ON_VALUES


DEPENDS_ON_VALUES = set(
    "_local_scalar_dense nonzero equal is_nonzero masked_select bincount argwhere".split()
)
DEPENDS_ON_VALUES |= set(
    "_unique _unique2 unique_dim unique_consecutive repeat_interleave histc allclose".split()
)


def _any_on_device(values: tuple) -> bool:
    for value in values:
        if isinstance(value, OnDevice):
            return True
        if isinstance(value, list | tuple) and _any_on_device(value):
            return True
    return False


def _held(value: object) -> object:
    if isinstance(value, OnDevice):
        return value.held
    return type(value)(map(_held, value)) if type(value) in (list, tuple) else value


def _on_device(result: object, given: dict[int, Tensor]) -> object:
    """Wrap a result's tensors as `OnDevice`; return one changed in place as the tensor `given`."""
    if isinstance(result, Tensor):
        return given[id(result)] if id(result) in given else OnDevice(result)
    return (
        type(result)(_on_device(x, given) for x in result)
        if type(result) in (list, tuple)
        else result
    )


class Generator(torch.Generator):
    """A random generator that reports META as its device; torch has none for META."""

    device = META


def generator(device: torch.device | str, *counters: int) -> torch.Generator:
    made = Generator() if torch.device(device) == META else torch.Generator(device)
    made.manual_seed(rng.key(*counters) >> 1)
    return made


class Log:
    """A stand-in for the log and the signal handler: counts from the end of the first step on."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def wait(self, seconds: float) -> None:
        pass

    def tick(self) -> None:
        self.accelerator.counts = True

    def agreed(self) -> str:
        return ""


STEPS = 50


@pytest.fixture
def accelerator(monkeypatch) -> Iterator[Accelerator]:
    """Simulate an accelerator on which scripts train for STEPS + 1 steps.

    All steps but the first count.
    """
    accelerator = Accelerator(monkeypatch)

    def steps(self: trainer.Trainer) -> None:
        self.steps_per_epoch = STEPS + 10
        batch, sizes = self.config.input.batch_per_process, [view.size for view in self.recipe]

        def batches() -> Iterator[Batch]:
            for _ in range((STEPS + 1) * self.config.optimizer.accumulation_steps):
                views = [
                    torch.randint(256, (batch, 3, size, size), dtype=torch.uint8) for size in sizes
                ]
                index, label = (
                    torch.randint(len(self.task.images), (batch,)),
                    torch.zeros(batch, dtype=torch.long),
                )
                *views, index, label = (
                    devices.to_device(x, self.device) for x in (*views, index, label)
                )
                yield Batch(views, index, label, [])

        stub = Log(accelerator)
        with contextlib.suppress(StopIteration):
            self._train_epoch(self.order.start // self.steps_per_epoch, batches(), stub, stub)
        accelerator.counts = False
        accelerator.losses = [loss.item() for _, loss, _ in self.health._recent]

    monkeypatch.setattr(devices, "for_process", lambda *_: META)
    monkeypatch.setattr(rng, "generator", generator)
    monkeypatch.setattr(trainer.Trainer, "train", steps)
    autocast = torch.autocast  # it does not support META; here it is off
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *amp, **more: autocast(kind.replace("meta", "cpu"), *amp, **more),
    )

    def small(arch: str, weights: None, num_classes: int, **more: bool) -> ResNet:
        net = ResNet(BasicBlock, [1, 1, 1, 1], **more)
        net.layer2, net.layer3, net.layer4 = nn.Conv2d(64, 512, 1), nn.Identity(), nn.Identity()
        net.fc = nn.Linear(512, num_classes)
        return net

    monkeypatch.setattr(networks.models, "get_model", small)
    with accelerator:
        yield accelerator


SMALL = "-a resnet18 --image-size 32 -b 8 -j 0 --epochs 200 --print-freq 1000".split()
SYNCO = "--mlp --moco-k 64 --n-hard 16 --warmup-epochs 0".split()
FNC = "--support-size 1 --memory-multiplier 4".split()
MOBY = "--queue 64 --mlp-dim 64".split()
SIX = "--n1 4 --n2 4 --n3 4 --n4 4 --n5 4 --n6 4".split()
METHODS = {
    "moco": ("main_synco", "--moco-k", 64, "--clip-grad", 1),
    "moco, accumulation": ("main_synco", "--moco-k", 64, "--accumulation-steps", 2),
    "moco, symmetric": (
        "main_synco",
        "--moco-k",
        64,
        "--symmetric",
        "--bn-splits-query",
        "--stem",
        "cifar",
    ),
    "mochi": ("main_synco", *SYNCO, "--n1", 8, "--n3", 4),
    "synco": ("main_synco", *SYNCO, *SIX, "--aug-plus", "--cos"),
    "adco": ("main_adco", "--cluster", 64, "--no-ad-init"),
    "adco, filling its bank": ("main_adco", "--cluster", 8 * (STEPS + 5)),
    "adco, symmetric": ("main_adco", "--cluster", 64, "--no-ad-init", "--sym"),
    "adco, multi-crop": ("main_adco", "--cluster", 64, "--no-ad-init", "--multi-crop"),
    "simclr": ("main_sogclr", "--loss-type", "simclr", "--mlp-dim", 32),
    "sogclr": ("main_sogclr", "--mlp-dim", 32, "--clip-grad", 1),
    "fnc, attract": ("main_fnc", *FNC),
    "fnc, eliminate": ("main_fnc", *FNC, "--fn-mode", "eliminate"),
    "fnc, off": ("main_fnc", *FNC, "--fn-mode", "off"),
    "fnc, no memory": ("main_fnc", "--support-size", 1, "--memory-multiplier", 0, "--fn-topk", 3),
    "moby": ("main_moby", *MOBY, "-a", "test_vit", "--online-drop-path", 0.2),
    "synco v2": (
        "main_moby",
        *MOBY,
        "--method",
        "synco",
        "--n-hard",
        16,
        *SIX,
        "--synthetic-first",
        0,
    ),
    "byol": ("main_moby", "--mlp-dim", 64, "--method", "byol"),
}


@pytest.mark.parametrize("method", METHODS)
def test_50_steps_without_a_log_line_do_not_wait_for_the_device(
    method, accelerator, shared_images, tmp_path
):
    name, *options = METHODS[method]
    status, _, err = in_process(
        name, shared_images, *SMALL, *options, "--save-dir", tmp_path / "run"
    )
    assert status == 0, err
    assert accelerator.waits == []
    assert accelerator.wide == set() or "fnc" in method, (
        "mps has no float64: see devices.widest_float"
    )
    passes = STEPS + 1 if "accumulation" not in method else 2 * STEPS + 2
    assert len(accelerator.losses) == passes and all(map(math.isfinite, accelerator.losses))


# Each function gets the numbers 0 to 3. `.tolist()` and `.numpy()` raise, and need no case here.
WAITS = {
    "item": lambda x: x[1].item(),
    "float": lambda x: float(x[1]),
    "if": lambda x: bool(x[1] > 0),
    "cpu": lambda x: x.cpu(),
    "copy": lambda x: torch.zeros(4, dtype=torch.long).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "masked write": lambda x: x.__setitem__(x > 1, x[:2].clone()),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "slice": lambda x: x[: x[2]],
    "repeat": lambda x: x.repeat_interleave(x),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "to": lambda x: torch.ones(2).to(x.device),
    "index from the host": lambda x: x[torch.tensor([1, 2])],
}


@pytest.mark.parametrize("wait", WAITS)
def test_waits_are_counted_on_the_device_and_not_on_the_cpu(wait, monkeypatch):
    host = torch.arange(4)
    with Accelerator(monkeypatch) as accelerator:
        device = host.to(META)
        accelerator.counts = True
        WAITS[wait](host)
        assert accelerator.waits == []
        WAITS[wait](device)
        assert len(accelerator.waits) == 1


def test_operations_without_a_wait_are_not_counted(monkeypatch):
    with Accelerator(monkeypatch) as accelerator:
        accelerator.counts = True
        x = torch.arange(4).to(META, non_blocking=True)
        y = torch.zeros(4, device=META, requires_grad=True)
        (y[x] * 2).masked_fill(x > 2, 0.0).sum().backward()
        x[:2].add_(1)
        assert x.device == y.grad.device == META and accelerator.waits == []
        accelerator.counts = False
        assert y.grad.cpu().tolist() == [2, 2, 2, 0] and x.cpu().tolist() == [1, 2, 2, 3]


def test_item_in_a_loss_is_found(accelerator, shared_images, tmp_path, monkeypatch):
    """`.item()` is added to a loss: each step is recorded, with the line."""
    own = contrastive.bank_info_nce
    monkeypatch.setattr(
        "moco.builder.moco.bank_info_nce",
        lambda *args: own(*args) * (1 if own(*args).item() else 0),
    )
    in_process("main_synco", shared_images, *SMALL, "--moco-k", 64, "--save-dir", tmp_path / "run")
    assert len(accelerator.waits) == STEPS and "_local_scalar_dense" in accelerator.waits[0]


# The choice of the device


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets which accelerator, and how many devices, torch seems to find."""

    def has(accelerator: str | None = None, **counts: int) -> None:
        for kind in ("cuda", "xpu", "mps"):
            monkeypatch.setattr(
                torch.get_device_module(kind),
                "device_count",
                functools.partial(counts.get, kind, 0),
            )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in counts)
        found = accelerator and torch.device(accelerator)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)

    for name in (
        *"RANK WORLD_SIZE LOCAL_RANK".split(),
        *(name for name in os.environ if name.startswith("SLURM_")),
    ):
        monkeypatch.delenv(name, raising=False)
    return has


def test_auto_takes_the_accelerator_that_torch_reports_or_else_the_cpu(machine):
    machine()
    assert devices.resolve_type("auto") == "cpu" and devices.for_process(
        "auto", None, 0
    ) == torch.device("cpu")
    for kind, n in (("cuda", 4), ("xpu", 2), ("mps", 1)):
        machine(kind, **{kind: n})
        assert devices.resolve_type("auto") == devices.resolve_type(kind) == kind
        assert devices.count(kind) == n and devices.count("cpu") == 0
        assert devices.for_process("auto", None, 0) == torch.device(kind, 0)
        assert devices.for_process("cpu", None, 0) == torch.device("cpu")
    machine("hpu")  # an accelerator that the scripts do not support
    assert devices.resolve_type("auto") == "cpu"


def test_a_process_takes_the_gpu_of_its_local_rank_or_of_its_option(machine):
    machine("cuda", cuda=4)
    assert [devices.for_process("cuda", None, rank).index for rank in range(6)] == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]
    assert devices.for_process("auto", 2, 0) == torch.device("cuda", 2)


def test_gpus_that_torch_cannot_use_do_not_count(machine, monkeypatch):
    machine(cuda=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as with an old driver
    assert devices.count("cuda") == 0


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_found_is_refused_in_one_line(kind, machine, script, shared_images):
    machine()
    for name in ("main_synco", "main_knn"):
        status, _, err = script(name, shared_images, *SMALL[:-4], "--device", kind)
        assert status == 2 and err.count("\n") == 1
        assert (
            f"error: --device {kind}: PyTorch finds no such device on this machine; leave it out"
            in err
        )


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_xpu_and_mps_support_a_single_process(kind, machine, monkeypatch):
    parsed = main_adco.parser()
    machine(kind, **{kind: 2 if kind == "xpu" else 1})

    def plan(*words: object) -> processes.Plan:
        return processes.plan(parsed.parse(["d", *map(str, words)]).launch)

    assert (plan().launcher, plan().world_size) == (
        "single",
        1,
    )  # though the script takes every CUDA GPU
    assert (
        plan("--multiprocessing-distributed", "--device", "cpu", "--nproc-per-node", 2).world_size
        == 2
    )
    refused = f"--device {kind}: supports a single process, and this run has 2; "
    refused += "start one process, or give --device cpu"
    nodes = ("--world-size", 2, "--rank", 1, "--dist-url", "tcp://10.0.0.1:9999")
    for words in (("--multiprocessing-distributed", "--nproc-per-node", 2), nodes)[kind == "mps" :]:
        with pytest.raises(InputError) as error:
            plan(*words)
        assert str(error.value) == refused
    with pytest.raises(InputError, match="nccl: needs CUDA GPUs, and this machine has none"):
        plan("--dist-backend", "nccl")
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 29501,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert plan().launcher == "torchrun"  # of one process


def test_device_cpu_trains_on_the_cpu_of_a_machine_with_gpus(
    machine, script, shared_images, tmp_path
):
    machine("cuda", cuda=2)
    options = (shared_images, *SMALL[:-4], "--moco-k", 64, "--epochs", 1, "--device", "cpu")
    status, out, err = script("main_synco", *options, "--save-dir", tmp_path / "run")
    assert status == 0, err
    assert "cpu, amp off" in out and "GPUs trains" not in out
    status, _, err = script("main_synco", *options, "--gpu", 0)
    assert status == 2 and "--gpu 0: --device cpu uses no GPU; leave one of the two out" in err
    status, _, err = script("main_synco", *options, "--dist-backend", "nccl")
    assert status == 2 and "nccl: needs CUDA GPUs, and --device is cpu" in err
    # the option may differ when the run is resumed
    resumed = (*options[:-4], "--epochs", 2, "--save-dir", tmp_path / "run", "--resume", "auto")
    machine()
    status, out, err = script("main_synco", *resumed)
    assert status == 0 and "resumed from" in out, err


def test_bf16_is_switched_off_only_on_a_slow_cpu(machine, monkeypatch, capsys):
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda: False)
    for kind, chosen, amp in (
        ("cuda", "auto", "bf16"),
        ("cuda", "cpu", "off"),
        ("mps", "auto", "bf16"),
        ("mps", "cpu", "off"),
    ):
        machine(kind, **{kind: 1})
        config = replaced(Pretraining(), amp="bf16", device=chosen)
        assert precision.disable_slow_amp(config).compute.amp == amp
        assert ("is slow on this CPU" in capsys.readouterr().out) == (amp == "off")


def test_fp16_is_refused_on_a_device_without_gradient_scaler():
    assert precision.scaler("fp16", torch.device("cpu")).is_enabled()
    assert (
        not precision.scaler("off", META).is_enabled()
        and not precision.scaler("bf16", META).is_enabled()
    )
    refused = "--amp fp16: PyTorch cannot scale gradients on meta; give --amp bf16 or off"
    with pytest.raises(InputError, match=refused):
        precision.scaler("fp16", META)


def test_fp16_is_accepted_on_an_accelerator_whose_gradients_torch_scales(monkeypatch):
    with Accelerator(monkeypatch):
        assert precision.scaler("fp16", META).is_enabled()


def test_compile_is_refused_if_torch_cannot_compile_for_the_device(monkeypatch):
    def fails(function):
        raise RuntimeError("no backend\nfor it")

    net = nn.Sequential(nn.Linear(2, 2))
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError) as error:
        precision.prepare_model(net, META, compile=True, recompute=False)
    refused = "--compile: PyTorch cannot compile for meta on this machine; leave it out"
    assert str(error.value) == f"{refused} (no backend for it)"
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert (
        precision.prepare_model(net, META, compile=True, recompute=False)[0]._compiled_call_impl
        is not None
    )


def test_an_operation_that_torch_lacks_on_an_accelerator_gives_a_one_line_error(
    machine, script, shared_images, tmp_path, monkeypatch
):
    machine("mps", mps=1)

    def lacks(args, device):
        assert device == torch.device("mps", 0)
        raise NotImplementedError(
            "The operator 'aten::_embedding_bag' is not implemented for the MPS device.\nSet ..."
        )

    monkeypatch.setattr("main_synco.worker", lacks)
    status, _, err = script(
        "main_synco", shared_images, *SMALL[:-4], "--save-dir", tmp_path / "run"
    )
    assert status == 2 and err.count("\n") == 1
    refused = "--device mps: PyTorch lacks an operation on this device; give --device cpu"
    assert f"{refused} (The operator 'aten::_embedding_bag'" in err


def test_no_float64_reaches_mps(monkeypatch):
    assert (
        devices.widest_float(torch.device("cpu"))
        == devices.widest_float(torch.device("cuda", 0))
        == torch.float64
    )
    monkeypatch.setattr(devices, "widest_float", lambda device: torch.float32)  # as on mps
    mean = log.Mean()
    for step in range(3):
        mean.add(
            {"loss": torch.tensor(float(step)), "found": (torch.tensor(step), torch.tensor(2))}
        )
    stacks, stack = [], torch.stack
    monkeypatch.setattr(
        torch, "stack", lambda tensors, *axis: stacks.append(stack(tensors, *axis)) or stacks[-1]
    )
    assert mean.read() == {"loss": 1.0, "found": 0.5}
    assert {made.dtype for made in stacks} == {torch.float32}


# The copy of the next batch on a separate stream


class Stream:
    """A stand-in for a CUDA stream that records its waits in `done`."""

    def __init__(self, name: str, done: list[str]):
        self.name, self.done = name, done

    def wait_stream(self, other: "Stream") -> None:
        self.done.append(f"{self.name} waits for {other.name}")


def test_on_cuda_batches_are_copied_on_a_stream_that_training_waits_for(monkeypatch):
    done: list[str] = []
    copies, training = Stream("copies", done), Stream("training", done)

    @contextlib.contextmanager
    def on(stream):
        done.append(f"on {stream.name}")
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    monkeypatch.setattr(
        devices, "to_device", lambda x, device: done.append(f"copy {tuple(x.shape)}") or x.clone()
    )
    monkeypatch.setattr(
        Tensor,
        "record_stream",
        lambda x, stream: done.append(f"{tuple(x.shape)} used by {stream.name}"),
    )
    batch = Batch(
        [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 5, 5)],
        torch.arange(2),
        torch.zeros(2),
        [(1, "bad")],
    )
    moved = loader._moved(batch, torch.device("cuda", 0), copies)
    shapes = ("(2, 3, 4, 4)", "(2, 3, 5, 5)", "(2,)", "(2,)")
    expected = [
        "on copies",
        *(f"copy {shape}" for shape in shapes),
        "end",
        "training waits for copies",
    ]
    assert done == [*expected, *(f"{shape} used by training" for shape in shapes)]
    for one, other in zip(
        (*batch.views, batch.index, batch.label),
        (*moved.views, moved.index, moved.label),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert moved.unreadable == batch.unreadable


def test_on_a_cpu_a_batch_is_not_copied():
    batch = Batch([torch.ones(2, 3, 4, 4)], torch.arange(2), torch.zeros(2), [])
    moved = loader._moved(batch, torch.device("cpu"), None)
    assert (
        moved.views[0] is batch.views[0]
        and moved.index is batch.index
        and moved.label is batch.label
    )


def test_copies_are_queued_on_cuda_only(monkeypatch):
    asked = []
    monkeypatch.setattr(
        Tensor, "to", lambda x, device, non_blocking: asked.append((device.type, non_blocking))
    )
    for kind in ("cuda", "xpu", "mps"):
        devices.to_device(torch.ones(1), torch.device(kind, 0))
    assert asked == [("cuda", True), ("xpu", False), ("mps", False)]
