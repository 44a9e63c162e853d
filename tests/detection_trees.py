"""Tiny trees of PASCAL VOC and COCO for detectron2."""

import json

import numpy as np
from PIL import Image

# Training and evaluation
VOC = {"car": (220, 40, 40), "dog": (40, 200, 60), "person": (60, 60, 230)}
COCO_IDS = {"person": 1, "car": 3, "dog": 18}


def scenes(n, seed):
    """Yield images of 96 x 128 pixels with one to three coloured boxes of classes of VOC.

    A box is [xmin, ymin, xmax, ymax].
    """
    rng = np.random.default_rng(seed)
    for _ in range(n):
        pixels = rng.integers(90, 140, (96, 128, 3)).astype(np.uint8)
        objects = []
        for name in rng.choice(list(VOC), rng.integers(1, 4), replace=False):
            w, h = rng.integers(24, 56, 2)
            x, y = rng.integers(0, 128 - w), rng.integers(0, 96 - h)
            pixels[y : y + h, x : x + w] = VOC[name]
            objects.append((str(name), [int(x), int(y), int(x + w), int(y + h)]))
        yield Image.fromarray(pixels), objects


def write_voc(root, year, split, n, seed):
    folder = root / f"VOC{year}"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = [f"{split}{i:03d}" for i in range(n)]
    for name, (image, objects) in zip(names, scenes(n, seed), strict=True):
        image.save(folder / "JPEGImages" / f"{name}.jpg")
        of = "".join(
            f"<object><name>{kind}</name><pose>Unspecified</pose><truncated>0</truncated>"
            f"<difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for kind, (x0, y0, x1, y1) in objects
        )
        size = "<size><width>128</width><height>96</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{of}</annotation>")
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")


def write_coco(root, split, n, seed):
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    folder = root / "coco" / f"{split}2017"
    folder.mkdir(parents=True)
    (root / "coco" / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i, (image, objects) in enumerate(scenes(n, seed), 1):
        image.save(folder / f"{i:012d}.jpg")
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": 96, "width": 128})
        for kind, (x0, y0, x1, y1) in objects:
            about = {
                "id": len(annotations) + 1,
                "image_id": i,
                "category_id": COCO_IDS[kind],
                "iscrowd": 0,
            }
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            annotations.append({**about, **box, "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]})
    categories = [
        {"id": one["id"], "name": one["name"]} for one in COCO_CATEGORIES if one["isthing"]
    ]
    file = root / "coco" / "annotations" / f"instances_{split}2017.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
