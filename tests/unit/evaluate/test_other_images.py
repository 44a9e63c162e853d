"""Test how the class folders of --eval-data are matched with the training images' classes."""

import numpy as np
import pytest
from PIL import Image

from moco.data import folders
from moco.errors import InputError
from moco.evaluate import other_images
from moco.sections_eval import OtherTest

CLASSES = ("cat", "dog", "n01", "n02")


def write(root, names):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(i + 1):
            Image.new("RGB", (8, 8)).save(root / name / f"{j}.png")
    return root


@pytest.fixture
def train(tmp_path):
    return folders.scan_classes(write(tmp_path / "train", CLASSES))


def load(folder, train, lines=None, place=None):
    if lines is not None:
        (place / "map.txt").write_text(lines)
    settings = OtherTest(str(folder), None if lines is None else str(place / "map.txt"))
    other_images.check(settings, "imagenet")
    return other_images.load(settings, train)


def test_folders_are_matched_by_name_and_in_val(train, tmp_path, capsys):
    for folder in (write(tmp_path / "a", ["dog", "n02"]), tmp_path / "b"):
        write(tmp_path / "b" / "val", ["dog", "n02"]) if folder.name == "b" else None
        found = load(folder, train)
        assert found.labels.tolist() == [1, 3, 3] and found.classes == CLASSES
        assert "3 test images of 2 of the 4 classes" in capsys.readouterr().out


def test_numbers_are_indices_in_numeric_order_unless_they_are_classes(tmp_path):
    names = [f"c{i:02d}" for i in range(12)]
    train = folders.scan_classes(write(tmp_path / "train", names))
    # the folders are listed as 0, 1, 10, 11, 2; each has one image more than the one before
    found = load(write(tmp_path / "v2", ["0", "2", "10", "11"]), train)
    assert np.bincount(found.labels).tolist() == [1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 4]
    digits = folders.scan_classes(write(tmp_path / "digits", ["0", "1", "5"]))
    assert set(load(write(tmp_path / "more", ["0", "5"]), digits).labels) == {0, 2}
    with pytest.raises(InputError, match=r"'12' .a class there is 'c00'"):
        load(write(tmp_path / "far", ["3", "12"]), train)


def test_a_file_maps_folders_by_name_or_index_and_leaves_out_others(train, tmp_path, capsys):
    folder = write(tmp_path / "x", ["big cat", "hound", "kitten", "tree"])
    lines = "big cat\tcat\nhound\t1\nkitten\tcat\r\n\nabsent\tn01\n"
    found = load(folder, train, lines, tmp_path)
    assert found.labels.tolist() == [0, 1, 1, 0, 0, 0]
    assert "1 class folders are not in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("dog", "line 1 is 'dog'"),
        ("dog cat\ndog n01", "line 2 has the folder 'dog' again"),
        ("dog bird", "'bird' is neither a class of .* nor an index below 4"),
        ("dog 4", "'4' is neither"),
        ("tree cat", "names no class folder of"),
        ("\n", "is empty|names nothing"),
    ],
)
def test_a_wrong_map_is_an_error_of_one_line(lines, said, train, tmp_path):
    with pytest.raises(InputError, match=said):
        load(write(tmp_path / "x", ["dog"]), train, lines, tmp_path)


def test_a_folder_without_class_folders_is_an_error(train, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nowhere", train)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no class folders"):
        load(tmp_path / "empty", train)
    with pytest.raises(InputError, match=r"1 of its 2 class folders are not classes .*'bird'"):
        load(write(tmp_path / "x", ["bird", "dog"]), train)


def test_knn_knows_the_shown_classes_alone(train, tmp_path):
    val = load(write(tmp_path / "x", ["dog", "n02"]), train)
    bank, val = other_images.restrict(train, val)
    assert bank.classes == val.classes == ("dog", "n02")
    assert bank.labels.tolist() == [0, 0, 1, 1, 1, 1] and val.labels.tolist() == [0, 1, 1]
    assert bank.name(2) == "n02/0.png"
    with pytest.raises(InputError, match="of one class"):
        other_images.restrict(train, load(write(tmp_path / "y", ["dog"]), train))
