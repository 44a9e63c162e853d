"""Test mistakes in the data: missing folders, odd classes and images that cannot be read."""

import json

import pytest
from conftest import settings, shell, write_images
from PIL import Image
from run_helpers import INPUT, SMALL, refused, typed

import main_synco
from moco.data import cache


def test_missing_folder(script, tmp_path):
    refused(script("main_synco", tmp_path / "nowhere", *SMALL), "nowhere", "no such folder")


def test_no_data_given(script):
    refused(script("main_synco", *SMALL), "no data folder", "photos")


def test_no_train(script, tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    refused(script("main_synco", tmp_path, *SMALL), "no train/")


def test_no_val(script, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    either = "expected val/CLASS/*.jpg or test/CLASS/*.jpg"
    refused(script("main_lincls", tmp_path, "-a", "resnet18"), "no val/", either)
    refused(script("main_knn", tmp_path, "-a", "resnet18"), "no val/", either)
    refused(
        script("main_synco", tmp_path, *SMALL, "--knn-every", 1), "no val/", either, "--knn-every 0"
    )


@pytest.mark.parametrize("launch", ["spawn", "torchrun"])
def test_the_line_on_test_in_place_of_val_is_printed_once(launch, images, tmp_path):
    (images / "val").rename(images / "test")
    words = ("main_knn.py", images, "-a", "resnet18", "--image-size", 32, "-b", 8, "-j", 0)
    if launch == "spawn":
        words += ("--device", "cpu", "--multiprocessing-distributed", "--nproc-per-node", 2)
    else:
        words = (
            *typed("-m torch.distributed.run --standalone --nproc-per-node 2"),
            *words,
            "--device",
            "cpu",
        )
    done = shell(*words, "--save-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no val/; test/ is used instead") == 1, done.stderr


def test_flat_val(script, images):
    for folder in (images / "val").iterdir():
        for file in folder.iterdir():
            file.rename(images / "val" / f"{folder.name}-{file.name}")
        folder.rmdir()
    refused(script("main_lincls", images, "-a", "resnet18"), "val", "no class folders")


def test_val_with_one_class(script, images):
    (images / "val" / "class1").rename(images / "class1")
    refused(script("main_lincls", images, "-a", "resnet18"), "val", "one class")


def test_val_classes_that_are_not_trains(script, images):
    (images / "val" / "class1").rename(images / "val" / "stranger")
    refused(script("main_knn", images, "-a", "resnet18"), "stranger", "not among train's")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(script, images, tmp_path, workers):
    (images / "train" / "class0" / "3.jpg").write_text("no image")
    result = script(
        "main_synco",
        images,
        *SMALL,
        *typed("-j {} --save-dir {} --on-bad-image error", workers, tmp_path / "run"),
    )
    refused(result, "class0/3.jpg", "unreadable")


def test_empty_image_is_named(script, images, tmp_path):
    (images / "train" / "class1" / "0.jpg").write_bytes(b"")
    result = script(
        "main_synco", images, *SMALL, "--save-dir", tmp_path / "run", "--on-bad-image", "error"
    )
    refused(result, "class1/0.jpg", "empty")


def test_truncated_image_is_named(script, images, tmp_path):
    file = images / "train" / "class1" / "0.jpg"
    file.write_bytes(file.read_bytes()[:400])
    result = script(
        "main_synco", images, *SMALL, "--save-dir", tmp_path / "run", "--on-bad-image", "error"
    )
    refused(result, "class1/0.jpg", "unreadable")


def losses(run):
    """Return the losses in a run's log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_caching_images_in_memory_changes_no_loss(script, images, tmp_path):
    (images / "train" / "class0" / "3.jpg").write_text("no image")
    found = {}
    for mode in ("on", "off"):
        # views of 8 pixels are too small to crop a batch at once, which may change a pixel by 1
        options = (*SMALL, "--image-size", 8, "-p", 1, "--save-dir", tmp_path / mode)
        status, out, err = script("main_synco", images, *options, "--cache-images", mode)
        assert (
            status == 0
            and err.count("skipped, another image is used instead") == 1
            and "class0/3.jpg" in err
        )
        assert ("images stay in memory: about" in out) == (mode == "on")
        found[mode] = losses(tmp_path / mode)
    assert len(found["on"]) == 3 and found["on"] == found["off"]


def test_cache_images_on_is_refused_if_the_images_do_not_fit(script, images, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 100_000)
    result = script(
        "main_synco", images, *SMALL, "--save-dir", tmp_path / "run", "--cache-images", "on"
    )
    refused(result, "--cache-images on", "leave the option out, or free memory")


def test_cache_images_is_refused_by_a_script_that_reads_each_image_once(script, images):
    refused(
        script("main_knn", images, "-a", "resnet18", "--cache-images", "on"),
        "reads images from their files",
    )


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_on_and_off_in_a_recipe_are_words(tmp_path, mode):
    """YAML reads them as true and false."""
    (tmp_path / "recipe.yaml").write_text(f"cache-images: {mode}\n")
    assert settings(main_synco, ["photos", "--cfg", tmp_path / "recipe.yaml"]).cache_images == mode


def test_fewer_images_than_a_batch(script, images, tmp_path):
    refused(
        script("main_synco", images, *SMALL, "-b", 64, "--save-dir", tmp_path / "run"),
        "24 images",
        "--batch-size",
    )


def test_pictures_of_many_modes_are_read(script, images, tmp_path):
    folder = images / "train" / "class0"
    for i, mode in enumerate(("L", "RGBA", "P", "CMYK", "1")):
        Image.new("RGB", (40, 40), (200, 30, 90)).convert(mode).save(
            folder / f"m{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        )
    status, _, err = script("main_synco", images, *SMALL, "--save-dir", tmp_path / "run")
    assert status == 0, err


@pytest.mark.parametrize("name", ["main_knn", "main_lincls", "main_semisup"])
def test_a_single_class_makes_no_evaluation(name, script, tmp_path):
    data = write_images(tmp_path / "one", classes=1)
    result = script(name, data, *INPUT, "--save-dir", tmp_path / "run")
    refused(result, "its images are of one class", "two classes or more")


def test_a_single_class_pretrains_without_the_monitor_only(script, tmp_path):
    data = write_images(tmp_path / "one", classes=1)
    command = ("main_synco", data, *SMALL, "--save-dir", tmp_path / "run")
    said = ("its images are of one class", "or train without the k-NN monitor: --knn-every 0")
    refused(script(*command, "--knn-every", 1), *said)
    assert script(*command)[0] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_test_image_says_so(workers, script, images, tmp_path):
    file = images / "val" / "class0" / "3.jpg"
    file.write_bytes(b"")
    words = (images, *INPUT[:-1], workers, "--save-dir", tmp_path / "run")
    refused(script("main_knn", *words), f"{file}: unreadable image (the file is empty)")


def test_a_folder_of_images_is_no_voc07(script, images, tmp_path):
    result = script("main_voc07", images, "-a", "resnet18", "--save-dir", tmp_path / "run")
    refused(result, "no usable voc2007", "use another script than main_voc07.py")
