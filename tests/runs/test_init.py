"""Test `--init`: pre-training starts from weights of a file, or from named weights of a library."""

import json
import re
import urllib.error

import pytest
import timm
import torch
from conftest import shell
from encoder_helpers import random_resnet18
from run_helpers import SMALL, load, refused, same, succeeded, typed
from safetensors.torch import save_file
from torchvision import models

from moco.encoder import networks
from moco.engine.trainer import Trainer
from moco.methods import METHODS

SHORT = typed("--image-size 32 -b 16 -j 0 --epochs 1 --seed 2")


def options(name):
    """Return the options of a method's tiny run, and its architecture."""
    words = METHODS[name].tiny.split()
    if "-a" not in words:
        words = [*words, "-a", "resnet18"]
    return [*words, *SHORT], words[words.index("-a") + 1]


@pytest.fixture
def started(script, shared_images, tmp_path, monkeypatch):
    """Start a pre-training; return its output and its task as they are before the first step."""
    found = []
    monkeypatch.setattr(Trainer, "train", lambda self: found.append(self.task))

    def start(name, *words):
        folder = tmp_path / f"run{len(found)}"
        status, out, err = script(name, shared_images, *words, "--save-dir", folder)
        assert status == 0, err
        return out, found[-1]

    return start


@pytest.fixture
def resnet18(tmp_path):
    """Return a ResNet-18 in eval mode, and a file of its tensors with torchvision's names."""
    net = random_resnet18(1).eval()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    return net, tmp_path / "resnet18.pth"


def backbone(net):
    """Return the tensors of a network's backbone by name."""
    state = net.state_dict()
    return {name: state[name] for name in networks.backbone_keys(net)}


def copies(method):
    """Return pairs of a trained network and its moving average."""
    parts = dict(method.named_children())
    average = dict.fromkeys(("encoder_k", "momentum_encoder"), method.encoder)
    average["projector_k"] = parts.get("projector")
    return [(average[name], net) for name, net in parts.items() if name in average]


def heads_of(name, arch):
    """Return the names of a method's trained heads."""
    if METHODS[name].script == "main_moby":
        return "projector", "predictor"
    last = "head" if arch == "test_vit" else "fc"
    return (last, "predictor") if METHODS[name].script == "main_mocov3" else (last,)


@pytest.mark.parametrize("name", ["main_synco", "main_sogclr"])
def test_knn_before_the_first_step_is_that_of_the_file(
    name, resnet18, started, script, shared_images, tmp_path
):
    net, file = resnet18
    words = ("-a", "resnet18", *SHORT, *typed("--knn-every 1 --knn-k 5"))
    out, task = started(name, *words, "--init", file)
    assert f"--init {file}: 120 of 120 backbone tensors matched; the head fc is new\n" in out
    knn = (shared_images, *typed("-a resnet18 --image-size 32 -b 16 -j 0 --k 5 --pretrained"), file)
    status, _, err = script("main_knn", *knn, "--save-dir", tmp_path / "knn")
    assert status == 0, err
    metrics = json.loads((tmp_path / "knn" / "results.json").read_text())["metrics"]
    assert [task.monitor.measure(task.images, {"knn"})["knn"]] == [
        value for key, value in metrics.items() if "knn" in key
    ]
    x = torch.randn(4, 3, 32, 32)
    features = networks.features(task.module.encoder.eval(), x)
    assert torch.equal(features, networks.features(net, x))
    other = networks.features(started(name, *words)[1].module.encoder.eval(), x)
    assert not torch.allclose(features, other)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_from_a_file(name, started, tmp_path):
    words, arch = options(name)
    torch.manual_seed(5)
    net = networks.create(arch, 3, 32)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    out, task = started(METHODS[name].script, *words, "--init", tmp_path / "x.pth")
    n = len(backbone(net))
    new = "; ".join(f"the head {head} is new" for head in heads_of(name, arch))
    assert f"x.pth: {n} of {n} backbone tensors matched; {new}\n" in out
    assert same(backbone(task.module.encoder), backbone(net))
    pairs = copies(task.module)
    assert len(pairs) == {"main_sogclr": 0, "main_moby": 2}.get(METHODS[name].script, 1)
    for trained, average in pairs:
        assert same(trained.state_dict(), average.state_dict())


@pytest.mark.parametrize("name", ["mocov2", "fnc", "byol", "moby", "mocov3", "mocov3-vit"])
def test_heads_start_from_a_file_that_has_them(name, started, tmp_path):
    words, arch = options(name)
    _, task = started(METHODS[name].script, *words)
    state = {f"module.{key}": x for key, x in task.module.state_dict().items()}
    state = {key: x + 1 if x.is_floating_point() else x for key, x in state.items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    out, task = started(METHODS[name].script, *words, "--init", tmp_path / "x.pth")
    matched = "; ".join(f"the head {head} matched, too" for head in heads_of(name, arch))
    assert f"; {matched}\n" in out and re.search(
        r"(encoder_k|momentum_encoder)\.\*\); the head", out
    )
    for key, parameter in task.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, state[f"module.{key}"]), key
    for trained, average in copies(task.module):
        assert same(trained.state_dict(), average.state_dict())


def test_a_head_of_another_shape_stays_new(started, tmp_path):
    net = models.resnet18(num_classes=128)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    words = ("-a", "resnet18", *SHORT)
    init = ("--init", tmp_path / "x.pth")
    assert "; the head fc is new\n" in started("main_synco", *words, "--mlp", *init)[0]
    assert "; the head fc is new\n" in started("main_synco", *words, "--moco-dim", 64, *init)[0]
    out, task = started("main_synco", *words, *init)
    assert "; the head fc matched, too\n" in out
    assert torch.equal(task.module.encoder_k.fc.weight, net.fc.weight)


def test_a_folder_of_hugging_face_is_read(resnet18, started, tmp_path):
    net, _ = resnet18
    (tmp_path / "hf").mkdir()
    save_file(net.state_dict(), tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    _, task = started("main_synco", "-a", "resnet18", *SHORT, "--init", tmp_path / "hf")
    assert same(backbone(task.module.encoder), backbone(net))


def test_another_normalization_is_announced(resnet18, started, tmp_path):
    net, _ = resnet18
    args = {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}
    torch.save({"state_dict": net.state_dict(), "args": args}, tmp_path / "x.pth")
    words = ("-a", "resnet18", *SHORT, "--init", tmp_path / "x.pth")
    said = "normalized with mean 0.5 0.5 0.5, and those of this run with 0.485 0.456 0.406 (--mean)"
    out, _ = started("main_synco", *words)
    assert said in out and "(--std)" not in out
    assert "normalized" not in started("main_synco", *words, *typed("--mean 0.5 0.5 0.5"))[0]


def test_named_weights_are_loaded(started, monkeypatch):
    net = models.resnet18()
    monkeypatch.setattr(
        models.ResNet18_Weights, "get_state_dict", lambda *_, **__: net.state_dict()
    )
    words = ("-a", "resnet18", *SHORT, "--init")
    out, task = started("main_synco", *words, "torchvision:IMAGENET1K_V1")
    assert "--init torchvision:IMAGENET1K_V1: 120 of 120 backbone tensors matched" in out
    assert same(backbone(task.module.encoder), backbone(net))

    create = timm.create_model
    made = []

    def downloaded(name, pretrained=False, **more):
        made.append((name, create(name, **more)))
        return made[-1][1]

    monkeypatch.setattr(timm, "create_model", downloaded)
    out, task = started("main_synco", *words, "timm")
    name, own = made[-1]
    assert name == "resnet18" and "--init timm: 120 of 120 backbone tensors matched" in out
    assert same(backbone(task.module.encoder), backbone(own))


def test_what_cannot_be_loaded_is_one_line(resnet18, script, shared_images, tmp_path, monkeypatch):
    net, file = resnet18
    named = {"arch": "resnet18", "state_dict": net.state_dict()}
    torch.save(named, tmp_path / "named.pth")
    (tmp_path / "text.pth").write_text("no weights\n")
    (tmp_path / "empty").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    small = networks.create("resnet18", 3, 32, stem="cifar")
    torch.save(small.state_dict(), tmp_path / "small.pth")
    swin = networks.create("swin_tiny", 0, 32)
    swin = {"args": {"norm_eps": "synco-v2"}, "state_dict": swin.state_dict()}
    torch.save(swin, tmp_path / "swin.pth")

    vit = networks.create("vit_small_patch16_224", 0, 32)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    create = timm.create_model

    def of_torchvision(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    def of_timm(*names, pretrained=False, **more):
        if pretrained:
            raise ConnectionError("no\nroute")
        return create(*names, **more)

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", of_torchvision)
    monkeypatch.setattr(timm, "create_model", of_timm)
    network = "network, download the weights elsewhere, and give the file with --init FILE"
    for name, arch, init, *said in (
        ("main_synco", "resnet18", tmp_path / "none.pth", "none.pth: no such checkpoint"),
        ("main_sogclr", "resnet18", tmp_path / "text.pth", "a text file that begins with"),
        ("main_fnc", "resnet18", tmp_path / "empty", "is a folder; it holds no checkpoint"),
        ("main_adco", "resnet18", tmp_path / "other.pth", "no tensor matches the encoder"),
        ("main_synco", "resnet34", file, "missing tensors", "give another -a ARCH"),
        ("main_synco", "resnet34", tmp_path / "named.pth", "contains resnet18, not resnet34"),
        ("main_synco", "resnet18", tmp_path / "small.pth", "its stem is cifar", "--stem cifar"),
        ("main_moby", "swin_tiny", tmp_path / "swin.pth", "give --norm-eps synco-v2"),
        ("main_synco", "resnet18", "torchvision:V9", "unknown name", "known: IMAGENET1K_V1"),
        ("main_moby", "test_vit", "torchvision:IMAGENET1K_V1", "is not a network of torchvision"),
        ("main_moby", "ghostnet_050", "timm", "timm has no weights for ghostnet_050"),
        ("main_moby", "vit_small", tmp_path / "vit.pth", "give -a vit_small_patch16_224"),
        ("main_synco", "resnet18", "torchvision:IMAGENET1K_V1", "service not known", network),
        ("main_synco", "resnet18", "timm", "its weights: no route", network),
        ("main_synco", "resnet18", "https://x/y.pth", "is a URL"),
    ):
        words = ("-a", arch, *SHORT, "--init", init, "--save-dir", tmp_path / "run")
        refused(script(name, shared_images, *words), *said)
        assert not (tmp_path / "run").exists()
    refused(
        script("main_synco", shared_images, *SMALL, "--stem", "cifar", "--init", file),
        "its stem is imagenet, not cifar; give --stem imagenet",
    )


def test_a_resumed_run_does_not_read_the_file(resnet18, script, shared_images, tmp_path):
    _, file = resnet18
    words = (shared_images, *SMALL[:-1], 2, "-p", 1)
    init = ("--init", file)
    status, out, err = script("main_synco", *words, *init, "--save-dir", tmp_path / "whole")
    assert status == 0 and "backbone tensors matched" in out, err
    first = tmp_path / "whole" / "checkpoint_0000.pth.tar"
    assert load(first)["args"]["init"] == str(file)
    for run in ("present", "gone"):
        if run == "gone":
            file.unlink()
        more = (*init, "--resume", first, "--save-dir", tmp_path / run)
        status, out, err = script("main_synco", *words, *more)
        assert status == 0, err
        assert "--init has no effect: the run continues with the weights of its checkpoint" in out
        assert "matched" not in out
        a, b = (load(tmp_path / one / "checkpoint_0001.pth.tar") for one in ("whole", run))
        for key in ("state_dict", "optimizer", "progress", "epoch"):
            assert same(a[key], b[key]), key
    resumed = ("--resume", first, "--save-dir", tmp_path / "none")
    differ = script("main_synco", *words, *resumed)
    refused(differ, f"--init is unset, and was {file}", "--allow-change init")
    again = ("--resume", "auto", "--save-dir", tmp_path / "new")
    refused(script("main_synco", *words, *init, *again), "no such checkpoint")


@pytest.mark.slow
def test_two_processes_start_from_the_same_weights(resnet18, shared_images, tmp_path):
    """With a learning rate of 0, all parameters stay those of the file."""
    net, file = resnet18
    two = ("--multiprocessing-distributed", "--nproc-per-node", 2, "--save-dir", tmp_path / "run")
    words = ("main_synco.py", shared_images, *SMALL, "--lr", 0, "--init", file, *two)
    out = succeeded(shell(*words))
    assert " x 2 processes" in out and out.count("backbone tensors matched") == 1
    state = load(tmp_path / "run" / "checkpoint_0000.pth.tar")["state_dict"]
    for name, parameter in net.named_parameters():
        if not name.startswith("fc."):
            for encoder in ("encoder_q", "encoder_k"):
                assert torch.equal(state[f"module.{encoder}.{name}"], parameter), name
