"""Tests of `moco.report.maps`: points in two dimensions, and packages that are not installed."""

import importlib.util
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from moco.errors import InputError
from moco.report import maps


def clouds(n=60, seed=0):
    """Return features of three well separated groups, [n, 16], and their labels."""
    draw = np.random.default_rng(seed)
    label = np.arange(n) % 3
    centres = 5 * draw.normal(size=(3, 16))
    return (centres[label] + draw.normal(size=(n, 16))).astype(np.float32), label


@pytest.mark.parametrize("name", ["tsne", "pca"])
def test_a_map_keeps_groups_together_and_is_the_same_each_time(name):
    x, label = clouds()
    points = maps.points(x, maps.METHODS[name])
    assert points.shape == (60, 2) and points.dtype == np.float32 and np.isfinite(points).all()
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (label[distance.argmin(1)] == label).mean() > 0.95
    assert np.array_equal(maps.points(x, maps.METHODS[name]), points)


@pytest.mark.parametrize("name", ["tsne", "pca"])
@pytest.mark.parametrize("n", [maps.FEWEST, 8])
def test_few_images_have_a_map(n, name):
    assert np.isfinite(maps.points(clouds(n)[0], maps.METHODS[name])).all()


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="4 images are too few for a map; it needs at least 5"):
        maps.choose("pca", 4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_features_have_no_map(value):
    with pytest.raises(InputError, match=r"the same features.*leave out --map"):
        maps.points(np.full((9, 4), value, np.float32), maps.METHODS["pca"])


class Fake:
    """A class that takes the place of PaCMAP and UMAP."""

    made: ClassVar[list[dict]] = []

    def __init__(self, **options):
        self.made.append(options)

    def fit_transform(self, x):
        assert np.allclose(np.linalg.norm(x, axis=1), 1)
        return x[:, :2].astype(np.float64)


@pytest.fixture
def installed(monkeypatch):
    """Return a list of modules. Only these seem to be installed."""
    names: list[str] = []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in names else None
    )
    monkeypatch.setitem(sys.modules, "pacmap", SimpleNamespace(PaCMAP=Fake))
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Fake))
    Fake.made.clear()
    return names


def test_auto_takes_the_best_method_that_is_installed(installed):
    assert maps.choose("auto", 100).title == "t-SNE"
    assert maps.choose("auto", 20_001).title == "principal components"
    installed.append("umap")
    assert maps.choose("auto", 20_001).title == "UMAP"
    installed.append("pacmap")
    assert maps.choose("auto", 100).title == "PaCMAP"


@pytest.mark.parametrize(("name", "package"), [("pacmap", "pacmap"), ("umap", "umap-learn")])
def test_a_method_that_is_not_installed_is_refused(name, package, installed):
    with pytest.raises(InputError, match=f"--map {name} needs .*: pip install {package}, or"):
        maps.choose(name, 100)


@pytest.mark.parametrize(("name", "metric"), [("pacmap", "distance"), ("umap", "metric")])
def test_other_packages_get_normalized_features_and_a_seed(name, metric, installed):
    installed.append(name)
    x, _ = clouds(8)
    points = maps.points(x, maps.choose(name, 8))
    assert np.allclose(points, x[:, :2] / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-6)
    (options,) = Fake.made
    assert options["random_state"] == 0 and options[metric] in ("angular", "cosine")
    assert options["n_neighbors"] == 7  # fewer than images
