"""Data sets by name: each read from a small tree in its own format on disk, split as published; and what is said without it."""

import io
import json
import os
import pickle
import struct
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torchvision.datasets as tv
from PIL import Image
from scipy.io import savemat

from moco.data import photos
from moco.data.images import ImageArray, ImageFolder
from moco.data.registry import METRIC, NAMES, canonical, check, load
from moco.errors import InputError

NEVER_DOWNLOADED = ("imagenet", "cars", "places205")
DOWNLOADED = tuple(name for name in NAMES if name not in (*NEVER_DOWNLOADED, "photos"))
ARRAYS = ("cifar10", "cifar100", "stl10")
ON_DISK = tuple(name for name in NAMES if name != "photos")


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The addresses asked for: none, if a test does not say otherwise, is ever answered."""
    addresses = []

    def refuse(request):
        addresses.append(request.full_url)
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return addresses


@pytest.fixture
def root(tmp_path):
    return tmp_path / "données"


# Pictures that tell which they are, and how they lie: the upper part is white, the lower has a colour by the picture's number.


def picture(number, size=16):
    """Uint8 [3, size, size]."""
    pixels = np.full((3, size, size), 255, dtype=np.uint8)
    pixels[:, size // 2 :] = (
        np.array([number % 8, number // 8 % 8, number // 64])[:, None, None] * 32 + 16
    )
    return pixels


def number_of(image):
    """The number of the picture that `image` shows, right way up."""
    size = image.shape[-1]
    assert image.dtype.is_signed is False and image.shape == (3, size, size)
    levels = image[:, -1, -1].int() // 32
    number = int(levels @ levels.new_tensor([1, 8, 64]))
    assert np.abs(image.numpy().astype(int) - picture(number, size)).max() < 8
    return number


class Tree:
    """A folder in which to write a data set. Pictures are numbered as they are written."""

    def __init__(self, root):
        self.root, self.count = Path(root), 0

    def number(self):
        self.count += 1
        return self.count

    def file(self, path, data):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    def lines(self, path, lines):
        self.file(path, "".join(f"{line}\n" for line in lines))

    def image(self, path):
        jpeg, number = io.BytesIO(), self.number()
        Image.fromarray(picture(number).transpose(1, 2, 0)).save(
            jpeg, "jpeg", quality=95, subsampling=0
        )
        self.file(path, jpeg.getvalue())
        return number

    def mat(self, path, **values):
        data = io.BytesIO()
        savemat(data, values)
        self.file(path, data.getvalue())


class Python2Pickler(pickle._Pickler):
    """Writes bytes as the str of Python 2, which is what CIFAR's files hold."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}


def pickled(value):
    data = io.BytesIO()
    Python2Pickler(data, protocol=2).dump(value)
    return data.getvalue()


# The trees: each writer returns the classes, and (number, label) of every training and test image in order.


def cifar(tree, folder, key, names, batches, meta):
    classes, train, test = ["first", "second", "third"], [], []
    for batch in batches:
        rows = [(tree.number(), label) for label in (2, 0, 1)]
        data = np.stack([picture(number, 32).ravel() for number, _ in rows])
        content = {
            b"batch_label": batch.encode(),
            key: [label for _, label in rows],
            b"data": data,
            b"filenames": [b"x.png"] * 3,
        }
        tree.file(f"{folder}/{batch}", pickled(content))
        (test if batch.startswith("test") else train).extend(rows)
    tree.file(f"{folder}/{meta}", pickled({names: [name.encode() for name in classes]}))
    return classes, train, test


def cifar10(tree):
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return cifar(tree, "cifar-10-batches-py", b"labels", b"label_names", batches, "batches.meta")


def cifar100(tree):
    return cifar(
        tree, "cifar-100-python", b"fine_labels", b"fine_label_names", ["train", "test"], "meta"
    )


def stl10(tree):
    splits = []
    for split, labels in (("train", (2, 0, 1)), ("test", (1, 1))):
        rows = [(tree.number(), label) for label in labels]
        columns = [
            picture(number, 96).transpose(0, 2, 1).tobytes() for number, _ in rows
        ]  # each channel column by column
        tree.file(f"stl10_binary/{split}_X.bin", b"".join(columns))
        tree.file(f"stl10_binary/{split}_y.bin", bytes(label + 1 for _, label in rows))
        splits.append(rows)
    tree.file("stl10_binary/class_names.txt", "airplane\nbird\ncar\n")
    return ["airplane", "bird", "car"], *splits


def flowers(tree):
    labels = [3, 1, 102, 1, 2, 3, 2]  # of images 1 to 7, from 1
    number = [tree.image(f"flowers-102/jpg/image_{i:05d}.jpg") for i in range(1, 8)]
    ids = {"trnid": [5, 2], "valid": [7, 1], "tstid": [6, 3, 4]}
    tree.mat("flowers-102/imagelabels.mat", labels=np.array([labels], dtype=np.uint8))
    tree.mat(
        "flowers-102/setid.mat",
        **{name: np.array([places], dtype=np.uint16) for name, places in ids.items()},
    )
    train, val, test = (
        [(number[i - 1], labels[i - 1] - 1) for i in places] for places in ids.values()
    )
    classes = getattr(tv.Flowers102, "classes", [str(i) for i in range(1, 103)])
    assert len(classes) == 102
    return classes, train + val, test


def pets(tree):
    splits = []
    for split, names in (
        ("trainval", ["Abyssinian_7", "american_bulldog_100"]),
        ("test", ["american_bulldog_3", "Abyssinian_201"]),
    ):
        labels = [int(name.startswith("american")) for name in names]
        lines = [
            f"{name} {label + 1} {2 - label} 1" for name, label in zip(names, labels, strict=True)
        ]
        tree.lines(f"oxford-iiit-pet/annotations/{split}.txt", lines)
        splits.append(
            [
                (tree.image(f"oxford-iiit-pet/images/{name}.jpg"), label)
                for name, label in zip(names, labels, strict=True)
            ]
        )
    return ["Abyssinian", "American Bulldog"], *splits


def food101(tree):
    # the test images of this reduced copy show no apple_pie
    rows = {
        "train": {"waffles": [12, 9], "apple_pie": [5], "sushi": [3]},
        "test": {"waffles": [7], "sushi": [4, 1]},
    }
    classes, splits = ["apple_pie", "sushi", "waffles"], []
    for split, listed in rows.items():
        paths = {name: [f"{name}/{i}" for i in ids] for name, ids in listed.items()}
        tree.file(f"food-101/meta/{split}.json", json.dumps(paths))
        images = [(path, classes.index(name)) for name, paths in paths.items() for path in paths]
        splits.append(
            [(tree.image(f"food-101/images/{path}.jpg"), label) for path, label in images]
        )
    return classes, *splits


def cars(tree):
    classes, splits = (
        ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"],
        [],
    )
    fields = [
        (name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    ]
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, labels in (("train", (2, 0, 1)), ("test", (1, 2))):
        names = [f"{i:05d}.jpg" for i in range(1, len(labels) + 1)]  # the same in both
        boxes = [
            (1, 2, 3, 4, np.uint8(label + 1), name)
            for label, name in zip(labels, names, strict=True)
        ]
        tree.mat(f"stanford_cars/{files[split]}", annotations=np.array([boxes], dtype=fields))
        splits.append(
            [
                (tree.image(f"stanford_cars/cars_{split}/{names[i]}"), label)
                for i, label in enumerate(labels)
            ]
        )
    tree.mat("stanford_cars/devkit/cars_meta.mat", class_names=np.array([classes], dtype=object))
    return classes, *splits


def dtd(tree):
    # val shows no banded, test neither banded nor zigzagged
    rows = {
        "train": ["zigzagged/a_1", "banded/b_1", "dotted/c_1"],
        "val": ["zigzagged/a_2", "dotted/c_2"],
        "test": ["dotted/c_3"],
    }
    classes, splits = ["banded", "dotted", "zigzagged"], {}
    for split, paths in rows.items():
        tree.lines(f"dtd/dtd/labels/{split}1.txt", [f"{path}.jpg" for path in paths])
        tree.lines(f"dtd/dtd/labels/{split}2.txt", ["dotted/other.jpg"])
        splits[split] = [
            (tree.image(f"dtd/dtd/images/{path}.jpg"), classes.index(path.split("/")[0]))
            for path in paths
        ]
    return classes, splits["train"] + splits["val"], splits["test"]


def aircraft(tree):
    classes, splits = ["707-320", "Model B200", "A310"], []
    tree.lines("fgvc-aircraft-2013b/data/variants.txt", classes)
    for split, listed in (
        ("trainval", [("1025794", 1), ("0209554", 0)]),
        ("test", [("1514522", 2), ("0747566", 1)]),
    ):
        tree.lines(
            f"fgvc-aircraft-2013b/data/images_variant_{split}.txt",
            [f"{image} {classes[label]}" for image, label in listed],
        )
        splits.append(
            [
                (tree.image(f"fgvc-aircraft-2013b/data/images/{image}.jpg"), label)
                for image, label in listed
            ]
        )
    return classes, *splits


def sun397(tree, partitions="SUN397/Partitions"):
    classes, splits = ["abbey", "apartment_building/outdoor", "zoo"], []
    tree.lines("SUN397/ClassName.txt", ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"])
    for split, labels in (("Training", (2, 0, 1, 1)), ("Testing", (0, 1))):
        paths = [
            f"/{classes[label][0]}/{classes[label]}/sun_a{split.lower()}{i}.jpg"
            for i, label in enumerate(labels)
        ]
        tree.lines(f"{partitions}/{split}_01.txt", paths)
        tree.lines(f"{partitions}/{split}_02.txt", reversed(paths))
        splits.append(
            [
                (tree.image(f"SUN397{path}"), label)
                for path, label in zip(paths, labels, strict=True)
            ]
        )
    tree.image("SUN397/a/abbey/sun_in_no_list.jpg")
    return classes, *splits


def annotation(objects):
    """Objects of (class, difficult), in VOC's XML."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    boxes = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult>{part}</object>"
        for name, difficult in objects
    ]
    return f"<annotation><folder>VOC2007</folder><owner><name>x</name></owner>{''.join(boxes)}</annotation>"


VOC_IMAGES = {  # objects, and what the labels say
    "000005": ([("chair", 0), ("chair", 1)], {"chair": 1}),
    "000007": ([("chair", 1), ("chair", 0), ("aeroplane", 0)], {"chair": 1, "aeroplane": 1}),
    "000009": ([("person", 1), ("person", 1), ("tvmonitor", 0)], {"person": -1, "tvmonitor": 1}),
    "000001": ([("dog", 0), ("person", 0)], {"dog": 1, "person": 1}),
    "000002": ([("train", 1)], {"train": -1}),
}


def voc2007(tree):
    classes = sorted(
        "person bird cat cow dog horse sheep aeroplane bicycle boat bus car motorbike train "
        "bottle chair diningtable pottedplant sofa tvmonitor".split()
    )
    base, splits = "VOCdevkit/VOC2007", []
    for split, names in (
        ("trainval", ["000005", "000007", "000009"]),
        ("test", ["000001", "000002"]),
    ):
        tree.lines(f"{base}/ImageSets/Main/{split}.txt", names)
        splits.append([])
        for name in names:
            objects, shown = VOC_IMAGES[name]
            tree.file(f"{base}/Annotations/{name}.xml", annotation(objects))
            splits[-1].append(
                (
                    tree.image(f"{base}/JPEGImages/{name}.jpg"),
                    [shown.get(one, 0) for one in classes],
                )
            )
    return classes, *splits


def places365(tree, size="256"):
    classes = ["a/airfield", "a/apartment_building/outdoor", "z/zen_garden"]
    tree.lines(
        "categories_places365.txt", [f"/{name} {label}" for label, name in enumerate(classes)]
    )
    train = [(f"/{classes[label]}/0000000{i}.jpg", label) for i, label in enumerate((1, 0, 2, 1))]
    val = [(f"Places365_val_0000000{i}.jpg", label) for i, label in enumerate((2, 0))]
    tree.lines("places365_train_standard.txt", [f"{path} {label}" for path, label in train])
    tree.lines("places365_val.txt", [f"{path} {label}" for path, label in val])
    splits = ((f"data_{size}_standard", train), (f"val_{size}", val))
    return classes, *(
        [(tree.image(f"{folder}/{path.lstrip('/')}"), label) for path, label in split]
        for folder, split in splits
    )


def places205(
    tree,
    lists="trainvalsplit_places205",
    folder="data/vision/torralba/deeplearning/images256",
    line="{} {}",
):
    classes, splits = ["a/abbey", "a/airport/inside", "y/yard"], []
    for split, labels in (("train", (1, 0, 2, 1)), ("val", (2, 0))):
        paths = [f"{classes[label]}/gsun_{split}{i}.jpg" for i, label in enumerate(labels)]
        tree.lines(
            f"{lists}/{split}_places205.csv",
            [line.format(*row) for row in zip(paths, labels, strict=True)],
        )
        splits.append(
            [
                (tree.image(f"{folder}/{path}"), label)
                for path, label in zip(paths, labels, strict=True)
            ]
        )
    return classes, *splits


def imagenet(tree):
    train = [
        (tree.image(f"train/n0{label}/{i}.JPEG"), label) for label in range(3) for i in range(2)
    ]
    return (
        ["n00", "n01", "n02"],
        train,
        [(tree.image(f"val/n0{label}/9.JPEG"), label) for label in (1, 2)],
    )


def caltech101(tree, count=33):
    """All images and their labels; the classes of which a test takes what `load` drew."""
    for i in range(3):
        tree.image(f"caltech101/101_ObjectCategories/BACKGROUND_Google/image_{i + 1:04d}.jpg")
    classes = ["Faces", "accordion"]
    rows = [
        (tree.image(f"caltech101/101_ObjectCategories/{name}/image_{i + 1:04d}.jpg"), label)
        for label, name in enumerate(classes)
        for i in range(count)
    ]
    return classes, rows


def shown(images):
    return [(number_of(images.read(i)), label) for i, label in enumerate(images.labels.tolist())]


PARTS = (
    imagenet,
    cifar10,
    cifar100,
    stl10,
    flowers,
    pets,
    food101,
    cars,
    caltech101,
    dtd,
    aircraft,
    sun397,
    voc2007,
)
WRITERS = {writer.__name__: writer for writer in (*PARTS, places365, places205)}
FIXED = tuple(name for name in ON_DISK if name != "caltech101")  # whose split is a list
LISTED = tuple(name for name in FIXED if name != "imagenet")


@pytest.mark.parametrize("name", FIXED)
def test_a_tree_in_the_published_format_is_read_as_published(name, root):
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
def test_files_are_kept_as_bytes_below_a_folder(name, root):
    WRITERS[name](Tree(root))
    for split in load(name, str(root)):
        assert split.paths.dtype.kind == "S" and split.root.is_absolute()
        assert all(
            Path(split.path(i)).is_relative_to(root) and os.path.isfile(split.path(i))
            for i in range(len(split))
        )


@pytest.mark.parametrize("name", ["pets", "aircraft", "cifar10", "sun397", "places205"])
@pytest.mark.parametrize("given", [".", "./", "../données", "~"])
def test_a_folder_may_be_given_in_any_way(name, given, root, monkeypatch):
    _, train, _ = WRITERS[name](Tree(root))
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    check(name, given, download=False)
    assert shown(load(name, given)[0]) == train


def test_photos_are_built_in_wherever_the_root_is(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(photos, "PHOTOS", ["text", "chelsea"])  # the others take seconds
    check("photos", str(root), download=True)
    train, val = load("photos", str(root))
    assert (len(train), len(val)) == (2 * 60, 2 * 30) and train.classes == val.classes == (
        "chelsea",
        "text",
    )
    assert train.root.is_relative_to(tmp_path / "cache") and not root.exists()


def test_names_and_metrics():
    names = "imagenet photos cifar10 cifar100 stl10 flowers pets food101 cars caltech101 dtd aircraft sun397 voc2007"
    assert list(NAMES) == list(METRIC) == [*names.split(), "places365", "places205"]
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
        assert sorted(shown(train) + shown(test)) == rows  # and so nothing is in both
    again = load("caltech101", str(root), seed=0)
    assert [shown(split) for split in again] == [shown(split) for split in draws[0]]
    assert set(shown(draws[0][1])) != set(shown(draws[1][1]))
    check("caltech101", str(root), download=False)


def test_caltech_without_images_is_refused(root):
    caltech101(Tree(root), count=30)
    assert "more than 30" in refusal("caltech101", root)
    (root / "caltech101/101_ObjectCategories/zebra").mkdir()
    assert refusal("caltech101", root).startswith(
        f"{root}/caltech101/101_ObjectCategories/zebra: holds no image"
    )


@pytest.mark.parametrize("partitions", ["SUN397", "SUN397/Partitions", "Partitions"])
def test_sun397s_partitions_may_lie_in_three_places(partitions, root):
    _, *splits = sun397(Tree(root), partitions)
    assert [shown(split) for split in load("sun397", str(root))] == splits


@pytest.mark.parametrize("size", ["256", "large"])
def test_places365_may_be_small_or_large(size, root):
    _, *splits = places365(Tree(root), size)
    assert [shown(split) for split in load("places365", str(root))] == splits


@pytest.mark.parametrize("line", ["{} {}", "{},{}", "{};{}", "/{} {}", "{}, {}\r"])
@pytest.mark.parametrize("lists", ["trainvalsplit_places205", "."])
@pytest.mark.parametrize(
    "folder", [".", "data/vision/torralba/deeplearning/images256", "images256", "images"]
)
def test_places205_in_each_layout(line, lists, folder, root):
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
        (
            "voc2007",
            "VOCdevkit/VOC2007/Annotations/000001.xml",
            annotation([("unicorn", 0)]),
            "unicorn",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(name, file, text, message, root):
    tree = Tree(root)
    WRITERS[name](tree)
    load(name, str(root))
    tree.file(file, text)
    with pytest.raises(InputError, match=message):
        load(name, str(root))


# What is said where data is absent or incomplete: one line, with the folder, what belongs there, and how to get it.


def refusal(name, root, download=False):
    """The one line with which `check` refuses."""
    with pytest.raises(InputError) as caught:
        check(name, str(root), download)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("folder", ["absent", "empty"])
@pytest.mark.parametrize("name", ON_DISK)
def test_absent_data_is_refused_in_one_line(name, folder, root, tmp_path, asked):
    if folder == "empty":
        root.mkdir()
    WRITERS[name](Tree(tmp_path / "whole"))
    first = min(path.name for path in (tmp_path / "whole").iterdir())
    line = refusal(name, root)
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
        assert folder == "absent" or f"(no {root}/" in line  # the first file that is missed
    with pytest.raises(InputError):
        load(name, str(root))
    assert (
        not asked
        and root.exists() == (folder == "empty")
        and (not root.exists() or not any(root.iterdir()))
    )


def test_an_image_folder_with_another_fault_is_not_sent_for(root):
    tree = Tree(root)
    imagenet(tree)
    tree.image("val/unknown/1.JPEG")
    assert refusal("imagenet", root).endswith("name the folders as in train/")


@pytest.mark.parametrize(("function", "options"), [(load, ()), (check, (False,)), (check, (True,))])
def test_an_unknown_name_brings_up_the_nearest(function, options, root):
    with pytest.raises(InputError, match="unknown dataset 'cifra10'; the nearest is 'cifar10'"):
        function("cifra10", str(root), *options)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("name", [name for name in LISTED if name not in ARRAYS])
def test_a_half_unpacked_copy_is_refused(name, split, root):
    WRITERS[name](Tree(root))
    check(name, str(root), download=False)
    missing = load(name, str(root))[split].path(0)
    os.remove(missing)
    assert os.path.basename(missing) in refusal(name, root)


@pytest.mark.parametrize("name", LISTED)
def test_a_list_that_is_missing_or_damaged_never_ends_in_a_traceback(name, root):
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


# Downloads. The network is a function here.


class Answer(io.BytesIO):
    def __init__(self, url, data):
        super().__init__(data)
        self.url, self.length = url, len(data)


@pytest.fixture
def serve(asked, monkeypatch):
    """Answer every request with what a dictionary, or a function, has for the last part of its address."""

    def start(content, seconds=0.0):
        def answer(request):
            asked.append(request.full_url)
            time.sleep(seconds)
            return Answer(request.full_url, content(os.path.basename(request.full_url)))

        monkeypatch.setattr(urllib.request, "urlopen", answer)

    return start


@pytest.fixture
def no_checksums(monkeypatch):
    """The published ones are not those of small trees."""
    monkeypatch.setattr(tv.SUN397, "_DATASET_MD5", None)
    for key in ("2007", "2007-test"):
        monkeypatch.setitem(tv.voc.DATASET_YEAR_DICT[key], "md5", None)
    monkeypatch.setattr(tv.Places365, "_CATEGORIES_META", (tv.Places365._CATEGORIES_META[0], None))
    for meta in ("_DEVKIT_META", "_FILE_LIST_META", "_IMAGES_META"):
        files = getattr(tv.Places365, meta)
        monkeypatch.setattr(
            tv.Places365, meta, {key: (file, None) for key, (file, _) in files.items()}
        )


def tar(root, chosen=lambda path: True, mode="w", top=("", "")):
    """The chosen files below `root`; `top` renames the first folder."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for path in sorted(root.rglob("*")):
            inside = str(path.relative_to(root))
            if path.is_file() and chosen(inside):
                archive.add(path, inside.replace(*top, 1))
    return data.getvalue()


def zipped(root, top):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path in root.iterdir():
            archive.write(path, f"{top}{path.name}")
    return data.getvalue()


def of_trainval(path):
    return Path(path).stem in ("trainval", "000005", "000007", "000009")


ARCHIVES = {
    "aircraft": lambda root: {"fgvc-aircraft-2013b.tar.gz": tar(root, mode="w:gz")},
    "sun397": lambda root: {
        "SUN397.tar.gz": tar(root, lambda path: "Partitions" not in path, "w:gz"),
        "Partitions.zip": zipped(root / "SUN397/Partitions", ""),
    },
    "voc2007": lambda root: {
        "VOCtrainval_06-Nov-2007.tar": tar(root, of_trainval),
        "VOCtest_06-Nov-2007.tar": tar(root, lambda path: not of_trainval(path)),
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
def test_a_download_brings_both_splits(name, root, tmp_path, serve, asked, no_checksums):
    _, *splits = WRITERS[name](Tree(tmp_path / "source"))
    archives = ARCHIVES[name](tmp_path / "source")
    serve(archives.__getitem__)
    check(name, str(root), download=True)
    assert [shown(split) for split in load(name, str(root))] == splits
    assert {os.path.basename(url) for url in asked} == set(archives)
    asked.clear()
    check(name, str(root), download=True)
    assert not asked


def test_sun397s_partitions_may_lie_in_a_folder_of_their_archive(
    root, tmp_path, serve, no_checksums
):
    _, *splits = sun397(Tree(tmp_path))
    archives = ARCHIVES["sun397"](tmp_path) | {
        "Partitions.zip": zipped(tmp_path / "SUN397/Partitions", "Partitions/")
    }
    serve(archives.__getitem__)
    check("sun397", str(root), download=True)
    assert [shown(split) for split in load("sun397", str(root))] == splits


def test_of_several_processes_one_downloads(root, tmp_path, serve, asked):
    aircraft(Tree(tmp_path / "source"))
    serve(ARCHIVES["aircraft"](tmp_path / "source").__getitem__, seconds=0.1)
    callers = [threading.Thread(target=check, args=("aircraft", str(root), True)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    check("aircraft", str(root), download=False)
    assert len(asked) == 2  # where it is, and the file


@pytest.mark.parametrize("name", DOWNLOADED)
@pytest.mark.parametrize("failure", ["no network", "not an archive"])
def test_a_download_that_fails_is_refused_in_one_line(name, failure, root, asked, serve):
    if failure == "not an archive":
        serve(lambda file: b"<html>moved</html>")
    line = refusal(name, root, download=True)
    assert (
        f"--download of {name} failed" in line
        and "by hand" in line
        and (failure != "no network" or failure in line)
    )
    assert asked


def test_a_reduced_copy_passes_no_checksum_of_a_download(root, tmp_path, serve):
    cifar10(Tree(tmp_path / "source"))
    load("cifar10", str(tmp_path / "source"))
    serve(lambda file: tar(tmp_path / "source", mode="w:gz"))
    assert "corrupted" in refusal("cifar10", root, download=True)


def test_a_package_that_torchvision_misses_is_named(root, monkeypatch):
    def download(self):
        raise RuntimeError(
            "To download files from GDrive, 'gdown' is required. You can install it with 'pip install gdown'."
        )

    monkeypatch.setattr(tv.Caltech101, "download", download)
    assert "pip install gdown" in refusal("caltech101", root, download=True)


def test_a_half_unpacked_copy_must_be_removed_before_a_download(root, asked):
    pets(Tree(root))
    os.remove(load("pets", str(root))[0].path(0))
    assert "remove an incomplete copy" in refusal("pets", root, download=True)
    assert not asked  # torchvision takes the folders for the whole


@pytest.mark.parametrize("name", NEVER_DOWNLOADED)
def test_what_cannot_be_downloaded_is_not_tried(name, root, asked):
    assert "by hand from http" in refusal(name, root, download=True)
    assert not asked and not root.exists()


@pytest.mark.parametrize("name", ON_DISK)
def test_what_is_there_is_not_downloaded(name, root, asked):
    WRITERS[name](Tree(root))
    check(name, str(root), download=True)
    assert not asked


@pytest.mark.parametrize(
    ("given", "name"),
    [("place205", "places205"), ("imagenet2012", "imagenet"), ("CIFAR10", "cifar10")],
)
def test_names_in_the_commands_of_papers_are_understood(given, name):
    assert canonical(given) == name and name in NAMES
