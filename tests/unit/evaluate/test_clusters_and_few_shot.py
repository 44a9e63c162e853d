"""Test clustering against all matches of clusters and classes, and the episodes of few shots."""

from itertools import permutations

import numpy as np
import pytest

from moco.errors import InputError
from moco.evaluate import clusters, few_shot
from moco.sections_eval import FewShot


@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_matched_accuracy_is_the_best_of_all_matches(count):
    rng = np.random.default_rng()
    labels, found = rng.integers(0, 4, 60), rng.integers(0, count, 60)
    width = max(4, count)
    best = max(
        np.mean([match[cluster] == label for cluster, label in zip(found, labels, strict=True)])
        for match in permutations(range(width))
    )
    assert clusters.matched_accuracy(labels, found) == pytest.approx(best)


@pytest.mark.parametrize("large", [False, True])
def test_separate_classes_are_found(large, monkeypatch):
    monkeypatch.setattr(clusters, "LARGE", 10 if large else 10**6)
    labels = np.repeat(np.arange(3), 20)
    x = np.eye(3)[labels] + 0.01 * np.random.default_rng(0).normal(size=(60, 3))
    runs = [clusters.measure(x, labels[::1], 3, seed) for seed in range(5)]
    best = max(runs, key=lambda run: run["nmi"])
    assert best == pytest.approx({"nmi": 1, "ari": 1, "cluster_accuracy": 1})
    assert clusters.measure(x, labels, 3, 1) == clusters.measure(x, labels, 3, 1)
    with pytest.raises(InputError, match="--clusters 61: there are 60 images; lower it"):
        clusters.measure(x, labels, 61, 0)


def data(seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(8), 12))
    x = np.eye(8)[labels] + noise * rng.normal(size=(len(labels), 8))
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def test_separate_classes_are_learnt_and_labels_without_meaning_are_not():
    settings = FewShot(queries=4, episodes=60)
    x, labels = data(noise=0.05)
    found = few_shot.evaluate(x, labels, settings, 0)
    names = {f"few_5way_{k}shot_{how}" for k in (1, 5) for how in ("mean", "logistic")}
    assert found.keys() == names | {f"{name}_ci95" for name in names}
    assert all(found[name] > 0.98 for name in names)
    random = np.random.default_rng(1).permutation(labels)
    found = few_shot.evaluate(x, random, settings, 0)
    assert all(0.12 < found[name] < 0.28 for name in names)
    assert found == few_shot.evaluate(x, random, settings, 0)
    assert found != few_shot.evaluate(x, random, settings, 1)


def test_an_episode_learns_from_other_images_than_it_classifies(monkeypatch):
    """Each image has a feature of its own, which shows what an episode draws."""
    labels = np.repeat(np.arange(6), 9)
    x, seen = np.eye(54), []

    def record(support, known, queries):
        seen.append((support.argmax(1), known, queries.argmax(1)))
        return np.zeros(len(queries), int)

    monkeypatch.setattr(few_shot, "CLASSIFIERS", {"mean": record})
    settings = FewShot(ways=4, shots=(3,), queries=5, episodes=20, few_shot_classifier=("mean",))
    accuracy = few_shot.accuracies(x, labels, 3, settings, 0)["mean"]
    assert np.allclose(accuracy, 1 / 4)
    for support, known, queries in seen:
        assert len({*support, *queries}) == 4 * 8
        classes = [set(labels[support[known == way]]) for way in range(4)]
        assert all(len(one) == 1 for one in classes) and len(set.union(*classes)) == 4
        wanted = [classes[way] for way in range(4) for _ in range(5)]
        assert [{label} for label in labels[queries]] == wanted
    assert len({tuple(sorted(support)) for support, *_ in seen}) == 20


def test_the_nearest_mean_and_the_interval_equal_their_formulas():
    rng = np.random.default_rng()
    support, queries = rng.normal(size=(6, 4)), rng.normal(size=(50, 4))
    known = np.array([0, 0, 1, 1, 2, 2])
    means = [support[2 * c : 2 * c + 2].sum(0) / 2 for c in range(3)]
    for query, found in zip(queries, few_shot.nearest_mean(support, known, queries), strict=True):
        cosines = [m @ query / np.sqrt(m @ m) / np.sqrt(query @ query) for m in means]
        assert found == np.argmax(cosines)
    x = rng.random(30)
    half = 1.96 * np.sqrt(((x - x.mean()) ** 2).sum() / 29 / 30)
    assert few_shot.interval(x) == pytest.approx(half)


def test_too_few_images_are_an_error_that_says_what_fits():
    _, labels = data()
    with pytest.raises(InputError, match=r"0 of the 8 classes.*lower --queries: 5 classes have 12"):
        few_shot.check(labels, FewShot())
    with pytest.raises(InputError, match=r"--ways 9: 8 of the 8 classes.*lower --ways$"):
        few_shot.check(labels, FewShot(ways=9, queries=4))
