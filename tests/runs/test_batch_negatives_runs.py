"""Runs of MoCo v3 and SimCLR with synthetic negatives made from those of the batch."""

import re

import pytest
from run_helpers import INPUT, facts, load, refused, same, typed

COUNTS = "--n1 2 --n2 2 --n3 2 --n4 2 --n5 2 --n6 2"
SCRIPTS = {
    "main_mocov3": "--moco-mlp-dim 32 --moco-dim 16 --moco-m-cos --lr-warmup-epochs 1",
    "main_sogclr": "--mlp-dim 32 --dim 16 --loss simclr --lr-warmup-epochs 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_synthetic_negatives_have_epochs_and_a_resumed_run_equals_an_unstopped_one(
    name, script, shared_images, tmp_path
):
    """Train four epochs, of which the second and the third have synthetic negatives.

    The resumed run begins with the third epoch, in the middle of the ramp.
    """
    words = f"{SCRIPTS[name]} --epochs 4 -p 1 --seed 2 --accumulation-steps 2 --save-every 2"
    words += f" --n-hard 7 {COUNTS} --synthetic-first 1 --synthetic-last 3"
    words += " --synthetic-ramp-epochs 2 --synthetic-ramp-of weight"
    for run, more in (
        ("whole", ()),
        ("resumed", ("--resume", tmp_path / "whole" / "checkpoint_0001.pth.tar")),
    ):
        command = (shared_images, *INPUT, *typed(words), "--save-dir", tmp_path / run, *more)
        status, out, err = script(name, *command)
        assert status == 0, err
        assert "12 synthetic negatives per query from epoch 1 on (--synthetic-first), none" in out
        assert "their weight rises (linear) and is full after epoch 2" in out
    a, b = (load(tmp_path / run / "checkpoint_0003.pth.tar") for run in ("whole", "resumed"))
    for key in ("state_dict", "optimizer", "scaler", "progress"):
        assert same(a[key], b[key]), key
    lines = facts(tmp_path / "whole")
    assert facts(tmp_path / "resumed") == lines
    types = {f"hardness_{one}" for one in ("interpolated", "mixup", "noise", "adversarial")}
    for line in lines:
        found = types & line.keys()
        assert found == (types if line["epoch"] in (1, 2) else set()), line
    assert a["method"] == {"main_mocov3": "mocov3", "main_sogclr": "simclr"}[name]
    assert a["args"]["synthetic_last"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_without_synthetic_negatives_is_the_one_that_ends_before_them(
    name, script, shared_images, tmp_path
):
    runs = {"none": "", "late": f"--n-hard 7 {COUNTS} --synthetic-first 1"}
    states = []
    for run, more in runs.items():
        words = (*INPUT, *typed(f"{SCRIPTS[name]} --epochs 1 {more}"))
        status, out, err = script(name, shared_images, *words, "--save-dir", tmp_path / run)
        assert status == 0, err
        assert ("before the first synthetic negatives: this is" in out) == bool(more)
        states.append(load(tmp_path / run / "checkpoint_0000.pth.tar")["state_dict"])
    assert same(*states)


MISTAKES = [
    ("", "--n1 4", "made from the hardest negatives of the batch: give --n-hard"),
    ("", "--n-hard 8 --n1 4 --synthetic-first 5 --synthetic-last 5", "--synthetic-first 5: must"),
    ("", "--n-hard 8 --n1 4 --synthetic-last 12 --synthetic-ramp-epochs 3", "last 2 epochs only"),
    ("", "--n-hard 8", "--n-hard has no effect: there are no synthetic negatives"),
    ("", "--synthetic-last 5", "--synthetic-last has no effect"),
    ("", "--synthetic-ramp-epochs 5", "--synthetic-ramp-epochs has no effect"),
    ("", "--n-hard 8 --n1 4 --synthetic-ramp cosine", "give --synthetic-ramp-epochs as well"),
    ("", "--n-hard 8 --n1 4 --sigma 0.1", "--sigma has no effect: there are no noise negatives"),
    ("", "--n-hard 8 --n1 4 --synthetic-eta 0.1", "there are no adversarial negatives"),
    ("main_mocov3", "--n-hard 8 --n1 4", "--n-hard 8: a query has only 7 negatives"),
    ("main_sogclr", "--n-hard 15 --n1 4", "--n-hard 15: a query has only 14 negatives"),
    ("main_sogclr", "--n-hard 5 --n1 4 --loss sogclr", "--loss sogclr: assumes that all negatives"),
    ("main_sogclr", "--n-hard 5 --n1 4 --loss hcl", "give --loss simclr, dcl or dclw"),
    ("main_sogclr", "--n-hard 5 --n6 4 --eta 1", "synthetic negatives have --synthetic-eta"),
]


@pytest.mark.parametrize(("only", "words", "message"), MISTAKES)
def test_mistakes_are_one_line(only, words, message, script, shared_images, tmp_path):
    for name in [only] if only else SCRIPTS:
        # 8 images in a pass, and 32 for mistakes in other options than --n-hard
        batch = () if only else ("-b", 32)
        command = (*INPUT, *typed(SCRIPTS[name]), *batch, *typed(words))
        refused(script(name, shared_images, *command, "--save-dir", tmp_path), message)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_hardest_come_from_the_batch_of_all_processes(name, script, shared_images, tmp_path):
    """A pass has 16 images, of both processes. Other passes of the same step do not count."""
    negatives = {"main_mocov3": 15, "main_sogclr": 30}[name]
    words = f"{SCRIPTS[name]} -b 16 --n1 4 --n-hard {negatives + 1} --accumulation-steps 4"
    several = typed("--multiprocessing-distributed --nproc-per-node 2 --device cpu")
    command = (*INPUT, *typed(words), *several, "--save-dir", tmp_path)
    refused(script(name, shared_images, *command), f"a query has only {negatives} negatives in the")


def test_help_says_what_the_negatives_are_made_from(script):
    for name in SCRIPTS:
        text = re.sub(r"\s+", " ", script(name, "--help")[1])
        assert "number of hardest negatives of the batch to make synthetic negatives from" in text
        assert "hardest queue entries" not in text
