"""Tests of `moco.data.registry`: data sets are read as published; missing ones are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import check_error, refuse_network
from dataset_trees import (
    ARRAYS,
    FIXED,
    LISTED,
    NEVER_DOWNLOADED,
    ON_DISK,
    WRITERS,
    Tree,
    annotation,
    caltech101,
    imagenet,
    imagenette,
    places205,
    places365,
    shown,
    sun397,
    tiny_imagenet,
)

from moco.data import catalog, photos, registry
from moco.data.catalog import IN_MEMORY, METRIC, NAMES, canonical
from moco.data.images import ImageArray, ImageFolder
from moco.data.registry import check, load, train_images
from moco.data.registry import test_images as images_to_test
from moco.errors import InputError


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Refuse every request to the network. Return the list of the URLs asked for."""
    return refuse_network(monkeypatch)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "données"


@pytest.mark.parametrize("name", FIXED)
def test_a_data_set_is_read_with_its_published_split_and_labels(name, root):
    classes, *splits = WRITERS[name](Tree(root))
    found = load(name, str(root))
    for images, expected in zip(found, splits, strict=True):
        assert shown(images) == expected and len(images) == len(expected)
        assert isinstance(
            images, ImageArray if name in ARRAYS else ImageFolder
        ) and images.classes == tuple(classes)
        assert images.labels.dtype == np.int64 and images.multi_label == (name == "voc2007")
        assert name not in ARRAYS or images.pixels.flags.c_contiguous
    assert not {number for number, _ in splits[0]} & {number for number, _ in splits[1]}
    check(name, str(root), download=False)


@pytest.mark.parametrize("name", [name for name in ON_DISK if name not in ARRAYS])
def test_paths_are_bytes_relative_to_the_root(name, root):
    WRITERS[name](Tree(root))
    for split in load(name, str(root)):
        assert split.root.is_absolute()
        assert all(
            Path(split.path(i)).is_relative_to(root) and os.path.isfile(split.path(i))
            for i in range(len(split))
        )


@pytest.mark.parametrize("name", ["pets", "aircraft", "cifar10", "sun397", "places205"])
@pytest.mark.parametrize("given", [".", "./", "../données", "~"])
def test_the_root_may_be_relative_or_start_with_a_tilde(name, given, root, monkeypatch):
    _, train, _ = WRITERS[name](Tree(root))
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    check(name, given, download=False)
    assert shown(load(name, given)[0]) == train


def test_the_data_sets_in_memory_are_those_of_arrays():
    assert set(IN_MEMORY) == set(ARRAYS)


def test_photos_need_no_root(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(photos, "PHOTOS", ["text", "chelsea"])  # the others take seconds
    check("photos", str(root), download=True)
    train, val = load("photos", str(root))
    assert (len(train), len(val)) == (2 * 60, 2 * 30) and train.classes == val.classes == (
        "chelsea",
        "text",
    )
    assert train.root.is_relative_to(tmp_path / "cache") and not root.exists()


def test_each_data_set_has_the_metric_that_papers_report():
    names = "imagenet photos cifar10 cifar100 stl10 tiny_imagenet imagenette flowers pets "
    names += "food101 cars caltech101 dtd aircraft sun397 voc2007 places365 places205"
    assert list(NAMES) == list(METRIC) == names.split()
    others = {name: metric for name, metric in METRIC.items() if metric != "acc1"}
    assert others == dict.fromkeys(
        ("flowers", "pets", "caltech101", "aircraft"), "mean_per_class"
    ) | {"voc2007": "map11"}


# Splits and layouts of single data sets.


def test_caltech_trains_on_30_random_images_of_each_class(root):
    classes, rows = caltech101(Tree(root))
    draws = {seed: load("caltech101", str(root), seed) for seed in (0, 1)}
    for train, test in draws.values():
        assert train.classes == test.classes == tuple(classes)
        assert np.bincount(train.labels).tolist() == [30, 30] and np.bincount(
            test.labels
        ).tolist() == [3, 3]
        assert sorted(shown(train) + shown(test)) == rows  # so no image is in both
    again = load("caltech101", str(root), seed=0)
    assert [shown(split) for split in again] == [shown(split) for split in draws[0]]
    assert set(shown(draws[0][1])) != set(shown(draws[1][1]))
    check("caltech101", str(root), download=False)


def test_caltech_without_test_images_or_with_an_empty_class_is_refused(root):
    caltech101(Tree(root), count=30)
    assert "more than 30" in check_error("caltech101", root)
    (root / "caltech101/101_ObjectCategories/zebra").mkdir()
    assert check_error("caltech101", root).startswith(
        f"{root}/caltech101/101_ObjectCategories/zebra: holds no image"
    )


@pytest.mark.parametrize("partitions", ["SUN397", "SUN397/Partitions", "Partitions"])
def test_sun397s_lists_are_found_in_three_folders(partitions, root):
    _, *splits = sun397(Tree(root), partitions)
    assert [shown(split) for split in load("sun397", str(root))] == splits


@pytest.mark.parametrize("size", ["256", "large"])
def test_places365_has_small_or_large_images(size, root):
    _, *splits = places365(Tree(root), size)
    assert [shown(split) for split in load("places365", str(root))] == splits


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("folder", ["tiny-imagenet-200", "."])
def test_tiny_imagenet_may_be_the_folder_itself(folder, download, root, asked):
    classes, *splits = tiny_imagenet(Tree(root), folder)
    check("tiny_imagenet", str(root), download)
    found = load("tiny_imagenet", str(root))
    assert [shown(split) for split in found] == splits and not asked
    assert found[0].classes == tuple(classes)  # sorted, though wnids.txt is not


def test_tiny_imagenet_has_the_labels_of_an_image_folder(root):
    """The same classes get the same numbers if the folder is given without --dataset."""
    tiny_imagenet(Tree(root), ".")
    named, plain = train_images("tiny_imagenet", str(root)), train_images("imagenet", str(root))
    assert shown(named) == shown(plain) and named.classes == plain.classes


def test_tiny_imagenet_as_a_plain_folder_is_refused_with_the_option_to_give(root):
    tiny_imagenet(Tree(root), ".")
    assert check_error("imagenet", root).endswith("give --dataset tiny_imagenet")
    (root / "val/val_annotations.txt").unlink()
    assert "sort its images into class folders" in check_error("imagenet", root)


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("folder", ["imagenette2", "imagenette2-320", "imagenette2-160", "."])
def test_imagenette_is_read_in_each_size_and_as_the_folder_itself(folder, download, root, asked):
    _, *splits = imagenette(Tree(root), folder)
    check("imagenette", str(root), download)
    assert [shown(split) for split in load("imagenette", str(root))] == splits and not asked


def test_the_largest_imagenette_is_read(root):
    imagenette(Tree(root), "imagenette2-160")
    tree = Tree(root)
    tree.count = 100
    _, train, _ = imagenette(tree, "imagenette2")
    assert shown(load("imagenette", str(root))[0]) == train


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_image_folder_does_not_pass_for_imagenette(split, root, asked):
    imagenette(Tree(root), ".")
    (root / split / "n01440764").rename(root / split / "n99999999")
    for download in (False, True):
        line = check_error("imagenette", root, download)
        assert "other classes than Imagenette's ten" in line or "another data set" in line
    assert not asked


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenette"])
def test_class_lists_name_the_wnids(name, root, tmp_path):
    classes, train, val = WRITERS[name](Tree(root))
    file = tmp_path / "classes.txt"
    file.write_text(f"{classes[2]}\n{classes[0]}\n")
    for images, rows in zip((train_images, images_to_test), (train, val), strict=True):
        kept = images(name, str(root), str(file))
        assert kept.classes == (classes[0], classes[2])
        assert [n for n, _ in shown(kept)] == [n for n, label in rows if label in (0, 2)]


@pytest.mark.parametrize("line", ["{} {}", "{},{}", "{};{}", "/{} {}", "{}, {}\r"])
@pytest.mark.parametrize("lists", ["trainvalsplit_places205", "."])
@pytest.mark.parametrize(
    "folder", [".", "data/vision/torralba/deeplearning/images256", "images256", "images"]
)
def test_places205_is_read_in_each_of_its_layouts(line, lists, folder, root):
    classes, *splits = places205(Tree(root), lists, folder, line)
    found = load("places205", str(root))
    assert [shown(split) for split in found] == splits and found[0].classes == tuple(classes)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        (
            "places205",
            "trainvalsplit_places205/train_places205.csv",
            "a/abbey/gsun_train1.jpg\n",
            "PATH LABEL",
        ),
        ("places205", "trainvalsplit_places205/train_places205.csv", "", "PATH LABEL"),
        (
            "places205",
            "trainvalsplit_places205/train_places205.csv",
            "a/abbey/gsun_train1.jpg abbey\n",
            "abbey",
        ),
        (
            "places365",
            "places365_val.txt",
            "Places365_val_00000000.jpg 3\n",
            "labels from 3 to 3 with 3 classes",
        ),
        (
            "sun397",
            "SUN397/Partitions/Testing_01.txt",
            "/x/xanadu/sun_a.jpg\n",
            "no training image of class 'x/xanadu'",
        ),
        ("sun397", "SUN397/Partitions/Testing_01.txt", "", "0 images"),
        ("dtd", "dtd/dtd/labels/test1.txt", "woven/a.jpg\n", "no training image of class 'woven'"),
        ("stl10", "stl10_binary/train_y.bin", "\1", "3 images with 1 labels"),
        ("stl10", "stl10_binary/train_y.bin", "\1\2\4", "labels from 0 to 3 with 3 classes"),
        ("tiny_imagenet", "tiny-imagenet-200/wnids.txt", "", "0 images|no training image"),
        (
            "tiny_imagenet",
            "tiny-imagenet-200/val/val_annotations.txt",
            "val_0.JPEG\tn00000001\t0\t32\t44\t62\n",
            "no training image of class 'n00000001'",
        ),
        (
            "tiny_imagenet",
            "tiny-imagenet-200/val/val_annotations.txt",
            "val_0.JPEG\tn01443537\t0\t32\t44\t62\nval_1.JPEG\tn0144",
            "val_annotations.txt does not hold lines of 6 columns; it may be truncated",
        ),
        (
            "tiny_imagenet",
            "tiny-imagenet-200/train/n01443537/n01443537_boxes.txt",
            "n01443537_0.JPEG",
            "n01443537_boxes.txt does not hold lines of 5 columns",
        ),
        (
            "voc2007",
            "VOCdevkit/VOC2007/Annotations/000001.xml",
            annotation([("unicorn", 0)]),
            "unicorn",
        ),
    ],
)
def test_lists_with_errors_are_refused(name, file, text, message, root):
    tree = Tree(root)
    WRITERS[name](tree)
    load(name, str(root))
    tree.file(file, text)
    with pytest.raises(InputError, match=message):
        load(name, str(root))


@pytest.mark.parametrize("folder", ["absent", "empty"])
@pytest.mark.parametrize("name", ON_DISK)
def test_a_missing_data_set_is_refused_in_one_line_that_says_how_to_get_it(
    name, folder, root, tmp_path, asked
):
    if folder == "empty":
        root.mkdir()
    WRITERS[name](Tree(tmp_path / "complete"))
    first = min(path.name for path in (tmp_path / "complete").iterdir())
    line = check_error(name, root)
    assert ("--download" in line) == (name != "imagenet") and ("by hand from http" in line) == (
        name in NEVER_DOWNLOADED
    )
    assert (
        ("no such folder" in line) == (folder == "absent")
        and "download=True" not in line
        and "found.)" not in line
    )
    if name not in ("places365", "places205"):
        assert f"{first}/" in line
    if name in (*ARRAYS, "flowers", "caltech101", "places365"):
        assert folder == "absent" or f"(no {root}/" in line  # the first file that is missing
    with pytest.raises(InputError):
        load(name, str(root))
    assert (
        not asked
        and root.exists() == (folder == "empty")
        and (not root.exists() or not any(root.iterdir()))
    )


def test_a_present_image_folder_with_a_fault_is_not_to_be_downloaded_again(root):
    tree = Tree(root)
    imagenet(tree)
    tree.image("val/unknown/1.JPEG")
    assert check_error("imagenet", root).endswith("name the folders as in train/")


@pytest.mark.parametrize(("function", "options"), [(load, ()), (check, (False,)), (check, (True,))])
def test_an_unknown_name_is_refused_with_the_nearest_known_one(function, options, root):
    with pytest.raises(InputError, match="unknown dataset 'cifra10'; the nearest is 'cifar10'"):
        function("cifra10", str(root), *options)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("name", [name for name in LISTED if name not in ARRAYS])
def test_a_copy_without_the_first_image_is_refused(name, split, root):
    WRITERS[name](Tree(root))
    check(name, str(root), download=False)
    missing = load(name, str(root))[split].path(0)
    os.remove(missing)
    assert os.path.basename(missing) in check_error(name, root)


@pytest.mark.parametrize("name", LISTED)
def test_a_missing_or_damaged_list_raises_no_other_error_than_input_error(name, root):
    WRITERS[name](Tree(root))
    lists = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".jpg"]
    refused = 0
    for path in lists:
        content = path.read_bytes()
        for damaged in (None, b"", b"\x80\x00 damaged", content[: len(content) // 2]):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            try:
                load(name, str(root))
            except InputError as error:
                refused += 1
                assert str(root) in str(error) and "\n" not in str(error)
            path.write_bytes(content)
    assert refused >= 4


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("place205", "places205"),
        ("imagenet2012", "imagenet"),
        ("CIFAR10", "cifar10"),
        ("tiny-imagenet-200", "tiny_imagenet"),
        ("Tiny-ImageNet", "tiny_imagenet"),
    ],
)
def test_names_in_the_commands_of_papers_are_accepted(given, name):
    assert canonical(given) == name and name in NAMES


def test_the_names_of_options_are_those_of_the_table():
    table = registry._DATASETS
    assert ("imagenet", "photos", *table) == catalog.NAMES
    downloadable = {name for name, dataset in table.items() if callable(dataset.get)}
    assert {name for name in catalog.NAMES if catalog.is_downloadable(name)} == downloadable
    assert not catalog.is_downloadable("imagenet-21k")
