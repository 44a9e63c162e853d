"""Cluster features by k-means, and compare the clusters with the classes."""

import warnings

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from moco.errors import InputError

LARGE = 100_000  # more images are clustered in mini-batches
_BATCH = 16_384


def measure(x: np.ndarray, labels: np.ndarray, count: int, seed: int) -> dict[str, float]:
    """Return `nmi`, `ari` and `cluster_accuracy` of one run of k-means.

    `nmi` is the mutual information of clusters and classes, divided by the arithmetic mean of their
    entropies, and `ari` is the Rand index, adjusted for chance.

    Args:
        x: features, [N, D], of norm 1.
        labels: the classes, [N].
        count: number of clusters.
        seed: seed of the first centers.

    Raises InputError if there are fewer images than clusters.
    """
    if len(x) < count:
        raise InputError(f"--clusters {count}: there are {len(x)} images; lower it")
    found = assign(x, count, seed)
    return {
        "nmi": float(normalized_mutual_info_score(labels, found)),
        "ari": float(adjusted_rand_score(labels, found)),
        "cluster_accuracy": matched_accuracy(labels, found),
    }


def assign(x: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the cluster of each feature, [N], by k-means with k-means++.

    Above `LARGE` features, the centers move after each mini-batch.
    """
    options = {"n_clusters": count, "random_state": seed % 2**32, "n_init": 1}
    model = MiniBatchKMeans(batch_size=_BATCH, **options) if len(x) > LARGE else KMeans(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        return model.fit_predict(x)


def matched_accuracy(labels: np.ndarray, found: np.ndarray) -> float:
    """Return the accuracy if each cluster stands for one class, and each class for one cluster.

    The Hungarian algorithm finds the best such match. Images of clusters or classes that are left
    over count as wrong.

    Args:
        labels: the classes, [N].
        found: the clusters, [N].
    """
    counts = contingency_matrix(labels, found)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))
