"""Tests of `moco.data.folders` with symbolic links: what is followed, left out and refused."""

import os

import pytest
from folder_helpers import error_message, link, make_files, names_of

from moco.data.sources import scan


def test_links_to_folders_and_files_are_followed(tmp_path):
    make_files(tmp_path / "disk", "c/1.jpg", "c/more/2.jpg", "extra/3.jpg", "4.jpg")
    make_files(tmp_path, "train/ant/1.jpg")
    link(tmp_path / "train" / "cat", tmp_path / "disk" / "c")
    link(tmp_path / "train" / "ant" / "extra", "../../disk/extra")
    link(tmp_path / "train" / "ant" / "file.jpg", tmp_path / "disk" / "4.jpg")
    folder = scan(tmp_path, "train")
    assert names_of(folder) == [
        "ant/1.jpg",
        "ant/extra/3.jpg",
        "ant/file.jpg",
        "cat/1.jpg",
        "cat/more/2.jpg",
    ]
    assert folder.labels.tolist() == [0, 0, 0, 1, 1] and all(
        os.path.exists(folder.path(i)) for i in range(5)
    )
    link(tmp_path / "linked", tmp_path)
    assert names_of(scan(tmp_path / "linked", "train")) == names_of(folder)


@pytest.mark.parametrize("to", [".", "..", "../..", "more", "more/deep", "/"])
def test_a_link_to_a_listed_folder_or_one_above_is_left_out(tmp_path, capsys, to):
    """`to` is the class itself, the split, the data folder, one above it, or one in the class."""
    make_files(
        tmp_path, "train/cat/1.jpg", "train/cat/more/deep/2.jpg", "train/dog/3.jpg", "val/cat/4.jpg"
    )
    link(tmp_path / "train" / "cat" / "again", to)
    link(tmp_path / "train" / "cat" / "more" / "zzz", tmp_path / "train" / "cat" / "again")
    folder = scan(tmp_path, "train")
    assert names_of(folder) == [
        "cat/1.jpg",
        "cat/more/deep/2.jpg",
        "dog/3.jpg",
    ] and folder.labels.tolist() == [0, 0, 1]
    said = capsys.readouterr().err
    assert f"2 links to folders that are listed already, first {tmp_path}/train/cat/again\n" in said


def test_a_folder_that_two_links_lead_to_is_listed_once(tmp_path):
    """The class is itself a link, and one link leads to a folder above the other link's."""
    make_files(tmp_path / "disk", "c/1.jpg", "other/deep/2.jpg")
    for name in ("a", "b"):
        link(tmp_path / "disk" / "c" / name, "../other/deep" if name == "a" else "../other")
    link(tmp_path / "train" / "cat", tmp_path / "disk" / "c")
    assert names_of(scan(tmp_path, "train")) == ["cat/1.jpg", "cat/a/2.jpg"]


@pytest.mark.parametrize(
    ("where", "to"),
    [
        ("train/dog", "cat"),
        ("train/cow/x", "../cat"),
        ("train/cow/x", "../cat/more"),
        ("train/cow/x", "../../disk"),
    ],
)
def test_a_folder_that_belongs_to_two_classes_is_refused(tmp_path, where, to):
    make_files(
        tmp_path, "train/cat/1.jpg", "train/cat/more/2.jpg", "train/cow/1.jpg", "disk/eel/1.jpg"
    )
    link(tmp_path / "train" / "eel", "../disk/eel")
    link(tmp_path / where, to)
    message = error_message(scan, tmp_path, "train")
    two = ("cow", "eel") if "disk" in to else ("cat", where.split("/")[1])
    assert (
        message.startswith(f"{tmp_path}/train/{two[0]} and {tmp_path}/train/{two[1]}: ")
        and "two classes" in message
    )


@pytest.mark.parametrize("where", ["train/dog", "train/cat/more"])
def test_a_broken_link_is_refused(tmp_path, where):
    """It may lead to a disk that is not mounted. Without its class, all labels would change."""
    make_files(tmp_path, "train/cat/1.jpg", "train/emu/1.jpg")
    link(tmp_path / where, "/no/such/disk")
    message = error_message(scan, tmp_path, "train")
    assert message.startswith(
        f"{tmp_path / where}: is a link to /no/such/disk, which does not exist"
    )
    (tmp_path / where).unlink()
    link(tmp_path / where, tmp_path / where)
    assert str(tmp_path / where) in error_message(scan, tmp_path, "train")
