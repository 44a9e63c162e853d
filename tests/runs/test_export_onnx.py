"""tools/export.py --onnx: onnxruntime computes the same features, for batches of any size."""

import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_helpers import loads_folders, network, printed, saved, saved_resnet, tool_caller
from run_helpers import refused

from moco.encoder import onnx_file
from tools import export


@pytest.fixture
def run(monkeypatch, capsys):
    return tool_caller(export, monkeypatch, capsys)


@pytest.fixture
def resnet(tmp_path):
    return saved_resnet(tmp_path)


@torch.no_grad()
def relative_difference(net, session, images):
    """Return the largest difference of features, relative to the largest feature."""
    mine = net(images).numpy()
    theirs = session.run(["features"], {"images": images.numpy()})[0]
    assert theirs.shape == mine.shape and theirs.dtype == np.float32
    return float(np.abs(theirs - mine).max() / np.abs(mine).max())


@pytest.mark.parametrize(
    ("arch", "size"), [("resnet18", 32), ("test_vit", 32), ("convnext_atto", 64)]
)
def test_features_are_equal_in_batches_of_any_size(arch, size, run, tmp_path):
    net = network(arch, size)
    args = {"image_size": size, "mean": [0.25, 0.5, 0.75], "std": [0.5, 0.25, 0.125]}
    file = saved(tmp_path / "x.pth.tar", net, arch=arch, method="synco", epoch=7, args=args)
    path = tmp_path / "new" / "x.onnx"
    status, out, err = run(file, "--onnx", path)
    assert status == 0, err
    assert os.listdir(path.parent) == ["x.onnx"]
    (session,) = printed(out)
    for batch in (1, 2, 5):
        assert relative_difference(net, session, torch.randn(batch, 3, size, size)) < 1e-4
    assert session.get_modelmeta().custom_metadata_map == {
        "arch": arch,
        "method": "synco",
        "epoch": "7",
        "source": "x.pth.tar",
        "image_size": str(size),
        "mean": "0.25 0.5 0.75",
        "std": "0.5 0.25 0.125",
    }
    (entry,) = onnx.load(path).graph.input
    sides = [side.dim_param or side.dim_value for side in entry.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, size, size]


def test_changed_networks_are_exported(run, tmp_path):
    """The model holds the operations, so a CIFAR stem needs no code of this project."""
    net = network("resnet18", stem="cifar")
    args = {"image_size": 32}
    file = saved(tmp_path / "x.pth.tar", net, arch="resnet18", args=args)
    assert run(file, "--onnx", tmp_path / "x.onnx")[0] == 0
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    assert relative_difference(net, session, torch.randn(2, 3, 32, 32)) < 1e-4
    assert session.get_modelmeta().custom_metadata_map["stem"] == "cifar"


def test_conversion_leaves_the_network_unchanged():
    """Check that attention is made traceable for the conversion only."""
    net = network("test_vit")
    before = [vars(module).get("fused_attn") for module in net.modules()]
    assert any(before)
    onnx_file.convert(net, 32, {})
    assert [vars(module).get("fused_attn") for module in net.modules()] == before
    assert not net.training


@loads_folders
def test_all_outputs_are_written_together(run, resnet, tmp_path):
    options = (tmp_path / "a.pth", "--hub", "--hf", tmp_path / "hf", "--onnx", tmp_path / "a.onnx")
    status, out, err = run(resnet[1], *options)
    assert status == 0, err
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.pth", "hf", "hubconf.py", "moco.pth.tar"]
    assert "in torchvision, " in out and "in timm, " in out and "in onnxruntime, " in out


# errors


def test_missing_packages_are_named_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "PACKAGES", ("torch", "no_such_package"))
    words = "--onnx needs the package no_such_package: pip install no_such_package"
    refused(run(tmp_path / "no_such_checkpoint", "--onnx", tmp_path / "x.onnx"), words)


def test_a_package_that_cannot_be_imported_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise ImportError('libbroken.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(onnx_file, "PACKAGES", ("torch", "broken_package"))
    words = "the package broken_package cannot be imported (libbroken.so is missing)"
    refused(run(tmp_path / "no_such_checkpoint", "--onnx", tmp_path / "x.onnx"), words)


def test_different_features_leave_no_file(run, resnet, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "run", lambda _, images: torch.zeros(len(images), 512))
    result = run(resnet[1], "--onnx", tmp_path / "new" / "x.onnx")
    refused(result, "the features of onnxruntime differ", "nothing was written")
    assert not os.listdir(tmp_path / "new")


def test_a_network_that_cannot_be_traced_is_refused():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real.mean((2, 3)) + torch.linalg.svdvals(x).sum((1, 2))[:, None]

    with pytest.raises(onnx_file.InputError, match=r"--onnx: torch\.onnx cannot convert this"):
        onnx_file.convert(Odd(), 8, {})
    with pytest.raises(onnx_file.InputError, match=r"onnxruntime .* cannot run the model"):
        onnx_file.run(b"no model", torch.zeros(1, 3, 8, 8))


def test_errors_are_one_line(run, resnet, tmp_path):
    _, file = resnet
    (tmp_path / "file").write_text("mine")
    (tmp_path / "x.onnx").write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    for path, words in (
        (tmp_path / "x.pb", "let FILE end in .onnx"),
        (tmp_path / "x.onnx", "x.onnx: exists; give --force to replace it"),
        (tmp_path / "folder.onnx", "is a folder"),
        (tmp_path / "file" / "y.onnx", "cannot be written"),
        ("s3://bucket/x.onnx", "is a URL"),
    ):
        refused(run(file, "--onnx", path), words)
    assert (tmp_path / "x.onnx").read_text() == "mine"
    assert run(file, "--onnx", tmp_path / "x.onnx", "--force")[0] == 0
    onnx.checker.check_model(tmp_path / "x.onnx")
