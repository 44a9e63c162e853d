"""Make the images that `benchmarks/loader.py` reads, from photographs of other packages."""

import io
import random
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

from moco.data import cache, sources
from moco.data.images import ImageArray, ImageFolder
from moco.errors import InputError
from moco.sections import Input

WIDTH, HEIGHT = 500, 375
BYTES = range(80_000, 110_001)


def photographs() -> list[np.ndarray]:
    """Return the photographs that come with scikit-image and scikit-learn, uint8 [H, W, 3]."""
    return [
        skimage.data.astronaut(),
        skimage.data.coffee(),
        skimage.data.immunohistochemistry(),
        *load_sample_images().images,
    ]


def make(folder: Path, images: int) -> list[int]:
    """Write JPEGs of 500x375 pixels and 80 to 110 KB; return their sizes in bytes.

    The images are patches of real photographs.
    """
    folder.mkdir(parents=True)
    photos = [Image.fromarray(array) for array in photographs()]
    draw, sizes = random.Random(0), []
    while len(sizes) < images:
        photograph = draw.choice(photos)
        left = draw.randint(0, photograph.width - WIDTH)
        top = draw.randint(0, photograph.height - HEIGHT)
        patch = photograph.crop((left, top, left + WIDTH, top + HEIGHT))
        for quality in range(98, 50, -2):
            file = io.BytesIO()
            patch.save(file, "JPEG", quality=quality)
            if file.tell() < BYTES.stop:
                break
        if file.tell() in BYTES:
            (folder / f"{len(sizes):04d}.jpg").write_bytes(file.getvalue())
            sizes.append(file.tell())
    return sizes


def make_large(root: Path, images: int) -> ImageFolder:
    """Write JPEGs of 4000x3000 pixels: photographs, enlarged."""
    folder = root / "train" / "photo"
    folder.mkdir(parents=True)
    photos = photographs()
    for i in range(images):
        photograph = Image.fromarray(photos[i % len(photos)]).resize((4000, 3000))
        photograph.save(folder / f"{i}.jpg", quality=92)
    return sources.scan(root, "train")


def in_memory(data: Path | None, n: int) -> ImageArray:
    """Return n images: those of the folder `data`, or 32-pixel patches of photographs."""
    draw = np.random.default_rng(0)
    if data:
        folder = sources.scan(data, "train")
        rows = draw.permutation(len(folder))[:n]
        (held,) = cache.load(Input(cache_images="on"), folder.subset(rows))
        found = held.read_batch(np.arange(len(held)), lambda height, width: True)
        if found is None:
            raise InputError(f"--data {data}: the images differ in size; give images of one size")
        pixels = np.ascontiguousarray(found.numpy())
    else:
        photos = photographs()
        pixels = np.empty((n, 3, 32, 32), dtype=np.uint8)
        for i in range(n):
            source = photos[i % len(photos)]
            top, left = (draw.integers(0, side - 31) for side in source.shape[:2])
            pixels[i] = source[top : top + 32, left : left + 32].transpose(2, 0, 1)
    return ImageArray(Path(data or "."), np.zeros(len(pixels), dtype=np.int64), ("",), pixels)
