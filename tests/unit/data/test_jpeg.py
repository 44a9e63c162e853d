"""Test that all decoders of JPEGs return the same pixels, for all kinds of JPEGs."""

import importlib.metadata
import io
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from moco.data import decoding, jpeg
from moco.errors import InputError
from moco.sections_images import Decoding


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def patched(data, marker, offset, value):
    """Return a JPEG with another byte at `offset` from a marker."""
    data = bytearray(data)
    data[data.index(marker) + offset] = value
    return bytes(data)


def kinds() -> dict[str, bytes]:
    """Return JPEGs of many kinds by name."""
    image = Image.fromarray(skimage.data.astronaut()[100:356, 100:356])
    found = {}
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        for quality in (50, 98):
            name, options = f"{sampling} quality {quality}", {"subsampling": sampling}
            found[name] = saved(image, quality=quality, **options)
            found[f"progressive {name}"] = saved(
                image, quality=quality, progressive=True, **options
            )
        for size in ((1, 1), (17, 33), (3, 200), (200, 3), (255, 129)):
            found[f"{sampling} {size}"] = saved(image.resize(size), subsampling=sampling)
    found["grey"] = saved(image.convert("L"))
    found["progressive grey"] = saved(image.convert("L").crop((0, 0, 77, 91)), progressive=True)
    found["restart markers"] = saved(image, restart_marker_blocks=3)
    found["progressive restart markers"] = saved(image, restart_marker_rows=1, progressive=True)
    found["optimized"] = saved(image, optimize=True)
    found["rgb"] = saved(image, keep_rgb=True)
    cmyk = found["cmyk"] = saved(image.convert("CMYK"))
    found["ycck"] = patched(cmyk, b"Adobe", 11, 2)  # another value of its field of colours
    adobe = cmyk.index(b"Adobe")
    found["cmyk without a mark"] = cmyk[: adobe - 4] + cmyk[adobe + 12 :]
    # of a square image, these have as many blocks as before
    found["4:4:0"] = patched(saved(image, subsampling="4:2:2"), b"\xff\xc0", 11, 0x12)
    found["4:1:1"] = patched(saved(image, subsampling="4:2:0"), b"\xff\xc0", 11, 0x41)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        found[f"orientation {turn}"] = saved(image.resize((60, 40)), exif=exif)
        assert exif.tobytes()[6:8] == b"MM"
        little = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([turn]) + bytes(7)
        found[f"orientation {turn}, little endian"] = saved(image.resize((60, 40)), exif=little)
    turned = found["orientation 6"]
    found["a comment before EXIF"] = turned[:2] + b"\xff\xfe\0\x07hello" + turned[2:]
    found["EXIF of another name"] = found["orientation 6"].replace(b"Exif\0\0", b"Fixe\0\0")
    whole = found["4:2:0 quality 98"]
    middle = len(whole) // 2
    found["junk at the end"] = whole + b"junk" * 100
    found["zeros in the middle"] = whole[:middle] + bytes(20) + whole[middle + 20 :]
    found["an end in the middle"] = whole[:middle] + b"\xff\xd9\xff\xd9" + whole[middle + 4 :]
    return found


KINDS = kinds()


@pytest.fixture(scope="module")
def decoders():
    return dict(jpeg.working())


@pytest.mark.parametrize("kind", KINDS)
def test_all_decoders_return_the_same_pixels(kind, decoders):
    data = np.frombuffer(bytearray(KINDS[kind]), np.uint8)
    before = data.copy()
    header = jpeg.header(memoryview(data))
    found = {name: decode(data, header) for name, decode in decoders.items()}
    assert (data == before).all(), "a decoder changed the file's content"
    pixels = found["pillow"]
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3
    for name, other in found.items():
        assert torch.equal(pixels, other), name


def test_the_kinds_differ_and_orientations_are_in_the_files():
    assert len(set(KINDS.values())) >= len(KINDS) - 1

    def orientation(name):
        data = memoryview(KINDS[name])
        return jpeg.orientation(data, jpeg.header(data))

    for turn in range(1, 9):
        for name in (f"orientation {turn}", f"orientation {turn}, little endian"):
            assert orientation(name) == turn
    assert orientation("a comment before EXIF") == 6
    assert orientation("4:4:0") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_has_the_size_and_all_bytes_before_the_pixels(kind):
    header = jpeg.header(memoryview(KINDS[kind]))
    with Image.open(io.BytesIO(KINDS[kind])) as image:
        assert (header.width, header.height) == image.size
    assert KINDS[kind].startswith(header.content + b"\xff\xda")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["4:2:0 quality 98", "progressive 4:2:0 quality 98", "cmyk"])
def test_no_decoder_accepts_a_truncated_file(kind, kept, monkeypatch, decoders):
    data = np.frombuffer(KINDS[kind][: int(kept * len(KINDS[kind]))], np.uint8)
    messages = set()
    for pair in decoders.items():
        monkeypatch.setattr(jpeg, "decoder", lambda pair=pair: pair)
        with pytest.raises(InputError, match=r"^x\.jpg: unreadable image") as error:
            decoding.decode(data, "x.jpg")
        messages.add(str(error.value))
    assert len(messages) == 1


def test_every_decoder_that_is_installed_is_used(decoders):
    assert list(decoders)[-1] == "pillow" and "torchvision" in decoders
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    try:
        importlib.metadata.version("torchcodec")
    except importlib.metadata.PackageNotFoundError:
        assert "torchcodec" not in decoders
    else:
        assert next(iter(decoders)) == "torchcodec" or version < (2, 11)
    assert jpeg.decoder()[0] == next(iter(decoders))


@pytest.mark.parametrize("broken", ["missing", "old", "fails"])
def test_the_next_decoder_replaces_a_broken_one(broken, monkeypatch):
    def fail():
        if broken == "missing":
            raise ImportError("no torchcodec")
        if broken == "old":
            raise RuntimeError("needs FFmpeg")
        return lambda data, header: torch.zeros(3, 1, 1)

    monkeypatch.setattr(jpeg, "_torchcodec", fail)
    assert [name for name, _ in jpeg.working()] == ["torchvision", "pillow"]
    monkeypatch.setattr(jpeg, "_torchvision", fail)
    assert [name for name, _ in jpeg.working()] == ["pillow"]


def test_images_decode_without_warnings_in_a_new_process(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(KINDS["4:4:4 quality 50"])
    code = (
        "from moco.data import decoding, jpeg; import sys\n"
        "assert 'torchcodec' not in sys.modules, 'imported before it is needed'\n"
        "for pair in jpeg.working():\n"
        "    jpeg.decoder = lambda pair=pair: pair\n"
        f"    decoding.decode(decoding.read_bytes({str(file)!r}), 'a.jpg')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


def test_pillow_decodes_a_jpeg_of_any_size(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Image.open refuses twice as many
    data = np.frombuffer(KINDS["grey"], np.uint8)
    monkeypatch.setattr(jpeg, "decoder", lambda: ("pillow", jpeg._with_pillow))
    assert decoding.decode(data, "x", Decoding(exif="apply")).shape == (3, 256, 256)
