"""Test full runs from the shell: published commands, launchers, exact resume, and run folders."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import shell
from run_helpers import TINY, facts, load, log, same, succeeded, typed

from moco.encoder.resnets import resnet
from moco.engine import precision

pytestmark = pytest.mark.slow

PUBLISHED_SYNCO = (
    "main_synco.py -a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001 "
    "--multiprocessing-distributed --world-size 1 --rank 0 --mlp --moco-t 0.2 --aug-plus --cos "
    "--n-hard 1024 --n1 256 --n2 256 --n3 256 --n4 64 --n5 64 --n6 64"
).split()
PUBLISHED_LINCLS = (
    "main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained {} "
    "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0"
)
SMALL = ("-a", "resnet18", "--image-size", 32, "-j", 1, "--epochs", 1)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, str]:
    """Run SynCo's published command on photos with a small network for one epoch.

    Return the run folder and the output.
    """
    run = tmp_path_factory.mktemp("published")
    return run, succeeded(
        shell(*PUBLISHED_SYNCO, "photos", *SMALL, "--warmup-epochs", 0, "--save-dir", run)
    )


def test_published_pretraining_command_runs(published):
    run, out = published
    assert "total batch 256 = 256 per process x 1 process x 1 accumulation" in out
    assert re.search(r"lr after scaling 0\.03 .* 1 epoch x 4 steps", out)
    assert "960 synthetic negatives per query from epoch 0 on" in out
    lines = [line for line in log(run) if "loss" in line]
    assert lines[-1]["step"] == 4
    assert all(0 < line["loss"] < 20 for line in lines)


def test_run_folder_holds_log_events_and_options(published):
    run, _ = published
    line = log(run)[-1]
    assert {
        "epoch",
        "step",
        "loss",
        "acc1",
        "acc5",
        "lr",
        "images_per_s",
        "data_wait",
        "time",
    } <= line.keys()
    assert list(run.glob("events.out.tfevents*"))
    options = yaml.safe_load((run / "args.yaml").read_text())
    assert (options["n_hard"], options["moco_t"], options["arch"]) == (1024, 0.2, "resnet18")


def test_checkpoint_holds_the_contract(published):
    state = load(published[0] / "checkpoint_0000.pth.tar")
    assert {
        "epoch",
        "arch",
        "method",
        "args",
        "state_dict",
        "optimizer",
        "scaler",
        "progress",
    } <= state.keys()
    assert (state["epoch"], state["arch"], state["method"]) == (1, "resnet18", "synco")
    assert state["progress"] == {
        "step": 4,
        "samples": 1024,
        "seed": 0,
        "batch": 256,
        "steps_per_epoch": 4,
    }
    assert state["args"]["n_hard"] == 1024
    weights = state["state_dict"]
    for encoder in ("encoder_q", "encoder_k"):
        wanted = {
            f"module.{encoder}.{name}" for name in resnet("resnet18", 128, mlp=True).state_dict()
        }
        assert wanted == {name for name in weights if name.startswith(f"module.{encoder}.")}
    queue = weights["module.queue"]
    assert queue.shape == (65536, 128)
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(65536))
    assert weights["module.queue_ptr"].tolist() == [1024]


def test_published_probe_command_runs(published, tmp_path):
    checkpoint = published[0] / "checkpoint_0000.pth.tar"
    command = PUBLISHED_LINCLS.format(checkpoint).split()
    out = succeeded(shell(*command, "photos", *SMALL, "--save-dir", tmp_path))
    assert "120 of 120 backbone tensors matched" in out
    assert "bit-identical" in out
    acc1, acc5 = map(float, re.search(r"\* Acc@1 ([\d.]+) Acc@5 ([\d.]+)", out).groups())
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"method", "checkpoint", "protocol", "dataset", "metrics"} <= results.keys()
    assert (results["method"], results["protocol"]) == ("synco", "linear")
    assert results["metrics"]["acc1"] == pytest.approx(acc1 / 100, abs=1e-5)
    assert results["metrics"]["acc5"] == pytest.approx(acc5 / 100, abs=1e-5)
    assert 0 <= acc1 <= acc5 <= 100
    state = load(tmp_path / "model_best.pth.tar")
    source = load(checkpoint)["state_dict"]
    assert torch.equal(
        state["state_dict"]["module.layer4.1.conv2.weight"],
        source["module.encoder_q.layer4.1.conv2.weight"],
    )


def test_stopped_and_resumed_equals_never_stopped(script, shared_images, tmp_path):
    """Send SIGKILL after three of six epochs, and resume.

    Encoders, queue, optimizer and metrics are equal bit by bit.
    """
    command = (shared_images, *TINY, *typed("--epochs 6 --cos --mlp --warmup-epochs 2 --aug-plus"))
    command += ("--knn-every", 2, "-p", 2, "--accumulation-steps", 2, "--moco-m", 0.9, "--seed", 3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert script("main_synco", *command, "-j", 0, "--save-dir", whole)[0] == 0
    stopped = shell("main_synco.py", *command, "-j", 1, "--save-dir", parts, wait=False)
    third = parts / "checkpoint_0002.pth.tar"
    while not third.exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.02)
    stopped.kill()
    stopped.communicate()
    status, out, err = script(
        "main_synco", *command, "-j", 2, "--save-dir", parts, "--resume", "auto"
    )
    assert status == 0 and "resumed from" in out, err
    a, b = (load(run / "checkpoint_0005.pth.tar") for run in (whole, parts))
    for key in ("epoch", "state_dict", "optimizer", "scaler", "progress"):
        assert same(a[key], b[key]), key
    assert facts(whole) == facts(parts)
    # the first one is of the encoder before training
    assert [line["epoch"] for line in facts(whole) if "knn" in line] == [0, 1, 3, 5]
    assert not same(load(whole / "checkpoint_0004.pth.tar")["state_dict"], b["state_dict"])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(amp, script, images, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "disable_slow_amp", lambda config: config)  # a CPU can, slowly
    options = (images, *TINY, "-j", 0, "--epochs", 1, "--warmup-epochs", 0, "--amp", amp)
    assert script("main_synco", *options, "--save-dir", tmp_path)[0] == 0
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in log(tmp_path))
    weights = load(tmp_path / "checkpoint_0000.pth.tar")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert weights["module.queue"].dtype == torch.float32


@pytest.mark.parametrize(
    ("amp", "native", "used"),
    [("fp16", True, "off"), ("bf16", False, "off"), ("bf16", True, "bf16")],
)
def test_a_half_precision_recipe_on_a_cpu_computes_what_the_cpu_can(
    amp, native, used, script, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "recipe.yaml").write_text(f"amp: {amp}\n")
    options = (
        images,
        *TINY,
        *typed("-j 0 --epochs 1 --cfg {}", tmp_path / "recipe.yaml"),
        "--save-dir",
        tmp_path / "run",
    )
    status, out, err = script("main_synco", *options)
    assert status == 0, err
    assert out.count(f"--amp {amp} is slow on this CPU: this run computes in float32") == (
        used == "off"
    )
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["amp"] == used
    assert f"cpu, amp {used}" in out
    command = (
        images,
        *typed("-a resnet18 --image-size 32 -b 8 -j 0 --amp {}", amp),
        "--save-dir",
        tmp_path / "knn",
    )
    status, out, err = script("main_knn", *command, "--k", 3)
    assert status == 0, err
    assert json.loads((tmp_path / "knn" / "results.json").read_text())["settings"]["amp"] == used


def test_accumulation_takes_all_the_passes_of_a_step(script, shared_images, tmp_path):
    options = (shared_images, *TINY, "-j", 0, "--epochs", 1, "--accumulation-steps", 3)
    status, out, err = script("main_synco", *options, "--save-dir", tmp_path)
    assert status == 0, err
    assert "total batch 24 = 8 per process x 1 process x 3 accumulation" in out
    state = load(tmp_path / "checkpoint_0000.pth.tar")
    assert state["progress"] == {
        "step": 2,
        "samples": 48,
        "seed": 0,
        "batch": 24,
        "steps_per_epoch": 2,
    }
    assert state["state_dict"]["module.queue_ptr"].item() == 48


def rename(weights: dict, prefix: str) -> dict:
    return {
        prefix + name.removeprefix("module.encoder_q."): t
        for name, t in weights.items()
        if "encoder_q." in name
    }


STYLES = {
    "moco": lambda weights: {"epoch": 200, "arch": "resnet18", "state_dict": weights},
    "sogclr": lambda weights: {"state_dict": rename(weights, "module.base_encoder.")},
    "moby": lambda weights: {"model": rename(weights, "encoder.")},
    "bare": lambda weights: {
        name: t for name, t in rename(weights, "").items() if not name.startswith("fc.")
    },
}


@pytest.mark.parametrize("style", STYLES)
def test_probe_reads_what_the_field_publishes(style, script, published, shared_images, tmp_path):
    weights = load(published[0] / "checkpoint_0000.pth.tar")["state_dict"]
    file = tmp_path / f"{style}.pth"
    torch.save(STYLES[style](weights), file)
    options = (
        shared_images,
        *typed("-a resnet18 --image-size 32 -b 16 -j 0 --epochs 1 --pretrained {}", file),
    )
    status, out, err = script("main_lincls", *options, "--save-dir", tmp_path / "run")
    assert status == 0, err
    assert "120 of 120 backbone tensors matched" in out
    trained = load(tmp_path / "run" / "checkpoint.pth.tar")["state_dict"]
    for name in ("conv1.weight", "bn1.running_mean", "layer4.1.bn2.weight"):
        assert torch.equal(trained[f"module.{name}"], weights[f"module.encoder_q.{name}"])


def test_nothing_is_written_by_other_ranks_or_left_half_done(published):
    assert [name for name in os.listdir(published[0]) if name.startswith(".")] == [".lock"]
