"""Classify images in episodes, each with a few labelled images of a few classes."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from moco.errors import InputError
from moco.sections_eval import FewShot


def check(labels: np.ndarray, settings: FewShot) -> None:
    """Raise InputError if too few classes have enough images for an episode.

    Args:
        labels: the labels of all images, [N].
        settings: the settings of the episodes.
    """
    needed = max(settings.shots) + settings.queries
    counts = np.bincount(labels)
    usable = int((counts >= needed).sum())
    if usable < settings.ways:
        enough = int(np.sort(counts)[-settings.ways]) if len(counts) >= settings.ways else 0
        ways = "lower --ways" if usable > 1 else "add images"
        lower = f", or lower --queries: {settings.ways} classes have {enough} images or more"
        raise InputError(
            f"--ways {settings.ways}: {usable} of the {(counts > 0).sum()} classes of val/ have "
            f"the {needed} images of --shots {max(settings.shots)} and --queries "
            f"{settings.queries}; {ways}{lower * (enough > max(settings.shots))}"
        )


def accuracies(
    x: np.ndarray, labels: np.ndarray, shots: int, settings: FewShot, seed: int
) -> dict[str, np.ndarray]:
    """Return the accuracy of each classifier in each episode, [episodes], in [0, 1].

    An episode draws `ways` classes among those with enough images. For each class, it draws images
    to learn from, and other images to classify. The draws depend on the seed and the episode only.

    Args:
        x: the features, [N, D], of norm 1.
        labels: their labels, [N].
        shots: number of images of each class to learn from.
        settings: the settings of the episodes.
        seed: seed of the draws.
    """
    needed = max(settings.shots) + settings.queries  # the same classes for all numbers of shots
    members = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    members = [indices for indices in members if len(indices) >= needed]
    found = {name: np.empty(settings.episodes) for name in settings.few_shot_classifier}
    ways = settings.ways
    known, wanted = np.repeat(np.arange(ways), shots), np.repeat(np.arange(ways), settings.queries)
    with threadpool_limits(1):  # an episode is too small for several threads
        for episode in range(settings.episodes):
            draw = np.random.default_rng((seed % 2**32, episode))
            chosen = draw.choice(len(members), ways, replace=False)
            drawn = [
                draw.choice(members[c], shots + settings.queries, replace=False) for c in chosen
            ]
            support = x[np.concatenate([one[:shots] for one in drawn])]
            queries = x[np.concatenate([one[shots:] for one in drawn])]
            for name, classify in CLASSIFIERS.items():
                if name in found:
                    found[name][episode] = (classify(support, known, queries) == wanted).mean()
    return found


def nearest_mean(support: np.ndarray, known: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the class, [M], whose mean of features has the highest cosine with each query.

    Args:
        support: features to learn from, [n, D], of norm 1.
        known: their labels, [n], from 0 to the number of classes - 1.
        queries: features to classify, [M, D].
    """
    means = np.stack([support[known == c].mean(0) for c in range(known.max() + 1)])
    norms = np.linalg.norm(means, axis=1)
    return (queries @ (means / np.maximum(norms, 1e-12)[:, None]).T).argmax(1)


def logistic(support: np.ndarray, known: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the class of each query, [M], by scikit-learn's logistic regression with C = 1.

    This is the classifier of Tian et al. (arXiv 2003.11539) on normalized features. The arguments
    are those of `nearest_mean`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(max_iter=1000).fit(support, known).predict(queries)


CLASSIFIERS = {"mean": nearest_mean, "logistic": logistic}


def interval(accuracy: np.ndarray) -> float:
    """Return half the width of the 95 % confidence interval of the mean of [episodes] values."""
    return float(1.96 * accuracy.std(ddof=1) / np.sqrt(len(accuracy)))


def title(metric: str) -> str:
    """Return the title of a metric of `evaluate`: "5-way 1-shot, nearest mean"."""
    _, ways, shots, name = metric.split("_")
    how = {"mean": "nearest mean", "logistic": "logistic regression"}[name]
    return f"{ways.removesuffix('way')}-way {shots.removesuffix('shot')}-shot, {how}"


def evaluate(x: np.ndarray, labels: np.ndarray, settings: FewShot, seed: int) -> dict[str, float]:
    """Return the mean accuracy over episodes, and half of its 95 % confidence interval.

    Their names are `few_5way_1shot_mean` and `few_5way_1shot_mean_ci95`, for example. The arguments
    are those of `accuracies`. Raises InputError like `check`.
    """
    check(labels, settings)
    found = {}
    for shots in settings.shots:
        for name, each in accuracies(x, labels, shots, settings, seed).items():
            metric = f"few_{settings.ways}way_{shots}shot_{name}"
            found |= {metric: float(each.mean()), f"{metric}_ci95": interval(each)}
    return found
