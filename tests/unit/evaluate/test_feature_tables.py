"""Tests of `moco.evaluate.feature_tables`: what the files contain, and odd names."""

import csv
import io
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from moco.errors import InputError
from moco.evaluate import feature_tables
from moco.evaluate.feature_tables import WRITERS, Table

ODD = ["a/b.jpg", 'comma, quote" and space.jpg', "line\nbreak.jpg", "é.png", "0001.jpg"]
ABOUT = {"arch": "resnet18", "epoch": None}


def table(names, sizes=None, points=None, width=3, seed=0):
    """Return a table of random features, in blocks of the given sizes."""
    rows = np.random.default_rng(seed).normal(size=(len(names), width)).astype(np.float32)
    ends = np.cumsum(sizes or [len(names)])[:-1]
    return Table(names, width, lambda: iter(np.split(rows, ends)), points, ABOUT), rows


def written(suffix, content):
    file = io.BytesIO()
    WRITERS[suffix](file, content)
    assert not file.closed
    file.seek(0)
    return file


def read(suffix, file):
    """Return names, features and the map, which is None if the file has none."""
    if suffix == ".npz":
        found = np.load(file)
        points = found.get("map")
        assert json.loads(str(found["about"])) == ABOUT
        return found["names"].tolist(), found["features"], points
    if suffix == ".parquet":
        found = pq.read_table(file)
        assert json.loads(found.schema.metadata[b"about"]) == ABOUT
        points = np.stack([found[name] for name in "xy"], 1) if "x" in found.column_names else None
        return found["name"].to_pylist(), np.stack(found["features"].to_numpy()), points
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    heads, *lines = csv.reader(text)
    values = np.array([line[1:] for line in lines], np.float32)
    if heads[1:3] == ["x", "y"]:
        assert heads == ["name", "x", "y", "f0", "f1", "f2"]
        return [line[0] for line in lines], values[:, 2:], values[:, :2]
    assert heads == ["name", "f0", "f1", "f2"]
    return [line[0] for line in lines], values, None


@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
def test_names_features_and_map_are_read_back_exactly(suffix, with_map):
    points = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32) if with_map else None
    content, rows = table(ODD, points=points)
    names, features, found = read(suffix, written(suffix, content))
    assert names == ODD and features.dtype == np.float32 and np.array_equal(features, rows)
    assert (found is None) == (points is None)
    assert points is None or np.array_equal(found, points)


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_file_does_not_depend_on_the_sizes_of_the_blocks(suffix, monkeypatch):
    monkeypatch.setattr(feature_tables, "_ROWS", 4)
    names = [f"{i}.jpg" for i in range(11)]
    files = [written(suffix, table(names, sizes)[0]) for sizes in ([11], [4, 4, 3], [1, 9, 1])]
    assert len({file.getvalue() for file in files}) == 1
    assert np.array_equal(read(suffix, files[0])[1], table(names)[1])
    if suffix == ".parquet":
        assert pq.ParquetFile(files[0]).num_row_groups == 3


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_a_name_that_is_not_utf8_keeps_its_bytes(suffix):
    names = [os.fsdecode(b"caf\xe9.jpg"), "b.jpg"]
    feature_tables.check_names(suffix, names)
    assert read(suffix, written(suffix, table(names)[0]))[0] == names


def test_parquet_refuses_a_name_that_is_not_utf8():
    with pytest.raises(InputError, match="not UTF-8, which parquet needs"):
        feature_tables.check_names(".parquet", ["a.jpg", os.fsdecode(b"caf\xe9.jpg")])
    feature_tables.check_names(".parquet", ODD)


def test_extreme_numbers_survive_the_text_file():
    rows = np.array([[1e-45, -3.4028235e38, 0.1]], np.float32)
    content = Table(["a.jpg"], 3, lambda: iter([rows]), None, ABOUT)
    assert np.array_equal(read(".csv", written(".csv", content))[1], rows)
