"""Test runs of the linear probe: exact resume, several learning rates, and held-out images."""

import json

import pytest
import torch
from conftest import own_lines, shell, write_images
from PIL import Image
from run_helpers import facts, load, same, succeeded, typed

from moco import distributed
from moco.config import MEAN, STD, Probing, replaced
from moco.data import sources
from moco.encoder.resnets import resnet
from moco.engine import precision
from moco.evaluate import classifier

pytestmark = pytest.mark.slow


def test_probe_resumes_exactly(script, shared_images, tmp_path):
    def probe(*options: object) -> str:
        status, out, err = script("main_lincls", *command, *options)
        assert status == 0, err
        return out

    command = (
        shared_images,
        *typed("-a resnet18 --image-size 32 -b 8 -j 0 --lr 1 --schedule 2 --seed 1"),
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
        *typed("-a resnet18 --image-size 32 -b 8 -j 0 --epochs 2 --schedule 1"),
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
    command = (shared_images, *typed("-a resnet18 --image-size 32 -b 8 -j 0 --epochs 1 --lr 1 2 3"))
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
    command = (shared_images, *typed("-a resnet18 --image-size 32 -b 8 -j 0 --epochs 1 --amp fp16"))
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
        *typed("-a resnet18 --image-size 32 -b 8 -j 0 --epochs 1 --save-dir {}", tmp_path),
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
        *typed("-a resnet18 --image-size 32 -b 8 -j 0 --lr 0.1 --save-dir {}", tmp_path),
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
        *typed("-a resnet18 --image-size 32 -j 0 --epochs 2 --schedule 1"),
    )
    command += typed("--lr 0.1 0.03 --accumulation-steps 2 --multiprocessing-distributed -b 8")
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
    val = sources.scan(shared_images, "val")
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
