"""Runs of main_moby.py with transformers, and evaluations of their checkpoints."""

import json
import math

import pytest
import timm
import torch
from conftest import ROOT, in_process, shell
from dataset_trees import WRITERS, Tree
from encoder_helpers import ARCHS, METHODS, SIZES, SMALL, VIT
from run_helpers import facts, load, refused, same, succeeded, typed
from voc_tree import write_voc

from moco.encoder import networks, recompute
from moco.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, shared_images):
    """Return a checkpoint of each method, each with another network."""
    files = {}
    for method, options in METHODS.items():
        run = tmp_path_factory.mktemp(method)
        command = (
            shared_images,
            *SIZES,
            "--method",
            method,
            *options,
            *typed("-a {} --knn-every 1", ARCHS[method]),
        )
        assert in_process("main_moby", *command, "--save-dir", run)[0] == 0
        files[method] = run / "checkpoint_0000.pth.tar"
    return files


def test_encoder_loads_into_timms_own_network(checkpoints):
    tensors = {
        name.removeprefix("module.encoder."): tensor
        for name, tensor in load(checkpoints["moby"])["state_dict"].items()
        if name.startswith("module.encoder.")
    }
    stock = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32)
    assert str(stock.load_state_dict(tensors)) == "<All keys matched successfully>"


@pytest.mark.parametrize("method", METHODS)
def test_every_evaluation_reads_the_checkpoint(
    method, checkpoints, script, shared_images, tmp_path
):
    file = checkpoints[method]
    calls = {
        "main_lincls": (shared_images, "--lr", 0.1, 0.01, "--epochs", 1),
        "main_semisup": (
            shared_images,
            *typed("--epochs 1 --train-percent 10 --weights finetune --lr-backbone 0.02"),
            *typed("--ft-proj 1"),
        ),
        "main_knn": (shared_images, "--k", 5),
        "main_voc07": (write_voc(tmp_path / "voc", 30, 12), "--c", 1),
    }
    for evaluation, options in calls.items():
        run = tmp_path / evaluation
        status, out, err = script(
            evaluation,
            *options,
            *typed("--image-size 32 -b 4 -j 0 --pretrained {} --save-dir {}", file, run),
        )
        assert status == 0, err
        found = json.loads((run / "results.json").read_text())
        assert (found["method"], found["arch"]) == (method, ARCHS[method])
        assert all(
            0 <= value <= 1 or name.startswith("best") for name, value in found["metrics"].items()
        )
        count = len(networks.backbone_keys(networks.create(found["arch"], 1, 32)))
        assert f"{count} of {count} backbone tensors matched" in out


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_uninterrupted_run(method, script, shared_images, tmp_path):
    """So do stochastic depth, the queues and the target's momentum."""
    command = (
        shared_images,
        *SMALL,
        *typed("--epochs 3 --method {}", method),
        *METHODS[method],
        *typed("-p 1 --accumulation-steps 2"),
    )
    for run, more in (
        ("full", ()),
        ("parts", ("--resume", tmp_path / "full" / "checkpoint_0001.pth.tar")),
    ):
        status, _, err = script("main_moby", *command, "--save-dir", tmp_path / run, *more)
        assert status == 0, err
    a, b = (load(tmp_path / run / "checkpoint_0002.pth.tar") for run in ("full", "parts"))
    for key in ("epoch", "state_dict", "optimizer", "scaler", "progress"):
        assert same(a[key], b[key]), key
    lines = facts(tmp_path / "full")
    assert facts(tmp_path / "parts") == lines  # the resumed log begins with the first run's lines
    assert {"grad_encoder", "grad_projector", "grad_predictor"} < lines[0].keys()
    assert ("cosine" if method == "byol" else "acc1") in lines[0]


@pytest.mark.parametrize("weights", ["freeze", "finetune"])
def test_resumed_classifier_equals_uninterrupted_one(weights, script, shared_images, tmp_path):
    """Stochastic depth resumes, too, in a frozen and in a fine-tuned network."""
    command = (
        shared_images,
        *typed("-a test_vit --image-size 32 -b 8 -j 0 --lr 0.1 --nesterov --clip-grad 5"),
        *typed("--weights {} --drop-path 0.4 --label-smoothing 0.1", weights),
    )
    runs = {
        "full": [("--epochs", 2)],
        "parts": [("--epochs", 1), ("--epochs", 2, "--resume", "auto")],
        "plain": [("--epochs", 2, "--drop-path", 0)],
        "sharp": [("--epochs", 2, "--label-smoothing", 0)],
    }
    states = {}
    for run, starts in runs.items():
        for more in starts:
            status, _, err = script("main_lincls", *command, *more, "--save-dir", tmp_path / run)
            assert status == 0, err
        states[run] = load(tmp_path / run / "checkpoint.pth.tar")
    for key in ("epoch", "state_dict", "optimizer", "progress", "best_acc1"):
        assert same(states["full"][key], states["parts"][key]), key
    for other in ("plain", "sharp"):
        assert not same(states["full"]["state_dict"], states[other]["state_dict"])
    settings = json.loads((tmp_path / "full" / "results.json").read_text())["settings"]
    assert (settings["drop_path"], settings["label_smoothing"]) == (0.4, 0.1)


def test_recomputed_blocks_change_nothing(script, shared_images, tmp_path):
    net, calls = networks.create("test_vit", 3, 32), []
    net.blocks[2].register_forward_pre_hook(lambda *_: calls.append(1))
    recompute.recompute_blocks(net)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 2
    for arch, words in (
        ("resnet26d", "has batch norm"),
        ("cs3darknet_focus_s", "--grad-checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            recompute.recompute_blocks(networks.create(arch, 3, 64))
    states = []
    for name in ("--no-stop-grad-conv1", "--use-checkpoint"):
        status, _, err = script(
            "main_moby", shared_images, *SMALL, name, "--save-dir", tmp_path / name
        )
        assert status == 0, err
        states.append(load(tmp_path / name / "checkpoint_0000.pth.tar")["state_dict"])
    assert same(*states)


def test_frozen_patch_projection_stays_as_initialized(script, shared_images, tmp_path):
    status, _, err = script(
        "main_moby",
        shared_images,
        *VIT,
        *typed("--epochs 2 --stop-grad-conv1 --wd 0.5 --save-dir {}", tmp_path),
    )
    assert status == 0, err
    first, second = (load(tmp_path / f"checkpoint_000{i}.pth.tar")["state_dict"] for i in range(2))
    kept = ["patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"]
    for name in kept:
        for part in ("encoder", "encoder_k"):
            assert torch.equal(first[f"module.{part}.{name}"], second[f"module.{part}.{name}"])
        assert torch.equal(second[f"module.encoder.{name}"], second[f"module.encoder_k.{name}"])
    assert not torch.equal(first["module.encoder.cls_token"], second["module.encoder.cls_token"])
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    weight = second["module.encoder.patch_embed.proj.weight"]
    assert weight.abs().max() <= bound  # as initialized
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    refused(
        script("main_moby", shared_images, *SIZES, "-a", "resnet18", "--stop-grad-conv1"),
        "resnet18 has no patch projection",
    )


def test_gradient_is_clipped_to_the_given_norm(script, shared_images, tmp_path):
    """SGD without momentum moves the weights by lr times the gradient."""
    moves = []
    for clip in (0, 0.01):
        run = tmp_path / str(clip)
        sgd = "--optimizer sgd --momentum 0 --wd 0 --lr 1 --learning-rate-scaling none --no-cos"
        options = (
            *sgd.split(),
            *"--lr-warmup-epochs 0 -b 24 --epochs 2 --accumulation-steps 2 -p 1".split(),
            *typed("--clip-grad {} --save-dir {}", clip, run),
        )
        status, _, err = script("main_moby", shared_images, *SMALL, *options)
        assert status == 0, err
        first, second = (load(run / f"checkpoint_000{i}.pth.tar")["state_dict"] for i in range(2))
        trained = [n for n in first if ".encoder." in n or ".projector." in n or ".predictor." in n]
        trained = [n for n in trained if "running" not in n and "num_batches" not in n]
        moves.append(
            math.sqrt(sum(float((second[n] - first[n]).double().square().sum()) for n in trained))
        )
        norms = [
            math.hypot(*(line[f"grad_{part}"] for part in ("encoder", "projector", "predictor")))
            for line in facts(run)
        ]
        assert moves[-1] == pytest.approx(min(norms[1], clip or math.inf), rel=1e-3)
    assert moves[1] == pytest.approx(0.01, rel=1e-3) and moves[0] > 0.1


RESULTS = ("imagenet-freeze", "cifar10-finetune")
LAUNCH = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port=12345")


def test_published_commands_run(shared_images, tmp_path):
    """Pre-training, a linear probe, and fine-tuning on another dataset, at 32 pixels."""
    small = ("--image-size", 32, "--epochs", 1, "--workers", 0)
    run = ("--output", tmp_path, "--tag", "T")
    data = ("--data-path", shared_images)
    command = (
        *LAUNCH,
        "main_moby.py",
        "--cfg",
        "configs/moby_vit_tiny.yaml",
        *data,
        "--batch-size",
        8,
        *run,
    )
    out = succeeded(shell(*command, *small, "--mlp-dim", 64))
    assert (
        "total batch 16 = 8 per process x 2 processes x 1 accumulation; lr after scaling 3.125e-05"
        in out
    )
    assert (tmp_path / "T" / "checkpoint_0000.pth.tar").exists()
    command = (
        *LAUNCH,
        "main_lincls.py",
        "--cfg",
        "configs/moby_vit_tiny.yaml",
        *data,
        "--batch-size",
        8,
        *run,
    )
    out = succeeded(shell(*command, *small))
    assert "150 of 150 backbone tensors matched" in out and "lr after scaling 0.015625" in out
    WRITERS["cifar10"](Tree(tmp_path / "cifar"))
    command = tuple(tmp_path / "cifar" if word == shared_images else word for word in command)
    out = succeeded(shell(*command, *small, "--dataset", "cifar10", "--weights", "finetune"))
    assert "150 of 150 backbone tensors matched" in out
    found = [
        json.loads((tmp_path / "T" / f"lincls-{name}" / "results.json").read_text())
        for name in RESULTS
    ]
    assert [(one["method"], one["arch"], one["dataset"], one["protocol"]) for one in found] == [
        ("moby", "vit_small", str(shared_images), "linear"),
        ("moby", "vit_small", "cifar10", "finetune"),
    ]


def test_evaluation_finds_the_run_of_output_and_tag(script, shared_images, checkpoints, tmp_path):
    small = (shared_images, "--image-size", 32, "-b", 8, "-j", 0, "--k", 5)
    refused(
        script("main_knn", *small, "--output", tmp_path, "--tag", "T"),
        f"no checkpoint_*.pth.tar in {tmp_path / 'T'}",
    )
    refused(script("main_knn", *small, "--tag", "T"), "--tag T", "needs --output DIR")
    run = checkpoints["synco"].parent
    found = (
        *typed("--output {} --tag {}", run.parent, run.name),
        *typed("--cfg {} -a test_vit", ROOT / "configs" / "synco_vit_small.yaml"),
    )
    status, out, err = script("main_knn", *small, *found, "--save-dir", tmp_path / "elsewhere")
    assert (
        status == 0
        and "checkpoint_0000.pth.tar: 78 of 78" in out
        and (tmp_path / "elsewhere" / "results.json").exists()
    ), err
    status, out, err = script("main_knn", *small, *found, "--image-size", 16)
    assert (
        status == 0
        and "pre-trained at 32 pixels, and is used at 16" in out
        and (run / "knn-imagenet").exists()
    ), err


def test_error_about_another_network_names_it(script, shared_images, checkpoints, tmp_path):
    small = (shared_images, "--image-size", 32, "--pretrained", checkpoints["byol"])
    refused(
        script("main_knn", *small, "-a", "test_vit"),
        "contains vit_tiny, not test_vit; give -a vit_tiny",
    )
    result = shell(
        "detection/convert-pretrain-to-detectron2.py", checkpoints["byol"], tmp_path / "x.pkl"
    )
    assert (
        result.returncode == 2
        and "is of vit_tiny, but the detectors here are built on ResNets" in result.stderr
    )
