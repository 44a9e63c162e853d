"""Bad images, and the bytes of small ones."""

import io
import itertools
import os
import pickle
import random
import struct
import zlib

import numpy as np
from PIL import Image
from run_helpers import INPUT

from bad_inputs.base import Case, Place


def small(im: Image.Image, kind: str, **more: object) -> bytes:
    data = io.BytesIO()
    im.save(data, kind, **more)
    return data.getvalue()


def picture(width: int = 40, height: int = 40) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 6 % 256, y * 6 % 256, 255 - (x + y) * 3 % 256], -1).astype(np.uint8)
    )


def png(width: int, height: int, pixels: bytes) -> bytes:
    """With a header that says what its pixels need not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    )


def jpeg(width: int, height: int) -> bytes:
    data = small(picture(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def bad_image(rng: random.Random, place: Place) -> Case:
    cut = rng.choice(
        [("JPEG", 0.97), ("PNG", 0.7), ("GIF", 0.8), ("WEBP", 0.9), ("TIFF", 0.9), ("BMP", 0.9)]
    )
    whole = small(picture(), cut[0])
    gif = small(picture().quantize(), "GIF")
    data = rng.choice(
        [
            *[whole[: int(len(whole) * cut[1] * rng.random())]] * 5,
            b"",
            b"\xff",
            b"\xff\xd8",
            b"a page of text",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch ran) (w) file\n",
            rng.randbytes(300),
            png(60_000, 60_000, b"0" * 1000),
            png(40, 40, b"0" * 1000),
            jpeg(60_000, 60_000),
            gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:],
            pickle.dumps([1]),
            None,  # a link to nowhere
            "fifo",
        ]
    )
    count, mode = rng.choice([(1, "error"), (2, "skip")])
    for split, c, i in itertools.product(("train", "val"), range(2), range(4)):
        file = (
            place.own
            / "images"
            / split
            / f"class{c}"
            / f"{i}.{rng.choice(('jpg', 'JPEG', 'png', 'tif'))}"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        if split == "val" or c or i >= count:
            file.symlink_to(place.data / "train" / f"class{c}" / f"{i}.jpg")
        elif data is None:
            file.symlink_to(place.own / "nowhere")
        elif data == "fifo":
            os.mkfifo(file)
        else:
            file.write_bytes(data)
    words = (place.own / "images", *INPUT, "--save-dir", place.own / "run")
    if rng.random() < 0.3:
        return Case("main_knn", words, ("class0", "image"))
    return Case("main_synco", (*words, "--moco-k", 32, "--on-bad-image", mode), ("image",))
