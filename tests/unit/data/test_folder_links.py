"""Links."""

import os

import pytest
from folder_helpers import complaint, link, make, names_of

from moco.data.folders import scan


def test_class_folders_and_others_may_lie_elsewhere(tmp_path):
    make(tmp_path / "disk", "c/1.jpg", "c/more/2.jpg", "extra/3.jpg", "4.jpg")
    make(tmp_path, "train/ant/1.jpg")
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
def test_a_link_back_counts_no_image_twice(tmp_path, capsys, to):
    """To its own class, the split, the data folder, one above, or one listed before or after."""
    make(
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


def test_two_links_to_one_folder_count_it_once(tmp_path):
    """Also below a class that is itself a link, and if one link leads above the other."""
    make(tmp_path / "disk", "c/1.jpg", "other/deep/2.jpg")
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
def test_a_folder_in_two_classes_is_refused(tmp_path, where, to):
    make(tmp_path, "train/cat/1.jpg", "train/cat/more/2.jpg", "train/cow/1.jpg", "disk/eel/1.jpg")
    link(tmp_path / "train" / "eel", "../disk/eel")
    link(tmp_path / where, to)
    message = complaint(scan, tmp_path, "train")
    two = ("cow", "eel") if "disk" in to else ("cat", where.split("/")[1])
    assert (
        message.startswith(f"{tmp_path}/train/{two[0]} and {tmp_path}/train/{two[1]}: ")
        and "two classes" in message
    )


@pytest.mark.parametrize("where", ["train/dog", "train/cat/more"])
def test_a_broken_link_is_not_left_out(tmp_path, where):
    """If a disk is not mounted, a class would be missing, and others would change labels."""
    make(tmp_path, "train/cat/1.jpg", "train/emu/1.jpg")
    link(tmp_path / where, "/no/such/disk")
    message = complaint(scan, tmp_path, "train")
    assert message.startswith(
        f"{tmp_path / where}: is a link to /no/such/disk, which does not exist"
    )
    (tmp_path / where).unlink()
    link(tmp_path / where, tmp_path / where)
    assert str(tmp_path / where) in complaint(scan, tmp_path, "train")
