"""Run the Python blocks of docs/python.md in order, in one namespace and a folder of their own."""

import importlib
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT

import moco

PAGE = (ROOT / "docs/python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture
def folder(tmp_path, shared_images, pretraining, monkeypatch):
    """Return a folder with the files that the page names, which becomes the current folder."""
    run = tmp_path / "runs/synco"
    run.mkdir(parents=True)
    shutil.copy(pretraining / "checkpoint_0000.pth.tar", run / "checkpoint_0199.pth.tar")
    (tmp_path / "DIR").symlink_to(shared_images)
    for name, of in (("cat.jpg", "class0"), ("dog.jpg", "class1")):
        shutil.copy(shared_images / "val" / of / "0.jpg", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def test_every_block_runs(folder):
    seen, names = [], {}
    for block in BLOCKS:
        exec(compile(block, f"docs/python.md: {block.splitlines()[0]}", "exec"), names)
        seen.append(dict(names))
    assert len(BLOCKS) == 9
    loaded, features, tuned, _, _, _, trained, by_hand, simclr = seen

    assert loaded["encoder"].arch == "resnet18" and loaded["encoder"].num_features == 512
    assert features["batch"].shape == (2, 3, 32, 32) and features["features"].shape == (2, 512)
    assert features["similarity"].ndim == 0 and -1 <= features["similarity"] <= 1
    assert tuned["loss"] < 0.5 < 1.09  # log(3) is chance, and the three classes are easy

    assert all(one["loss"].isfinite() for one in (trained, by_hand, simclr))
    queue, k = trained["queue"], trained["k"]
    assert queue.shape == (4096, 128) and torch.equal(queue[: len(k)], k)
    assert by_hand["synthetic"].shape == (32, 60)
    start = moco.load_encoder("finetuned.pth.tar").net.conv1.weight
    moved = [(net[0].net.conv1.weight - start).norm() for net in (names["query"], names["key"])]
    assert 0 < moved[1] < 0.1 * moved[0]  # the key encoder follows slowly


def test_the_pages_loss_equals_the_logits_that_it_writes_out(folder):
    """The page says so of `bank_info_nce` and of `cross_entropy` of the logits."""
    names = {}
    for block in BLOCKS:
        exec(block, names)
    q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 128)) for n in (8, 8, 4096))
    q.requires_grad_()
    names |= {"q": q, "k": k, "queue": queue, "first": None, "query": lambda _: q}
    names["generator"].manual_seed(1)
    expected = names["synco_loss"](q, k, queue)
    (gradient,) = torch.autograd.grad(expected, q)
    names["generator"].manual_seed(1)
    exec(next(block for block in BLOCKS if "similarities(" in block), names)
    assert torch.allclose(names["loss"], expected, atol=1e-5)
    # the page normalizes q once more, which removes the radial part of the gradient
    gradient -= (gradient * q).sum(1, keepdim=True) * q
    (other,) = torch.autograd.grad(names["loss"], q)
    assert torch.allclose(gradient, other, atol=1e-5)


def test_the_functions_in_the_table_exist():
    named = re.findall(r"`moco\.loss\.(\w+)\.(\w+)`", PAGE)
    assert len(named) == 9
    for module, function in named:
        assert callable(getattr(importlib.import_module(f"moco.loss.{module}"), function))


def test_the_blocks_leave_no_other_file(folder):
    names = {}
    for block in BLOCKS[:4]:
        exec(block, names)
    assert sorted(os.listdir(folder)) == ["DIR", "cat.jpg", "dog.jpg", "finetuned.pth.tar", "runs"]
