"""Tests of `moco.data.folders`: finding, checking and listing image folders."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import on_two_ranks
from folder_helpers import BOTH, error_message, link, make_files, names_of

from moco.data import folders
from moco.data.sources import find, scan
from moco.errors import InputError


def test_a_missing_folder_is_refused(tmp_path):
    message = error_message(find, str(tmp_path / "nowhere"), BOTH)
    assert str(tmp_path / "nowhere") in message
    assert "no such folder" in message and "photos" in message


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    make_files(tmp_path, "data.tar")
    assert str(tmp_path / "data.tar") in error_message(find, str(tmp_path / "data.tar"), BOTH)


def test_a_folder_without_train_is_refused(tmp_path):
    make_files(tmp_path, "val/cat/1.jpg", "val/dog/1.jpg")
    message = error_message(find, str(tmp_path), BOTH)
    assert str(tmp_path) in message and "train/" in message


def test_a_folder_without_val_is_refused(tmp_path):
    make_files(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg")
    message = error_message(find, str(tmp_path), BOTH)
    assert str(tmp_path) in message and "val/" in message and "train/" not in message


def test_only_the_splits_in_use_must_exist(tmp_path):
    make_files(tmp_path / "a", "train/cat/1.jpg")
    make_files(tmp_path / "b", "val/cat/1.jpg", "val/dog/1.jpg")
    assert find(str(tmp_path / "a"), ("train",)) == tmp_path / "a"
    assert find(str(tmp_path / "b"), ("val",)) == tmp_path / "b"


@pytest.mark.parametrize("split", BOTH)
@pytest.mark.parametrize("image", ["ILSVRC2012_val_00000001.JPEG", "1.png"])
def test_a_split_without_class_folders_is_refused(tmp_path, split, image):
    make_files(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg")
    (tmp_path / split).rename(tmp_path / "aside")
    make_files(tmp_path, f"{split}/{image}")
    message = error_message(find, str(tmp_path), BOTH)
    assert str(tmp_path / split) in message
    assert "no class folders" in message and f"{split}/CLASS" in message and "images" in message


def test_an_empty_split_is_refused(tmp_path):
    make_files(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val")
    message = error_message(find, str(tmp_path), BOTH)
    assert (
        str(tmp_path / "val") in message
        and "no class folders" in message
        and "holds images" not in message
    )


def test_a_single_class_folder_in_val_is_refused(tmp_path):
    make_files(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/images/1.jpg")
    message = error_message(find, str(tmp_path), BOTH)
    assert str(tmp_path / "val") in message and "images" in message and "one class" in message


def test_val_classes_that_train_lacks_are_refused(tmp_path):
    make_files(
        tmp_path,
        "train/cat/1.jpg",
        "train/dog/1.jpg",
        "val/cat/1.jpg",
        "val/zebra/1.jpg",
        "val/eel/1.jpg",
    )
    message = error_message(find, str(tmp_path), BOTH)
    assert str(tmp_path / "val") in message
    assert "2 classes" in message and "eel" in message


@pytest.mark.parametrize("split", BOTH)
def test_a_class_folder_without_images_is_refused(tmp_path, split):
    make_files(
        tmp_path,
        "train/cat/1.jpg",
        "train/dog/1.jpg",
        "val/cat/1.jpg",
        "val/dog/1.jpg",
        f"{split}/emu/notes.txt",
    )
    message = error_message(scan, tmp_path, split)
    assert str(tmp_path / split / "emu") in message and "no image" in message


def test_val_labels_are_indices_into_the_classes_of_train(tmp_path):
    make_files(
        tmp_path,
        "train/ant/1.jpg",
        "train/bee/1.jpg",
        "train/cat/1.jpg",
        "val/cat/1.jpg",
        "val/ant/1.jpg",
        "val/ant/2.jpg",
    )
    root = find(str(tmp_path), BOTH)
    train = scan(root, "train")
    val = scan(root, "val", train.classes)
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [0, 0, 2]
    assert [val.path(i) for i in range(3)] == [
        str(tmp_path / "val" / file) for file in ("ant/1.jpg", "ant/2.jpg", "cat/1.jpg")
    ]


def test_scan_lists_nested_images_and_skips_hidden_and_other_files(tmp_path):
    make_files(
        tmp_path,
        "train/cat/b.JPEG",
        "train/cat/deep/er/a.png",
        "train/cat/.hidden.jpg",
        "train/cat/notes.txt",
    )
    make_files(tmp_path, "train/Äpfel/ö 1.webp", "train/.thumbnails/1.jpg", "train/readme.md")
    folder = scan(tmp_path, "train")
    assert folder.classes == ("cat", "Äpfel")
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0, 0, 1]
    expected = ["cat/b.JPEG", "cat/deep/er/a.png", "Äpfel/ö 1.webp"]
    assert [folder.path(i) for i in range(len(folder))] == [
        str(tmp_path / "train" / file) for file in expected
    ]


def age(root):
    """Give every folder the same old modification time, as tar, rsync -a and some mounts do."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1.5e9, 1.5e9))


@pytest.mark.parametrize("change", ["add", "remove", "rename", "nested", "class", "remove class"])
def test_scan_notices_changes_even_if_modification_times_stay(images, change):
    folder = images / "train"
    make_files(folder, "class0/more/nested.png")
    age(images)
    before = names_of(scan(images, "train"))
    assert len(before) == 25 and before == sorted(before) and "class0/more/nested.png" in before
    if change == "add":
        (folder / "class1" / "new.jpg").touch()
    elif change == "remove":
        (folder / "class1" / "3.jpg").unlink()
    elif change == "rename":
        (folder / "class1" / "3.jpg").rename(folder / "class1" / "other.jpg")
    elif change == "nested":
        (folder / "class0" / "more" / "deep.png").touch()
    elif change == "class":
        make_files(folder, "class2/x.jpg")
    else:
        (folder / "class1").rename(images / "elsewhere")
    age(images)
    after = scan(images, "train")
    on_disk = {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".jpg", ".png")
    }
    assert set(names_of(after)) == on_disk != set(before) and len(after.labels) == len(after)
    assert [after.classes[label] for label in after.labels] == [
        name.split("/")[0] for name in names_of(after)
    ]


def test_scan_opens_no_file(images, monkeypatch):
    """On a network disk, asking for a million files would take minutes."""
    looked = []
    stat = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **more: looked.append(os.fspath(path)) or stat(path, **more)
    )
    assert len(scan(images, "train")) == 24
    assert [path for path in looked if path.endswith(".jpg")] == []


def test_system_folders_are_ignored_and_other_files_are_counted_once(tmp_path, capsys):
    for parent in ("train", "train/cat", "train/cat/more"):
        for name in (
            ".ipynb_checkpoints",
            "@eaDir",
            "__MACOSX",
            "lost+found",
            "#recycle",
            ".snapshot",
            "$RECYCLE.BIN",
        ):
            make_files(tmp_path, f"{parent}/{name}/1.jpg")
    link(tmp_path / "train" / "cat" / "#snapshot2", tmp_path / "train" / "cat" / "#snapshot")
    (tmp_path / "train" / "cat" / "#snapshot2").rename(tmp_path / "train" / "@Recycle")
    make_files(
        tmp_path,
        "train/cat/1.JPG",
        "train/cat/2.jfif",
        "train/cat/3.JPE",
        "train/cat/more/4.gif",
        "train/cat/._1.JPG",
    )
    assert scan(tmp_path, "train").classes == ("cat",)
    assert capsys.readouterr().err == ""  # nothing is left out that is worth a line
    make_files(
        tmp_path,
        "train/dog/1.jpg",
        *(f"train/dog/{i}.heic" for i in range(3)),
        "train/dog/a.txt",
        "train/cat/more/b.TXT",
    )
    make_files(tmp_path, "train/loose.jpg", "train/classes.csv")
    (tmp_path / "train" / "cat" / "README").write_text("")
    for _ in range(2):
        folder = scan(tmp_path, "train")
    assert names_of(folder) == [
        "cat/1.JPG",
        "cat/2.jfif",
        "cat/3.JPE",
        "cat/more/4.gif",
        "dog/1.jpg",
    ]
    assert capsys.readouterr().err == (
        f"{tmp_path / 'train'}: left out: 7 files with other endings "
        "(.heic 3, .txt 2, .csv 1, no ending 1); 1 image outside the class folders\n"
    )


def test_the_error_for_a_class_without_images_counts_its_other_files(tmp_path):
    make_files(
        tmp_path, "train/cat/1.jpg", "train/dog/1.heic", "train/dog/2.heic", "train/dog/.hidden.jpg"
    )
    assert "dog: holds no image (" in error_message(scan, tmp_path, "train")
    assert "), but .heic 2; remove" in error_message(scan, tmp_path, "train")


def list_of_rank(rank, folder):
    """List the data folder of this rank. Return the number of images, or the error in a list."""
    try:
        return len(scan(Path(f"{folder}{rank}"), "train"))
    except InputError as error:
        return [str(error)]


def test_different_images_on_two_ranks_are_an_error_on_both(tmp_path):
    for name in ("same", "fewer", "others", "labels"):
        for rank in range(2):
            make_files(
                tmp_path / f"{name}{rank}", "train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg"
            )
    (tmp_path / "fewer1" / "train" / "cat" / "2.jpg").unlink()
    (tmp_path / "others1" / "train" / "cat" / "2.jpg").rename(
        tmp_path / "others1" / "train" / "cat" / "3.jpg"
    )
    (tmp_path / "labels1" / "train" / "dog").rename(tmp_path / "labels1" / "train" / "elk")
    names = ("same", "fewer", "others", "labels")
    of = on_two_ranks({name: (list_of_rank, str(tmp_path / name)) for name in names}, tmp_path)
    assert of("same") == [3, 3]
    for name, count in (("fewer", 2), ("others", 3), ("labels", 3)):
        for rank, (message,) in enumerate(of(name)):
            expected = f"rank 0 and rank 1 find different images (3 and {count} of them)"
            assert message.startswith(f"{tmp_path}/{name}{rank}/train: {expected}")


def latin(name):
    """Return the name that Python gives a file whose name is in Latin-1."""
    return os.fsdecode(name.encode("latin-1"))


def test_several_threads_list_folders_if_the_disk_is_slow(tmp_path, monkeypatch):
    names = [f"train/c{i:02d}/{j}.jpg" for i in range(20) for j in range(3)]
    make_files(tmp_path, *names, "train/c07/below/x.jpg")
    quick, listed, threads = scan(tmp_path, "train"), folders._entries, set()

    def slow(folder):
        threads.add(threading.get_ident())
        time.sleep(0.02)
        return listed(folder)

    monkeypatch.setattr(folders, "_entries", slow)
    for patience in (1e9, 0.05):
        threads.clear()
        monkeypatch.setattr(folders, "_PATIENCE", patience)
        again = scan(tmp_path, "train")
        assert list(again.paths) == list(quick.paths) and again.classes == quick.classes
        assert (again.labels == quick.labels).all() and len(again) == 61
        assert (len(threads) > 1) == (patience < 1)


def test_names_of_files_need_not_be_utf_8(tmp_path):
    make_files(
        tmp_path,
        latin("train/pi\xe8ces/\xe9.jpg"),
        latin("train/pi\xe8ces/1.jpg"),
        "train/cat/1.jpg",
    )
    folder = scan(tmp_path, "train")
    assert folder.classes == ("cat", latin("pi\xe8ces"))
    assert [os.path.exists(folder.path(i)) for i in range(3)] == [True] * 3
    assert os.fsencode(folder.name(2)) == b"pi\xe8ces/\xe9.jpg"
