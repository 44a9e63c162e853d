"""Draw features as points in two dimensions, by PaCMAP, UMAP, t-SNE or principal components."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moco.errors import InputError
from moco.messages import counted

FEWEST = 5  # images on a map
_MANY = 20_000  # images for which t-SNE takes too long


class Method(NamedTuple):
    """A way to map features to two dimensions.

    Attributes:
        title: Its name, for messages.
        package: The package that pip installs, or "" if it is always there.
        module: The module of that package.
        fit: Maps normalized features [N, D] to points [N, 2], with a fixed seed.
    """

    title: str
    package: str
    module: str
    fit: Callable[[np.ndarray], np.ndarray]

    @property
    def is_installed(self) -> bool:
        """Return whether the package is installed."""
        return not self.package or importlib.util.find_spec(self.module) is not None


def tsne(x: np.ndarray) -> np.ndarray:
    """Return the t-SNE of features [N, D], by their cosine. N must be at least `FEWEST`."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # the features of a collapsed encoder have no principal axis
    start = "pca" if x.std(0).max() > 1e-6 else "random"
    perplexity = min(30, (len(x) - 1) / 3)
    # on busy cores, several threads mostly wait for each other
    with threadpool_limits(1):
        method = TSNE(metric="cosine", init=start, perplexity=perplexity, random_state=0)
        return method.fit_transform(x)


def _pca(x: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import PCA

    points = PCA(min(2, x.shape[1]), svd_solver="full", random_state=0).fit_transform(x)
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def _pacmap(x: np.ndarray) -> np.ndarray:
    from pacmap import PaCMAP

    neighbours = min(10, len(x) - 1)
    return PaCMAP(n_neighbors=neighbours, distance="angular", random_state=0).fit_transform(x)


def _umap(x: np.ndarray) -> np.ndarray:
    from umap import UMAP

    # its usual start needs more images than this
    start = "spectral" if len(x) > 30 else "random"
    neighbours = min(15, len(x) - 1)
    return UMAP(
        n_neighbors=neighbours, metric="cosine", init=start, random_state=0, n_jobs=1
    ).fit_transform(x)


METHODS = {
    "pacmap": Method("PaCMAP", "pacmap", "pacmap", _pacmap),
    "umap": Method("UMAP", "umap-learn", "umap", _umap),
    "tsne": Method("t-SNE", "", "", tsne),
    "pca": Method("principal components", "", "", _pca),
}


def choose(name: str, images: int) -> Method:
    """Return a method by name; for "auto", the best that is installed and fast for the images.

    Raises InputError if it is not installed, or if there are too few images.
    """
    if images < FEWEST:
        few = counted(images, "image is", "images are")
        raise InputError(f"{few} too few for a map; it needs at least {FEWEST}")
    if name == "auto":
        installed = (one for one in ("pacmap", "umap") if METHODS[one].is_installed)
        name = next(installed, "tsne" if images <= _MANY else "pca")
    method = METHODS[name]
    if not method.is_installed:
        raise InputError(
            f"--map {name} needs the package {method.package}: pip install {method.package}, "
            "or give --map tsne"
        )
    return method


def points(x: np.ndarray, method: Method) -> np.ndarray:
    """Return the map of features [N, D] as float32 [N, 2]. Features are normalized first.

    Raises InputError if all features are equal.
    """
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    if x.std(0).max() < 1e-6:
        raise InputError("all images have the same features, so there is no map; leave out --map")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about seeds and threads
        return np.ascontiguousarray(method.fit(x), dtype=np.float32)
