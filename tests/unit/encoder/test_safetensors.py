"""Files in the safetensors format: exports of this project, and files of other software."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from run_helpers import SMALL, refused
from safetensors.torch import save_file
from torchvision import models

from moco.config import MEAN, STD
from moco.encoder import metadata, networks, pretrained
from moco.engine import checkpoint
from moco.errors import InputError
from tools import export


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Return a ResNet-18 and the path of its export by this project."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    net = models.resnet18(num_classes=3)
    state = {
        "arch": "resnet18",
        "method": "moco",
        "epoch": 5,
        "args": {"image_size": 32},
        "state_dict": net.state_dict(),
    }
    torch.save(state, folder / "x.pth.tar")
    args = argparse.Namespace(
        checkpoint=str(folder / "x.pth.tar"),
        out=folder / "x.safetensors",
        hf=None,
        onnx=None,
        arch=None,
        image_size=None,
        norm_eps=None,
        hub=False,
        force=False,
    )
    export.export(args)
    return net, folder / "x.safetensors"


def test_export_contains_metadata(encoder, script, shared_images, tmp_path):
    """So -a and --image-size can be left out. The content decides the format, not the name."""
    net, file = encoder
    copy = Path(shutil.copy(file, tmp_path / "x.bin"))
    for path in (file, copy):
        facts = metadata.read_metadata(checkpoint.load(str(path)))
        assert facts[:3] == ("resnet18", "moco", 5) and facts.image_size == 32
        assert (facts.mean, facts.std) == (list(MEAN), list(STD))
        hubbed = torch.hub.load(str(ROOT), "encoder", str(path), source="local")
        assert torch.equal(hubbed.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    command = (shared_images, "--image-size", 32, "-b", 8, "-j", 0, "--k", 3, "--pretrained", copy)
    status, out, err = script("main_knn", *command, "--save-dir", tmp_path / "knn")
    assert status == 0 and "120 of 120 backbone tensors matched\n" in out, err
    results = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert (results["arch"], results["method"], results["pretrain_epochs"]) == (
        "resnet18",
        "moco",
        5,
    )


def test_safetensors_of_other_software_load(encoder, tmp_path):
    net, _ = encoder
    tensors = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    for header in (None, {"format": "pt"}, {"arch": "x"}):
        save_file(tensors, tmp_path / "x.safetensors", header)
        state = checkpoint.load(str(tmp_path / "x.safetensors"))
        assert metadata.read_metadata(state) == metadata.Metadata(None, "unknown", None, {}, None)
        mine = networks.create("resnet18", 3, 32)
        assert pretrained.load_backbone(mine, pretrained.tensors_of(mine, state), "x") == 120


def test_truncated_safetensors_and_resumption_from_them_are_errors(
    encoder, script, shared_images, tmp_path
):
    _, file = encoder
    data = file.read_bytes()
    for length in (9, 2000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(InputError, match="truncated or damaged"):
            checkpoint.load(str(tmp_path / "cut.safetensors"))
    resumed = (shared_images, "--resume", file, "--save-dir", tmp_path / "run")
    refused(
        script("main_lincls", *resumed),
        "x.safetensors: cannot be resumed",
        "give it with --pretrained",
    )
    said = "x.safetensors: cannot be resumed: a .safetensors file holds weights alone"
    refused(script("main_synco", *resumed, *SMALL), said, "pre-training cannot start from them")


def test_error_without_the_package_names_it(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        checkpoint.load(str(encoder[1]))
