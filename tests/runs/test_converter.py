"""Test the conversion of encoders to detectron2's format."""

import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import own_lines, wants_detectron2
from detection_helpers import converter, published
from encoder_helpers import PREFIXES

from moco.encoder import networks
from moco.encoder.resnets import resnet

pytestmark = pytest.mark.slow


@pytest.fixture
def convert(monkeypatch, capsys):
    """The converter's command line, in this process: returns its status, stdout and stderr."""

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["convert-pretrain-to-detectron2.py", *map(str, options)])
        return converter.main(), *capsys.readouterr()

    return call


def saved(tmp_path, state):
    torch.save(state, tmp_path / "encoder.pth.tar")
    return tmp_path / "encoder.pth.tar"


# The converter
def test_a_checkpoint_of_other_software_converts(convert, tmp_path):
    """Convert a checkpoint of MoCo's layout; the key encoder and the queue are left out."""
    state = published("resnet50", epoch=200, optimizer={"state": {}})
    state["state_dict"] |= {
        f"module.encoder_k.{name}": x for name, x in resnet("resnet50", 128).state_dict().items()
    }
    state["state_dict"] |= {
        "module.queue": torch.randn(128, 64),
        "module.queue_ptr": torch.zeros(1, dtype=torch.int64),
    }
    status, out, err = convert(saved(tmp_path, state), tmp_path / "new" / "out.pkl")
    assert status == 0, err
    assert "265 of 265" in out and "module.encoder_q.layer1.0.downsample.1.bias" in out
    written = pickle.loads((tmp_path / "new" / "out.pkl").read_bytes())
    assert written["matching_heuristics"] is True and written["source"]["file"] == str(
        tmp_path / "encoder.pth.tar"
    )
    assert (
        written["source"] | {"arch": "resnet50", "epoch": 200, "method": "unknown"}
        == written["source"]
    )
    expected = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res3.0.shortcut.norm.bias": "layer2.0.downsample.1.bias",
        "res4.5.conv2.weight": "layer3.5.conv2.weight",
        "res5.2.conv3.norm.weight": "layer4.2.bn3.weight",
    }
    model = written["model"]
    assert len(model) == 265 and not any("fc" in name or "num_batches" in name for name in model)
    for new, old in expected.items():
        assert np.array_equal(model[new], state["state_dict"][f"module.encoder_q.{old}"].numpy())


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"]
)
def test_every_resnet_keeps_every_tensor(arch, convert, tmp_path):
    state = published(arch)
    status, out, err = convert(saved(tmp_path, state), tmp_path / "out.pkl")
    assert status == 0, err
    model = pickle.loads((tmp_path / "out.pkl").read_bytes())["model"]
    wanted = [name for name in networks.backbone_keys(resnet(arch, 1)) if "num_batches" not in name]
    assert len(model) == len(wanted) and f"{len(wanted)} of {len(wanted)}" in out


def broken(change):
    """Tensors of a ResNet-18 after `change` of one, and the name that an error must show."""
    tensors = published("resnet18")["state_dict"]
    name = "module.encoder_q.layer3.1.conv2.weight"
    if change == "missing":
        del tensors[name]
    elif change == "renamed":
        tensors[name.replace("conv2", "konv2")] = tensors.pop(name)
    elif change == "extra in a layer":
        tensors["module.encoder_q.layer3.1.conv3.weight"] = torch.zeros(3)
        return tensors, "layer3.1.conv3.weight"
    elif change == "extra at the top":
        tensors["module.encoder_q.attention.weight"] = torch.zeros(3)
        return tensors, "attention.weight"
    elif change == "reshaped":
        tensors[name] = tensors[name][:, :-1]
    return tensors, "layer3.1.conv2.weight"


@pytest.mark.parametrize(
    "change", ["missing", "renamed", "extra in a layer", "extra at the top", "reshaped"]
)
def test_one_odd_tensor_is_named_and_nothing_is_written(change, convert, tmp_path):
    tensors, name = broken(change)
    status, _, err = convert(
        saved(tmp_path, {"arch": "resnet18", "state_dict": tensors}), tmp_path / "out.pkl"
    )
    assert status == 2 and name in err and len(own_lines(err)) == 1
    if change == "renamed":
        assert "layer3.1.konv2.weight" in err
    assert not list(tmp_path.glob("*out.pkl*"))


def test_mistakes_are_one_line(convert, tmp_path):
    (tmp_path / "file").write_text("")
    file = saved(tmp_path, published("resnet18"))
    for options, said in (
        ((tmp_path / "none.pth", tmp_path / "out.pkl"), "no such checkpoint"),
        ((file, tmp_path / "out.pth"), "let OUT end in .pkl"),
        ((file, tmp_path / "file" / "out.pkl"), "cannot be written"),
        ((file, tmp_path / "out.pkl", "-a", "resnet50"), "does not fit"),
        ((file, tmp_path / "out.pkl", "-a", "resnet51"), "the nearest is"),
    ):
        status, _, err = convert(*options)
        assert status == 2 and said in err and len(own_lines(err)) == 1


def test_what_detectron2_does_not_know_is_said(convert, tmp_path):
    """It normalizes by its config, and its first convolution is 7x7."""
    file = saved(
        tmp_path,
        published("resnet18", args={"mean": [0.5, 0.4, 0.3], "std": [0.229, 0.224, 0.225]}),
    )
    status, out, _ = convert(file, tmp_path / "out.pkl")
    assert (
        status == 0
        and "MODEL.PIXEL_MEAN [127.500,102.000,76.500]" in out
        and "PIXEL_STD" not in out
    )
    status, _, err = convert(
        saved(tmp_path, published("resnet18", args={"stem": "cifar"})), tmp_path / "cifar.pkl"
    )
    assert status == 2 and "--stem cifar" in err and len(own_lines(err)) == 1


def test_a_check_without_detectron2_says_so(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)
    status, _, err = convert(
        saved(tmp_path, published("resnet18")), tmp_path / "out.pkl", "--check"
    )
    assert status == 2 and "README.md" in err


@wants_detectron2
@pytest.mark.parametrize("prefix", PREFIXES)
def test_check_proves_a_resnet50_of_each_prefix(prefix, convert, tmp_path):
    status, out, err = convert(
        saved(tmp_path, published("resnet50", prefix)), tmp_path / "out.pkl", "--check"
    )
    assert status == 0, err
    assert "265 of 265 backbone tensors arrived" in out


@wants_detectron2
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnext50_32x4d", "wide_resnet50_2"])
def test_check_proves_other_resnets(arch, convert, tmp_path):
    status, out, err = convert(saved(tmp_path, published(arch)), tmp_path / "out.pkl", "--check")
    assert status == 0 and "arrived in detectron2's model" in out, err


@wants_detectron2
@pytest.mark.parametrize("change", ["a number", "a tensor less", "a name"])
def test_check_sees_what_did_not_arrive(change, convert, tmp_path, monkeypatch):
    """Spoil OUT between writing and loading, in several ways."""
    write = converter.write

    def spoil(path, found, force):
        model = dict(found["model"])
        x = model.pop("res4.0.conv1.weight")
        if change == "a number":
            model["res4.0.conv1.weight"] = np.nextafter(x, np.float32(1))
        elif change == "a name":
            model["res4.0.konv1.weight"] = x
        write(path, found | {"model": model})

    monkeypatch.setattr(converter, "write", spoil)
    status, _, err = convert(
        saved(tmp_path, published("resnet18")), tmp_path / "out.pkl", "--check"
    )
    assert status == 2 and "res4.0.conv1.weight" in err


@wants_detectron2
def test_detectron2s_own_model_loads_the_file_too(tmp_path):
    """Load it into the standard C4 detector, with frozen batch norm, by its own checkpointer."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    state = published("resnet50")
    converter.write(tmp_path / "out.pkl", converter.convert(str(saved(tmp_path, state))))
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "out.pkl"))
    loaded = model.state_dict()
    for there, name in (
        ("backbone.stem.conv1.weight", "conv1.weight"),
        ("backbone.res4.5.conv3.norm.running_var", "layer3.5.bn3.running_var"),
        ("roi_heads.res5.0.shortcut.weight", "layer4.0.downsample.0.weight"),
        ("roi_heads.res5.2.conv2.norm.running_mean", "layer4.2.bn2.running_mean"),
    ):
        assert torch.equal(loaded[there], state["state_dict"][f"module.encoder_q.{name}"])
