"""Linear classifiers on features of images that show several classes: one for each class, at a cost chosen by cross-validation.

VOC07's protocol, after Goyal et al. (arXiv 1905.01235), image classification. No torch: worker processes start quickly."""

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
    kind: str,
    costs: list[float],
    seed: int,
    jobs: int | None = None,
) -> tuple[np.ndarray, list[float | None]]:
    """Train a classifier for each class, at the best of the `costs`: scores of the test images [M, classes], and costs [classes].

    An image labelled -1 for a class takes no part in that class's training. A class that no training image shows, or that all
    of them show, has no classifier: its scores are 0 and its cost None.

    Args:
        train, test: features [N, D] and [M, D].
        labels: [N, classes]: 1 shown, 0 not shown, -1 not counted.
        kind: svm or linear, see `fit`.
        seed: draws the folds.
        jobs: worker processes, by default as many as cores.
    """
    train, test = normalize(train), normalize(test)
    known = [np.flatnonzero(label >= 0) for label in labels.T]
    sets = {
        c: (rows, labels[rows, c])
        for c, rows in enumerate(known)
        if len(np.unique(labels[rows, c])) == 2
    }
    jobs = jobs or cpu_count()
    workers = Parallel(jobs)
    try:
        tasks = [(rows, y, folds(y, seed), cost) for rows, y in sets.values() for cost in costs]
        precision = workers(delayed(cross_validate)(train, *task, kind) for task in tasks)
        chosen = [best_cost(costs, row) for row in np.reshape(precision, (len(sets), len(costs)))]
        tasks = [(*one, cost) for one, cost in zip(sets.values(), chosen, strict=True)]
        found = dict(
            zip(
                sets,
                workers(delayed(_scores)(train, *task, test, kind) for task in tasks),
                strict=True,
            )
        )
    finally:
        if (
            jobs > 1
        ):  # a rank that multiprocessing started would wait minutes for idle workers to leave
            get_reusable_executor(reuse=True).shutdown()
    cost_of = dict(zip(sets, chosen, strict=True))
    classes = range(labels.shape[1])
    return np.stack([found.get(c, np.zeros(len(test))) for c in classes], 1), [
        cost_of.get(c) for c in classes
    ]


def best_cost(costs: list[float], precision: np.ndarray) -> float:
    """The cost of the highest precision [costs]; of several, the middle one."""
    places = np.flatnonzero(precision == precision.max())
    return costs[places[len(places) // 2]]


def normalize(x: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64, for either kind: no image's features depend on another image's, as they would standardised."""
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def fit(x: np.ndarray, y: np.ndarray, kind: str, cost: float) -> LinearSVC | LogisticRegression:
    """A classifier of features [N, D] with labels [N] of 0 and 1, both of which occur. No random number is drawn.

    It minimises |w|^2 / 2 + cost * (sum of losses), which is a weight decay of 1 / (cost N) on the mean loss. svm: squared hinge,
    twice as much where y is 1. linear: binary cross entropy, by full-batch LBFGS.
    """
    if kind == "svm":
        classifier = LinearSVC(C=cost, class_weight={0: 1, 1: 2}, dual=False, max_iter=2000)
    else:
        classifier = LogisticRegression(C=cost, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # of a cost that is out of all proportion
        return classifier.fit(x, y)


def folds(y: np.ndarray, seed: int) -> np.ndarray:
    """The fold [N] of each image, 0 to 2: in random order, of the images with either label [N] a third each."""
    fold = np.empty(len(y), dtype=np.int64)
    for value in (0, 1):
        places = np.random.default_rng((seed % 2**32, value)).permutation(
            np.flatnonzero(y == value)
        )
        fold[places] = np.arange(len(places)) % FOLDS
    return fold


def cross_validate(
    train: np.ndarray, known: np.ndarray, y: np.ndarray, fold: np.ndarray, cost: float, kind: str
) -> float:
    """The mean average precision over folds: on each, of the classifier that the images `known` of the others have trained.

    A fold counts if it shows the class and the others both show it and do not; 0 where none does.
    """
    found = []
    for out in range(FOLDS):
        others, own = fold != out, fold == out
        if y[own].any() and 0 < y[others].sum() < others.sum():
            classifier = fit(train[known[others]], y[others], kind, cost)
            found.append(
                average_precision_score(y[own], classifier.decision_function(train[known[own]]))
            )
    return float(np.mean(found)) if found else 0.0


def _scores(
    train: np.ndarray, known: np.ndarray, y: np.ndarray, cost: float, test: np.ndarray, kind: str
) -> np.ndarray:
    return fit(train[known], y, kind, cost).decision_function(test)
