"""Run retrieval, few-shot classification, clustering and tests on other images."""

import json
import pickle
import shutil

import numpy as np
import pytest
from conftest import shell
from PIL import Image
from run_helpers import refused, succeeded, typed

from moco.evaluate import feature_tables, inputs
from moco.report import results

INPUT = typed("-a resnet18 --image-size 32 -b 8 -j 0")
TWO = typed("--multiprocessing-distributed --nproc-per-node 2")


def read(folder):
    return json.loads((folder / "results.json").read_text())


def columns(folder):
    return [column[1] for _, column in results.collect(folder)]


@pytest.fixture
def oxford(tmp_path):
    """A revisited data set of two scenes, each a colour with noise, in images of several shapes."""
    (tmp_path / "data" / "roxford5k" / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{scene}{i}" for scene in "ab" for i in range(4)]
    for i, name in enumerate([*names, "qa", "qb"]):
        red = 200 if "a" in name else 20
        pixels = np.array([red, 60, 220 - red]) + rng.integers(0, 50, (40 + 3 * i, 64 - i, 3))
        file = tmp_path / "data" / "roxford5k" / "jpg" / f"{name}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    gnd = [
        {"easy": [at, at + 1], "hard": [at + 2], "junk": [at + 3], "bbx": [4, 4, 40, 36]}
        for at in (0, 4)
    ]
    truth = {"imlist": names, "qimlist": ["qa", "qb"], "gnd": gnd}
    file = tmp_path / "data" / "roxford5k" / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(truth))
    return tmp_path / "data"


@pytest.mark.slow
def test_revisited_oxford_over_one_process_and_two(oxford, script, tmp_path):
    words = (oxford, *typed("--dataset roxford5k -a resnet18 --imsize 48 -j 0"))
    for name, more in (
        ("plain", ()),
        ("dino", typed("--protocol dino")),
        ("synco", typed("--protocol synco-v2 --multiscale")),
    ):
        folder = tmp_path / "runs" / name
        status, out, err = script("main_retrieval", *words, *more, "--save-dir", folder)
        assert (status, err) == (0, ""), err
        assert out.startswith("protocol ") and "* roxford5k hard: mAP" in out
        if name == "synco":
            assert "has no effect" not in out
    succeeded(shell("main_retrieval.py", *words, *TWO, "--save-dir", tmp_path / "two"))
    one = read(tmp_path / "runs" / "plain")
    assert one["metrics"] == read(tmp_path / "two")["metrics"]
    assert one["protocol"] == "retrieval revisited" and one["dataset"] == "roxford5k"
    assert one["settings"]["pooling"] == "gem"
    dino = read(tmp_path / "runs" / "dino")["settings"]
    assert (dino["imsize"], dino["crop_queries"], dino["pooling"]) == (48, False, "network")
    expected = {f"retrieval {name}" for name in ("revisited", "dino", "synco-v2")}
    assert {title.split(",")[0] for title in columns(tmp_path / "runs")} == expected
    assert "retrieval revisited, mAP medium" in columns(tmp_path / "runs")


def test_options_of_one_type_of_retrieval_are_refused_for_the_other(oxford, script, images):
    words = (oxford, *typed("--dataset roxford5k -a resnet18"))
    for more, said in (
        ("--image-size 32", "--image-size has no effect: images keep their shapes"),
        ("--database val", "--database has no effect"),
        ("--no-multiscale --scales 1 2", "--scales has no effect: there is one scale"),
        ("--pooling gem -a test_vit", "--pooling gem: is for torchvision's ResNets"),
        ("--protocol moby", "unknown protocol 'moby'; known: revisited, dino, synco-v2"),
        ("--download", "--download has no effect"),
    ):
        refused(script("main_retrieval", *words, *more.split()), said)
    for more in ("--protocol dino", "--imsize 64", "--ap synco-v2", "--scales 1 2"):
        refused(script("main_retrieval", images, *INPUT, *more.split()), "it is for --dataset")
    refused(script("main_retrieval", images, *INPUT, "--dataset", "rparis6k"), "no gnd_rparis6k")


@pytest.mark.slow
def test_retrieval_of_classes_over_one_process_and_two(shared_images, script, tmp_path):
    for name, more in (("train", ()), ("val", typed("--database val"))):
        words = (shared_images, *INPUT, *typed("--k 1 3"), *more, "--save-dir")
        status, out, err = script("main_retrieval", *words, tmp_path / "runs" / name)
        assert status == 0 and not out.startswith("protocol"), err
        succeeded(shell("main_retrieval.py", *words, tmp_path / f"two_{name}", *TWO))
        one, two = read(tmp_path / "runs" / name), read(tmp_path / f"two_{name}")
        assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-6)
        assert one["metrics"].keys() == {"map", "recall_1", "recall_3"}
        assert one["metrics"]["recall_1"] > 0.9  # the classes have different colours
    titles = ["retrieval in val, mAP", "retrieval in val, Recall@1"]
    titles += ["retrieval, mAP", "retrieval, Recall@1"]
    assert sorted(columns(tmp_path / "runs")) == sorted(titles)


@pytest.mark.slow
def test_few_shot_classification_over_one_process_and_two(
    shared_images, script, tmp_path, monkeypatch
):
    words = (shared_images, *INPUT, "--few-shot", *typed("--ways 3 --shots 1 2 --queries 2"))
    words += typed("--episodes 20 --save-dir")
    status, out, err = script("main_knn", *words, tmp_path / "one")
    assert status == 0 and "* 3-way 2-shot, logistic regression Acc@1" in out, err
    succeeded(shell("main_knn.py", *words, tmp_path / "two", *TWO))
    assert read(tmp_path / "one")["metrics"] == read(tmp_path / "two")["metrics"]
    assert read(tmp_path / "one")["metrics"]["few_3way_2shot_mean"] > 0.9
    assert len(columns(tmp_path / "one")) == 4
    few = (*words[:-1], "--shots", 3, "--queries", 3)
    monkeypatch.setattr(inputs, "load_network", None)  # refused before features are computed
    refused(script("main_knn", *few), "--ways 3: 0 of the 3 classes of val/ have the 6 images")
    refused(script("main_knn", shared_images, *INPUT, "--ways", 3), "--ways has no effect")


def test_a_classifier_of_few_shots_is_given_once(images, script):
    words = (images, *INPUT, "--few-shot", *typed("--few-shot-classifier mean logistic mean"))
    refused(script("main_knn", *words), "mean logistic mean: a value is given twice")


@pytest.mark.slow
def test_clusters_of_a_folder_and_of_a_file_of_features(shared_images, call, script, run, tmp_path):
    checkpoint = run / "checkpoint_0000.pth.tar"
    words = (shared_images, *typed("-b 8 -j 0 --pretrained {} --save-dir", checkpoint))
    status, out, err = script("tools.cluster", *words, tmp_path / "runs" / "folder")
    assert status == 0 and "15 images, 3 clusters" in out, err
    one = read(tmp_path / "runs" / "folder")
    assert one["protocol"] == "clusters" and one["settings"]["clusters"] == 3
    assert columns(tmp_path / "runs") == [
        f"k-means (k 3), {title}" for title in ("NMI", "ARI", "matched accuracy")
    ]
    embed = (shared_images / "val", *typed("--pretrained {} -j 0 -b 8 --out", checkpoint))
    for suffix in (".npz", ".csv", ".parquet"):
        if suffix == ".parquet":
            pytest.importorskip("pyarrow")
        assert call("tools.embed", *embed, tmp_path / f"x{suffix}")[0] == 0
        folder = tmp_path / f"file{suffix}"
        status, out, err = script("tools.cluster", tmp_path / f"x{suffix}", "--save-dir", folder)
        assert status == 0, err
        assert read(folder)["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert read(tmp_path / "file.npz")["checkpoint"] == str(checkpoint)
    more = (tmp_path / "x.npz", "--pretrained", checkpoint)
    refused(script("tools.cluster", *more), "--pretrained has no effect: features come from")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-40])
    refused(script("tools.cluster", tmp_path / "bad.npz"), "is not a file of tools/embed.py")


def test_tables_of_features_are_read_as_they_were_written(tmp_path):
    rows = np.random.default_rng().normal(size=(5, 3)).astype(np.float32)
    names = [f"a b/{i},x.jpg" for i in range(5)]
    about = {"arch": "resnet18", "epoch": None}
    table = feature_tables.Table(names, 3, lambda: iter([rows[:2], rows[2:]]), rows[:, :2], about)
    for suffix, write in feature_tables.WRITERS.items():
        if suffix == ".parquet":
            pytest.importorskip("pyarrow")
        with open(tmp_path / f"x{suffix}", "wb") as file:
            write(file, table)
        found = feature_tables.read(tmp_path / f"x{suffix}")
        assert found[0] == names and np.array_equal(found[1], rows)
        assert found[2] == ({} if suffix == ".csv" else about)


@pytest.mark.slow
def test_a_classifier_and_knn_are_tested_on_other_images(shared_images, script, run, tmp_path):
    """On a copy of val/, on two of its classes, and on the same folders with numbers."""
    copy, two, numbers = (tmp_path / name for name in ("copy", "two", "numbers"))
    shutil.copytree(shared_images / "val", copy)
    for i in (0, 2):
        shutil.copytree(shared_images / "val" / f"class{i}", two / f"class{i}")
        shutil.copytree(shared_images / "val" / f"class{i}", numbers / f"{i}")
    checkpoint = ("--pretrained", run / "checkpoint_0000.pth.tar")
    probe = (shared_images, *typed("-b 8 -j 0"), "--save-dir")
    train = typed("--lr 0.001 --epochs 1 --protocol moco")
    status, _, err = script("main_lincls", *probe, tmp_path / "probe", *train, *checkpoint)
    assert status == 0, err
    best = ("-e", "--resume", tmp_path / "probe" / "model_best.pth.tar")
    knn = (*checkpoint, *typed("--k 5"))
    for name, command in (("main_lincls", best), ("main_knn", knn)):
        metrics = {}
        for folder in (None, copy, two, numbers):
            other = () if folder is None else ("--eval-data", folder)
            save = tmp_path / name / (folder.name if folder else "val")
            status, _, err = script(name, *probe, save, *command, *other)
            assert status == 0, err
            metrics[save.name] = read(save)["metrics"]
            assert folder is None or read(save)["dataset"] == str(folder)
        assert metrics["copy"] == metrics["val"]
        assert metrics["two"] == metrics["numbers"]
        if name == "main_lincls":
            assert metrics["two"]["acc5"] == 1  # there are two answers
    refused(script("main_lincls", *probe, tmp_path / "x", *train, "--eval-data", copy), "give -e")
    one = tmp_path / "one"
    shutil.copytree(two / "class0", one / "class0")
    refused(script("main_lincls", *probe, tmp_path / "x", *best, "--eval-data", one), "one class")
