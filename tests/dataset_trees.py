"""Small copies of the data sets in `moco.data.registry`, each in its published format on disk."""

import io
import json
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import torchvision.datasets as tv
from imagenet_trees import imagenet, imagenette, tiny_imagenet
from PIL import Image
from scipy.io import savemat

from moco.data.catalog import NAMES

NEVER_DOWNLOADED = ("imagenet", "cars", "places205")
DOWNLOADED = tuple(name for name in NAMES if name not in (*NEVER_DOWNLOADED, "photos"))
ARRAYS = ("cifar10", "cifar100", "stl10")
ON_DISK = tuple(name for name in NAMES if name != "photos")


def picture(number, size=16):
    """Return a picture that shows its `number`, uint8 [3, size, size].

    Its upper half is white, and the colour of its lower half encodes the number. `number_of` can
    therefore tell which picture it sees, and that it is the right way up.
    """
    pixels = np.full((3, size, size), 255, dtype=np.uint8)
    pixels[:, size // 2 :] = (
        np.array([number % 8, number // 8 % 8, number // 64])[:, None, None] * 32 + 16
    )
    return pixels


def number_of(image):
    """Return the number of the picture that `image` shows. Fail if it is not the right way up."""
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
    """A pickler that writes bytes as the str of Python 2, which CIFAR's files have."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}


def pickled(value):
    data = io.BytesIO()
    Python2Pickler(data, protocol=2).dump(value)
    return data.getvalue()


# Each of the functions below writes one data set. It returns the classes and, for the training
# images and for the test images, a list of (number, label) in order.
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
    ids = {
        "train": {"waffles": [12, 9], "apple_pie": [5], "sushi": [3]},
        "test": {"waffles": [7], "sushi": [4, 1]},
    }
    classes, splits = ["apple_pie", "sushi", "waffles"], []
    for split, ids_of in ids.items():
        paths = {name: [f"{name}/{i}" for i in those] for name, those in ids_of.items()}
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
    """Return VOC's XML for objects of (class, difficult)."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    boxes = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult>{part}</object>"
        for name, difficult in objects
    ]
    head = "<folder>VOC2007</folder><owner><name>x</name></owner>"
    return f"<annotation>{head}{''.join(boxes)}</annotation>"


VOC_IMAGES = {  # the objects in each image, and the labels that follow, except for zeros
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


def caltech101(tree, count=33):
    """Return the classes, and (number, label) of all images. Their split is random."""
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
    """Return (number, label) of all images, in order."""
    return [(number_of(images.read(i)), label) for i, label in enumerate(images.labels.tolist())]


_WRITERS = [imagenet, cifar10, cifar100, stl10, tiny_imagenet, imagenette]


_WRITERS += [flowers, pets, food101, cars, caltech101, dtd]


_WRITERS += [aircraft, sun397, voc2007, places365, places205]


WRITERS = {writer.__name__: writer for writer in _WRITERS}
SCANNED = ("imagenet", "imagenette")  # those without lists of images
FIXED = tuple(name for name in ON_DISK if name != "caltech101")  # those with a published split
LISTED = tuple(name for name in FIXED if name not in SCANNED)  # those with lists of images
