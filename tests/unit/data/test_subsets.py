"""Tests of `moco.data.subsets`: random splits, class lists and lists of labelled images."""

import hashlib
import http.server
import os
import shutil
import threading

import numpy as np
import pytest
from conftest import ROOT, write_images

from moco.data import photos, sources, subsets
from moco.data.images import ImageFolder
from moco.data.names import Names
from moco.data.subsets import (
    hold_out,
    is_imagenet,
    labelled_subset,
    published_list,
    sample,
    select_listed,
)
from moco.errors import InputError


def paths(folder):
    return set(folder.paths)


@pytest.mark.parametrize(("fraction", "per_class"), [(0.25, 4), (0.01, 1), (0.1, 2), (0.99, 15)])
def test_hold_out_takes_a_fraction_of_each_class(shared_images, fraction, per_class):
    images = sources.scan(shared_images, "train")  # 16 images in each of 3 classes
    rest, held = hold_out(images, fraction, seed=0)
    assert (
        np.bincount(held.labels).tolist() == [per_class] * 3
        and np.bincount(rest.labels).tolist() == [16 - per_class] * 3
    )
    assert paths(rest) | paths(held) == paths(images) and not paths(rest) & paths(held)
    label = dict(zip(images.paths, images.labels.tolist(), strict=True))
    for subset in (rest, held):
        assert [label[path] for path in subset.paths] == subset.labels.tolist()
        assert (subset.root, subset.classes) == (images.root, images.classes)


def test_hold_out_is_the_same_for_a_seed_and_differs_between_seeds(shared_images):
    images = sources.scan(shared_images, "train")
    first, again, other = (paths(hold_out(images, 0.5, seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


def test_a_class_with_one_image_cannot_be_split(tmp_path):
    images = sources.scan(write_images(tmp_path, train=1), "train")
    with pytest.raises(InputError, match="class0: has one image only"):
        hold_out(images, 0.5, seed=0)


@pytest.mark.parametrize(("fraction", "per_class"), [(0.1, 2), (0.01, 1), (0.5, 8)])
def test_sample_takes_a_fraction_of_each_class(shared_images, fraction, per_class):
    images = sources.scan(shared_images, "train")
    first, again, other = (sample(images, fraction, seed) for seed in (1, 1, 2))
    assert np.bincount(first.labels).tolist() == [per_class] * 3
    assert list(first.paths) == list(again.paths) == sorted(first.paths) != list(other.paths)
    assert paths(first) < paths(images)


def test_hold_out_of_multi_label_images_takes_a_fraction_of_all(tmp_path):
    labels = np.random.default_rng(0).integers(-1, 2, (20, 3))
    images = ImageFolder(
        tmp_path, labels, ("a", "b", "c"), Names.of([b"%d.jpg" % i for i in range(20)])
    )
    rest, held = hold_out(images, 0.25, seed=0)
    assert (
        len(held) == 5
        and paths(rest) | paths(held) == paths(images)
        and not paths(rest) & paths(held)
    )
    for i in range(5):
        assert held.labels[i].tolist() == labels[int(held.name(i).removesuffix(".jpg"))].tolist()


def test_a_list_has_file_names_or_paths(shared_images, tmp_path):
    train = sources.scan(shared_images, "train")  # 0.jpg to 15.jpg in each class
    (tmp_path / "list.txt").write_text("class2/3.jpg\n\nclass0/15.jpg\n  class1/3.jpg \n")
    subset = select_listed(train, tmp_path / "list.txt")
    assert [subset.name(i) for i in range(3)] == ["class0/15.jpg", "class1/3.jpg", "class2/3.jpg"]
    assert subset.labels.tolist() == [0, 1, 2] and subset.classes == train.classes
    (shared_images / "train" / "class1" / "alone.jpg").write_bytes(
        (shared_images / "train" / "class1" / "0.jpg").read_bytes()
    )
    try:
        (tmp_path / "list.txt").write_text("alone.jpg\n")
        subset = select_listed(sources.scan(shared_images, "train"), tmp_path / "list.txt")
        assert (subset.name(0), subset.labels.tolist()) == ("class1/alone.jpg", [1])
    finally:
        (shared_images / "train" / "class1" / "alone.jpg").unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "class0/1.jpg\nclass0/77.jpg\nclass9/1.jpg",
            "2 of the 3 images that .* names are missing, first 'class0/77.jpg'",
        ),
        (
            "1.jpg",
            "several images are named '1.jpg': class0/1.jpg, class1/1.jpg; write these names",
        ),
        ("\n \n", "names nothing"),
        ("a\0.jpg", "not text in UTF-8"),
        ("1\0.\0j\0p\0g\0", "not text in UTF-8"),  # UTF-16, as some shells write
        ("class0/\xff.jpg", r"the 1 images that .* names are missing, first 'class0/\udcff.jpg'"),
        (None, "No such file"),
    ],
)
def test_a_list_with_errors_is_refused_in_one_line(shared_images, tmp_path, text, message):
    if text is not None:
        (tmp_path / "list.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as error:
        select_listed(sources.scan(shared_images, "train"), tmp_path / "list.txt")
    assert "\n" not in str(error.value)


def test_a_written_list_selects_the_same_images(tmp_path):
    """Any file name can be listed, except one with a line break."""
    names = [
        b"pi\xe8ces/\xe9.jpg",
        "日/本 1.jpg".encode(),
        b" a/b.jpg",
        b"a/\xc2\x85.jpg",
        b"a/\x1c.jpg",
        b"a/'.jpg",
    ]
    images = ImageFolder(tmp_path, np.arange(6) % 2, ("a", "b"), Names.of(names))
    subset = images.subset(np.array([0, 2, 3, 4]))
    subsets.write_names(subset, tmp_path / "subset.txt")
    assert (tmp_path / "subset.txt").read_bytes() == b"".join(name + b"\n" for name in subset.paths)
    again = select_listed(images, tmp_path / "subset.txt")
    assert paths(again) == paths(subset) and again.labels.tolist() == subset.labels.tolist()
    for bad in (b"a/x\ny.jpg", b"a/x\ry.jpg"):
        with pytest.raises(InputError, match="has a line break in it"):
            subsets.write_names(
                ImageFolder(tmp_path, np.zeros(1, int), ("a",), Names.of([bad])),
                tmp_path / "no.txt",
            )
    assert not (tmp_path / "no.txt").exists()


def test_a_class_list_may_have_names_that_are_not_utf_8(tmp_path):
    classes = ("cat", os.fsdecode(b"pi\xe8ces"))
    images = ImageFolder(
        tmp_path, np.array([0, 1]), classes, Names.of([b"cat/1.jpg", b"pi\xe8ces/1.jpg"])
    )
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfpi\xe8ces some words\r\n")
    subset = subsets.keep_classes(images, str(tmp_path / "list.txt"))
    assert subset.classes == classes[1:] and paths(subset) == {b"pi\xe8ces/1.jpg"}


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """Serve LIST as the published lists, with an empty cache. Return the paths asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(LIST)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subsets, "_URL", f"http://127.0.0.1:{server.server_port}/{{}}percent.txt")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


LIST = b"n00000001_1.JPEG\nn00000002_7.JPEG\n"


def test_a_published_list_is_downloaded_once_and_checked(requests, monkeypatch):
    monkeypatch.setitem(subsets._SHA256, 1, hashlib.sha256(LIST).hexdigest())
    assert published_list(1).read_bytes() == LIST and published_list(1).read_bytes() == LIST
    assert requests == ["/1percent.txt"]
    published_list(1).write_bytes(LIST[:-3])  # a damaged copy is downloaded again
    assert published_list(1).read_bytes() == LIST and len(requests) == 2
    monkeypatch.setattr(subsets, "_URL", "http://127.0.0.1:9/{}percent.txt")
    assert published_list(1).read_bytes() == LIST  # the second use needs no network


def test_a_list_that_is_not_the_published_one_is_refused(requests):
    with pytest.raises(InputError, match=r"sha256 differs.*--subset-file FILE"):
        published_list(10)
    assert requests == ["/10percent.txt"] and not list(photos.cache_folder().glob("**/*.txt"))


def test_without_network_the_message_says_how_to_supply_the_list(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subsets, "_URL", "http://127.0.0.1:9/{}percent.txt")
    with pytest.raises(
        InputError, match=r"1 % cannot be downloaded .*refused.*--subset-file FILE"
    ) as error:
        published_list(1)
    assert "\n" not in str(error.value)


TRUE_LISTS = ROOT.parent / "shared" / "data" / "imagenet_subsets"


@pytest.mark.skipif(not TRUE_LISTS.is_dir(), reason="the true lists are not in the repository")
@pytest.mark.parametrize(("percent", "count"), [(1, 12_811), (10, 128_116)])
def test_the_true_lists_select_their_images(percent, count, tmp_path, monkeypatch):
    """The folder has empty files with those names and others. No image is opened."""
    file = TRUE_LISTS / f"{percent}percent.txt"
    names = file.read_text().split()
    wnids = sorted({name.split("_")[0] for name in names})
    assert is_imagenet(tuple(wnids)) and not is_imagenet(tuple(wnids[:100]))
    for wnid in wnids:
        (tmp_path / "train" / wnid).mkdir(parents=True)
    for name in names + [f"{wnid}_0.JPEG" for wnid in wnids]:
        (tmp_path / "train" / name[:9] / name).touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = photos.cache_folder() / "imagenet_subsets" / file.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(file.read_bytes())
    monkeypatch.setattr(subsets, "_URL", "http://127.0.0.1:9/{}percent.txt")  # nothing is fetched
    train = sources.scan(tmp_path, "train")
    subset = labelled_subset(train, percent, seed=0)
    assert (len(train), len(subset), len(names)) == (count + 1000, count, count)
    assert {subset.name(i)[10:] for i in range(count)} == set(names)
    assert all(wnids[label] == subset.name(i)[:9] for i, label in enumerate(subset.labels))
    assert len(labelled_subset(train, 100, seed=0)) == len(train)
    assert len(labelled_subset(train, percent, seed=0, file=str(file))) == count
    for name in names[:500]:
        (tmp_path / "train" / name[:9] / name).unlink()
    with pytest.raises(InputError, match=f"500 of the {count} images .* are missing"):
        labelled_subset(sources.scan(tmp_path, "train"), percent, seed=0)
    shutil.rmtree(tmp_path)
