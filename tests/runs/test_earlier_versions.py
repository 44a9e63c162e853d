"""Runs of the version before this one load, resume and compare (tests/before/ has its files)."""

import json

import pytest
import torch
import yaml
from conftest import ROOT, in_process
from run_helpers import load, same

from moco.report import results

BEFORE = ROOT / "tests" / "before"


def described(value):
    """Types, names and shapes of what a checkpoint contains."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, list):
        return [described(value[0])] if value and isinstance(value[0], dict) else "list"
    return type(value).__name__


@pytest.fixture(scope="module")
def options():
    return yaml.safe_load((BEFORE / "synco_args.yaml").read_text())


@pytest.fixture(scope="module")
def again(shared_images, tmp_path_factory):
    """The run of the earlier version's args.yaml, by this one."""
    run = tmp_path_factory.mktemp("again") / "run"
    words = (shared_images, "--cfg", BEFORE / "synco_args.yaml", "--save-dir", run)
    status, _, err = in_process("main_synco", *words)
    assert status == 0, err
    return run


def test_its_args_yaml_is_a_recipe_of_the_same_settings(again, options):
    written = yaml.safe_load((again / "args.yaml").read_text())
    own = {"cfg", "data", "save_dir"}
    assert written.keys() >= options.keys()
    for name in options.keys() - own:
        assert written[name] == options[name], name


def test_a_checkpoint_has_the_names_types_and_shapes_that_it_had(again):
    expected = json.loads((BEFORE / "checkpoint.json").read_text())
    found = described(load(again / "checkpoint_0001.pth.tar"))
    found["optimizer"].pop("state")
    found.pop("args")
    assert found.pop("image_digest") == "str"  # it had none
    assert found == expected


def test_a_checkpoint_with_its_options_resumes(again, options, script, shared_images, tmp_path):
    state = load(again / "checkpoint_0000.pth.tar")
    state["args"] = {**options, "data": str(shared_images)}
    del state["image_digest"]
    torch.save(state, tmp_path / "checkpoint_0000.pth.tar")
    words = (shared_images, "--cfg", BEFORE / "synco_args.yaml", "--save-dir", tmp_path / "run")
    resumed = ("--resume", tmp_path / "checkpoint_0000.pth.tar")
    status, _, err = script("main_synco", *words, *resumed)
    assert status == 0, err
    a, b = (load(run / "checkpoint_0001.pth.tar") for run in (again, tmp_path / "run"))
    for name in ("state_dict", "optimizer", "progress", "epoch"):
        assert same(a[name], b[name]), name


def test_its_results_stand_in_one_table_with_new_ones(again, script, shared_images, tmp_path):
    for name in ("lincls", "knn"):
        (tmp_path / "earlier" / name).mkdir(parents=True)
        text = (BEFORE / f"{name}_results.json").read_text()
        (tmp_path / "earlier" / name / "results.json").write_text(text)
    file = again / "checkpoint_0001.pth.tar"
    words = (shared_images, "-b", 8, "-j", 0, "--pretrained", file, "--k", 5)
    status, _, err = script("main_knn", *words, "--save-dir", tmp_path / "now")
    assert status == 0, err
    protocols = [column[1] for _, column in results.collect(tmp_path)]
    knn = [protocol for protocol in protocols if protocol.startswith("k-NN")]
    assert len(knn) == len(protocols) - 1 and len(set(knn)) == 1
