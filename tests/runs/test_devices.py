"""Test the choice of the device.

The tests need no accelerator: its availability is patched, and `Accelerator` simulates one.
"""

import functools
import os

import pytest
import torch
from device_helpers import META, Accelerator
from run_helpers import INPUT
from torch import nn

import main_adco
from moco import devices
from moco.config import Pretraining, replaced
from moco.engine import log, precision
from moco.errors import InputError
from moco.launch import processes

pytestmark = pytest.mark.slow


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
        status, _, err = script(name, shared_images, *INPUT, "--device", kind)
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
    options = (shared_images, *INPUT, "--moco-k", 64, "--epochs", 1, "--device", "cpu")
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
    status, _, err = script("main_synco", shared_images, *INPUT, "--save-dir", tmp_path / "run")
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
