"""Tests of the downloads of `moco.data.registry`. A function takes the place of the network."""

import io
import os
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torchvision.datasets as tv
from data_helpers import check_error, refuse_network
from dataset_trees import (
    DOWNLOADED,
    NEVER_DOWNLOADED,
    ON_DISK,
    WRITERS,
    Tree,
    aircraft,
    cifar10,
    pets,
    shown,
    sun397,
)

from moco.data.registry import check, load


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Refuse every request to the network. Return the list of the URLs asked for."""
    return refuse_network(monkeypatch)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "données"


class Answer(io.BytesIO):
    def __init__(self, url, data):
        super().__init__(data)
        self.url, self.length = url, len(data)


@pytest.fixture
def serve(asked, monkeypatch):
    """Return a function that lets requests succeed.

    Its argument `content` is called with the file name in a URL, and returns the file's bytes.
    """

    def start(content, seconds=0.0):
        def answer(request):
            asked.append(request.full_url)
            time.sleep(seconds)
            return Answer(request.full_url, content(os.path.basename(request.full_url)))

        monkeypatch.setattr(urllib.request, "urlopen", answer)

    return start


@pytest.fixture
def no_checksums(monkeypatch):
    """Switch off torchvision's checksums, which small copies of the data sets do not have."""
    monkeypatch.setattr(tv.SUN397, "_DATASET_MD5", None)
    urls = {size: (url, None) for size, (url, _) in tv.Imagenette._ARCHIVES.items()}
    monkeypatch.setattr(tv.Imagenette, "_ARCHIVES", urls)
    for key in ("2007", "2007-test"):
        monkeypatch.setitem(tv.voc.DATASET_YEAR_DICT[key], "md5", None)
    monkeypatch.setattr(tv.Places365, "_CATEGORIES_META", (tv.Places365._CATEGORIES_META[0], None))
    for meta in ("_DEVKIT_META", "_FILE_LIST_META", "_IMAGES_META"):
        files = getattr(tv.Places365, meta)
        monkeypatch.setattr(
            tv.Places365, meta, {key: (file, None) for key, (file, _) in files.items()}
        )


def tar(root, chosen=lambda path: True, mode="w", top=("", "")):
    """Return a tar archive of the `chosen` files below `root`. `top` renames the first folder."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for path in sorted(root.rglob("*")):
            inside = str(path.relative_to(root))
            if path.is_file() and chosen(inside):
                archive.add(path, inside.replace(*top, 1))
    return data.getvalue()


def zipped(root, top):
    """Return a zip archive of the files in `root`. `top` is put before their names."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, f"{top}{path.relative_to(root)}")
    return data.getvalue()


def is_trainval(path):
    """Return whether a file of VOC2007 belongs to the split trainval."""
    return Path(path).stem in ("trainval", "000005", "000007", "000009")


ARCHIVES = {
    "tiny_imagenet": lambda root: {"tiny-imagenet-200.zip": zipped(root, "")},
    "imagenette": lambda root: {"imagenette2-320.tgz": tar(root, mode="w:gz")},
    "aircraft": lambda root: {"fgvc-aircraft-2013b.tar.gz": tar(root, mode="w:gz")},
    "sun397": lambda root: {
        "SUN397.tar.gz": tar(root, lambda path: "Partitions" not in path, "w:gz"),
        "Partitions.zip": zipped(root / "SUN397/Partitions", ""),
    },
    "voc2007": lambda root: {
        "VOCtrainval_06-Nov-2007.tar": tar(root, is_trainval),
        "VOCtest_06-Nov-2007.tar": tar(root, lambda path: not is_trainval(path)),
    },
    "places365": lambda root: {
        "filelist_places365-standard.tar": tar(root, lambda path: path.endswith("txt")),
        "train_256_places365standard.tar": tar(
            root, lambda path: path.startswith("data"), top=("data_256_standard", "data_256")
        ),
        "val_256.tar": tar(root, lambda path: path.startswith("val")),
    },
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_download_gets_both_splits_once(name, root, tmp_path, serve, asked, no_checksums):
    _, *splits = WRITERS[name](Tree(tmp_path / "source"))
    archives = ARCHIVES[name](tmp_path / "source")
    serve(archives.__getitem__)
    check(name, str(root), download=True)
    assert [shown(split) for split in load(name, str(root))] == splits
    assert {os.path.basename(url) for url in asked} == set(archives)
    asked.clear()
    check(name, str(root), download=True)
    assert not asked


def test_sun397s_lists_may_be_in_a_folder_of_their_archive(root, tmp_path, serve, no_checksums):
    _, *splits = sun397(Tree(tmp_path))
    archives = ARCHIVES["sun397"](tmp_path) | {
        "Partitions.zip": zipped(tmp_path / "SUN397/Partitions", "Partitions/")
    }
    serve(archives.__getitem__)
    check("sun397", str(root), download=True)
    assert [shown(split) for split in load("sun397", str(root))] == splits


def test_only_one_of_several_callers_downloads(root, tmp_path, serve, asked):
    aircraft(Tree(tmp_path / "source"))
    serve(ARCHIVES["aircraft"](tmp_path / "source").__getitem__, seconds=0.1)
    callers = [threading.Thread(target=check, args=("aircraft", str(root), True)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    check("aircraft", str(root), download=False)
    assert len(asked) == 2  # one for the redirect, one for the file


@pytest.mark.parametrize("name", DOWNLOADED)
@pytest.mark.parametrize("failure", ["no network", "not an archive"])
def test_a_download_that_fails_is_refused_in_one_line(name, failure, root, asked, serve):
    if failure == "not an archive":
        serve(lambda file: b"<html>moved</html>")
    line = check_error(name, root, download=True)
    assert (
        f"--download of {name} failed" in line
        and "by hand" in line
        and (failure != "no network" or failure in line)
    )
    assert asked


def test_a_download_with_a_wrong_checksum_is_refused(root, tmp_path, serve):
    cifar10(Tree(tmp_path / "source"))
    load("cifar10", str(tmp_path / "source"))
    serve(lambda file: tar(tmp_path / "source", mode="w:gz"))
    assert "corrupted" in check_error("cifar10", root, download=True)


def test_a_missing_package_that_torchvision_needs_is_named(root, monkeypatch):
    def download(self):
        raise RuntimeError(
            "To download files from GDrive, 'gdown' is required. "
            "You can install it with 'pip install gdown'."
        )

    monkeypatch.setattr(tv.Caltech101, "download", download)
    assert "pip install gdown" in check_error("caltech101", root, download=True)


def test_an_incomplete_copy_must_be_removed_before_a_download(root, asked):
    pets(Tree(root))
    os.remove(load("pets", str(root))[0].path(0))
    assert "remove an incomplete copy" in check_error("pets", root, download=True)
    assert not asked  # torchvision only looks whether the folders exist


@pytest.mark.parametrize("name", NEVER_DOWNLOADED)
def test_a_data_set_without_a_download_is_refused_without_a_request(name, root, asked):
    assert "by hand from http" in check_error(name, root, download=True)
    assert not asked and not root.exists()


@pytest.mark.parametrize("name", ON_DISK)
def test_a_data_set_that_is_there_is_not_downloaded(name, root, asked):
    WRITERS[name](Tree(root))
    check(name, str(root), download=True)
    assert not asked
