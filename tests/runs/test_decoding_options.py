"""Test --exif, --white and --shrink-on-decode of runs, and in the checkpoints that follow them."""

import shutil

import dataset_trees
import numpy as np
import pytest
import torch
import yaml
from conftest import in_process
from decoding_helpers import png16
from PIL import Image
from run_helpers import PRETRAIN, load, log, refused, same, typed

import main_synco
from moco.data import decoding
from moco.engine import resume

GIVEN = ("--exif", "apply", "--white", 4095)
EVALUATION = typed("-b 8 -j 0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a data folder with JPEGs that lie on their side, and dark images of 16 bits."""
    root = tmp_path_factory.mktemp("turned")
    draw, tags = np.random.default_rng(0), Image.Exif()
    tags[0x0112] = 6
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (root / split / name).mkdir(parents=True)
        for i in range(6):
            coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3)).astype(np.uint8))
            image = coarse.resize((320, 240))
            image.save(root / split / name / f"{i}.jpg", exif=tags, quality=90)
            deep = np.asarray(image.convert("L")).astype(np.uint16)[:, :, None] * 16
            (root / split / name / f"{i}.png").write_bytes(png16(deep, 0))
    return root


def train(folder, run, *words):
    command = (folder, *PRETRAIN, "--epochs", 2, "-p", 1, "--save-dir", run, *words)
    status, out, err = in_process("main_synco", *command)
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Return the run folder of a pre-training with options of decoding, and its output."""
    run = tmp_path_factory.mktemp("run") / "run"
    return run, train(folder, run, *GIVEN)


def losses(run):
    return [line["loss"] for line in log(run)]


def args(run):
    return yaml.safe_load((run / "args.yaml").read_text())


def test_a_run_says_how_it_decodes_and_trains_on_other_pixels(folder, trained, tmp_path):
    run, out = trained
    assert "images are decoded with --exif apply, --white 4095\n" in out
    assert "16-bit images look dark" not in out
    assert args(run)["exif"] == "apply" and args(run)["white"] == 4095
    assert args(run)["shrink_on_decode"] is False
    found = {}
    for name, words in (("neither", (*GIVEN[:1], "ignore")), ("white", GIVEN[2:])):
        out = train(folder, tmp_path / name, *words)
        assert ("16-bit images look dark" in out) == (name != "white")
        assert ("images are decoded" in out) == (name == "white")
        found[name] = losses(tmp_path / name)
    every = [losses(run), *found.values()]
    assert all(a != b for i, a in enumerate(every) for b in every[:i])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_cached_images_train_like_files(folder, trained, tmp_path, workers):
    train(folder, tmp_path / "files", *GIVEN, "--cache-images", "off", "-j", workers)
    assert losses(tmp_path / "files") == losses(trained[0])


def test_the_run_resumes_exactly_without_the_options(folder, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    (run / "checkpoint_0001.pth.tar").unlink()
    out = train(folder, run, "--resume", run / "checkpoint_0000.pth.tar")
    assert "images are decoded with --exif apply, --white 4095\n" in out
    states = [load(one / "checkpoint_0001.pth.tar") for one in (trained[0], run)]
    assert same(states[0]["state_dict"], states[1]["state_dict"])


def test_other_options_are_refused_with_resume(folder, trained, tmp_path):
    resumed = ("--resume", trained[0] / "checkpoint_0000.pth.tar", "--save-dir", tmp_path / "new")
    command = ("main_synco", folder, *PRETRAIN, "--epochs", 2, *resumed)
    refused(in_process(*command, "--exif", "ignore"), "--exif is ignore, and was apply")
    refused(in_process(*command, "--white", 9), "--white is 9.0, and was 4095.0")
    on = in_process(*command, "--shrink-on-decode")
    refused(on, "--shrink-on-decode is True, and was False", "--allow-change shrink-on-decode")


def parsed(*words):
    return main_synco.parser().parse(list(map(str, words)))


def earlier(checkpoint, path):
    """Copy a checkpoint as an earlier version wrote it, without these options."""
    state = load(checkpoint)
    for name in ("exif", "white", "shrink_on_decode"):
        del state["args"][name]
    torch.save(state, path)


def test_a_checkpoint_without_the_options_is_of_a_run_that_shrank(folder, trained, tmp_path):
    file = tmp_path / "checkpoint_0000.pth.tar"
    earlier(trained[0] / "checkpoint_0000.pth.tar", file)
    words = (folder, *PRETRAIN, "--epochs", 2, "--resume", file)
    found = resume.inherit(parsed(*words)).input
    assert (found.exif, found.white, found.shrink_on_decode) == ("ignore", None, True)
    found = resume.inherit(parsed(*words, "--no-shrink-on-decode")).input
    assert found.shrink_on_decode is False
    new = resume.inherit(parsed(folder, *PRETRAIN)).input
    assert (new.exif, new.white, new.shrink_on_decode) == ("ignore", None, False)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_resumes_and_shrinks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_LARGE", 100)  # every JPEG counts as large
    small = ("--image-size", 16)  # so that crops are large enough to be shrunk
    train(folder, tmp_path / "on", "--shrink-on-decode", *small)
    train(folder, tmp_path / "off", *small)
    assert losses(tmp_path / "on") != losses(tmp_path / "off")
    before = tmp_path / "checkpoint_0000.pth.tar"
    earlier(tmp_path / "on" / "checkpoint_0000.pth.tar", before)
    out = train(folder, tmp_path / "again", "--resume", before, *small)
    assert "images are decoded with --shrink-on-decode\n" in out
    a, b = (load(tmp_path / run / "checkpoint_0001.pth.tar") for run in ("on", "again"))
    assert same(a["state_dict"], b["state_dict"])
    command = (folder, *PRETRAIN, *small, "--epochs", 2, "--resume", before)
    new = ("--save-dir", tmp_path / "new")
    off = in_process("main_synco", *command, *new, "--no-shrink-on-decode")
    refused(off, "--shrink-on-decode is False, and was True")
    refused(in_process("main_synco", *command, *new, "--exif", "apply"), "--exif is apply, and was")


def test_evaluations_decode_like_the_pretraining(folder, trained, tmp_path):
    encoder = ("--pretrained", trained[0] / "checkpoint_0001.pth.tar")
    command = ("main_knn", folder, *EVALUATION, *encoder, "--k", 3)
    dump = ("--dump-features", tmp_path / "features")
    status, out, err = in_process(*command, "--save-dir", tmp_path / "knn", *dump)
    assert status == 0, err
    assert "images are decoded with --exif apply, as in pre-training" in out
    assert "images are decoded with --white 4095, as in pre-training" in out
    assert args(tmp_path / "knn")["exif"] == "apply" and args(tmp_path / "knn")["white"] == 4095
    other = ("--exif", "ignore", "--dump-features", tmp_path / "other")
    status, out, err = in_process(*command, "--save-dir", tmp_path / "knn2", *other)
    assert status == 0, err
    assert "decoded with --exif apply in pre-training, and with --exif ignore here" in out
    a, b = (np.load(tmp_path / name / "val_features.npy") for name in ("features", "other"))
    assert not np.allclose(a, b)
    loaded = ("--load-features", tmp_path / "features", "--k", 3, "--save-dir", tmp_path / "knn3")
    status, out, err = in_process("main_knn", *loaded)
    assert status == 0 and args(tmp_path / "knn3")["white"] == 4095, err
    status, out, err = in_process("main_knn", *loaded[:4], "--exif", "apply")
    assert "--exif has no effect: features come from files" in out + err


@pytest.mark.slow
def test_a_classifier_is_trained_resumed_and_tested_with_the_same_decoding(
    folder, trained, tmp_path
):
    encoder = ("--pretrained", trained[0] / "checkpoint_0001.pth.tar")
    command = ("main_lincls", folder, *EVALUATION, "--epochs", 2, *encoder)
    status, _, err = in_process(*command, "--save-dir", tmp_path / "lin")
    assert status == 0, err
    found = args(tmp_path / "lin")
    assert (found["exif"], found["white"], found["shrink_on_decode"]) == ("apply", 4095, False)
    file = tmp_path / "lin" / "checkpoint.pth.tar"
    tests = ("main_lincls", folder, *EVALUATION, "--evaluate", "--resume", file)
    status, _, err = in_process(*tests, "--save-dir", tmp_path / "test")
    assert status == 0 and args(tmp_path / "test")["exif"] == "apply", err
    refused(
        in_process(*tests, "--save-dir", tmp_path / "test2", "--exif", "ignore"),
        "was trained with apply; leave it out",
    )
    refused(
        in_process(*command, "--resume", file, "--shrink-on-decode"),
        "--shrink-on-decode True: ",
        "was trained with False; leave it out",
    )


def test_show_views_proposes_a_white_for_dark_images(tmp_path, call):
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(tmp_path / "dark.png")
    words = ("tools.show_views", "mocov2", tmp_path / "dark.png", "--image-size", 32)
    status, out, err = call(*words, "--out", tmp_path / "a.png")
    assert status == 0 and "--white 4095 makes them brighter" in out, err
    status, out, err = call(*words, "--white", 4095, "--out", tmp_path / "b.png")
    assert status == 0 and "--white" not in out, err


def test_show_views_follows_the_options(folder, trained, tmp_path, call):
    image = folder / "train" / "a" / "0.jpg"
    found = []
    for name, words in (("a", ()), ("b", ("--exif", "apply")), ("c", ("--exif", "ignore"))):
        out = ("--out", tmp_path / f"{name}.png", "--draws", 1)
        status, _, err = call("tools.show_views", "mocov2", image, *out, *words)
        assert status == 0, err
        found.append((tmp_path / f"{name}.png").read_bytes())
    assert found[0] == found[2] != found[1]
    cfg = ("--cfg", trained[0] / "args.yaml", image, "--out", tmp_path / "d.png")
    assert call("tools.show_views", *cfg)[0] == 0
    status, _, err = call("tools.show_views", "mocov2", image, "--exif", "maybe")
    assert status == 2 and "maybe" in err


@pytest.mark.parametrize("words", ["--exif upright", "--white 0", "--white -1", "--white nan"])
def test_wrong_values_are_refused(folder, words, tmp_path):
    command = ("main_synco", folder, *PRETRAIN, "--save-dir", tmp_path, *words.split())
    refused(in_process(*command), words.split()[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [("cifar10", "--exif apply"), ("cifar100", "--white 4095"), ("stl10", "--shrink-on-decode")],
)
def test_the_options_are_refused_for_images_that_are_in_no_files(name, words, tmp_path):
    getattr(dataset_trees, name)(dataset_trees.Tree(tmp_path / "data"))
    command = (tmp_path / "data", *PRETRAIN, "--dataset", name, "--save-dir", tmp_path / "run")
    ended = in_process("main_synco", *command, *words.split())
    refused(ended, f"{words.split()[0]} has no effect: the images of this data set are not in")
