"""tools/export.py --hf: timm and transformers load the folder, with the same features."""

import importlib.util
import json
import os

import pytest
import timm
import torch
from encoder_helpers import SMALL as TEST_VIT
from export_helpers import (
    TIMM,
    features,
    loads_folders,
    network,
    printed,
    saved,
    saved_resnet,
    tool_caller,
)
from PIL import Image
from run_helpers import SMALL, refused

from moco.encoder import hf_folder, pretrained
from moco.encoder.stock import StockModel
from tools import export

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def run(monkeypatch, capsys):
    return tool_caller(export, monkeypatch, capsys)


@pytest.fixture
def resnet(tmp_path):
    return saved_resnet(tmp_path)


def loaded(folder, **more):
    """Return timm's network, whose random weights the folder's must replace."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **more).eval()


def config(folder):
    return json.loads((folder / "config.json").read_text())


@loads_folders
def test_timm_loads_a_folder(run, resnet, tmp_path):
    net, file = resnet
    folder = tmp_path / "new" / "hf"
    status, out, err = run(file, "--hf", folder, "--image-size", 224)
    assert status == 0 and "in timm, features differ by at most 0 from" in out, err
    assert sorted(os.listdir(folder)) == FILES and os.listdir(folder.parent) == ["hf"]
    for more in ({}, {"num_classes": 0}):
        torch.testing.assert_close(
            features(loaded(folder, **more)), features(net), rtol=1e-5, atol=1e-5
        )
    assert loaded(folder, num_classes=7).fc.out_features == 7
    said = config(folder)
    assert said["architecture"] == "resnet18" and said["num_features"] == 512
    assert "model_args" not in said
    data = timm.data.resolve_model_data_config(loaded(folder))
    assert list(data["input_size"]) == [3, 224, 224] and data["crop_pct"] == 7 / 8
    assert data["interpolation"] == "bilinear" and list(data["mean"]) == [0.485, 0.456, 0.406]
    (line,) = (line for line in out.splitlines() if line.startswith("  import timm"))
    torch.testing.assert_close(features(printed(line)[0]), features(net))


@loads_folders
def test_own_normalization_and_small_images_reach_the_config(run, tmp_path):
    """CIFAR's images are evaluated at their own size, so timm must not enlarge and crop them."""
    args = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "image_size": 32}
    file = saved(tmp_path / "x.pth.tar", network("resnet18"), arch="resnet18", args=args)
    assert run(file, "--hf", tmp_path / "hf")[0] == 0
    data = timm.data.resolve_model_data_config(loaded(tmp_path / "hf"))
    assert list(data["mean"]) == [0] * 3 and list(data["std"]) == [1] * 3
    assert data["crop_pct"] == 1
    view = timm.data.create_transform(**data, is_training=False)
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    torch.testing.assert_close(view(Image.fromarray(image)), pixels)


@loads_folders
@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("vit_small", {"img_size": 64, "num_heads": 12}),
        ("test_vit", {"img_size": 64}),
        ("convnext_atto", None),
    ],
)
def test_each_network_has_its_arguments(arch, arguments, run, tmp_path):
    """MoCo v3's small ViT has twelve heads and fixed positions."""
    net = network(arch, 64)
    file = saved(tmp_path / "x.pth.tar", net, arch=arch, args={"image_size": 64})
    status, _, err = run(file, "--hf", tmp_path / "hf")
    assert status == 0, err
    assert config(tmp_path / "hf").get("model_args") == arguments
    torch.testing.assert_close(
        features(loaded(tmp_path / "hf"), 64), features(net, 64), rtol=1e-5, atol=1e-5
    )


def test_swin_needs_a_timm_that_reads_headless_swins(run, tmp_path):
    """Check a Swin, which timm before 1.0.31 reads as one with MoBY's names."""
    net = network("swin_tiny", 32)
    file = saved(tmp_path / "x.pth.tar", net, arch="swin_tiny", args={"image_size": 32})
    result = run(file, "--hf", tmp_path / "new" / "hf")
    if TIMM < (1, 0, 31):
        refused(result, "cannot load such a folder", "pip install -U timm")
        assert not os.listdir(tmp_path / "new")
    else:
        assert result[0] == 0, result[2]
        torch.testing.assert_close(features(loaded(tmp_path / "new" / "hf")), features(net))


@loads_folders
def test_this_project_reads_the_folder(run, tmp_path):
    net = network("resnet18")
    args = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "image_size": 48}
    file = saved(tmp_path / "x.pth.tar", net, arch="resnet18", method="synco", epoch=3, args=args)
    assert run(file, "--hf", tmp_path / "hf")[0] == 0
    found = pretrained.read(str(tmp_path / "hf" / "model.safetensors"))
    assert (found.arch, found.method, found.epoch, found.image_size) == ("resnet18", "synco", 3, 48)
    assert found.mean == [0.5] * 3 and found.std == [0.2] * 3
    assert torch.equal(features(found.net), features(net))


def test_a_timm_that_cannot_load_folders_is_named(run, resnet, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise AssertionError("unknown scheme")

    monkeypatch.setattr(timm, "create_model", fails)
    result = run(resnet[1], "--hf", tmp_path / "new" / "hf")
    refused(result, f"timm {timm.__version__} cannot load such a folder", "pip install -U timm")
    assert not os.listdir(tmp_path / "new")


# what config.json cannot describe


def test_changed_networks_are_refused(run, tmp_path):
    """Config.json can describe neither a CIFAR stem nor epsilons that differ by layer."""
    net = network("resnet18", stem="cifar")
    file = saved(tmp_path / "cifar.pth.tar", net, arch="resnet18")
    refused(run(file, "--hf", tmp_path / "hf"), "--hf", "--stem cifar", "OUT with --hub")
    net = network("swin_tiny", norm_eps="synco-v2")
    args = {"norm_eps": "synco-v2", "image_size": 32}
    file = saved(tmp_path / "swin.pth.tar", net, arch="swin_tiny", args=args)
    refused(run(file, "--hf", tmp_path / "hf"), "--norm-eps synco-v2", "cannot describe")
    assert not (tmp_path / "hf").exists()


def test_network_that_timm_lacks_is_refused(run, resnet, tmp_path, monkeypatch):
    alone = [StockModel("torchvision", ("net = torchvision.models.resnet18()",))]
    monkeypatch.setattr(hf_folder, "stock_models", lambda *_: alone)
    refused(run(resnet[1], "--hf", tmp_path / "hf"), "timm has no resnet18, only torchvision")
    assert not (tmp_path / "hf").exists()


@loads_folders
def test_different_features_leave_no_folder(run, resnet, tmp_path, monkeypatch):
    other = network("resnet18")
    monkeypatch.setattr(hf_folder, "load", lambda _: other)
    refused(
        run(resnet[1], "--hf", tmp_path / "new" / "hf"), "the features of timm's network differ"
    )
    assert not os.listdir(tmp_path / "new")


# nothing is overwritten


@loads_folders
def test_existing_files_stay_unless_forced(run, resnet, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("mine")
        refused(run(resnet[1], "--hf", folder), f"{name}: exists; give --force to replace it")
        assert os.listdir(folder) == [name] and (folder / name).read_text() == "mine"
        (folder / name).unlink()
    (folder / "notes.txt").write_text("mine")
    (folder / "config.json").write_text("mine")
    assert run(resnet[1], "--hf", folder, "--force")[0] == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert config(folder)["architecture"] == "resnet18"


@loads_folders
def test_a_failure_on_the_way_leaves_no_file(run, resnet, tmp_path, monkeypatch):
    """config.json cannot be created: then the weights, which come first, are not kept either."""
    folder = tmp_path / "hf"
    creating = export.creating

    def fails(path, force):
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return creating(path, force)

    monkeypatch.setattr(export, "creating", fails)
    refused(run(resnet[1], "--hf", folder), "model.safetensors: cannot be written (No space left")
    assert not os.listdir(folder)


def test_errors_are_one_line(run, resnet, tmp_path):
    _, file = resnet
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "hf"
    folder.mkdir()
    checkpoint = (tmp_path / "hf" / "model.safetensors").resolve()
    checkpoint.write_bytes(file.read_bytes())
    for options, words in (
        ((file,), ("nothing to write; give OUT, --hf DIR or --onnx FILE",)),
        ((file, "--hub", "--hf", tmp_path / "x"), ("--hub", "give OUT")),
        ((file, "--hf", tmp_path / "file"), ("is a file; give a folder",)),
        ((file, "--hf", "hf://user/model"), ("is a URL",)),
        ((checkpoint, "--hf", folder, "--force"), ("is the checkpoint itself",)),
        ((file, tmp_path / "x" / "model.safetensors", "--hf", tmp_path / "x"), ("written twice",)),
        ((file, "--hf", tmp_path / "file" / "hf"), ("cannot be written",)),
        ((file, "--hf", tmp_path / os.fsdecode(b"\xe9")), ("is not UTF-8",)),
    ):
        refused(run(*options), *words)
    assert sorted(os.listdir(tmp_path)) == ["file", "hf", "moco.pth.tar"]
    assert checkpoint.read_bytes() == file.read_bytes() and os.listdir(folder) == [checkpoint.name]


# whole runs


@loads_folders
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script_name", "options"), [("main_synco", (*SMALL, "--mlp")), ("main_moby", TEST_VIT)]
)
def test_a_run_is_exported_with_a_card(script_name, options, script, run, shared_images, tmp_path):
    folder = tmp_path / "run"
    status, _, err = script(script_name, shared_images, *options, "--save-dir", folder)
    assert status == 0, err
    file = folder / "checkpoint_0000.pth.tar"
    knn = ("main_knn", shared_images, "-b", 8, "-j", 0, "--k", 3, "--pretrained", file)
    assert script(*knn, "--save-dir", folder / "knn")[0] == 0
    status, _, err = run(file, "--hf", tmp_path / "hf")
    assert status == 0, err
    torch.testing.assert_close(
        features(loaded(tmp_path / "hf")), features(pretrained.read(str(file)).net)
    )
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"python {script_name}.py --cfg options.yaml DIR" in card
    value = json.loads((folder / "knn" / "results.json").read_text())["metrics"]["knn_3"]
    assert f"k-NN (k 3, T 0.07, backbone features)`: {100 * value:.1f}" in card


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
@loads_folders
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size"), [("resnet18", 32), ("vit_small", 64), ("convnext_atto", 64)]
)
def test_transformers_loads_the_same_folder(arch, size, run, tmp_path):
    from transformers import AutoImageProcessor

    net = network(arch, size)
    args = {"image_size": size, "mean": [0.25, 0.5, 0.75], "std": [0.5, 0.25, 0.125]}
    file = saved(tmp_path / "x.pth.tar", net, arch=arch, args=args)
    status, out, err = run(file, "--hf", tmp_path / "hf")
    assert status == 0, err
    timms, theirs = printed(out)
    assert type(theirs).__name__ == "TimmWrapperModel" and not theirs.training
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found = theirs(images).pooler_output
        torch.testing.assert_close(found, net(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, timms(images), rtol=1e-5, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(str(tmp_path / "hf"))
    grey = torch.full((size, size, 3), 128, dtype=torch.uint8).numpy()
    pixels = processor(grey, return_tensors="pt")["pixel_values"][0, :, 0, 0]
    wanted = (128 / 255 - torch.tensor(args["mean"])) / torch.tensor(args["std"])
    torch.testing.assert_close(pixels, wanted)
