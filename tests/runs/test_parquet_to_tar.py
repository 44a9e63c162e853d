"""Test tools/parquet_to_tar.py: equal images, continued after a stop, and its errors."""

import os
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import shell, write_images
from folder_helpers import names_of
from run_helpers import digests, refused, succeeded
from shard_helpers import write_arrow, write_parquet

from moco.data import sources
from tools import parquet_to_tar

TOOL = "tools.parquet_to_tar"


@pytest.fixture(scope="module")
def parquet(shared_images, tmp_path_factory):
    return write_parquet(shared_images, tmp_path_factory.mktemp("parquet"))


def equal(ours, theirs):
    for split in ("train", "val"):
        a, b = sources.scan(ours, split), sources.scan(theirs, split)
        assert len(a) == len(b) > 0 and a.classes == b.classes
        assert np.array_equal(a.labels, b.labels)
        assert all(np.array_equal(a.encoded(i), b.encoded(i)) for i in range(len(a)))
    return True


@pytest.mark.parametrize("write", [write_parquet, write_arrow, None])
def test_images_order_and_classes_stay_the_same(call, shared_images, tmp_path, write):
    data = write(shared_images, tmp_path / "data") if write else shared_images
    status, out, err = call(TOOL, data, tmp_path / "out", "--shard-size", 20)
    assert status == 0, err
    assert f"train: 48 images in 3 tar files, in {tmp_path / 'out'}" in out
    assert "val: 15 images in 1 tar file" in out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        *(f"train-0000{k}-of-00003.tar" for k in range(3)),
        "val-00000-of-00001.tar",
    ]
    assert equal(tmp_path / "out", shared_images)


def test_file_names_become_keys_if_they_differ(call, parquet, shared_images, tmp_path):
    assert call(TOOL, parquet, tmp_path / "a")[0] == 0
    names = names_of(sources.scan(tmp_path / "a", "train"))
    assert names[1] == "train-00000-of-00001.tar/class0_1.jpg"
    assert call(TOOL, shared_images, tmp_path / "b")[0] == 0  # file names repeat between classes
    names = names_of(sources.scan(tmp_path / "b", "train"))
    assert names[1] == "train-00000-of-00001.tar/class0/1.jpg"
    png = b"\x89PNG\r\n\x1a\n"
    images = [{"bytes": data, "path": "x.y.JPG"} for data in (png, b"\xff\xd8", b"other")]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    assert call(TOOL, tmp_path, tmp_path / "c")[0] == 0
    with tarfile.open(tmp_path / "c" / "train-00000-of-00001.tar") as tar:
        assert tar.getnames() == ["00000000.png", "00000001.jpg", "00000002.jpg"]


def test_a_stopped_conversion_continues(call, parquet, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(TOOL, parquet, whole, "--shard-size", 10)[0] == 0
    write, done = parquet_to_tar._write, []

    def stop(file, *rest):
        if len(done) == 2:
            file.write(b"half a file")
            raise KeyboardInterrupt
        done.append(write(file, *rest))

    monkeypatch.setattr(parquet_to_tar, "_write", stop)
    assert call(TOOL, parquet, out, "--shard-size", 10)[0] == 130
    assert len(list(out.glob("*.tar"))) == 2
    refused(call("main_knn", out, "--k", 1), "has 2 of the 5 files train-*-of-00005, number 2 is")
    monkeypatch.setattr(parquet_to_tar, "_write", write)
    (out / ".train-00002-of-00005.tar-abcdefgh").write_bytes(b"left by a killed process")
    status, text, _ = call(TOOL, parquet, out, "--shard-size", 10)
    assert status == 0 and "train: 48 images in 5 tar files, of which 2 were there" in text
    assert digests(out) == digests(whole)


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (lambda out: None, ("--shard-size", 0), "--shard-size"),
        (lambda out: out.write_text(""), (), "out: cannot be written"),
        (lambda out: (out.mkdir(), (out / "a.tar").touch()), (), "a.tar: exists already; choose"),
        (lambda out: (out / "test").mkdir(parents=True), (), "out/test: exists, and its images"),
        (
            lambda out: (out.mkdir(), (out / parquet_to_tar.STATE).write_text("{}")),
            (),
            "out: was made from other images, or with another --shard-size",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(call, parquet, tmp_path, prepare, words, message):
    prepare(tmp_path / "out")
    refused(call(TOOL, parquet, tmp_path / "out", *words), message)


def test_the_folder_itself_and_folders_without_images_are_refused(call, parquet, tmp_path):
    refused(call(TOOL, parquet, parquet), "is the folder to read; choose another one")
    refused(call(TOOL, tmp_path, tmp_path / "out"), "holds no image", "train-*.parquet")
    refused(call(TOOL, tmp_path / "none", tmp_path / "out"), "none: no such folder")


def test_an_image_without_bytes_ends_the_conversion(call, tmp_path):
    images = [{"bytes": b"\xff\xd8", "path": "a"}, {"bytes": None, "path": "b"}]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    refused(call(TOOL, tmp_path, tmp_path / "out"), "x.parquet/1/b: unreadable image")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_class_names_that_need_two_lines_are_refused(call, tmp_path):
    data = write_images(tmp_path / "data", val=0, train=1)
    shutil.rmtree(data / "val")
    os.rename(data / "train" / "class1", data / "train" / "two\nlines")
    refused(call(TOOL, data, tmp_path / "out"), "cannot be written to classes.txt")


def test_other_orders_of_classes_are_kept(call, tmp_path):
    """Folders are sorted as text, so 10 comes before 2; as integers it would come after it."""
    data = write_images(tmp_path / "data", classes=3, train=2, val=1)
    for split in ("train", "val"):
        for old, new in (("class0", "10"), ("class1", "2"), ("class2", "x")):
            os.rename(data / split / old, data / split / new)
    assert call(TOOL, data, tmp_path / "out")[0] == 0
    assert sources.scan(tmp_path / "out", "train").classes == ("10", "2", "x")
    assert equal(tmp_path / "out", data)


@pytest.mark.slow
def test_from_the_shell(parquet, tmp_path):
    out = succeeded(shell("tools/parquet_to_tar.py", parquet, tmp_path / "out"))
    assert "train: 48 images in 1 tar file" in out
