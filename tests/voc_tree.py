"""A tree of PASCAL VOC 2007 with images of three classes that a classifier can learn."""

import io

import numpy as np
from dataset_trees import Tree, annotation
from PIL import Image

COLOURS = ("bird", "cat", "sofa")  # red, green, blue


def write_voc(root, trainval=61, test=40):
    """Some birds are difficult, as a few of what is no bird; a dog is shown in test only."""
    tree, rng = Tree(root), np.random.default_rng(0)
    base, number = "VOCdevkit/VOC2007", 0
    for split, count in (("trainval", trainval), ("test", test)):
        names = []
        for i in range(count):
            shown = rng.random(3) < 0.4
            name, number = f"{number:06d}", number + 1
            pixels = rng.integers(0, 80, (40, 40, 3)) + 100 * shown + rng.integers(0, 40)
            jpeg = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(jpeg, "jpeg", quality=95)
            tree.file(f"{base}/JPEGImages/{name}.jpg", jpeg.getvalue())
            things = [(thing, 0) for thing, there in zip(COLOURS, shown, strict=True) if there]
            if i % 7 == 3:
                things = [thing for thing in things if thing[0] != "bird"] + [("bird", 1)]
            if split == "test" and i % 9 == 2:
                things.append(("dog", 0))
            tree.file(f"{base}/Annotations/{name}.xml", annotation(things))
            names.append(name)
        tree.lines(f"{base}/ImageSets/Main/{split}.txt", names)
        if split == "trainval":
            for half, part in (("train", names[::2]), ("val", names[1::2])):
                tree.lines(f"{base}/ImageSets/Main/{half}.txt", part)
    return root
