"""Test the scripts of AdCo, SimCLR, SogCLR and FNC.

The tests cover published commands, exact resume, the readers of their checkpoints, and mistakes.
"""

import contextlib
import json
import math
import shutil
import sys

import pytest
import torch
from detection_helpers import converter
from method_helpers import METHODS, SMALL
from run_helpers import facts, load, same, typed
from voc_tree import write_voc

from moco.builder.adco import AdCo, Ascent
from moco.builder.fnc import FNC
from moco.builder.isogclr import ISogCLR
from moco.builder.simclr import SimCLR
from moco.builder.sogclr import SogCLR
from moco.builder.supcon import SupCon
from moco.config import MEAN, STD
from moco.encoder.resnets import resnet
from moco.loss.debiased import Debiased
from moco.loss.decoupled import Decoupled
from moco.loss.false_negatives import Cancellation
from moco.rng import Progress

pytestmark = pytest.mark.slow


# whole runs
@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_never_stopped(name, script, shared_images, tmp_path):
    """Compare also the bank, its velocity, u and the memory; resume at the third epoch."""
    method, *options = METHODS[name]
    command = (
        shared_images,
        *options,
        *SMALL[:-1],
        3,
        *typed("--accumulation-steps 2 -p 1 --seed 2 --cos 1"),
    )
    for run, more in (
        ("whole", ()),
        ("parts", ("--resume", tmp_path / "whole" / "checkpoint_0001.pth.tar")),
    ):
        status, out, err = script(method, *command, "--save-dir", tmp_path / run, *more)
        assert status == 0, err
    assert "at epoch 2" in out and "before epoch 0" not in out
    second, a, b = (
        load(tmp_path / run / f"checkpoint_{epoch}.pth.tar")
        for run, epoch in (("whole", "0001"), ("whole", "0002"), ("parts", "0002"))
    )
    for key in ("epoch", "state_dict", "optimizer", "scaler", "progress"):
        assert same(a[key], b[key]), key
    assert facts(tmp_path / "parts") == facts(
        tmp_path / "whole"
    )  # the first lines are those of the run it began from
    names = ("u", "bank", "bank_velocity", "memory", "memory_index")
    kept = [n for n in a["state_dict"] if n.removeprefix("module.") in names]
    assert len(kept) == (1 if name == "sogclr" else 2)
    for n in kept:
        assert a["state_dict"][n].any() and not torch.equal(
            a["state_dict"][n], second["state_dict"][n]
        )


def test_the_bank_is_filled_before_epoch_0(script, shared_images, tmp_path):
    for fill in (1, 0):
        status, out, err = script(
            "main_adco",
            shared_images,
            *SMALL,
            *typed("--cluster 60 --ad-init {} --save-dir {}", fill, tmp_path / f"{fill}"),
        )
        assert status == 0, err
        assert ("8 steps before epoch 0, numbered from -8" in out) == bool(
            fill
        )  # 60 rows by 8, of 6 steps an epoch
        assert ("before epoch 0: 6 steps left" in out) == bool(fill) and "step -" not in out
        epochs = [line["epoch"] for line in facts(tmp_path / f"{fill}")]
        assert sorted(set(epochs)) == ([-2, -1, 0] if fill else [0])
        assert load(tmp_path / f"{fill}" / "checkpoint_0000.pth.tar")["progress"]["step"] == 6


@pytest.mark.parametrize("name", ["adco", "sogclr", "fnc"])
def test_every_evaluation_reads_the_checkpoint(
    name, checkpoints, script, shared_images, tmp_path, monkeypatch, capsys
):
    file = checkpoints[name]
    voc = write_voc(tmp_path / "voc", 30, 12)
    calls = {
        "main_lincls": (shared_images, "--lr", 0.1, "--epochs", 1),
        "main_semisup": (
            shared_images,
            *typed("--epochs 1 --train-percent 10 --weights finetune --lr-backbone 0.02"),
            *typed("--ft-proj 1"),
        ),
        "main_knn": (shared_images, "--k", 5),
        "main_voc07": (voc, "--c", 1),
    }
    for evaluation, options in calls.items():
        run = tmp_path / evaluation
        sizes = ("--image-size", 32, "-b", 4, "-j", 0)
        status, out, err = script(
            evaluation, *options, *sizes, "--pretrained", file, "--save-dir", run
        )
        assert status == 0, err
        assert "120 of 120 backbone tensors matched" in out
        results = json.loads((run / "results.json").read_text())
        assert results["method"] == name and all(
            0 <= value <= 1 for value in results["metrics"].values()
        )
        used = {"image_size": 32, "mean": list(MEAN), "std": list(STD), "stem": "imagenet"}
        # FNC does not normalize images
        used |= {"mean": [0] * 3, "std": [1] * 3} if name == "fnc" else {}
        used |= {"features": "backbone", "temperature": 0.07} if evaluation == "main_knn" else {}
        assert results["settings"] | used == results["settings"]
    monkeypatch.setattr(sys, "argv", ["convert", str(file), str(tmp_path / "converted.pkl")])
    assert converter.main() in (0, None), capsys.readouterr().err
    assert (tmp_path / "converted.pkl").stat().st_size > 40e6


# no copy to the host inside a step
def test_a_step_copies_nothing_to_the_host(monkeypatch):
    """Run on tensors without storage, where copies to the host and reads of values fail."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # knows no device without storage
    encoder = {"encoder": lambda: resnet("resnet18", 8, mlp=True)}
    bank = {**encoder, "dim": 8, "K": 64, "ascent": Ascent()}
    by_labels = Cancellation(source="labels")
    with torch.device("meta"):
        labels = torch.arange(100)
        methods = [
            (AdCo(**bank), 2),
            (AdCo(**bank, symmetric=True, multi_crop=True), 4),
            (SogCLR(**encoder, images=100), 2),
            (ISogCLR(**encoder, images=100), 2),
            (SimCLR(**encoder), 2),
            (SimCLR(**encoder, loss=Decoupled(0.5)), 2),
            (SimCLR(**encoder, loss=Debiased(0.1, 1.0)), 2),
            (SupCon(**encoder, labels=torch.arange(100)), 2),
            (FNC(**encoder, dim=8, memory_size=64, chunk=3, labels=torch.arange(100)), 4),
            (FNC(**encoder, dim=8, memory_size=0, chunk=3), 2),
            (FNC(**encoder, dim=8, memory_size=64, cancellation=by_labels, labels=labels), 4),
        ]
        for method, count in methods:
            for step in (-1, 0):
                views = [torch.randn(8, 3, 32, 32) for _ in range(count)]
                loss, metrics = method(views, torch.arange(8), Progress(step=step))
                loss.backward()
                method.after_step()
                parts = [
                    part
                    for value in metrics.values()
                    for part in (value if isinstance(value, tuple) else (value,))
                ]
                assert loss.is_meta and parts and all(part.is_meta for part in parts)
    for use in (
        torch.Tensor.cpu,
        torch.Tensor.tolist,
        torch.Tensor.item,
        torch.Tensor.nonzero,
        bool,
    ):
        with pytest.raises((NotImplementedError, RuntimeError)):
            use(methods[2][0].u[:1])


def test_no_labels_no_precision(script, shared_images, tmp_path):
    """Log the precision of false negatives only if the images have labels, in several folders."""
    method, *options = METHODS["fnc"]
    (tmp_path / "images" / "train").mkdir(parents=True)
    shutil.copytree(shared_images / "train", tmp_path / "images" / "train" / "all")
    seen = {}
    for data in (shared_images, tmp_path / "images"):
        status, _, err = script(
            method, data, *options, *SMALL, "-p", 1, "--save-dir", tmp_path / data.name / "run"
        )
        assert status == 0, err
        seen[data] = [set(line) for line in facts(tmp_path / data.name / "run")]
    with_labels, without = seen.values()
    assert all("fn_found" in names for names in with_labels + without)
    assert any("fn_precision" in names for names in with_labels) and not any(
        "fn_precision" in names for names in without
    )


def test_by_labels_each_image_finds_the_entries_of_its_class(script, shared_images, tmp_path):
    """Log how many they are: with 3 classes, more than there are without labels."""
    words = typed("--support-size 1 --memory-multiplier 5 --fn-from labels -p 1")
    words += (*SMALL, "--save-dir", tmp_path)
    status, out, err = script("main_fnc", shared_images, *words)
    assert status == 0, err
    assert "attract, by the labels: an upper bound, not a self-supervised method" in out
    lines = [line for line in facts(tmp_path) if "fn_found" in line]
    assert len(lines) >= 3 and not any("fn_precision" in line for line in lines)
    # the memory of five batches fills with 3 x 8 views a step
    found = [line["fn_found"] for line in lines]
    assert 0 < found[0] < found[1] and max(found) <= 40


def test_less_memory_the_same_run(script, shared_images, tmp_path):
    """Blocks computed again for the gradient, and the loss in chunks of another size."""
    method, *options = METHODS["fnc"]
    states = []
    for more in ((), ("--grad-checkpoint",), ("--loss-chunk", 3)):
        run = tmp_path / "".join(map(str, more))
        status, _, err = script(method, shared_images, *options, *SMALL, *more, "--save-dir", run)
        assert status == 0, err
        states.append(load(run / "checkpoint_0000.pth.tar")["state_dict"])
    assert same(states[0], states[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[2][name], tensor, rtol=1e-3, atol=1e-4)


def test_rates_follow_the_step_and_the_total_batch(script, shared_images, tmp_path):
    """Train with 48 images, in 3 steps of 2 x 8 per epoch.

    The warm-up from 0 takes one epoch, the half cosine two.
    """
    options = (
        *typed("--mlp-dim 16 --dim 8 --accumulation-steps 2 --lr 0.1 --warmup-epochs 1 -p 1"),
    )
    command = (shared_images, *SMALL[:-1], 3, *options, "--save-dir", tmp_path)
    status, out, err = script("main_sogclr", *command)
    assert status == 0 and "lr after scaling 0.4 (sqrt scaling)" in out, err
    rates = [line["lr"] for line in facts(tmp_path)]
    cosine = [0.2 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([0, 0.4 / 3, 0.8 / 3, *cosine])


@pytest.mark.parametrize("loss", ["dclw", "hcl"])
def test_a_resumed_moco_with_another_loss_equals_one_that_never_stopped(
    loss, script, tmp_path, shared_images
):
    """Train MoCo's queue for two epochs, and the second of them again."""
    small = ("-a", "resnet18", "--image-size", 32, "-b", 16, "-j", 0, "--moco-k", 64)
    words = (shared_images, *small, "--epochs", 2, "--lr", 0.01, "--moco-t", 0.5, "--loss", loss)
    for folder, more in (
        ("whole", ()),
        ("resumed", ("--resume", tmp_path / "whole/checkpoint_0000.pth.tar")),
    ):
        status, _, err = script("main_synco", *words, "--save-dir", tmp_path / folder, *more)
        assert status == 0, err
    a, b = (load(tmp_path / name / "checkpoint_0001.pth.tar") for name in ("whole", "resumed"))
    assert same(a["state_dict"], b["state_dict"]) and a["args"]["loss"] == loss
