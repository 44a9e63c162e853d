"""Tests of `moco.data.sources`: which layout a data folder has, with labels and without."""

import os

import pytest
from folder_helpers import BOTH, error_message, link, make_files, names_of

from moco.data import sources
from moco.data.sources import find, locate, scan

LABELLED = ("train/cat/1.jpg", "train/cat/deep/2.jpg", "train/dog/1.jpg")


def unlabelled(root):
    """Return the names of the training images, which must have no labels."""
    images = scan(find(str(root), ("train",), labels=False), "train")
    assert (
        not images.labelled and images.classes == () and images.labels.tolist() == [0] * len(images)
    )
    assert all(os.path.isfile(images.path(i)) for i in range(len(images)))
    return names_of(images)


@pytest.mark.parametrize("top", ["", "train/"])
def test_images_without_folders_have_no_labels(tmp_path, top):
    make_files(tmp_path, *(f"{top}{name}" for name in ("b.jpg", "a.PNG", ".c.jpg", "d.txt")))
    assert unlabelled(tmp_path) == ["a.PNG", "b.jpg"]


def test_without_train_the_images_of_all_folders_are_used_in_the_order_of_their_paths(tmp_path):
    make_files(tmp_path, "z.jpg", "b/2.jpg", "b/c/1.jpg", "a/d/e/3.jpg", "empty")
    make_files(tmp_path, ".thumbs/1.jpg", "@eaDir/1.jpg", "b/lost+found/1.jpg", "b/notes.txt")
    assert unlabelled(tmp_path) == ["a/d/e/3.jpg", "b/2.jpg", "b/c/1.jpg", "z.jpg"]
    assert sources.holds_folders_without_labels(tmp_path)


def test_class_folders_in_train_are_labels_and_images_next_to_them_are_left_out(tmp_path, capsys):
    make_files(tmp_path, *LABELLED, "train/loose.jpg", "other/3.jpg")
    images = scan(find(str(tmp_path), ("train",)), "train")
    assert names_of(images) == ["cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg"]
    assert images.labelled and images.classes == ("cat", "dog")
    assert "left out: 1 image outside the class folders" in capsys.readouterr().err
    assert not sources.holds_folders_without_labels(tmp_path)


def test_the_folders_in_a_data_folder_named_train_are_no_classes(tmp_path):
    make_files(tmp_path, *LABELLED)
    assert scan(find(str(tmp_path / "train"), ("train",), labels=False), "train").classes == ()


def test_files_with_other_endings_are_counted(tmp_path, capsys):
    make_files(tmp_path, "1.jpg", "a/2.heic", "b.heic", "c.txt")
    assert unlabelled(tmp_path) == ["1.jpg"]
    said = f"{tmp_path}: left out: 3 files with other endings (.heic 2, .txt 1)\n"
    assert capsys.readouterr().err == said


def test_names_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"pi\xe8ces/\xe9 1.jpg")
    make_files(tmp_path, name, "a.jpg")
    assert unlabelled(tmp_path) == ["a.jpg", name]


def test_links_are_followed_once_and_never_upwards(tmp_path, capsys):
    make_files(tmp_path / "disk", "x/1.jpg")
    make_files(tmp_path / "data", "a/2.jpg", "a/b/3.jpg")
    link(tmp_path / "data" / "linked", tmp_path / "disk" / "x")
    link(tmp_path / "data" / "again", tmp_path / "data" / "a")
    link(tmp_path / "data" / "a" / "up", tmp_path)
    link(tmp_path / "data" / "file.jpg", tmp_path / "disk" / "x" / "1.jpg")
    assert unlabelled(tmp_path / "data") == ["a/2.jpg", "a/b/3.jpg", "file.jpg", "linked/1.jpg"]
    assert "left out: 2 links to folders that are listed already" in capsys.readouterr().err


@pytest.mark.parametrize("files", [(), ("a/b/notes.txt", "README.md"), (".hidden/1.jpg",)])
def test_a_folder_without_images_is_refused(tmp_path, files):
    make_files(tmp_path / "data", *files, "../outside/1.jpg").mkdir(exist_ok=True)
    link(tmp_path / "data" / "up", "..")  # images above the folder do not count
    message = error_message(find, str(tmp_path / "data"), ("train",), False)
    assert message.startswith(f"{tmp_path / 'data'}: holds no image (.jpg, ")
    assert "expected images anywhere in it, train/CLASS/*.jpg, train-*.tar or " in message
    assert locate(tmp_path / "data", "train") is None


def test_an_empty_train_folder_is_refused(tmp_path):
    make_files(tmp_path, "train", "elsewhere/1.jpg")
    message = error_message(find, str(tmp_path), ("train",), False)
    assert message.startswith(f"{tmp_path / 'train'}: holds no image (")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_folder_with_another_split_alone_has_no_training_images(tmp_path, split):
    make_files(tmp_path, f"{split}/cat/1.jpg", "1.jpg")
    message = error_message(find, str(tmp_path), ("train",), False)
    assert message.startswith(f"{tmp_path}: has no train/ folder; expected train/CLASS/*.jpg, ")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    make_files(tmp_path, "list.txt")
    message = error_message(find, str(tmp_path / "list.txt"), ("train",))
    assert "is a file, and a folder is needed (pre-training reads a list" in message
    assert "--file-list" in message and "no such folder" not in message


def test_labels_are_asked_for_where_there_are_none(tmp_path):
    make_files(tmp_path / "flat", "1.jpg")
    make_files(tmp_path / "nested", "cat/1.jpg")
    make_files(tmp_path / "split", "train/1.jpg")
    for name in ("flat", "nested"):
        message = error_message(find, str(tmp_path / name), BOTH)
        assert "has no train/ folder, so its images have no labels" in message
    assert "holds images but no class folders" in error_message(find, str(tmp_path / "split"), BOTH)


def test_the_error_for_a_missing_val_names_a_command_only_if_there_is_something_to_split(tmp_path):
    command = "docs/data.md has a command that makes val/"
    make_files(tmp_path / "labelled", *LABELLED)
    assert command in error_message(find, str(tmp_path / "labelled"), BOTH)
    (tmp_path / "empty").mkdir()
    assert command not in error_message(find, str(tmp_path / "empty"), ("val",))
