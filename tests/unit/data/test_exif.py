"""Test that --exif turns images upright, or not, in each format and on each way to their pixels."""

import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from moco.augment.recipes import recipe
from moco.data import cache, decoding, exif, jpeg
from moco.data.decoding import decode
from moco.data.loader import EvalBatchSampler, RandomCrops, batches
from moco.data.sources import scan
from moco.sections import Input
from moco.sections_images import Decoding

APPLY, IGNORE = Decoding(exif="apply"), Decoding(exif="ignore")
TURNS = range(1, 9)
SAVED = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(skimage.data.astronaut()).resize((60, 40))


def encoded(image, kind, turn, **more):
    """Return the image in a file with an orientation, as an array of bytes."""
    tags = Image.Exif()
    tags[0x0112] = turn
    file = io.BytesIO()
    image.save(file, kind, exif=tags, **SAVED[kind], **more)
    return np.frombuffer(bytearray(file.getvalue()), np.uint8)


def upright(image, turn):
    """Return the image as Pillow turns it upright."""
    tagged = image.copy()
    tagged.getexif()[0x0112] = turn
    return pil_to_tensor(ImageOps.exif_transpose(tagged))


def as_stored(data):
    with Image.open(io.BytesIO(data)) as image:
        return pil_to_tensor(image.convert("RGB"))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", SAVED)
def test_an_image_is_turned_upright_or_left_as_it_is_stored(kind, turn, picture):
    data = encoded(picture, kind, turn)
    stored = as_stored(encoded(picture, kind, 1))
    reference = Image.fromarray(stored.permute(1, 2, 0).numpy())
    assert torch.equal(decode(data, "x"), stored)
    assert torch.equal(decode(data, "x", IGNORE), stored)
    assert torch.equal(decode(data, "x", APPLY), upright(reference, turn))


@pytest.mark.parametrize("turn", TURNS)
def test_all_decoders_turn_jpegs_alike(turn, picture, monkeypatch):
    data = encoded(picture, "JPEG", turn)
    for settings in (APPLY, IGNORE):
        found = []
        for pair in jpeg.working():
            monkeypatch.setattr(jpeg, "decoder", lambda pair=pair: pair)
            found.append(decode(data, "x", settings))
        assert len(found) > 1 and all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("turn", TURNS)
def test_deep_tiffs_are_turned_too(turn):
    deep = (np.arange(60 * 40) * 20).reshape(40, 60).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "TIFF", tiffinfo={0x0112: turn})
    data = np.frombuffer(bytearray(file.getvalue()), np.uint8)
    stored = Image.fromarray((deep * (255 / 65535)).round().astype(np.uint8)).convert("RGB")
    assert torch.equal(decode(data, "x", IGNORE), pil_to_tensor(stored))
    assert torch.equal(decode(data, "x", APPLY), upright(stored, turn))


@pytest.mark.parametrize("turn", TURNS)
def test_a_shrunk_jpeg_is_turned_too(turn, picture, monkeypatch):
    monkeypatch.setattr(decoding, "_LARGE", 100)
    data, sizes = encoded(picture, "JPEG", turn), []

    def half(height, width):
        sizes.append((height, width))
        return 2

    shrunk = decode(data, "x", Decoding(exif="ignore", shrink_on_decode=True), half)
    turned = decode(data, "x", Decoding(exif="apply", shrink_on_decode=True), half)
    assert shrunk.shape == (3, 20, 30)
    assert sizes == [(40, 60), (60, 40) if turn > 4 else (40, 60)]
    assert torch.equal(turned, exif.turned(shrunk, turn))


@pytest.mark.parametrize("settings", [{"exif": "apply"}, {"exif": "ignore"}, {}])
def test_cached_images_have_the_views_of_files(settings, picture, tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for turn in TURNS:
        for kind in SAVED:
            (folder / f"{turn}.{kind.lower()}").write_bytes(encoded(picture, kind, turn).tobytes())
    images = scan(tmp_path, "train")
    (held,) = cache.load(Input(cache_images="on", **settings), images)
    assert (held.starts >= 0).all() and len(held) == 32
    crop, order = RandomCrops(recipe("byol", 16), 0), EvalBatchSampler(32, 32)
    options = Input(workers=0, batch_size=32, batch_per_process=32, **settings)
    ours, theirs = (
        next(batches(one, crop, order, options, torch.device("cpu"))) for one in (held, images)
    )
    assert all(map(torch.equal, ours.views, theirs.views))


@pytest.mark.parametrize("turn", [0, 9, 77, 65535])
def test_an_invalid_orientation_is_ignored(turn, picture):
    data = encoded(picture, "JPEG", turn)
    assert torch.equal(decode(data, "x", APPLY), as_stored(data))


@pytest.mark.parametrize("junk", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0" + b"\xff" * 60])
def test_damaged_exif_data_are_ignored(junk, picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=junk, quality=95)
    data = np.frombuffer(bytearray(file.getvalue()), np.uint8)
    assert torch.equal(decode(data, "x", APPLY), as_stored(encoded(picture, "JPEG", 1)))
    assert torch.equal(decode(data, "x", IGNORE), as_stored(encoded(picture, "JPEG", 1)))
