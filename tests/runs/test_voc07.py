"""Test VOC07 classification: the choice of costs, difficult images, and runs on a small tree."""

import json
import time

import numpy as np
import pytest
from conftest import settings, shell
from metric_helpers import eleven_points_by_hand
from run_helpers import INPUT, VOC_SMALL, refused, typed
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from voc_tree import COLOURS, write_voc

import main_voc07
from moco.evaluate import metrics, voc

pytestmark = pytest.mark.slow

KINDS = ("svm", "linear")
COSTS = [0.01, 0.1, 1.0, 10.0]


# On random features


def features(seed=0, n=240, m=150, width=40, classes=3):
    """Return features and labels (-1, 0, 1) for training and for testing.

    Some classes are easier than others.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n + m, width)) + 1
    noise = rng.normal(size=(n + m, classes)) * (1 + np.arange(classes))
    labels = (x[:, :classes] * 2 + noise > 4).astype(np.int64)
    labels[rng.random(labels.shape) < 0.1] = -1
    x = (x * rng.uniform(0.5, 2, (n + m, 1))).astype(np.float32)  # lengths do not count
    return x[:n], labels[:n], x[n:], labels[n:]


def average_precision_by_hand(y, score):
    order = np.argsort(-score)
    hits = np.flatnonzero(y[order])
    return np.mean([(i + 1) / (place + 1) for i, place in enumerate(hits)])


def by_a_slow_loop(x, y, kind, seed):
    """The mean average precision of each cost over three folds."""
    x = np.stack([row / np.sqrt((row.astype(float) ** 2).sum()) for row in x])
    fold, found = voc.folds(y, seed), []
    for cost in COSTS:
        each = []
        for out in range(3):
            if kind == "svm":
                classifier = LinearSVC(
                    C=cost,
                    class_weight={1: 2},
                    dual=True,
                    max_iter=1_000_000,
                    tol=1e-8,
                    random_state=0,
                )
            else:
                classifier = LogisticRegression(C=cost, solver="newton-cg", tol=1e-8)
            classifier.fit(x[fold != out], y[fold != out])
            each.append(
                average_precision_by_hand(y[fold == out], x[fold == out] @ classifier.coef_[0])
            )
        found.append(np.mean(each))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 7])
def test_each_class_has_the_cost_of_the_best_cross_validated_precision(kind, seed):
    x, labels, test, _ = features(seed)
    scores, chosen = voc.classify(x, labels, test, kind, COSTS, seed, jobs=1)
    assert scores.shape == (150, 3)
    for c, cost in enumerate(chosen):
        known = labels[:, c] >= 0
        precision = by_a_slow_loop(x[known], labels[known, c], kind, seed)
        assert len(set(precision)) == len(COSTS)
        assert cost == COSTS[int(np.argmax(precision))]
        mine = voc.cross_validate(
            voc.normalize(x),
            np.flatnonzero(known),
            labels[known, c],
            voc.folds(labels[known, c], seed),
            1.0,
            kind,
        )
        assert mine == pytest.approx(precision[2], abs=1e-3)
        alone = voc.fit(voc.normalize(x)[known], labels[known, c], kind, cost).decision_function(
            voc.normalize(test)
        )
        assert np.array_equal(scores[:, c], alone)


def test_of_costs_that_are_as_good_the_middle_one_is_taken():
    assert voc.best_cost([1, 2, 3, 4], np.array([0.5, 0.9, 0.7, 0.8])) == 2
    assert voc.best_cost([1, 2, 3, 4], np.array([0.1, 0.9, 0.9, 0.9])) == 3
    assert voc.best_cost([1, 2, 3], np.zeros(3)) == 2


@pytest.mark.parametrize("cost", [0.05, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_minimises_its_objective(kind, cost):
    """Check that the gradient vanishes.

    In an SVM, positives count twice, and the bias is a weight like the others.
    """
    x, labels, *_ = features()
    x, y = voc.normalize(x), (labels[:, 0] == 1).astype(int)
    classifier = voc.fit(x, y, kind, cost)
    weight, bias = classifier.coef_[0], classifier.intercept_[0]
    sign, score = 2 * y - 1, x @ weight + bias
    if kind == "svm":
        slope = -2 * sign * np.maximum(0, 1 - sign * score) * np.where(y, 2, 1)
    else:
        slope = 1 / (1 + np.exp(-score)) - y
    gradient = np.append(
        weight + cost * x.T @ slope, (bias if kind == "svm" else 0) + cost * slope.sum()
    )
    assert np.abs(gradient).max() < 2e-3 * cost * np.abs(slope).sum()
    if kind == "svm":  # as it does not where positives count once
        assert (
            np.abs(weight + cost * x.T @ (slope / np.where(y, 2, 1))).max()
            > 0.02 * cost * np.abs(slope).sum()
        )


def test_folds_share_both_labels_out_and_follow_the_seed():
    y = (np.arange(50) % 5 == 0).astype(int)
    fold = voc.folds(y, 3)
    for value in (0, 1):
        counts = np.bincount(fold[y == value], minlength=3)
        assert counts.max() - counts.min() <= 1 and len(counts) == 3
    assert np.array_equal(fold, voc.folds(y, 3)) and not np.array_equal(fold, voc.folds(y, 4))
    voc.folds(y, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_does_not_count_for_a_class_changes_nothing_there(kind):
    x, labels, test, _ = features()
    before, chosen = voc.classify(x, labels, test, kind, COSTS, 0, jobs=1)
    others = x.copy()
    others[labels[:, 1] == -1] = 1 + np.random.default_rng(1).normal(
        size=(np.sum(labels[:, 1] == -1), 40)
    )
    after, again = voc.classify(others, labels, test, kind, COSTS, 0, jobs=1)
    assert np.array_equal(before[:, 1], after[:, 1]) and chosen[1] == again[1]
    assert not np.allclose(before[:, 0], after[:, 0]) and not np.allclose(before[:, 2], after[:, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shown", [0, 1, 2, 240])
def test_a_class_that_few_training_images_or_all_show(shown, kind):
    x, labels, test, _ = features()
    labels[:, 1] = np.arange(240) < shown
    scores, chosen = voc.classify(x, labels, test, kind, COSTS, 0, jobs=1)
    assert np.isfinite(scores).all()
    if shown in (0, 240):
        assert not scores[:, 1].any() and chosen[1] is None
    else:
        assert scores[:, 1].any() and chosen[1] in COSTS
    assert shown != 1 or chosen[1] == 1.0  # nothing to choose on


def test_worker_processes_find_what_one_does():
    x, labels, test, _ = features()
    for kind in KINDS:
        alone, together = (voc.classify(x, labels, test, kind, COSTS, 0, jobs) for jobs in (1, 2))
        assert np.array_equal(alone[0], together[0]) and alone[1] == together[1]


# A tree in VOC's format. Each of three classes is the fraction of one colour in an image. The other
# classes are not shown.


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """A run of two processes: what it printed, its run folder, and its features."""
    folder = tmp_path_factory.mktemp("run")
    command = (
        "main_voc07.py",
        tree,
        *VOC_SMALL,
        *typed("--dump-features {} --save-dir {}", folder / "features", folder / "run"),
    )
    start = time.monotonic()
    result = shell(*command, "--multiprocessing-distributed", "--nproc-per-node", 2)
    assert (
        time.monotonic() - start < 240
    )  # no rank waits for idle worker processes, which stay for 300 s
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout, folder / "run", folder / "features"


def test_classes_of_a_colour_are_told_apart_and_shuffled_ones_are_not(whole):
    out, run, files = whole
    found = results(run)
    values = found["metrics"]
    assert (found["protocol"], found["dataset"], found["method"]) == ("voc07", "voc2007", "random")
    assert set(values) == {"map11", "map", *(f"ap_{name}" for name in (*COLOURS, "dog"))}
    assert values["map11"] == pytest.approx(
        np.mean([values[name] for name in values if name.startswith("ap_")])
    )
    assert min(values[f"ap_{name}"] for name in COLOURS) > 0.9
    assert (
        f"* mAP {100 * values['map11']:.3f} (11 points)  {100 * values['map']:.3f} (area)"
        in out.splitlines()
    )
    lines = {words[0]: line for line in out.splitlines() if (words := line.split())}
    for name in COLOURS:
        assert f"AP {100 * values[f'ap_{name}']:.3f}" in lines[name] and "(C " in lines[name]
    assert "no classifier" in lines["dog"] and "no test image" in lines["train"]
    # every image ties for a dog: its precision is the share of dogs
    assert values["ap_dog"] == pytest.approx(np.mean(np.arange(40) % 9 == 2))
    x, y, test, labels = (np.load(files / f"{name}.npy") for name in FILES)
    shuffled, _ = voc.classify(
        x, np.random.default_rng(0).permutation(y), test, "svm", COSTS, 0, jobs=1
    )
    assert (
        metrics.mean_average_precision(shuffled, labels)["map11"] < values["map11"] - 0.1
    )  # of which a quarter is the dog's


FILES = ("train_features", "train_labels", "val_features", "val_labels")


def test_one_process_finds_what_two_do(whole, tree, script, tmp_path):
    _, run, files = whole
    status, _, err = script(
        "main_voc07",
        tree,
        *VOC_SMALL,
        *typed("--save-dir {} --dump-features {}", tmp_path / "one", tmp_path / "features"),
    )
    assert status == 0, err
    for name in FILES:
        one, two = (np.load(folder / f"{name}.npy") for folder in (tmp_path / "features", files))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert results(tmp_path / "one")["metrics"] == pytest.approx(results(run)["metrics"], abs=0.01)
    # features of other lengths than 1: they are kept as they come
    assert (
        np.ptp(
            np.linalg.norm(
                one
                if one.ndim == 2 and one.shape[1] > 20
                else np.load(files / "train_features.npy"),
                axis=1,
            )
        )
        > 0.1
    )


def test_features_from_files_give_the_same_results(whole, script, tmp_path):
    _, run, files = whole
    status, _, err = script(
        "main_voc07", "--load-features", files, "--save-dir", tmp_path, "--c", 0.1, 1, 10, 100
    )
    assert status == 0, err
    assert results(tmp_path)["metrics"] == results(run)["metrics"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_difficult_is_neither_trained_nor_scored(kind, whole, script, tmp_path):
    """Change the images with difficult birds: only the average precision of cats changes."""
    found = []
    x, y, test, labels = (np.load(whole[2] / f"{name}.npy") for name in FILES)
    bird = json.loads((whole[2] / "meta.json").read_text())["classes"].index("bird")
    assert (y[:, bird] == -1).sum() == 9 and (labels[:, bird] == -1).sum() == 6
    for changed in (False, True):
        if changed:
            rng = np.random.default_rng(0)
            x[y[:, bird] == -1] = rng.permutation(x[y[:, bird] == 1])[:9]
            test[labels[:, bird] == -1] = rng.permutation(test[labels[:, bird] == 0])[:6]
        folder = tmp_path / str(changed)
        folder.mkdir()
        for name, array in zip(FILES, (x, y, test, labels), strict=True):
            np.save(folder / f"{name}.npy", array)
        (folder / "meta.json").write_text((whole[2] / "meta.json").read_text())
        options = (
            *typed(
                "--load-features {} --save-dir {} --classifier {}", folder, folder / "run", kind
            ),
            *typed("--c 0.1 10"),
        )
        status, _, err = script("main_voc07", *options)
        assert status == 0, err
        found.append(results(folder / "run"))
    before, after = (one["metrics"] for one in found)
    assert before["ap_bird"] == after["ap_bird"] > 0.9
    assert before["ap_cat"] != after["ap_cat"]
    assert found[0]["protocol"] == ("voc07" if kind == "svm" else "voc07_linear")
    if kind == "svm":
        known = labels[:, bird] >= 0
        scores, _ = voc.classify(x, y, test, kind, [0.1, 10.0], 0, jobs=1)
        assert after["ap_bird"] == pytest.approx(
            eleven_points_by_hand(labels[known, bird], scores[known, bird])
        )


def test_the_linear_classifier_tells_colours_too(whole, script, tmp_path):
    options = (
        *typed("--load-features {} --save-dir {} --classifier linear", whole[2], tmp_path),
        *typed("--c 1 10 100"),
    )
    assert script("main_voc07", *options)[0] == 0
    assert min(results(tmp_path)["metrics"][f"ap_{name}"] for name in COLOURS) > 0.9


SGD = (*INPUT, *typed("--classifier sgd --epochs 2 --lr 0.01 --seed 3"))


def test_a_linear_layer_by_sgd_tells_colours_over_one_process_and_two(tree, script, tmp_path):
    status, out, err = script("main_voc07", tree, *SGD, "--save-dir", tmp_path / "one")
    assert status == 0, err
    one = results(tmp_path / "one")
    assert one["protocol"] == "voc07_sgd"
    expected = {"epochs": 2, "lr": 0.01, "batch_size": 8, "image_size": 32, "test_resize": None}
    assert one["settings"] | expected == one["settings"]
    assert min(one["metrics"][f"ap_{name}"] for name in COLOURS) > 0.9
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["0", "1"]
    best = max(float(line.rpartition(" ")[2]) for line in lines)
    assert one["metrics"]["held_out_map11"] == pytest.approx(best / 100, abs=1e-5)
    two = ("--multiprocessing-distributed", "--nproc-per-node", 2)
    result = shell("main_voc07.py", tree, *SGD, "--save-dir", tmp_path / "two", *two)
    assert result.returncode == 0, result.stderr
    assert results(tmp_path / "two")["metrics"] == pytest.approx(one["metrics"], abs=0.01)
    # the views depend on the seed, not on the number of processes: the same losses
    losses = [[line.split()[3] for line in lines]]
    losses.append([one.split()[3] for one in result.stdout.splitlines() if one[:6] == "epoch "])
    assert [float(x) for x in losses[1]] == pytest.approx([float(x) for x in losses[0]], rel=1e-3)


def test_options_of_one_classifier_are_refused_for_another(whole, tree, script, tmp_path):
    sgd = ("main_voc07", tree, *SGD, "--save-dir", tmp_path / "run")
    for option in (("--c", 1), ("--test-resize", "margin"), ("--dump-features", tmp_path / "f")):
        refused(script(*sgd, *option), option[0], "--classifier sgd has its own views")
    refused(script("main_voc07", *SGD[2:], "--load-features", whole[2]), "--load-features")
    for option in ("--epochs", "--lr"):
        refused(script("main_voc07", tree, *INPUT, option, 2), option, "for --classifier sgd")


def test_the_lists_of_train_and_val_must_be_there(script, tmp_path):
    tree = write_voc(tmp_path / "voc", 10, 6)
    (tree / "VOCdevkit/VOC2007/ImageSets/Main/val.txt").unlink()
    run = ("--save-dir", tmp_path / "run")
    refused(script("main_voc07", tree, *SGD, *run), "no usable voc2007", "val.txt")
    assert script("main_voc07", tree, *INPUT, "--c", 1, *run)[0] == 0


def test_the_recipe_of_adco_is_its_authors(tree):
    c = settings(main_voc07, [tree, "--cfg", "configs/voc07_adco.yaml"])
    assert (c.classifier, c.epochs, c.lr, c.batch_size, c.image_size) == ("sgd", 100, 0.05, 16, 300)
    assert [*c.mean, *c.std] == [0.4573, 0.4388, 0.4073, 0.2675, 0.2638, 0.2777]


# Mistakes


@pytest.mark.parametrize("dataset", ["imagenet", "cifar10", "flowers"])
def test_images_of_one_class_each_are_refused(dataset, script, tmp_path):
    refused(
        script("main_voc07", tmp_path, "--dataset", dataset), dataset, "one class each", "voc2007"
    )


def test_mistakes_are_one_line(script, tmp_path, images):
    refused(script("main_voc07", "photos"), "photos", "one class each")
    refused(script("main_voc07", tmp_path, "--dataset", "voc2017"), "the nearest is 'voc2007'")
    refused(script("main_voc07", tmp_path), "no usable voc2007", "VOCdevkit")
    for c in ("0", "-1", "nan", "inf", "x"):
        refused(script("main_voc07", tmp_path, "--c", 1, c), "--c" if c != "x" else "x")
    refused(script("main_voc07", tmp_path, "--classifier", "forest"), "forest")
    files = tmp_path / "features"
    command = (
        "main_knn",
        images,
        *VOC_SMALL[:8],
        *typed("--dump-features {} --save-dir {}", files, tmp_path / "knn"),
    )
    assert script(*command)[0] == 0
    refused(script("main_voc07", "--load-features", files), "one class each")


def test_features_of_several_classes_are_none_of_knns(whole, script):
    refused(script("main_knn", "--load-features", whole[2]), "main_voc07.py")
