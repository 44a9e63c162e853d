"""Test files of features: their order, missing and damaged files, and a full disk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shell
from feature_helpers import CPU, on_ranks
from run_helpers import refused, typed

import main_knn
from moco.config import replaced
from moco.data import sources
from moco.evaluate import feature_files

pytestmark = pytest.mark.slow


# Files
COMMON = ("-a", "resnet18", "--image-size", 32, "-j", 0)
TWO = ("--multiprocessing-distributed", "--nproc-per-node", 2)


def metrics_of(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


def arrays_of(folder):
    return {file.name: np.load(file) for file in folder.glob("*.npy")}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_files_hold_the_rows_in_order_and_ranks_read_their_shares(
    world_size, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_files, "_BLOCK", 4)
    origin = dict.fromkeys(feature_files._ORIGIN.values(), "x") | {
        "pretrain_epochs": None,
        "class_list": None,
        "image_size": 32,
        "seed": 0,
    }
    folders = {"dump_features": str(tmp_path), "load_features": str(tmp_path)}
    config = replaced(main_knn.Config(), **origin, **folders)
    train, val = ((torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in (29, 2))

    def work(rank):
        feature_files.dump(
            config,
            ("a", "b", "c"),
            *(tuple(x[rank::world_size] for x in split) for split in (train, val)),
        )
        return feature_files.load(config, CPU)

    for rank, (*splits, classes) in enumerate(on_ranks(world_size, work, monkeypatch)):
        assert classes == ("a", "b", "c")
        for found, split in zip(splits, (train, val), strict=True):
            assert all(
                torch.equal(one, x[rank::world_size]) for one, x in zip(found, split, strict=True)
            )
    for name, (rows, labels) in (("train", train), ("val", val)):
        assert np.array_equal(np.load(tmp_path / f"{name}_features.npy"), rows.numpy())
        assert np.array_equal(np.load(tmp_path / f"{name}_labels.npy"), labels.numpy())


def test_features_from_files_give_the_same_results_over_one_process_and_two(
    shared_images, script, tmp_path
):
    def run(name, *options, start=script):
        command = (*options, "--k", 1, 5, 20, "--save-dir", tmp_path / name)
        if start is script:
            status, _, err = script("main_knn", *command)
        else:
            status, err = (result := shell("main_knn.py", *command, *TWO)).returncode, result.stderr
        assert status == 0, err
        return metrics_of(tmp_path / name)

    one, two = tmp_path / "one", tmp_path / "two"
    options = (shared_images, *COMMON, "-b", 8, "--seed", 3, "--dump-features")
    found = run("1", *options, one)
    assert run("2", *options, two, "--host-features", start=shell) == found
    assert run("3", "--load-features", one) == found
    assert run("4", "--load-features", two, start=shell) == found
    arrays = arrays_of(one)
    assert {name: (x.shape, x.dtype.name) for name, x in arrays.items()} == {
        "train_features.npy": ((48, 512), "float32"),
        "train_labels.npy": ((48,), "int64"),
        "val_features.npy": ((15, 512), "float32"),
        "val_labels.npy": ((15,), "int64"),
    }
    for name, x in arrays_of(
        two
    ).items():  # smaller batches on fewer threads differ in the last bits
        assert np.abs(x - arrays[name]).max() < 1e-6 * (x.ndim == 2) or np.array_equal(
            x, arrays[name]
        ), name
    for split in ("train", "val"):
        assert np.array_equal(
            arrays[f"{split}_labels.npy"], sources.scan(shared_images, split).labels
        )
        assert np.allclose(np.linalg.norm(arrays[f"{split}_features.npy"], axis=1), 1, atol=1e-5)
    meta = json.loads((two / "meta.json").read_text())
    assert meta["classes"] == ["class0", "class1", "class2"]
    told = {
        "data": str(shared_images),
        "method": "random",
        "arch": "resnet18",
        "checkpoint": None,
        "seed": 3,
    }
    assert meta | told == meta
    # what the results say of the encoder is what was dumped
    first, third = (json.loads((tmp_path / name / "results.json").read_text()) for name in "13")
    del first["settings"]["batch_size"], third["settings"]["batch_size"]
    assert first == third


def test_features_of_files_keep_the_resize_of_the_images(shared_images, script, tmp_path):
    command = ("main_knn", *typed("--k 5 --save-dir"))
    images = (shared_images, *COMMON)
    for resize in ("scaled", "margin"):
        dump = ("--test-resize", resize, "--dump-features", tmp_path / f"{resize}_files")
        assert script(*command, tmp_path / resize, *images, *dump)[0] == 0
    one, two = (arrays_of(tmp_path / f"{name}_files") for name in ("scaled", "margin"))
    assert np.abs(one["val_features.npy"] - two["val_features.npy"]).max() > 1e-3
    load = ("--load-features", tmp_path / "margin_files")
    assert script(*command, tmp_path / "loaded", *load)[0] == 0
    results = json.loads((tmp_path / "loaded" / "results.json").read_text())
    assert results["settings"]["test_resize"] == "margin"
    refused(script(*command, tmp_path / "x", *load, "--test-resize", "up"), "--test-resize", "'up'")


@pytest.fixture
def dumped(script, shared_images, tmp_path):
    """A folder of features, the command that wrote it, and its metrics."""
    folder = tmp_path / "features"
    command = (
        "main_knn",
        shared_images,
        *COMMON,
        *typed("--dump-features {} --save-dir {}", folder, tmp_path / "run"),
    )
    status, _, err = script(*command)
    assert status == 0, err
    return folder, command, metrics_of(tmp_path / "run")


def test_a_finished_dump_and_an_unfinished_one_are_not_replaced(dumped, script):
    folder, command, _ = dumped
    before = arrays_of(folder)
    for more in ((), ("--seed", 1), ("--image-size", 40)):
        refused(
            script(*command, *more),
            str(folder),
            "holds features",
            "choose another",
            "--load-features",
        )
    (folder / "meta.json").unlink()  # as of a dump that was interrupted
    refused(script(*command), "holds an unfinished dump of features")
    assert all(np.array_equal(x, before[name]) for name, x in arrays_of(folder).items())


def test_files_that_are_missing_or_damaged_are_refused(dumped, script, tmp_path):
    folder, _, metrics = dumped
    load = ("main_knn", "--load-features", folder, "--save-dir", tmp_path / "again")
    files = [f"{split}_{kind}.npy" for split in ("train", "val") for kind in ("features", "labels")]
    for name in (*files, "meta.json"):
        content = (folder / name).read_bytes()
        for damaged in (None, b"", b"\x80\x00 damaged", content[:-1], content[: len(content) // 2]):
            if name == "meta.json" and damaged == content[:-1]:
                continue  # the end of its last line
            (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
            refused(script(*load), str(folder), name)
        (folder / name).write_bytes(content)
    assert script(*load)[0] == 0 and metrics_of(tmp_path / "again") == metrics


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train_features", lambda x: x.astype(np.float64)),
        ("val_features", lambda x: x[:, :-1]),
        ("val_features", lambda x: x[:-1]),
        ("train_labels", lambda x: x[:-1]),
        ("train_labels", lambda x: x.astype(np.float32)),
        ("val_labels", lambda x: x + 1),
        ("val_labels", lambda x: x - 1),
        ("val_labels", lambda x: np.stack([x, x], 1)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name, change, dumped, script):
    folder, *_ = dumped
    np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))
    refused(script("main_knn", "--load-features", folder), f"{name.split('_')[0]}_", "finished")


@pytest.mark.parametrize("meta", [[], {"arch": "resnet18"}, {"classes": []}])
def test_a_meta_that_says_too_little_is_refused(meta, dumped, script):
    folder, *_ = dumped
    (folder / "meta.json").write_text(json.dumps(meta))
    refused(script("main_knn", "--load-features", folder), "meta.json does not describe")


def test_options_that_contradict_files_are_refused(dumped, script, tmp_path):
    folder, *_ = dumped
    load = ("main_knn", "--load-features", folder)
    refused(script(*load, "-a", "resnet34"), "resnet34", "resnet18")
    refused(script(*load, "--pretrained", "other.pth"), "--pretrained other.pth", "leave")
    refused(script(*load, "--dump-features", tmp_path / "more"), "leave one of them out")
    refused(
        script("main_knn", "--load-features", tmp_path / "nowhere"), "nowhere", "no such folder"
    )
    refused(script("main_knn"), "no data folder")
    (tmp_path / "file").write_text("")
    refused(
        script("main_knn", "photos", "-a", "resnet18", "--dump-features", tmp_path / "file" / "x"),
        "cannot be written",
    )


def test_features_that_are_no_numbers_are_refused(dumped, script):
    folder, *_ = dumped
    rows = np.load(folder / "val_features.npy")
    for wrong in (np.nan, np.inf):
        rows[2, 5] = wrong
        np.save(folder / "val_features.npy", rows)
        refused(
            script("main_knn", "--load-features", folder), str(folder), "contain NaN or infinity"
        )


def test_a_disk_without_room_for_a_dump_is_said(script, shared_images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        feature_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=48 * 512 * 4 - 1)
    )
    command = (
        "main_knn",
        shared_images,
        *COMMON,
        *typed("--dump-features {} --save-dir {}", tmp_path / "dump", tmp_path / "run"),
    )
    refused(script(*command), str(tmp_path / "dump"), "train_features.npy needs", "free")
    assert not list((tmp_path / "dump").iterdir())


def test_knn_wants_images_of_one_class_each(script, tmp_path):
    refused(script("main_knn", tmp_path, "--dataset", "voc2007"), "voc2007", "main_voc07.py")


@pytest.mark.parametrize("temperature", ["0", "-1", "nan"])
def test_a_temperature_that_is_none_is_refused(temperature, script, images):
    refused(
        script("main_knn", images, "--temperature", temperature), "--temperature", "[0.001, 100]"
    )


def test_a_k_that_is_given_twice_is_refused(script, images):
    words = (images, *COMMON, "-b", 8)
    refused(script("main_knn", *words, "--k", 5, 20, 5), "--k 5 20 5: a value is given twice")
