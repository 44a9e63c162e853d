"""Test what a checkpoint says about itself: image size, network and classes."""

import json
import subprocess

import pytest
import yaml
from conftest import shell
from run_helpers import evaluation, load, refused, succeeded, typed

pytestmark = pytest.mark.slow


def test_an_evaluation_takes_the_image_size_from_the_checkpoint(
    script, shared_images, run, tmp_path
):
    checkpoint = run / "checkpoint_0000.pth.tar"
    command = (
        "main_knn",
        shared_images,
        *typed("-b 8 -j 0 --k 1 --pretrained {} --save-dir", checkpoint),
    )
    assert script(*command, tmp_path / "own")[0] == 0
    status, out, _ = script(*command, tmp_path / "other", "--image-size", 48)
    assert (
        status == 0 and "it was pre-trained at 32 pixels, and is used at 48 (--image-size)" in out
    )
    assert "normalized" not in out
    mean = ("--mean", 0.5, 0.45, 0.4)
    status, out, _ = script(*command, tmp_path / "mean", *mean)
    both = "with mean 0.485 0.456 0.406 in pre-training, and with mean 0.5 0.45 0.4 here (--mean)"
    assert status == 0 and out.count(f"images were normalized {both}\n") == 1
    sizes = [
        yaml.safe_load((tmp_path / name / "args.yaml").read_text())["image_size"]
        for name in ("own", "other")
    ]
    assert sizes == [32, 48]


def test_weights_alone_say_what_is_taken_for_granted(script, shared_images, run, tmp_path):
    """Use an exported .pth file, which cannot hold all options; tools/export.py prints them.

    Without them, a line says what is assumed.
    """
    exported = tmp_path / "encoder.pth"
    done = shell("tools/export.py", run / "checkpoint_0000.pth.tar", exported)
    succeeded(done)
    assert f"  --pretrained {exported} -a resnet18 --image-size 32\n" in done.stdout
    command = (
        "main_knn",
        shared_images,
        *typed("-b 8 -j 0 --k 1 --pretrained {} --save-dir {}", exported, tmp_path / "knn"),
    )
    refused(
        script(*command), "does not name its network, and resnet50 was tried: give another -a ARCH"
    )
    assumed = f"{exported}: does not say its image size; 224 pixels are used (--image-size)"
    normal = (
        f"{exported}: does not say the {{}} of its images; ImageNet's {{}} used (--mean, --std)\n"
    )
    status, out, err = script(*command, "-a", "resnet18")
    assert status == 0 and assumed in out and normal.format("mean and std", "are") in out, err
    mean, std = ("--mean", 0.485, 0.456, 0.406), ("--std", 0.229, 0.224, 0.225)
    status, out, err = script(*command, "-a", "resnet18", *mean)
    assert status == 0 and normal.format("std", "is") in out, err
    status, out, err = script(*command, "-a", "resnet18", "--image-size", 32, *mean, *std)
    assert status == 0 and "does not say" not in out, err


@pytest.mark.parametrize("name", ["main_lincls", "main_semisup"])
def test_a_classifier_knows_its_network_size_and_classes(
    name, script, shared_images, run, tmp_path
):
    own = tmp_path / "own"
    assert (
        script(
            *evaluation(name, shared_images, run / "checkpoint_0000.pth.tar"), "--save-dir", own
        )[0]
        == 0
    )
    saved = own / "checkpoint.pth.tar"
    assert (
        load(saved)["classes"] == ["class0", "class1", "class2"] and load(saved)["image_size"] == 32
    )
    best = next(own.glob("model_best*.pth.tar"))
    (run / "checkpoint_0000.pth.tar").unlink()  # the classifier's own file has all of the network
    test = (name, shared_images, "-e", "--resume", best, "-b", 8, "-j", 0, "--save-dir")
    status, _, err = script(*test, tmp_path / "tested")
    assert status == 0, err
    results = [
        json.loads((place / "results.json").read_text()) for place in (own, tmp_path / "tested")
    ]
    assert (
        results[0]["metrics"] == results[1]["metrics"]
        and results[0]["method"] == results[1]["method"] == "moco"
    )
    status, out, _ = script(*test, tmp_path / "larger", "--image-size", 48)
    assert status == 0 and "was trained at 32 pixels, and is tested at 48 (--image-size)" in out
    refused(
        script(*test, tmp_path / "r", "-a", "resnet34"), "--arch resnet34", "trained with resnet18"
    )
    resume = (name, shared_images, "--resume", saved, "-b", 8, "-j", 0, "--epochs", 2)
    refused(script(*resume, "--image-size", 48), "--image-size 48", "trained with 32")


@pytest.mark.parametrize("name", ["main_lincls", "main_semisup"])
def test_a_classifier_is_tested_on_images_resized_as_before(
    name, script, shared_images, run, tmp_path
):
    def results(folder):
        return json.loads((folder / "results.json").read_text())

    own = tmp_path / "own"
    train = evaluation(name, shared_images, run / "checkpoint_0000.pth.tar")
    assert script(*train, "--test-resize", "margin", "--save-dir", own)[0] == 0
    assert results(own)["settings"]["test_resize"] == "margin"
    assert yaml.safe_load((own / "args.yaml").read_text())["test_resize"] == "margin"
    last = own / "checkpoint.pth.tar"
    test = (name, shared_images, "-e", "--resume", last, "-b", 8, "-j", 0, "--save-dir")
    status, out, err = script(*test, tmp_path / "same")
    assert status == 0 and "--test-resize" not in out, err
    assert results(tmp_path / "same")["settings"]["test_resize"] == "margin"
    assert results(tmp_path / "same")["metrics"] == results(own)["metrics"]
    status, out, _ = script(*test, tmp_path / "other", "--test-resize", "stretched")
    line = "chosen on test images that were resized as margin, and is tested on images resized as "
    assert status == 0 and f"{line}stretched (--test-resize)" in out
    assert results(tmp_path / "other")["settings"]["test_resize"] == "stretched"
    resume = (name, shared_images, "--resume", last, "-b", 8, "-j", 0, "--epochs", 2)
    refused(script(*resume, "--test-resize", "scaled"), "--test-resize scaled", "with margin")


def test_a_classifier_of_other_classes_is_refused(script, shared_images, run, tmp_path):
    own = tmp_path / "own"
    assert (
        script(
            *evaluation("main_lincls", shared_images, run / "checkpoint_0000.pth.tar"),
            "--save-dir",
            own,
        )[0]
        == 0
    )
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", shared_images, other], check=True)
    for split in ("train", "val"):
        (other / split / "class1").rename(other / split / "stranger")
    test = (
        "main_lincls",
        other,
        *typed("-e --resume {} -b 8 -j 0", own / "model_best.pth.tar"),
        "--save-dir",
        tmp_path / "t",
    )
    refused(script(*test), "its classes differ from the data's", "'class1'", "'class2'")
    for split in ("train", "val"):
        (other / split / "stranger").rename(tmp_path / f"{split}-gone")
    refused(script(*test), "has 3 classes, but the data has 2")
