"""Test checkpoints that a run cannot use: truncated, of another network, or with code in them."""

import json
from argparse import Namespace
from fractions import Fraction

import pytest
import torch
from run_helpers import INPUT, SMALL, options, refused, typed


@pytest.fixture
def checkpoint(script, images, tmp_path):
    status, _, err = script("main_synco", images, *SMALL, "--save-dir", tmp_path / "run")
    assert status == 0, err
    return tmp_path / "run" / "checkpoint_0000.pth.tar"


def test_truncated_checkpoint(script, images, checkpoint, tmp_path):
    broken = tmp_path / "broken.pth.tar"
    data = checkpoint.read_bytes()
    for length in (0, 100, len(data) // 2, len(data) - 10):
        broken.write_bytes(data[:length])
        refused(
            script("main_lincls", images, "--pretrained", broken),
            "broken.pth.tar",
            "not a readable checkpoint",
        )
    refused(
        script("main_synco", images, *SMALL, "--resume", broken, "--save-dir", tmp_path / "r"),
        "broken.pth.tar",
        "not a readable",
    )


def test_checkpoint_that_is_none(script, images, tmp_path):
    strange = tmp_path / "strange.pth.tar"
    strange.write_text("# a page of text")
    refused(
        script("main_lincls", images, "--pretrained", strange),
        "strange.pth.tar",
        "of another format",
    )
    torch.save({"state_dict": {}, "args": Namespace(lr=Fraction(1, 2))}, strange)
    refused(
        script("main_lincls", images, "--pretrained", strange),
        "strange.pth.tar",
        "holds Python objects",
    )


def test_checkpoint_of_another_arch(script, images, checkpoint, tmp_path):
    refused(
        script("main_lincls", images, "--pretrained", checkpoint, "-a", "resnet50"),
        "contains resnet18",
        "-a resnet18",
    )
    refused(
        script("main_lincls", images, "--pretrained", checkpoint, "-a", "resnet34"),
        "contains resnet18",
        "-a resnet18",
    )
    result = script(
        "main_synco",
        images,
        *SMALL,
        *typed("-a resnet34 --resume {} --save-dir {}", checkpoint, tmp_path / "r"),
    )
    refused(result, "arch 'resnet18'", "'resnet34'")


TUNING = typed("--weights finetune --lr-backbone 0.1")


def test_checkpoint_of_another_part(script, images, checkpoint, tmp_path):
    """A pre-training's where a classifier's is needed, and the reverse; --pretrained takes both."""
    for name, more in (("main_lincls", ()), ("main_semisup", TUNING)):
        resumed = (images, *INPUT, "--resume", checkpoint, "--save-dir", tmp_path / name)
        said = ("is a pre-training checkpoint", "give it with --pretrained instead of --resume")
        refused(script(name, *resumed), *said)
        refused(script(name, *resumed, "-e"), *said, "leave out --evaluate")
        trained = (images, *INPUT, *more, "--epochs", 1, "--save-dir", tmp_path / name)
        status, _, err = script(name, *trained, "--pretrained", checkpoint)
        assert status == 0, err
        classifier = tmp_path / name / "checkpoint.pth.tar"
        result = script(
            "main_synco", images, *SMALL, "--resume", classifier, "--save-dir", tmp_path / "r"
        )
        refused(
            result,
            "cannot be resumed here: it is a classifier's checkpoint",
            f"continue it with {name}.py",
        )
        knn = (
            images,
            *INPUT,
            *typed("--k 3 --pretrained {} --save-dir {}", classifier, tmp_path / f"knn-{name}"),
        )
        status, out, err = script("main_knn", *knn)
        assert status == 0 and "120 of 120 backbone tensors matched (state_dict.module.*)" in out, (
            err
        )
        found = json.loads((tmp_path / f"knn-{name}" / "results.json").read_text())
        encoder = "moco" if name == "main_lincls" else "moco, fine-tuned"
        assert (found["method"], found["pretrain_epochs"]) == (encoder, 1)


def test_weights_of_other_software_are_not_resumed(script, images, checkpoint, tmp_path):
    weights = {"epoch": 200, "arch": "resnet18", "state_dict": {}, "optimizer": {}}
    torch.save(weights, tmp_path / "zoo.pth.tar")
    resumed = ("--resume", tmp_path / "zoo.pth.tar", "--save-dir", tmp_path / "r")
    lacks = "zoo.pth.tar: cannot be resumed: it lacks args, progress"
    refused(
        script("main_synco", images, *SMALL, *resumed), lacks, "pre-training cannot start from them"
    )
    refused(script("main_lincls", images, *INPUT, *resumed), lacks, "give it with --pretrained")


def test_checkpoint_of_another_method_or_shape(script, images, checkpoint, tmp_path):
    resume = ("--resume", checkpoint, "--save-dir", tmp_path / "r")
    refused(
        script("main_synco", images, *SMALL, *resume, "--n-hard", 4, "--n2", 1),
        "method 'moco'",
        "'synco'",
    )
    refused(
        script("main_synco", images, *SMALL, *resume, "--moco-k", 64), "--moco-k is 64, and was 32"
    )
    refused(script("main_synco", images, *SMALL, *resume, "--mlp"), "--mlp is True, and was False")


def test_missing_checkpoint(script, images):
    refused(
        script("main_lincls", images, "--pretrained", "nowhere.pth"),
        "nowhere.pth",
        "no such checkpoint",
    )


def test_checkpoint_with_code_is_not_run(script, images, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    refused(script("main_lincls", images, "--pretrained", tmp_path / "evil.pth"), "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_run_folder_of_another_run_is_kept(script, images, checkpoint):
    before = checkpoint.read_bytes()
    refused(
        script("main_synco", images, *SMALL, "--save-dir", checkpoint.parent),
        "holds another run",
        "--resume auto",
    )
    assert checkpoint.read_bytes() == before


def test_args_yaml_of_a_run_is_a_recipe(checkpoint):
    first = options("--cfg", checkpoint.parent / "args.yaml", "--save-dir", "elsewhere")
    assert (first.arch, first.moco_k, first.batch_size, first.image_size) == ("resnet18", 32, 8, 32)
    assert first.save_dir == "elsewhere"
