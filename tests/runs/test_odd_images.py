"""Test unusual but valid images: they look right, and train."""

import io
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs.images import picture, small
from decoding_helpers import decode_file
from PIL import Image
from run_helpers import INPUT


# Odd images.
def odd_images() -> dict[str, tuple[bytes, Image.Image]]:
    """Valid files by name, and the picture that each one shows."""
    im, grey = picture(48, 40), picture(48, 40).convert("L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    turned = im.rotate(180)
    palette = im.quantize(32)
    cmyk = small(im.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe")
    plain = (
        cmyk[: adobe - 4] + cmyk[adobe + 12 :]
    )  # without the marker that says that the inks are inverted
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    more = {"save_all": True, "append_images": [turned]}
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    found = {
        "cmyk.jpg": (cmyk, Image.open(io.BytesIO(cmyk))),
        "cmyk_plain.jpg": (plain, Image.open(io.BytesIO(plain))),
        "cmyk.tif": (small(im.convert("CMYK"), "TIFF"), im.convert("CMYK")),
        "grey.jpg": (small(grey, "JPEG", quality=98), grey),
        "grey.png": (small(grey, "PNG"), grey),
        "la.png": (small(im.convert("LA"), "PNG"), grey),
        "alpha.png": (small(im.convert("RGBA"), "PNG"), im),
        "palette.png": (small(palette, "PNG", transparency=3), palette),
        "bits.png": (small(im.convert("1"), "PNG"), im.convert("1")),
        "deep.png": (small(Image.fromarray(deep), "PNG"), grey),
        "deep.tif": (small(Image.fromarray(deep), "TIFF"), grey),
        "deep.pgm": (b"P5 48 40 65535\n" + deep.astype(">u2").tobytes(), grey),
        "deeper.tif": (small(Image.fromarray(deep.astype(np.int32)), "TIFF"), grey),
        "float.tif": (small(floats, "TIFF"), grey),
        "animated.gif": (
            small(palette, "GIF", save_all=True, append_images=[turned.quantize(32)]),
            palette,
        ),
        "animated.webp": (small(im, "WEBP", lossless=True, **more), im),
        "animated.png": (small(im, "PNG", **more), im),
        "progressive.jpeg": (small(im, "JPEG", quality=98, progressive=True), im),
        "turned.jpg": (small(im, "JPEG", quality=98, exif=exif), im),
        "profile.png": (small(im, "PNG", icc_profile=b"no profile"), im),
        "really a png.jpg": (small(im, "PNG"), im),
        "dot.png": (small(im.crop((0, 0, 1, 1)), "PNG"), im.crop((0, 0, 1, 1))),
        "line.png": (small(picture(300, 1), "PNG"), picture(300, 1)),
        "wide.png": (small(picture(20_000, 3), "PNG"), picture(20_000, 3)),
        "high.jpg": (
            small(picture(3, 20_000), "JPEG", quality=98, subsampling=0),
            picture(3, 20_000),
        ),
        "na\u00efve \u96ea'\"\n.BMP": (small(im, "BMP"), im),
        os.fsdecode(b"latin-1 \xe9.tiff"): (small(im, "TIFF"), im),
    }
    return found


@pytest.mark.parametrize("name", odd_images(), ids=ascii)
def test_an_odd_image_looks_right(name, tmp_path):
    data, shown = odd_images()[name]
    (tmp_path / name).write_bytes(data)
    found = decode_file(str(tmp_path / name))
    assert found.dtype == torch.uint8
    difference = np.abs(
        found.permute(1, 2, 0).numpy().astype(int) - np.asarray(shown.convert("RGB")).astype(int)
    )
    assert difference.mean() < (3 if name.lower().endswith(("jpg", "jpeg")) else 0.5), (
        difference.mean()
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Return a data folder of unusual images.

    It also has an empty folder named like an image, and a file that is not an image.
    """
    root = tmp_path_factory.mktemp("odd")
    for split, label in itertools.product(("train", "val"), ("a", "b \u96ea")):
        folder = root / split / label
        (folder / "folder.jpg").mkdir(parents=True)
        (folder / "notes.txt").write_text("words")
        for name, (data, _) in odd_images().items():
            (folder / name).write_bytes(data)
    return root


def test_odd_images_train(call, odd, tmp_path):
    options = (odd, *INPUT, "-b", 18, "--on-bad-image", "error", "--epochs", 1, "-p", 1)
    status, _, err = call("main_synco", *options, "--moco-k", 32, "--save-dir", tmp_path / "pre")
    assert status == 0, err
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "pre" / "log.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    encoder = ("--pretrained", tmp_path / "pre" / "checkpoint_0000.pth.tar")
    status, _, err = call("main_lincls", *options, *encoder, "--save-dir", tmp_path / "lin")
    assert status == 0, err
    status, _, err = call(
        "main_knn", odd, *INPUT, *encoder, "--k", 3, "--save-dir", tmp_path / "knn"
    )
    assert status == 0, err
    for run, metric in (("lin", "acc1"), ("knn", "knn_3")):
        assert (
            0 <= json.loads((tmp_path / run / "results.json").read_text())["metrics"][metric] <= 1
        )
