"""Classify multi-label images by one linear classifier per class, with cross-validated costs.

This is the VOC07 image classification of Goyal et al. (arXiv 1905.01235). The module does not
import torch, so that its worker processes start quickly.
"""

import warnings

import numpy as np
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import get_reusable_executor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

FOLDS = 3


def classify(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    classifier: str,
    costs: list[float],
    seed: int,
    jobs: int | None = None,
) -> tuple[np.ndarray, list[float | None]]:
    """Train a classifier for each class, at the best of `costs`, and apply it to the test images.

    An image labelled -1 for a class is not used to train that class. If all training images show a
    class, or none does, it gets no classifier: its scores are 0 and its cost is None.

    Args:
        train: features of the training images, [N, D].
        labels: their labels, [N, num_classes]: 1 shown, 0 not shown, -1 ignored.
        test: features of the test images, [M, D].
        classifier: "svm" or "linear", see `fit`.
        costs: the costs to choose from.
        seed: seed of the random folds.
        jobs: number of worker processes; by default one per core.

    Returns:
        Scores of the test images, [M, num_classes], and the chosen costs, [num_classes].
    """
    train, test = normalize(train), normalize(test)
    known = [np.flatnonzero(label >= 0) for label in labels.T]
    # for each class, the indices of the training images that count, and their labels
    sets = {
        c: (index, labels[index, c])
        for c, index in enumerate(known)
        if len(np.unique(labels[index, c])) == 2
    }
    jobs = jobs or cpu_count()
    workers = Parallel(jobs)
    try:
        tasks = [(index, y, folds(y, seed), cost) for index, y in sets.values() for cost in costs]
        precision = workers(delayed(cross_validate)(train, *task, classifier) for task in tasks)
        chosen = [best_cost(costs, row) for row in np.reshape(precision, (len(sets), len(costs)))]
        tasks = [(*one, cost) for one, cost in zip(sets.values(), chosen, strict=True)]
        found = workers(delayed(_scores)(train, *task, test, classifier) for task in tasks)
    finally:
        # otherwise a spawned rank waits minutes for idle workers to exit
        if jobs > 1:
            get_reusable_executor(reuse=True).shutdown()
    scores_of, cost_of = (dict(zip(sets, values, strict=True)) for values in (found, chosen))
    classes = range(labels.shape[1])
    scores = np.stack([scores_of.get(c, np.zeros(len(test))) for c in classes], 1)
    return scores, [cost_of.get(c) for c in classes]


def best_cost(costs: list[float], precision: np.ndarray) -> float:
    """Return the cost with the highest average precision, or the middle one if several tie.

    Args:
        costs: the costs.
        precision: the average precision of each cost, [len(costs)], in [0, 1].
    """
    indices = np.flatnonzero(precision == precision.max())
    return costs[indices[len(indices) // 2]]


def normalize(x: np.ndarray) -> np.ndarray:
    """Return the features [N, D] in float64, normalized to norm 1.

    Standardizing them would make an image's features depend on the other images.
    """
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def fit(
    x: np.ndarray, y: np.ndarray, classifier: str, cost: float
) -> LinearSVC | LogisticRegression:
    """Return a trained linear classifier. Draws no random numbers.

    Training minimizes |w|^2 / 2 + cost * (sum of losses). This is the same as the mean loss with a
    weight decay of 1 / (cost N).

    Args:
        x: features, [N, D].
        y: labels, [N], of 0 and 1; both occur.
        classifier: "svm" for the squared hinge loss, doubled if y is 1; "linear" for binary cross
            entropy, minimized by full-batch LBFGS.
        cost: weight of the losses.
    """
    if classifier == "svm":
        model = LinearSVC(C=cost, class_weight={0: 1, 1: 2}, dual=False, max_iter=2000)
    else:
        model = LogisticRegression(C=cost, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # extreme costs do not converge
        return model.fit(x, y)


def folds(y: np.ndarray, seed: int) -> np.ndarray:
    """Return a random fold, 0 to 2, for each image, [N].

    Each fold gets a third of the images with label 1, and a third of those with label 0.

    Args:
        y: labels, [N], of 0 and 1.
        seed: seed of the random numbers.
    """
    fold = np.empty(len(y), dtype=np.int64)
    for value in (0, 1):
        indices = np.random.default_rng((seed % 2**32, value)).permutation(
            np.flatnonzero(y == value)
        )
        fold[indices] = np.arange(len(indices)) % FOLDS
    return fold


def cross_validate(
    train: np.ndarray,
    known: np.ndarray,
    y: np.ndarray,
    fold: np.ndarray,
    cost: float,
    classifier: str,
) -> float:
    """Return the mean over folds of the average precision of a classifier, in [0, 1].

    For each fold, the classifier is trained on the other folds. Only folds that show the class and
    whose other folds have both labels are used. Returns 0 if there is no such fold.

    Args:
        train: features of all training images, [N, D].
        known: indices of the N' images that count for the class, [N'].
        y: their labels of 0 and 1, [N'].
        fold: their folds, from `folds`, [N'].
        cost: see `fit`.
        classifier: see `fit`.
    """
    found = []
    for held_out in range(FOLDS):
        others, own = fold != held_out, fold == held_out
        if y[own].any() and 0 < y[others].sum() < others.sum():
            model = fit(train[known[others]], y[others], classifier, cost)
            found.append(
                average_precision_score(y[own], model.decision_function(train[known[own]]))
            )
    return float(np.mean(found)) if found else 0.0


def _scores(
    train: np.ndarray,
    known: np.ndarray,
    y: np.ndarray,
    cost: float,
    test: np.ndarray,
    classifier: str,
) -> np.ndarray:
    """Return the scores of the test images, by a classifier trained on the images `known`."""
    return fit(train[known], y, classifier, cost).decision_function(test)
