"""Test full runs from the shell: published commands, launchers, exact resume, and run folders."""

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import own_lines, shell, write_images
from PIL import Image
from run_helpers import facts, load, log, same, succeeded

from moco import distributed
from moco.config import MEAN, STD, Probing, replaced
from moco.data import folders
from moco.encoder.resnets import resnet
from moco.engine import precision
from moco.evaluate import classifier

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
TINY = (
    "-a",
    "resnet18",
    "--image-size",
    32,
    "-b",
    8,
    "--moco-k",
    64,
    "--moco-dim",
    16,
    "--n-hard",
    8,
    "--n1",
    2,
    "--n3",
    2,
    "--n4",
    2,
)


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
    assert "total batch 256 = 256 per process x 1 processes x 1 accumulation" in out
    assert re.search(r"lr after scaling 0\.03 .* 1 epochs x 4 steps", out)
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
    command = (
        shared_images,
        *TINY,
        "--epochs",
        6,
        "--cos",
        "--mlp",
        "--warmup-epochs",
        2,
        "--aug-plus",
    )
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
    assert {line["epoch"] for line in facts(whole) if "knn" in line} == {1, 3, 5}
    assert not same(load(whole / "checkpoint_0004.pth.tar")["state_dict"], b["state_dict"])


def test_probe_resumes_exactly(script, shared_images, tmp_path):
    def probe(*options: object) -> str:
        status, out, err = script("main_lincls", *command, *options)
        assert status == 0, err
        return out

    command = (
        shared_images,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--lr",
        1,
        "--schedule",
        2,
        "--seed",
        1,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    probe("--epochs", 3, "--save-dir", whole)
    probe("--epochs", 1, "--save-dir", parts)
    probe("--epochs", 3, "--save-dir", parts, "--resume", parts / "checkpoint.pth.tar")
    a, b = (load(run / "checkpoint.pth.tar") for run in (whole, parts))
    for key in ("epoch", "state_dict", "optimizer", "best_acc1"):
        assert same(a[key], b[key]), key
    assert facts(whole) == facts(parts)
    tested = probe("-e", "--resume", parts / "checkpoint.pth.tar", "--save-dir", tmp_path / "test")
    results = json.loads((tmp_path / "test" / "results.json").read_text())["metrics"]
    assert results == json.loads((parts / "results.json").read_text())["metrics"]
    assert "* Acc@1" in tested


@pytest.mark.parametrize("clip", [0, 0.01])
def test_heads_of_several_rates_are_to_the_bit_those_of_each_alone(
    clip, script, shared_images, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "moco.cli.values.in_range", lambda kind, interval: kind
    )  # with which it diverges at once

    def probe(name: str, *options: object) -> tuple[dict, str]:
        status, out, err = script("main_lincls", *command, *options, "--save-dir", tmp_path / name)
        assert status == 0, err
        return json.loads((tmp_path / name / "results.json").read_text())["metrics"], out

    command = (shared_images, "-a", "resnet18", "--image-size", 32, "-b", 8, "-j", 0, "--epochs", 2)
    command += ("--schedule", 1, "--wd", 1e-3, "--clip-grad", clip)
    rates = (3.0, 0.1)
    together, out = probe(
        "all", "--lr", *rates, 1e20
    )  # which diverges, and must not take the others with it
    weights = load(tmp_path / "all" / "checkpoint.pth.tar")["state_dict"]
    alone = {}
    for i, lr in enumerate(rates):
        alone[lr], _ = probe(str(i), "--lr", lr)
        head = load(tmp_path / str(i) / "checkpoint.pth.tar")["state_dict"]
        for part in ("weight", "bias"):
            mine = weights[f"module.fc.{i}.{part}"]
            torch.testing.assert_close(
                mine, head[f"module.fc.{part}"], rtol=0, atol=0, equal_nan=True
            )
        assert together[f"acc1_lr{lr:g}"] == alone[lr]["acc1"]
    assert not torch.equal(weights["module.fc.0.weight"], weights["module.fc.1.weight"])
    status, _, err = script(
        "main_lincls", *command, "--lr", 1e20, "--save-dir", tmp_path / "diverged"
    )
    assert status == 2 and "the loss, or a weight, is nan" in err
    best = alone[together["best_lr"]]
    assert (
        best
        == {name: together[name] for name in ("acc1", "acc5")}
        == max(alone.values(), key=lambda m: (m["acc1"], m["acc5"]))
    )
    assert "lr 3: " in out and "lr 0.1: " in out
    assert (
        probe(
            "again", "--lr", *rates, 1e20, "-e", "--resume", tmp_path / "all" / "checkpoint.pth.tar"
        )[0]
        == together
    )


def test_a_probe_tries_decays_too_and_chooses_on_held_out_images(script, shared_images, tmp_path):
    def probe(name: str, *options: object) -> tuple[dict, str]:
        status, out, err = script("main_lincls", *command, *options, "--save-dir", tmp_path / name)
        assert status == 0, err
        return json.loads((tmp_path / name / "results.json").read_text())["metrics"], out

    command = (
        shared_images,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--epochs",
        2,
        "--schedule",
        1,
    )
    command += ("--val-from-train", 0.25)
    together, out = probe("all", "--lr", 0, 0.03, "--wd", 0, 0.1)
    assert (
        "12 images of train/ are held out to choose the classifier on, 36 are trained on" in out
        and "lr 0.03 wd 0.1: " in out
    )
    state = load(tmp_path / "all" / "checkpoint.pth.tar")
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0, 0.1] * 2
    alone, _ = probe("alone", "--lr", 0.03, "--wd", 0.1)
    head = load(tmp_path / "alone" / "checkpoint.pth.tar")["state_dict"]["module.fc.weight"]
    assert torch.equal(state["state_dict"]["module.fc.3.weight"], head)
    assert not torch.equal(state["state_dict"]["module.fc.2.weight"], head)
    assert together["acc1_lr0.03_wd0.1"] == alone["acc1"]
    assert (
        together["best_lr"] == 0.03
        and together["acc1"] == together[f"acc1_lr0.03_wd{together['best_wd']:g}"]
    )
    assert together["held_out_acc1"] >= alone["held_out_acc1"] > 0.5


def test_a_probe_is_chosen_on_held_out_images_and_not_on_val(
    script, shared_images, tmp_path, monkeypatch
):
    def test(self, folder):
        order = self.settings if folder is self.held_out else self.settings[::-1]
        return {setting: {"acc1": 0.1 * (i + 1), "acc5": 1.0} for i, setting in enumerate(order)}

    monkeypatch.setattr(classifier.ClassifierTask, "_test", test)
    command = (
        shared_images,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--epochs",
        1,
        "--lr",
        1,
        2,
        3,
    )
    for options, best, top1 in (((), 1, 0.3), (("--val-from-train", 0.25), 3, 0.1)):
        run = tmp_path / str(best)
        assert script("main_lincls", *command, *options, "--save-dir", run)[0] == 0
        found = json.loads((run / "results.json").read_text())["metrics"]
        assert (found["best_lr"], found["acc1"]) == (best, pytest.approx(top1))
        assert load(run / "model_best.pth.tar")["best_acc1"] == pytest.approx(0.3)


def test_a_diverging_classifier_does_not_stop_the_others_in_half_precision(
    script, shared_images, tmp_path, monkeypatch
):
    monkeypatch.setattr(precision, "disable_slow_amp", lambda config: config)
    monkeypatch.setattr(
        "moco.cli.values.in_range", lambda kind, interval: kind
    )  # with which it diverges at once
    command = (
        shared_images,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--epochs",
        1,
        "--amp",
        "fp16",
    )
    for name, rates in (("both", (1e30, 0.1)), ("alone", (0.1,))):
        assert (
            script(
                "main_lincls", *command, "--lr", *rates, "--wd", 1e-3, "--save-dir", tmp_path / name
            )[0]
            == 0
        )
    both, alone = (
        load(tmp_path / name / "checkpoint.pth.tar")["state_dict"] for name in ("both", "alone")
    )
    assert not both["module.fc.0.weight"].isfinite().all()
    assert torch.equal(both["module.fc.1.weight"], alone["module.fc.weight"])


def test_a_probe_goes_on_with_its_own_settings_only(script, shared_images, tmp_path):
    command = (
        shared_images,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--epochs",
        1,
        "--save-dir",
        tmp_path,
    )
    settings = ("--lr", 0.1, 0.03, "--seed", 3, "--val-from-train", 0.25)
    assert script("main_lincls", *command, *settings)[0] == 0
    first = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert first["best_lr"] in (0.1, 0.03)
    go_on = ("--resume", tmp_path / "checkpoint.pth.tar")
    for wrong, named in (
        (("--lr", 0.03, 0.1, "--val-from-train", 0.25), "--lr"),
        ((*settings, "--wd", 0.1), "--wd"),
        (("--lr", 0.1, 0.03), "--val-from-train"),
    ):
        status, _, err = script("main_lincls", *command, *go_on, *wrong)
        assert status == 2 and named in err and len(own_lines(err)) == 1, err
    state = load(tmp_path / "checkpoint.pth.tar")
    state["state_dict"]["module.conv1.weight"] += 1
    (tmp_path / "other").mkdir()
    torch.save(state, tmp_path / "other" / "checkpoint.pth.tar")
    status, _, err = script(
        "main_lincls",
        *command[:-2],
        "--resume",
        tmp_path / "other" / "checkpoint.pth.tar",
        *settings,
    )
    assert status == 2 and "its backbone is not a random one with --seed 3" in err
    # nothing is left to train, and a test takes everything from the checkpoint
    for options, folder in ((settings, tmp_path), (("-e",), tmp_path / "lincls")):
        status, _, err = script("main_lincls", *command, *go_on, *options)
        assert status == 0, err
        assert json.loads((folder / "results.json").read_text())["metrics"] == first
    status, _, err = script("main_lincls", *command, "-e")
    assert status == 2 and "--resume FILE" in err


def test_a_resumed_probe_remembers_its_best(script, shared_images, tmp_path):
    command = (
        shared_images,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--lr",
        0.1,
        "--save-dir",
        tmp_path,
    )
    assert script("main_lincls", *command, "--epochs", 1)[0] == 0
    state = load(tmp_path / "checkpoint.pth.tar")
    torch.save(state | {"best_acc1": 2.0}, tmp_path / "checkpoint.pth.tar")
    best = (tmp_path / "model_best.pth.tar").read_bytes()
    assert (
        script("main_lincls", *command, "--epochs", 2, "--resume", tmp_path / "checkpoint.pth.tar")[
            0
        ]
        == 0
    )
    assert (
        load(tmp_path / "checkpoint.pth.tar")["best_acc1"] == 2.0
        and (tmp_path / "model_best.pth.tar").read_bytes() == best
    )


def test_two_processes_train_the_classifiers_that_one_does(tmp_path):
    """On images of one colour each, whose views are the same however they are drawn."""
    data = write_images(tmp_path / "images", classes=3, train=16, size=32)
    for i, path in enumerate(sorted(data.rglob("*.jpg"))):
        Image.new("RGB", (32, 32), (5 * i % 256, 17 * i % 256, 29 * i % 256)).save(path)
    command = (
        "main_lincls.py",
        data,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-j",
        0,
        "--epochs",
        2,
        "--schedule",
        1,
    )
    command += (
        "--lr",
        0.1,
        0.03,
        "--accumulation-steps",
        2,
        "--multiprocessing-distributed",
        "-b",
        8,
    )
    for n in (1, 2):
        succeeded(shell(*command, "--nproc-per-node", n, "--save-dir", tmp_path / str(n)))
    one, two = (load(tmp_path / str(n) / "checkpoint.pth.tar")["state_dict"] for n in (1, 2))
    for name in ("module.fc.0.weight", "module.fc.1.bias"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)
    one, two = (
        json.loads((tmp_path / str(n) / "results.json").read_text())["metrics"] for n in (1, 2)
    )
    assert one == two


@pytest.mark.parametrize("heads", [1, 3])
def test_a_rank_without_an_image_counts_as_nothing(shared_images, monkeypatch, heads):
    val = folders.scan(shared_images, "val")
    given = {"image_size": 32, "batch_size": 8, "batch_per_process": 8, "workers": 0}
    config = replaced(Probing(), **given, mean=MEAN, std=STD)
    monkeypatch.setattr(distributed, "rank", lambda: len(val))
    monkeypatch.setattr(distributed, "world_size", lambda: len(val) + 1)
    others = torch.zeros(2 * heads + 1, 3, dtype=torch.long)
    others[:heads], others[heads:-1], others[-1] = (
        torch.tensor([2, 0, 0]),
        torch.tensor([2, 1, 0]),
        torch.tensor([2, 2, 0]),
    )
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda mine: mine.add_(others))
    found = classifier.evaluate(resnet("resnet18", 3), val, config, torch.device("cpu"), heads)
    assert found == [{"acc1": 0.5, "acc5": 0.75, "mean_per_class": 0.5}] * heads


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def by_spawn(options: tuple) -> str:
    return succeeded(shell(*options, "--multiprocessing-distributed", "--nproc-per-node", 2))


def by_torchrun(options: tuple) -> str:
    return succeeded(
        shell("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options)
    )


def by_torch_distributed_launch(options: tuple) -> str:
    launch = (
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    )
    return succeeded(shell(*launch, *options))


def by_srun(options: tuple) -> str:
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
    }
    url = ("--dist-url", f"tcp://127.0.0.1:{free_port()}")
    tasks = [
        shell(
            *options,
            *url,
            env={**step, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)},
            wait=False,
        )
        for r in range(2)
    ]
    ended = [(*task.communicate(), task.returncode) for task in tasks]
    assert [status for *_, status in ended] == [0, 0], ended
    return ended[0][0]


@pytest.mark.parametrize("launcher", [by_spawn, by_torchrun, by_torch_distributed_launch, by_srun])
def test_two_processes_by_every_launcher(launcher, shared_images, tmp_path):
    options = (
        "main_synco.py",
        shared_images,
        *TINY,
        "-j",
        0,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--knn-every",
        1,
    )
    out = launcher((*options, "--save-dir", tmp_path / "run"))
    assert "total batch 8 = 4 per process x 2 processes x 1 accumulation" in out
    state = load(tmp_path / "run" / "checkpoint_0000.pth.tar")
    assert state["progress"]["samples"] == 48
    assert state["state_dict"]["module.queue_ptr"].item() == 48
    assert 0 <= log(tmp_path / "run")[-1]["knn"] <= 1


def test_a_mistake_of_all_ranks_is_printed_once_by_torchrun(script, shared_images, tmp_path):
    command = (
        "main_synco.py",
        shared_images,
        *TINY,
        "-j",
        0,
        "--epochs",
        1,
        "--save-dir",
        tmp_path / "run",
    )
    assert script("main_synco", *command[1:])[0] == 0
    for options, said in (
        (("--lrr", 1), "unknown option '--lrr'"),
        (("--resume", "auto", "--lr", 0.5), "--lr is 0.5, and was"),
    ):
        done = shell(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command, *options
        )
        lines = [line for line in done.stderr.splitlines() if "main_synco.py: error:" in line]
        assert done.returncode == 1 and len(lines) == 1 and said in lines[0], done.stderr


def test_two_processes_evaluate_as_one(script, shared_images, tmp_path):
    """15 val images over 2 processes: the last batch is uneven, and no image counts twice."""
    common = (
        shared_images,
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--k",
        1,
        5,
        20,
    )
    assert script("main_knn", *common, "--save-dir", tmp_path / "one")[0] == 0
    two = ("--multiprocessing-distributed", "--nproc-per-node", 2, "--save-dir", tmp_path / "two")
    succeeded(shell("main_knn.py", *common, *two))
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["metrics"]
        for name in ("one", "two")
    )
    assert one == two
    assert one["knn_1"] * 15 == pytest.approx(round(one["knn_1"] * 15))


def test_a_mistake_inside_spawned_processes_is_one_line(images, tmp_path):
    (images / "train" / "class0" / "1.jpg").write_bytes(b"")
    launch = ("--multiprocessing-distributed", "--nproc-per-node", 2)
    options = (*TINY, "-j", 2, "--epochs", 1, "--on-bad-image", "error")
    result = shell("main_synco.py", images, *options, *launch, "--save-dir", tmp_path / "run")
    assert result.returncode == 2
    assert own_lines(result.stderr)[-1].startswith("main_synco.py: error:"), result.stderr
    assert "class0/1.jpg" in result.stderr
    assert "Traceback" not in result.stderr


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
        "-j",
        0,
        "--epochs",
        1,
        "--cfg",
        tmp_path / "recipe.yaml",
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
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--amp",
        amp,
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
    assert "total batch 24 = 8 per process x 1 processes x 3 accumulation" in out
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
        "-a",
        "resnet18",
        "--image-size",
        32,
        "-b",
        16,
        "-j",
        0,
        "--epochs",
        1,
        "--pretrained",
        file,
    )
    status, out, err = script("main_lincls", *options, "--save-dir", tmp_path / "run")
    assert status == 0, err
    assert "120 of 120 backbone tensors matched" in out
    trained = load(tmp_path / "run" / "checkpoint.pth.tar")["state_dict"]
    for name in ("conv1.weight", "bn1.running_mean", "layer4.1.bn2.weight"):
        assert torch.equal(trained[f"module.{name}"], weights[f"module.encoder_q.{name}"])


def test_nothing_is_written_by_other_ranks_or_left_half_done(published):
    assert [name for name in os.listdir(published[0]) if name.startswith(".")] == [".lock"]
