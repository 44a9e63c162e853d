"""Test classes from labels that are integers or names."""

import numpy as np
import pytest

from moco.data.labels import Labels, classes, indices, read_classes_file
from moco.errors import InputError


def labels(*given):
    """Return the labels of images; None stands for no label."""
    texts = sorted({one for one in given if one is not None})
    return Labels(texts, np.array([-1 if one is None else texts.index(one) for one in given]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("b", "a", "b"), ("a", "b")),
        (("10", "9", "2"), ("2", "9", "10")),
        (("010", "009", "100"), ("009", "010", "100")),  # names that look like numbers
        (("-1", "-1"), ()),
        ((None, None), ()),
    ],
)
def test_classes_are_in_order(given, expected):
    assert classes(labels(*given)) == expected
    found, names = indices(labels(*given))
    assert names == expected and found.dtype == np.int64
    assert [names[i] for i in found] == list(given) if expected else not found.any()


def test_integers_get_names_in_the_order_of_the_integers():
    names = ("zebra", "unused", "ant")
    assert classes(labels("2", "0"), names) == ("zebra", "ant")
    found, _ = indices(labels("2", "0", "2"), names)
    assert found.tolist() == [1, 0, 1]


def test_labels_that_are_names_do_not_need_the_list_of_names():
    assert classes(labels("b", "a"), ("x", "y")) == ("a", "b")


def test_indices_among_the_classes_of_the_training_images():
    found, names = indices(labels("b", "c"), among=("a", "b", "c"))
    assert found.tolist() == [1, 2] and names == ("a", "b", "c")
    with pytest.raises(InputError, match="1 class is not among those of the training images, f"):
        indices(labels("b", "d"), among=("a", "b", "c"))


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        (("a", None, None), (), "2 of 3 images have no label"),
        (("1", "cat"), (), r"some labels are integers \(1\), others are names \(cat\)"),
        (("1", "-1"), (), "the label -1 is negative"),
        (("0", "2"), ("a", "b"), "an image has the label 2, but only 2 classes have names"),
    ],
)
def test_labels_that_do_not_fit_are_refused(given, names, message):
    with pytest.raises(InputError, match=message):
        classes(labels(*given), names)


def test_the_file_of_class_names(tmp_path):
    assert read_classes_file(tmp_path) == ()
    (tmp_path / "below").mkdir()
    (tmp_path / "classes.txt").write_text("tench, Tinca tinca\r\ngoldfish\n")
    assert read_classes_file(tmp_path / "below", tmp_path) == ("tench, Tinca tinca", "goldfish")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "classes.txt: has no usable name for class 1"),
        (b"a\nb\na\n", "classes.txt: names 'a' twice"),
        (b"\xff\xfe\n", "classes.txt: cannot be read"),
    ],
)
def test_a_damaged_file_of_class_names_is_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_classes_file(tmp_path)
