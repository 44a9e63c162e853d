"""tools/convert_tf.py: a checkpoint of SimCLR or FNC becomes a file for --pretrained."""

import os

import numpy as np
import pytest
import torch
from bundle_helpers import SamePool, SimCLR, write_bundle
from conftest import ROOT
from export_helpers import tool_caller
from run_helpers import refused, typed

from moco.encoder import pretrained
from tools import convert_tf

FILES = ROOT / "tests" / "tf_checkpoints"


@pytest.fixture
def run(monkeypatch, capsys):
    return tool_caller(convert_tf, monkeypatch, capsys)


def test_errors_are_one_line(run, tmp_path):
    (tmp_path / "x.pth").write_text("mine")
    (tmp_path / "bad.index").write_bytes(b"bad")
    out, ckpt = tmp_path / "new.pth", FILES / "model.ckpt-7"
    for options, words in (
        ((ckpt, tmp_path / "x.pth"), ("x.pth: exists; give --force",)),
        ((ckpt, tmp_path / "x.safetensors"), ("let OUT end in .pth, .pt, .tar",)),
        ((ckpt, "gs://bucket/x.pth"), ("is a URL",)),
        ((ckpt, out), ("does not begin with a ResNet's convolution", "only ResNet-50")),
        ((ckpt, out, "--scope", "ema"), ("--scope ema: has no variable ema/conv2d/kernel",)),
        ((tmp_path / "none", out), ("none.index: no such file",)),
        ((tmp_path / "bad", out), ("is not the index of a TensorFlow checkpoint",)),
        ((FILES / "objects" / "ckpt-1", out), ("saved by TensorFlow 2",)),
        (("s3://bucket/model.ckpt", out), ("is a URL",)),
    ):
        refused(run(*options), *words)
    assert sorted(os.listdir(tmp_path)) == ["bad.index", "x.pth"]
    assert (tmp_path / "x.pth").read_text() == "mine"
    for option in ("--method", "--epochs"):
        with pytest.raises(SystemExit, match="2"):
            run(ckpt, out, option, "0")


@pytest.mark.slow
def test_checkpoint_is_converted_and_evaluated(run, script, shared_images, tmp_path):
    """A ResNet-50 in two data files, with the optimizer's variables, probed and fine-tuned."""
    simclr, images = SimCLR(), torch.rand(2, 64, 64, 3)
    with torch.no_grad():
        wanted, _ = simclr(images)
    variables = {
        **simclr.variables,
        "base_model/conv2d/kernel/Momentum": simclr.variables["base_model/conv2d/kernel"],
        "global_step": np.array(31200, np.int64),
    }
    prefix = write_bundle(tmp_path / "ckpt" / "model.ckpt-31200", variables, shards=2)
    out = tmp_path / "fnc.pth"
    status, said, err = run(prefix, out, "--method", "fnc", "--epochs", 100)
    assert status == 0, err
    assert "a resnet50 of 318 tensors and a projection head of 3 linear layers" in said
    assert "left out: global_step; 1 variables of the optimizer" in said
    found = pretrained.read(str(out))
    assert (found.arch, found.method, found.epoch) == ("resnet50", "fnc", 100)
    assert (found.mean, found.std, found.image_size) == ([0.0] * 3, [1.0] * 3, 224)
    found.net.maxpool = SamePool()
    with torch.no_grad():
        features = found.net(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)

    small = typed("--image-size 32 -b 8 -j 0 --pretrained {}", out)
    status, said, err = script(
        "main_knn", shared_images, *small, "--k", 3, "--save-dir", tmp_path / "knn"
    )
    assert status == 0, err
    assert "does not say" not in said  # the mean and std of the images
    tune = typed("--train-percent 10 --ft-proj 1 --epochs 1 --weights finetune")
    status, said, err = script(
        *("main_semisup", shared_images, *small, *tune, "--save-dir", tmp_path / "tune")
    )
    assert status == 0, err
    assert said.startswith("protocol fnc (configs/semisup_fnc_10pct.yaml)")
