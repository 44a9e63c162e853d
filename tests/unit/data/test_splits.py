"""Test which files with many images belong to a split."""

import os

import pytest
from folder_helpers import make_files

from moco.data import splits
from moco.errors import InputError

TAR = (".tar",)


def both(root):
    return tuple(splits.names(root, split, TAR) for split in ("train", "val"))


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        (["b.tar", "a.tar", "notes.txt", ".hidden.tar", "x_0.pth.tar"], ["a.tar", "b.tar"], []),
        (
            ["train-0.tar", "train-1.tar", "val-0.tar"],
            ["train-0.tar", "train-1.tar"],
            ["val-0.tar"],
        ),
        (["train.tar", "validation-1.TAR"], ["train.tar"], ["validation-1.TAR"]),
        (
            ["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"],
            ["imagenet1k-train-0000.tar"],
            ["imagenet1k-validation-00.tar"],
        ),
        (["train-0.tar", "test-0.tar"], ["train-0.tar"], ["test-0.tar"]),
        (["train-0.tar", "test-0.tar", "val-0.tar"], ["train-0.tar"], ["val-0.tar"]),
        (["test-set-train-0.tar"], ["test-set-train-0.tar"], []),  # the last word counts
        (["restrain-0.tar"], ["restrain-0.tar"], []),  # no word of a split
        (["data/train-0.tar", "data/val-0.tar"], ["data/train-0.tar"], ["data/val-0.tar"]),
    ],
)
def test_names_say_the_split(tmp_path, files, train, val):
    root = make_files(tmp_path / "root", *files)
    assert both(root) == (train, val)


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [("train", 2, 0), ("val", 0, 2), ("validation", 0, 2), ("test", 0, 2), ("other", 2, 0)],
)
def test_without_words_in_names_the_folder_says_the_split(tmp_path, name, train, val):
    root = make_files(tmp_path / name, "0.tar", "1.tar")
    assert tuple(map(len, both(root))) == (train, val)


def test_words_in_names_count_more_than_the_folder(tmp_path):
    """A data folder may be called test."""
    root = make_files(tmp_path / "test", "train-0.tar", "val-0.tar")
    assert both(root) == (["train-0.tar"], ["val-0.tar"])


def test_files_that_no_split_has_are_announced_once(tmp_path, capsys):
    root = make_files(tmp_path / "root", "train-0.tar", "extra.tar", "test-0.tar")
    for _ in range(2):
        splits.note_choice(root, "train", ["train-0.tar"], TAR)
        splits.note_choice(root, "val", ["test-0.tar"], TAR)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "left out: 1 file whose name says neither train nor val, first extra.tar" in lines[0]
    assert "has no files named val; those named test are used instead" in lines[1]


def test_an_incomplete_series_is_refused(tmp_path):
    names = ["train-00000-of-00003.tar", "train-00002-of-00003.tar"]
    root = make_files(tmp_path, *names)
    with pytest.raises(InputError, match=r"has 2 of the 3 files train-\*-of-00003, number 1 is m"):
        splits.files(root, names)
    make_files(tmp_path, "train-00001-of-00003.tar")
    assert len(splits.files(root, sorted(os.listdir(root)))) == 3


def test_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "link.tar").symlink_to("nowhere.tar")
    with pytest.raises(InputError, match=r"link.tar: is a link to nowhere.tar, which does not ex"):
        splits.files(tmp_path, ["link.tar"])
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(InputError, match=r"pipe.tar: is not a file"):
        splits.files(tmp_path, ["pipe.tar"])
    with pytest.raises(InputError, match=r"gone.tar: cannot be read: No such file"):
        splits.files(tmp_path, ["gone.tar"])
