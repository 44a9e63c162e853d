"""Test that every user of a checkpoint has the epsilons of the layer norms of pre-training."""

import importlib
import json
import sys

import pytest
import torch
from conftest import in_process
from encoder_helpers import QUEUE, RECIPES, SIZES
from encoder_helpers import settings as options_of
from run_helpers import load, refused, typed
from torch import nn
from voc_tree import write_voc

import hubconf
import main_moby
from moco.encoder import networks, pretrained
from moco.encoder.stock import stock_models
from moco.evaluate import inputs
from moco.report import pictures, runs
from tools import export

SWIN = (*SIZES, *QUEUE, "-a", "swin_tiny")
CPU = torch.device("cpu")


def epsilons(net):
    return {name: x.eps for name, x in net.named_modules() if isinstance(x, nn.LayerNorm)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_images):
    """Return the run folder of a Swin with SynCo-v2's epsilons."""
    run = tmp_path_factory.mktemp("swin")
    command = (shared_images, *SWIN, "--norm-eps", "synco-v2", "--save-dir", run)
    assert in_process("main_moby", *command)[0] == 0
    return run


@pytest.fixture(scope="module")
def expected(trained, shared_images):
    """Return images, and the features of the encoder of pre-training."""
    words = [str(word) for word in (shared_images, *SWIN, "--norm-eps", "synco-v2")]
    method = main_moby.build(main_moby.complete(main_moby.parser().parse(words)))
    state = load(trained / "checkpoint_0000.pth.tar")["state_dict"]
    method.load_state_dict({name.removeprefix("module."): x for name, x in state.items()})
    torch.manual_seed(0)
    # images of little contrast, whose variance is not far above the epsilons
    images = 1e-3 * torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        return images, networks.features(method.encoder.eval(), images)


def check(net, expected):
    images, features = expected
    with torch.inference_mode():
        assert torch.equal(networks.features(net.eval(), images), features)


def test_only_the_second_norm_of_a_block_has_timms_epsilon():
    found = epsilons(networks.create("swin_tiny", 0, 32, norm_eps="synco-v2"))
    blocks = [name for name in found if ".blocks." in name]
    assert len(blocks) == 2 * 12 and len(found) == 2 * 12 + 3 + 2
    for name, eps in found.items():
        assert eps == (1e-5 if name in blocks and name.endswith("norm2") else 1e-6), name
    for given in (None, "timm"):
        stock = epsilons(networks.create("swin_tiny", 0, 32, norm_eps=given))
        assert set(stock.values()) == {1e-5} and stock.keys() == found.keys()


def test_recipes_of_synco_v2s_code_have_its_epsilons():
    for path in RECIPES:
        args = options_of(path)
        own = args["arch"].startswith("swin") and args["method"] != "moby"
        assert args.get("norm-eps") == ("synco-v2" if own else None), path.name


EVALUATIONS = ("main_lincls", "main_semisup", "main_knn", "main_voc07")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_compute_the_features_of_pre_training(
    name, trained, expected, shared_images, tmp_path, monkeypatch
):
    module = importlib.import_module(name)
    data = write_voc(tmp_path, 30, 12) if name == "main_voc07" else shared_images
    file = trained / "checkpoint_0000.pth.tar"
    words = (data, "--pretrained", file, "--save-dir", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    config = module.complete(module.parser().parse([str(word) for word in words]))
    assert config.network.norm_eps == "synco-v2"
    check(inputs.load_network(config, 3, CPU), expected)
    # without the entry, as in files of other software, the option says it
    state = load(file)
    del state["args"]["norm_eps"]
    torch.save(state, tmp_path / "other.pth")
    for more, same in ((("--norm-eps", "synco-v2"), True), ((), False)):
        words = (data, "--pretrained", tmp_path / "other.pth", *more)
        config = module.complete(module.parser().parse([str(word) for word in words]))
        net = inputs.load_network(config, 3, CPU).eval()
        with torch.inference_mode():
            found = networks.features(net, expected[0])
        assert torch.equal(found, expected[1]) == same


def test_other_readers_compute_the_features_of_pre_training(trained, expected):
    file = trained / "checkpoint_0000.pth.tar"
    check(pretrained.read(str(file)).net, expected)
    check(hubconf.encoder(str(file)), expected)
    check(pictures.encoder(runs.read([trained])[0], None)[0], expected)


def test_an_export_keeps_the_epsilons(trained, expected, tmp_path, monkeypatch, capsys):
    file, out = trained / "checkpoint_0000.pth.tar", tmp_path / "swin.safetensors"
    for path in (out, out.with_suffix(".pth")):
        monkeypatch.setattr(sys, "argv", ["export", str(file), str(path), "--force", "--hub"])
        assert export.main() == 0, capsys.readouterr().err
    assert "--norm-eps synco-v2" in capsys.readouterr().out
    check(pretrained.read(str(out)).net, expected)
    check(pretrained.read(str(out.with_suffix(".pth")), "swin_tiny", 32, "synco-v2").net, expected)
    check(torch.hub.load(str(tmp_path), "encoder", source="local"), expected)
    names = {}
    (stock,) = stock_models("swin_tiny", 32, norm_eps="synco-v2")
    exec("\n".join(["import timm, torch", *stock.lines]), names)
    assert epsilons(names["net"]) == epsilons(pretrained.read(str(out)).net)


def test_a_resumed_run_and_a_classifier_keep_the_epsilons(trained, script, shared_images, tmp_path):
    file = trained / "checkpoint_0000.pth.tar"
    command = (shared_images, *SWIN, "--resume", file, "--save-dir", tmp_path / "more")
    more = ("--epochs", 2, "--allow-change", "epochs")
    refused(script("main_moby", *command, *more, "--norm-eps", "timm"), "--norm-eps is timm")
    status, _, err = script("main_moby", *command, *more)
    assert status == 0, err
    state = load(tmp_path / "more" / "checkpoint_0001.pth.tar")
    assert state["args"]["norm_eps"] == "synco-v2"
    probe = (shared_images, *typed("-b 8 -j 0 --epochs 1 --lr 0.1"))
    run = tmp_path / "probe"
    status, _, err = script("main_lincls", *probe, "--pretrained", file, "--save-dir", run)
    assert status == 0, err
    first = json.loads((run / "results.json").read_text())
    assert first["settings"]["norm_eps"] == "synco-v2"
    again = ("-e", "--resume", run / "checkpoint.pth.tar", "--save-dir", tmp_path / "again")
    status, _, err = script("main_lincls", *probe, *again)
    assert status == 0, err
    found = json.loads((tmp_path / "again" / "results.json").read_text())
    assert found["metrics"] == first["metrics"]
    assert found["settings"]["norm_eps"] == "synco-v2"


def test_epsilons_are_refused_if_they_contradict_the_file_or_the_network(
    trained, script, shared_images
):
    file = trained / "checkpoint_0000.pth.tar"
    words = ("--pretrained", file, "--norm-eps", "timm", "--image-size", 32)
    refused(
        script("main_knn", shared_images, *words), "was trained with synco-v2; leave --norm-eps out"
    )
    words = (shared_images, *SIZES, *QUEUE, "-a", "test_vit", "--norm-eps", "synco-v2")
    refused(script("main_moby", *words), "--norm-eps has no effect: it is for Swins")
