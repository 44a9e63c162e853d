"""Test a resumed run: its options, changes on purpose, and the checkpoints that it keeps."""

import json
from pathlib import Path

import pytest
import yaml
from run_helpers import PRETRAIN, digests, load, refused, typed

import main_synco
from moco.config import replaced
from moco.engine import resume
from moco.errors import InputError

pytestmark = pytest.mark.slow


def test_changed_options_are_refused_each_by_name(script, shared_images, run):
    before = digests(run)
    changed = ("--image-size", 48, "--moco-t", 0.2, "--aug-plus", "--lr", 0.3, "--epochs", 2)
    command = (
        "main_synco",
        shared_images,
        *typed("-a resnet18 -b 8 -j 0 --moco-k 32 --save-dir {}", run),
    )
    result = script(*command, *changed, "--resume", "auto")
    names = ("image-size", "moco-t", "aug-plus", "lr")
    refused(
        result,
        *(f"--{name} is" for name in names),
        "0.3, and was 0.03",
        "--allow-change aug-plus,image-size,lr,moco-t",
    )
    refused(
        script(*command, *changed, "--resume", run / "checkpoint_0000.pth.tar"),
        *(f"--{name} is" for name in names),
    )
    refused(
        script(*command, "--image-size", 32, "-b", 4, "--resume", "auto"),
        "--batch-size is 4 in all, and was 8 in all",
    )
    refused(
        script(*command, "--image-size", 32, "--seed", 1, "--resume", "auto"),
        "--seed is 1, and was 0",
    )
    assert digests(run) == before


def test_an_option_is_changed_on_purpose(script, shared_images, run):
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        *typed("--epochs 2 --save-dir {} --resume auto", run),
    )
    refused(
        script(*command, "--lr", 0.5, "--wd", 0.2, "--allow-change", "lr"),
        "--wd is 0.2, and was 0.0001",
    )
    refused(script(*command, "--allow-change", "lrr"), "--allow-change lrr", "no such option")
    status, out, err = script(
        *command, "--lr", 0.5, "--wd", 0.2, "--momentum", 0.5, "--allow-change", "lr,--wd,momentum"
    )
    assert status == 0, err
    assert "--allow-change lr: 0.03 before, 0.5 from now on" in out
    (group,) = load(run / "checkpoint_0001.pth.tar")["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.2, 0.5)
    refused(
        script("main_synco", shared_images, *PRETRAIN, "--allow-change", "lr"),
        "no effect without --resume",
    )


def test_args_yaml_says_how_the_checkpoints_were_made(script, shared_images, run, monkeypatch):
    """A start that trains nothing, or ends before its first checkpoint, leaves it as it is."""
    from moco.engine.trainer import Trainer

    def interrupted(*_):
        raise KeyboardInterrupt

    before = digests(run)["args.yaml"]
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        *typed("--save-dir {} --resume auto --lr 0.5 --allow-change lr", run),
    )
    assert script(*command, "--epochs", 1)[0] == 0 and digests(run)["args.yaml"] == before
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", interrupted)
        assert script(*command, "--epochs", 2)[0] == 130 and digests(run)["args.yaml"] == before
    assert script(*command, "--epochs", 2)[0] == 0
    options = yaml.safe_load((run / "args.yaml").read_text())
    assert (options["lr"], options["epochs"]) == (0.5, 2)


def test_a_run_without_a_checkpoint_says_that_its_log_begins_anew(script, shared_images, run):
    (run / "checkpoint_0000.pth.tar").unlink()
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        *typed("--epochs 1 --save-dir {} --resume auto", run),
    )
    status, out, err = script(*command)
    assert status == 0, err
    assert f"--resume auto: no checkpoint in {run} yet; the run starts again, with a new log" in out


def test_names_of_changed_options_are_joined_by_commas(script, shared_images, run):
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        *typed("--save-dir {} --resume auto --allow-change lr wd", run),
    )
    refused(script(*command), "unexpected argument 'wd'", "joined by commas: lr,wd")


def test_batch_norm_groups_may_differ_among_several_processes(monkeypatch):
    saved = {"args": {"bn_splits": 4, "lr": 0.1}, "progress": {"batch": 8}}
    given = {"bn_splits": 8, "lr": 0.1, "resume": "x/checkpoint.pth.tar"}
    given |= {"exif": "ignore", "shrink_on_decode": True}  # as of runs without these options
    config = replaced(main_synco.Config(), **given)
    with pytest.raises(InputError, match="--bn-splits is 8, and was 4"):
        resume.check_unchanged(config, saved, 8)
    monkeypatch.setattr(resume.distributed, "world_size", lambda: 2)
    resume.check_unchanged(config, saved, 8)


def test_more_epochs_change_a_cosine_and_nothing_else(script, shared_images, tmp_path):
    command = ("main_synco", shared_images, *PRETRAIN, "--resume", "auto", "--save-dir")
    for folder, schedule in ((tmp_path / "steps", ()), (tmp_path / "cosine", ("--cos",))):
        assert script(*command, folder, *schedule, "--epochs", 1)[0] == 0
        status, out, _ = script(*command, folder, *schedule, "--epochs", 1)
        assert status == 0 and "no epochs are left: 1 are done, and --epochs is 1" in out
    assert script(*command, tmp_path / "steps", "--epochs", 2)[0] == 0
    refused(
        script(*command, tmp_path / "cosine", "--cos", "--epochs", 2), "--epochs is 2, and was 1"
    )
    assert (
        script(*command, tmp_path / "cosine", "--cos", "--epochs", 2, "--allow-change", "epochs")[0]
        == 0
    )


def test_a_checkpoint_is_resumed_in_its_own_folder(
    script, shared_images, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = run / "checkpoint_0000.pth.tar"
    command = ("main_synco", shared_images, *PRETRAIN, "--epochs", 2)
    status, out, err = script(*command, "--resume", first)
    assert status == 0, err
    assert (
        f"run folder {run}" in out
        and (run / "checkpoint_0001.pth.tar").exists()
        and not (tmp_path / "runs").exists()
    )
    # the first one has been superseded: to go back to it is another run
    before = digests(run)
    refused(
        script(*command, "--resume", first),
        "checkpoint_0001.pth.tar in the same folder is further",
        "--save-dir",
    )
    assert digests(run) == before
    status, _, err = script(*command, "--resume", first, "--save-dir", tmp_path / "branch")
    assert status == 0, err
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "branch" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) and steps[0] <= 6 and digests(run) == before


def test_a_run_folder_without_options_is_continued_by_its_checkpoints(script, shared_images, run):
    (run / "args.yaml").unlink()
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        *typed("--epochs 2 --save-dir {} --resume auto", run),
    )
    assert script(*command)[0] == 0
    assert yaml.safe_load((run / "args.yaml").read_text())["epochs"] == 2


# retention
def epochs(folder: Path) -> list[int]:
    return sorted(int(path.name[11:15]) for path in folder.glob("checkpoint_*.pth.tar"))


def test_the_newest_the_best_and_every_tenth_are_kept(script, shared_images, tmp_path, monkeypatch):
    from moco.engine.monitor import Monitor

    accuracies = iter([0.95, 0.1, 0.2, 0.9, *[0.3] * 20])  # the first is that before training
    monkeypatch.setattr(Monitor, "_knn", lambda self, images, val: next(accuracies))
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        *typed("--knn-every 1 --save-dir {} --resume auto", tmp_path),
    )
    assert script(*command, "--epochs", 5)[0] == 0
    assert epochs(tmp_path) == [2, 3, 4]
    assert script(*command, "--epochs", 13)[0] == 0  # the best is remembered over a resume
    assert epochs(tmp_path) == [2, 9, 11, 12]


def test_all_checkpoints_are_kept_if_asked_for(script, shared_images, tmp_path):
    command = ("main_synco", shared_images, *PRETRAIN, "--save-dir", tmp_path, "--resume", "auto")
    assert script(*command, "--epochs", 4, "--keep", "all")[0] == 0
    assert epochs(tmp_path) == [0, 1, 2, 3]
    assert script(*command, "--epochs", 7)[0] == 0  # a resume with the default spares what is there
    assert epochs(tmp_path) == [0, 1, 2, 3, 5, 6]
    assert script(*command, "--epochs", 9)[0] == 0  # and so does a second one
    assert epochs(tmp_path) == [0, 1, 2, 3, 7, 8]
    refused(script(*command, "--keep", "some"), "--keep", "neither a number nor the word all")
