"""Tests of every method in the registry, and of the example in docs/adding-a-method.md."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, in_process, own_lines, shell
from report_helpers import made
from run_helpers import facts, load, same, succeeded

from moco.engine.pretrain import PretrainingTask
from moco.methods import METHODS

# three epochs of a few steps of tiny images
SHORT = "--image-size 32 -b 16 -j 0 --epochs 3 -p 1 --lr 0.01 --seed 2".split()
TOP = ("state_dict", "optimizer", "scaler", "progress", "epoch")  # entries that decide what follows


def options(name):
    """The options of a tiny run, with the smallest ResNet unless the method chooses a network."""
    arch = [] if "-a " in METHODS[name].tiny else ["-a", "resnet18"]
    return [*METHODS[name].tiny.split(), *arch, *SHORT]


@pytest.fixture(scope="module")
def run(shared_images, tmp_path_factory):
    """The folder of a method's tiny run, which is made once."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            words = (shared_images, *options(name), "--save-dir", folder)
            status, _, err = in_process(METHODS[name].script, *words)
            assert status == 0, err
            made[name] = folder
        return made[name]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_one_that_never_stopped(name, run, script, shared_images, tmp_path):
    whole = run(name)
    words = (shared_images, *options(name), "--save-dir", tmp_path / "resumed")
    resumed = ("--resume", whole / "checkpoint_0001.pth.tar")
    status, out, err = script(METHODS[name].script, *words, *resumed)
    assert status == 0, err
    assert "at epoch 2" in out
    a, b = (load(folder / "checkpoint_0002.pth.tar") for folder in (whole, tmp_path / "resumed"))
    for key in TOP:
        assert same(a[key], b[key]), key
    assert a["method"] == b["method"]


@pytest.mark.parametrize("name", METHODS)
def test_the_monitor_changes_no_weight(name, run, script, shared_images, tmp_path, monkeypatch):
    rows = []  # whether the probe reads the features of one view, in the order of the labels
    loss = PretrainingTask.loss

    def recorded(task, net, views, batch, progress):
        seen = []
        hook = task.module.encoder.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        result = loss(task, net, views, batch, progress)
        hook.remove()
        rows.append(any(torch.equal(seen[0][: len(view)], view) for view in views))
        return result

    monkeypatch.setattr(PretrainingTask, "loss", recorded)
    measured = "--knn-every 1 --knn-k 5 --probe-online --rankme-every 2".split()
    words = (shared_images, *options(name), *measured, "--save-dir", tmp_path / "run")
    status, _, err = script(METHODS[name].script, *words)
    assert status == 0, err
    a, b = (load(folder / "checkpoint_0002.pth.tar") for folder in (run(name), tmp_path / "run"))
    for key in TOP:
        assert same(a[key], b[key]), key
    assert all(rows) and len(rows) > 3
    assert {"probe", "knn_gain", "rankme"} <= {
        key for line in facts(tmp_path / "run") for key in line
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train(name, shared_images, tmp_path):
    words = [f"{METHODS[name].script}.py", shared_images, *options(name), "--save-dir", tmp_path]
    out = succeeded(shell(*words, "--multiprocessing-distributed", "--nproc-per-node", 2))
    assert " x 2 processes" in out
    losses = [line["loss"] for line in facts(tmp_path) if "loss" in line]
    assert len(losses) >= 3 and all(abs(loss) < 100 for loss in losses)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("evaluation", ["main_knn", "main_lincls", "main_semisup"])
def test_evaluations_read_the_encoder(evaluation, name, run, script, shared_images, tmp_path):
    file = run(name) / "checkpoint_0002.pth.tar"
    fine_tuning = ("--weights", "finetune", "--lr-backbone", 0.02, "--train-percent", 10)
    more = {"main_knn": ("--k", 5), "main_lincls": ("--lr", 0.1), "main_semisup": fine_tuning}
    more = more[evaluation]
    if evaluation != "main_knn":
        more += ("--epochs", 1)
    words = (shared_images, "-b", 4, "-j", 0, "--pretrained", file, "--save-dir", tmp_path / "run")
    status, out, err = script(evaluation, *words, *more)
    assert status == 0, err
    matched, whole = re.search(r"(\d+) of (\d+) backbone tensors matched", out).groups()
    assert matched == whole
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_report_explains_every_metric(name, run, tmp_path):
    page = made([run(name)], tmp_path)
    assert f"{METHODS[name].saved or name} ({METHODS[name].script}.py)" in page.text
    assert "Loss" in page.titles and "As the method logs it." not in page.text, page.titles
    assert "Traceback" not in page.text and page.source.count("<figure>") > 10


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "wrong", ["--epochs -1", "--lr x", "--epoch 1", "--recipe none", "--image-size 0"]
)
def test_a_wrong_option_is_one_line(wrong, name, script, shared_images, tmp_path):
    words = (shared_images, *options(name), *wrong.split(), "--save-dir", tmp_path / "run")
    status, _, err = script(METHODS[name].script, *words)
    assert status == 2 and len(own_lines(err)) == 1 and wrong.split()[0].strip("-") in err, err
    assert not (tmp_path / "run").exists()


def blocks():
    """The builder, the script and the entry of docs/adding-a-method.md."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)


def test_the_example_has_at_most_110_lines_that_are_not_blank():
    assert sum(bool(line.strip()) for block in blocks() for line in block.splitlines()) <= 110


@pytest.mark.slow
def test_the_example_passes_the_tests_of_every_method(tmp_path):
    """Two files and one entry, in a copy of the repository, as a contributor would save them."""
    copy = tmp_path / "repository"
    copy.mkdir()
    parts = "moco tests configs tools benchmarks detection docs".split()
    parts += "README.md pyproject.toml hubconf.py".split()
    for name in (*parts, *(path.name for path in ROOT.glob("main_*.py"))):
        take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        take(ROOT / name, copy / name)
    builder, script, entry = blocks()
    (copy / "moco" / "builder" / "simsiam.py").write_text(builder)
    (copy / "main_simsiam.py").write_text(script)
    registry = copy / "moco" / "methods.py"
    registry.write_text(registry.read_text() + entry)

    def run(*words):
        found = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert found.returncode == 0, found.stdout[-3000:]
        return found.stdout

    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")
    tests = ("pytest", "-q", "-x", "-p", "no:cacheprovider")
    passed = run(*tests, "tests/runs/test_methods.py", "-k", "simsiam")
    assert re.search(r"1\d passed", passed), passed[-300:]
    run(*tests, "tests/test_structure.py")
    run(*tests, "tests/test_docs.py", "-k", "commands_of_every_script")
