"""Test fine-tuning on few labels: published commands, learning rates, and exact resume."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, own_lines, settings, shell
from PIL import Image
from run_helpers import typed
from torch import nn

import main_semisup
from moco.data import subsets
from moco.encoder.resnets import resnet
from moco.evaluate import classifier, inputs

pytestmark = pytest.mark.slow

SMALL = ("-a", "resnet18", "--image-size", 32, "-j", 0, "-b", 8)
FINE_TUNING = typed("--weights finetune --lr-backbone 0.02 --lr-classifier 0.02")


# The settings of SynCo's paper and the launch flags of its repository, on a small network.
PUBLISHED = (
    "main_semisup.py -a resnet18 --lr-backbone {lr} --lr-classifier {lr} "
    "--train-percent {percent} --weights finetune --batch-size 16 --epochs 1 --pretrained {file} "
    "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0"
)


def load(path):
    return torch.load(path, weights_only=True)


def results(run) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint such as main_synco.py writes, with MoCo v2's head."""
    torch.manual_seed(5)
    net = resnet("resnet18", 16, mlp=True)
    file = tmp_path_factory.mktemp("pretrained") / "checkpoint_0199.pth.tar"
    weights = {f"module.encoder_q.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet18", "method": "synco", "state_dict": weights}, file)
    return file


@pytest.mark.parametrize("percent", [1, 10])
def test_published_command_runs(percent, pretrained, tmp_path):
    command = PUBLISHED.format(lr=0.05, percent=percent, file=pretrained).split()
    result = shell(*command, "--image-size", 32, "-j", 0, "--save-dir", tmp_path, "photos")
    assert result.returncode == 0, result.stderr
    assert (
        f"{max(1, round(0.6 * percent)) * 19} of 1140 training images are labelled" in result.stdout
    )
    assert "120 of 120 backbone tensors matched" in result.stdout and "\n* Acc@1 " in result.stdout
    found = results(tmp_path)
    assert (found["method"], found["pretrain_epochs"], found["protocol"]) == (
        "synco",
        200,
        f"semisup{percent}",
    )
    assert (
        len((tmp_path / "subset.txt").read_text().splitlines()) == max(1, round(0.6 * percent)) * 19
    )
    best = load(tmp_path / "model_best_semisup.pth.tar")
    assert best["best_acc1"] == found["metrics"]["acc1"] and best["method"] == "semisup"


def test_names_that_are_not_utf_8(pretrained, images, script, tmp_path):
    """Give such names to the data folder, a class, files and features.

    They are written, read again, and printed.
    """
    data = images.rename(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es"))
    for split in ("train", "val"):
        (data / split / "class1").rename(data / split / os.fsdecode(b"pi\xe8ces"))
        for file in (data / split / os.fsdecode(b"pi\xe8ces")).iterdir():
            file.rename(file.with_name(os.fsdecode(b"\xff" + os.fsencode(file.name))))
    (data / "classes").write_bytes(b"pi\xe8ces\nclass0\n")
    few = (*SMALL[2:], "--pretrained", pretrained, "--train-percent", 10, "--epochs", 1, "-b", 2)
    status, _, err = script("main_semisup", *few, "--save-dir", tmp_path / "a", data)
    assert status == 0, err
    subset = tmp_path / "a" / "subset.txt"
    assert b"pi\xe8ces/\xff" in subset.read_bytes() and len(subset.read_bytes().splitlines()) == 2
    status, _, err = script(
        "main_semisup", *few, "--subset-file", subset, "--save-dir", tmp_path / "b", data
    )
    assert status == 0, err
    assert (tmp_path / "b" / "subset.txt").read_bytes() == subset.read_bytes()
    knn = (*SMALL[2:], "--pretrained", pretrained, "--k", 3, "--class-list", data / "classes")
    two = ("--multiprocessing-distributed", "--nproc-per-node", 2)
    dump = shell(
        "main_knn.py", *knn, *two, "--dump-features", data / "f", "--save-dir", tmp_path / "k", data
    )
    assert dump.returncode == 0, dump.stderr
    *_, where, accuracy, _ = dump.stdout.splitlines()
    assert where.endswith("/donn\\udce9es/f")
    status, out, err = script(
        "main_knn", "--load-features", data / "f", "--k", 3, "--save-dir", tmp_path / "l"
    )
    assert status == 0 and out.splitlines()[-2] == accuracy, err
    assert (
        results(tmp_path / "l")["dataset"]
        .encode(errors="surrogateescape")
        .endswith(b"donn\xe9es (classes)")
    )
    status, _, err = script("main_semisup", *few, "--save-dir", data / "run", data)
    assert status == 2 and "--save-dir" in err and "is not UTF-8" in err and err.count("\n") == 1


def test_the_defaults_are_those_of_the_authors_script():
    args = settings(main_semisup, ["DIR"])
    assert (args.lr_backbone, args.lr_classifier, args.wd, args.momentum) == (0, 0.3, 1e-6, 0.9)
    assert (args.weights, args.train_percent, args.epochs) == ("freeze", 100, 100)
    assert (args.batch_size, args.cos, args.lr_by, args.lr_final) == (256, True, "epoch", 0)
    assert (args.optimizer, args.recipe, args.lr_warmup_epochs) == ("sgd", "probe", 0)


@pytest.mark.parametrize(("percent", "epochs"), [(1, 60), (10, 30), (100, 90)])
def test_the_recipes_are_the_papers_grid(percent, epochs):
    args = settings(main_semisup, ["DIR", "--cfg", f"configs/semisup_{percent}pct.yaml"])
    assert (args.train_percent, args.epochs, args.batch_size) == (percent, epochs, 1024)
    assert (args.weights, args.lr_classifier, args.wd) == ("finetune", 0.5, 1e-6)
    assert args.lr_backbone in (0.01, 0.02, 0.05, 0.1, 0.005) and args.cos
    head = (ROOT / "configs" / f"semisup_{percent}pct.yaml").read_text()
    assert "for lr in 0.01 0.02 0.05 0.1 0.005" in head


def test_a_loop_in_bash_runs(pretrained, shared_images, tmp_path):
    loop = (
        f"for lr in 0.01 0.005; do for epochs in 1; do {sys.executable} main_semisup.py "
        f"-a resnet18 --image-size 32 -j 0 --lr-backbone $lr --lr-classifier $lr "
        f"--train-percent 10 --weights finetune --batch-size 4 --epochs $epochs "
        f"--pretrained {pretrained} --save-dir {tmp_path}/lr_${{lr}}_epochs_$epochs "
        f'{shared_images} | grep "Acc@1 "; done; done'
    )
    done = subprocess.run(
        ["bash", "-euc", loop], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("* Acc@1 ") == 2 and len(list(tmp_path.glob("lr_*/results.json"))) == 2


@pytest.mark.parametrize("part", ["classifier", "backbone"])
def test_each_part_trains_at_its_own_rate(part, script, pretrained, shared_images, tmp_path):
    rates = (
        # --lr-backbone 0 is refused
        ("--lr-classifier", 0.1, "--lr-backbone", 1e-30)
        if part == "classifier"
        else ("--lr-classifier", 0, "--lr-backbone", 0.1)
    )
    common = (
        shared_images,
        *SMALL,
        *typed("--weights finetune --wd 0 --epochs 1 --pretrained {}", pretrained),
    )
    status, _, err = script("main_semisup", *common, *rates, "--save-dir", tmp_path)
    assert status == 0, err
    old = {
        name.removeprefix("module.encoder_q."): t
        for name, t in load(pretrained)["state_dict"].items()
    }
    state = load(tmp_path / "checkpoint.pth.tar")["state_dict"]
    kept = {
        name
        for name in ("conv1.weight", "bn1.weight", "layer4.1.bn2.bias")
        if torch.allclose(state[f"module.{name}"], old[name], rtol=0, atol=1e-20)
    }
    assert len(kept) == (3 if part == "classifier" else 0)
    assert torch.equal(state["module.fc.bias"], torch.zeros(3)) == (part == "backbone")
    # batch norm learns the statistics of the labelled images
    assert not torch.equal(state["module.bn1.running_mean"], old["bn1.running_mean"])


def test_a_new_classifier_does_not_depend_on_where_the_layer_is():
    """Always draw on the CPU in float32, because generators depend on device and type."""
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = nn.Linear(5, 40, dtype=dtype)
        torch.manual_seed(0)
        classifier.init_classifier(layer)
        found.append(layer.weight)
        assert not layer.bias.any()
    assert torch.equal(found[0].double(), found[1]) and torch.equal(found[0].bfloat16(), found[2])
    assert 0.005 < found[0].std() < 0.015


def test_a_classifier_can_begin_at_zero(script, pretrained, shared_images, tmp_path):
    """Check that no gradient reaches the backbone in the first step.

    A classifier that does not train stays at zero.
    """
    common = (
        shared_images,
        *SMALL,
        *typed("--weights finetune --wd 0 --epochs 1 --zero-init-classifier"),
    )
    rates = ("--lr-classifier", 0, "--lr-backbone", 0.1)
    assert (
        script("main_semisup", *common, *rates, "--pretrained", pretrained, "--save-dir", tmp_path)[
            0
        ]
        == 0
    )
    state = load(tmp_path / "checkpoint.pth.tar")["state_dict"]
    assert not state["module.fc.weight"].any()
    assert torch.equal(
        state["module.conv1.weight"],
        load(pretrained)["state_dict"]["module.encoder_q.conv1.weight"],
    )


def test_frozen_weights_stay_and_are_checked(script, pretrained, shared_images, tmp_path):
    options = (
        shared_images,
        *SMALL,
        *typed("--lr-classifier 0.1 --epochs 2"),  # as by default
    )
    status, out, err = script(
        "main_semisup", *options, "--pretrained", pretrained, "--save-dir", tmp_path
    )
    assert status == 0 and "frozen backbone is bit-identical" in out, err
    assert results(tmp_path)["settings"]["weights"] == "freeze"


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "lars_tf"])
def test_resumed_fine_tuning_is_one_never_stopped(
    optimizer, script, pretrained, shared_images, tmp_path
):
    common = (
        shared_images,
        *SMALL,
        *FINE_TUNING,
        *typed("--optimizer {} --pretrained {}", optimizer, pretrained),
    )
    common += ("--val-from-train", 0.25, "--schedule", 1, "--no-cos")
    for run, epochs, more in (
        ("whole", 2, ()),
        ("parts", 1, ()),
        ("parts", 2, ("--resume", tmp_path / "parts/checkpoint.pth.tar")),
    ):
        status, _, err = script(
            "main_semisup", *common, "--epochs", epochs, *more, "--save-dir", tmp_path / run
        )
        assert status == 0, err
    whole, parts = (load(tmp_path / run / "checkpoint.pth.tar") for run in ("whole", "parts"))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name]), name
    assert results(tmp_path / "whole")["metrics"] == results(tmp_path / "parts")["metrics"]
    assert "held_out_acc1" in results(tmp_path / "whole")["metrics"]
    # testing alone takes the settings from the checkpoint
    again = (
        shared_images,
        *SMALL,
        *typed("-e --resume {}", tmp_path / "whole" / "checkpoint.pth.tar"),
        "--save-dir",
        tmp_path / "again",
    )
    status, _, err = script("main_semisup", *again)
    assert status == 0, err
    assert results(tmp_path / "again")["metrics"] == results(tmp_path / "whole")["metrics"]
    status, _, err = script(
        "main_semisup",
        *common,
        *typed("--resume {} --lr-backbone 0.5", tmp_path / "whole/checkpoint.pth.tar"),
    )
    assert status == 2 and "--lr-backbone is 0.5" in err and len(own_lines(err)) == 1


def test_two_processes_test_as_one(script, pretrained, shared_images, tmp_path):
    common = (shared_images, *SMALL, *FINE_TUNING, "--pretrained", pretrained)
    status, _, err = script("main_semisup", *common, "--epochs", 1, "--save-dir", tmp_path / "one")
    assert status == 0, err
    again = (
        *typed("-e --resume {}", tmp_path / "one" / "checkpoint.pth.tar"),
        *typed("--multiprocessing-distributed --nproc-per-node 2"),
    )
    two = shell("main_semisup.py", *common, *again, "--save-dir", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert results(tmp_path / "one")["metrics"] == results(tmp_path / "two")["metrics"]


def test_two_processes_fine_tune(pretrained, shared_images, tmp_path):
    launch = ("--multiprocessing-distributed", "--nproc-per-node", 2)
    options = (
        shared_images,
        *SMALL,
        *FINE_TUNING,
        *typed("--train-percent 10 -b 4 --epochs 1 --pretrained {}", pretrained),
    )
    done = shell("main_semisup.py", *options, *launch, "--save-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "6 of 48 training images are labelled" in done.stdout
        and "4 = 2 per process x 2 processes" in done.stdout
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--train-percent", 5), "--train-percent"),
        (("--ft-proj", 1), "--pretrained FILE"),
        (("--ft-proj", 1, "--weights", "freeze", "--pretrained", "{}"), "--weights finetune"),
        (("--weights", "finetune"), "--lr-backbone 0: --weights finetune would not train"),
        (
            ("--ft-proj", 3, *FINE_TUNING, "--pretrained", "{}"),
            "has 2 linear layers, not --ft-proj 3",
        ),
        (("--subset-file", "nowhere.txt"), "nowhere.txt"),
        (("-e",), "--resume FILE"),
        (("--val-from-train", 1), "take one in (0, 1)"),
        (("--dataset", "cifar"), "the nearest is 'cifar10'"),
        (("--lr-backbone", "-1"), "below 0"),
        (("--resume", "{}"), "lacks args, optimizer, progress"),
    ],
)
def test_a_mistake_is_one_line(options, said, script, pretrained, shared_images, tmp_path):
    options = [str(option).format(pretrained) for option in options]
    status, _, err = script("main_semisup", shared_images, *SMALL, *options, "--save-dir", tmp_path)
    assert status == 2 and said in err and len(own_lines(err)) == 1, err


def test_on_imagenet_the_published_list_is_asked_for_before_any_work(script, tmp_path, monkeypatch):
    image = Image.new("RGB", (32, 32))
    for split in ("train", "val"):
        for i in range(1000):
            folder = tmp_path / "imagenet" / split / f"n{i:08d}"
            folder.mkdir(parents=True)
            image.save(folder / f"n{i:08d}_1.JPEG", "jpeg")
    monkeypatch.setattr(subsets, "_URL", "http://127.0.0.1:9/{}percent.txt")
    monkeypatch.setattr(inputs, "splits", None)
    status, _, err = script(
        "main_semisup",
        tmp_path / "imagenet",
        *SMALL,
        *typed("--train-percent 1 --save-dir {}", tmp_path / "run"),
    )
    assert (
        status == 2
        and "--subset-file FILE" in err
        and len(own_lines(err)) == 1
        and not (tmp_path / "run").exists()
    )


def test_a_kept_projection_trains_and_resumes(script, pretrained, shared_images, tmp_path):
    common = (
        shared_images,
        *SMALL,
        *FINE_TUNING,
        *typed("--ft-proj 1 --pretrained {}", pretrained),
        "--save-dir",
        tmp_path,
    )
    assert script("main_semisup", *common, "--epochs", 1)[0] == 0
    state = load(tmp_path / "checkpoint.pth.tar")
    assert state["state_dict"]["module.fc.2.weight"].shape == (3, 512)
    was = load(pretrained)["state_dict"]["module.encoder_q.fc.0.weight"]
    assert not torch.equal(state["state_dict"]["module.fc.0.weight"], was)
    torch.testing.assert_close(state["state_dict"]["module.fc.0.weight"], was, rtol=0, atol=0.1)
    first = results(tmp_path)["metrics"]
    status, _, err = script(
        "main_semisup",
        *common[:-4],
        *typed("-e --resume {} --save-dir {}", tmp_path / "checkpoint.pth.tar", tmp_path),
    )
    assert status == 0 and results(tmp_path)["metrics"] == first, err
