"""Test what the table in docs/data.md says about images with other than three 8-bit channels."""

import io
import struct

import numpy as np
import pytest
import tifffile
import torch
from decoding_helpers import png16
from PIL import Image, ImageCms

from moco.data.decoding import brightest, decode
from moco.data.images import note_dark
from moco.data.sources import scan
from moco.errors import InputError
from moco.sections_images import Decoding

draw = np.random.default_rng(0)
GREY = draw.integers(0, 4096, (33, 41)).astype(np.uint16)  # 12-bit values
COLOUR, FOUR = (draw.integers(0, 4096, (33, 41, n)).astype(np.uint16) for n in (3, 4))
FULL = GREY * np.uint16(16)
BYTES = {n: draw.integers(0, 256, (33, 41, n)).astype(np.uint8) for n in (2, 3, 4, 5)}


def shown(data, white=None):
    """Return the decoded image, int [33, 41, 3]."""
    array = np.frombuffer(bytearray(data), np.uint8)
    found = decode(array, "x", Decoding(white=white))
    assert found.dtype == torch.uint8
    return found.permute(1, 2, 0).numpy().astype(int)


def scaled(values, white):
    """Return values as 8 bits, [H, W, 3]."""
    found = np.round(np.minimum(values, white) * (255 / white)).astype(int)
    return found if found.ndim == 3 else np.stack([found] * 3, axis=2)


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff12(values):
    """Return a TIFF with 12 bits per value, two values in three bytes."""
    rows = []
    for row in values:
        bits = "".join(f"{value:012b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    pixels, (height, width) = b"".join(rows), values.shape
    start = 8 + 2 + 12 * 9 + 4
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: start, 277: 1, 278: height}
    tags[279] = len(pixels)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II" + struct.pack("<HIH", 42, 8, len(tags)) + entries + bytes(4) + pixels


GREY_FILES = {
    "png": lambda values: png16(values[:, :, None], 0),
    "tiff": tiff,
    "big-endian tiff": lambda values: tiff(values, byteorder=">"),
    "compressed tiff": lambda values: tiff(values, compression="zlib"),
}


@pytest.mark.parametrize("file", GREY_FILES)
def test_white_is_65535_in_16_bits_unless_it_is_given(file):
    data = GREY_FILES[file](GREY)
    assert (shown(data) == scaled(GREY, 65535)).all() and shown(data).max() == 16
    assert (shown(data, 4095.0) == scaled(GREY, 4095)).all()
    assert (shown(data, 1000.0) == scaled(GREY, 1000)).all()
    assert brightest(np.frombuffer(data, np.uint8)) == GREY.max()


COLOUR_FILES = {
    "png": lambda: png16(COLOUR, 2),
    "png with alpha": lambda: png16(FOUR, 6),
    "tiff": lambda: tiff(COLOUR, photometric="rgb"),
    "big-endian tiff": lambda: tiff(COLOUR, photometric="rgb", byteorder=">"),
    "compressed tiff": lambda: tiff(COLOUR, photometric="rgb", compression="zlib"),
    "big-endian compressed tiff": lambda: tiff(
        COLOUR, photometric="rgb", compression="zlib", byteorder=">"
    ),
    "predictor": lambda: tiff(COLOUR, photometric="rgb", compression="zlib", predictor=True),
    "tiles": lambda: tiff(COLOUR, photometric="rgb", tile=(16, 16)),
    "tiff with alpha": lambda: tiff(FOUR, photometric="rgb", extrasamples=["unassalpha"]),
    "tiff with another channel": lambda: tiff(
        FOUR, photometric="rgb", extrasamples=["unspecified"]
    ),
}


@pytest.mark.parametrize("file", COLOUR_FILES)
def test_colours_of_16_bits_keep_the_higher_8_unless_white_is_given(file):
    values = FOUR[:, :, :3] if "alpha" in file or "channel" in file else COLOUR
    data = COLOUR_FILES[file]()
    assert (shown(data) == values // 256).all()
    assert (shown(data, 4095.0) == scaled(values, 4095)).all()
    assert (shown(data, 65535.0) == scaled(values, 65535)).all()
    assert brightest(np.frombuffer(data, np.uint8)) == values.max()


@pytest.mark.parametrize(
    "data",
    [
        png16(FOUR[:, :, :2], 4),  # grey with alpha
        tiff(FOUR, photometric="separated"),
        tiff(FOUR, photometric="rgb", extrasamples=["assocalpha"]),
    ],
)
def test_layouts_whose_16_bits_pillow_does_not_give_refuse_white(data):
    shown(data)
    with pytest.raises(InputError, match=r"--white: 16-bit colors in the layout .* not supp"):
        shown(data, 4095.0)


def test_formats_that_say_their_white_ignore_the_option():
    pgm = b"P5 41 33 4095\n" + GREY.astype(">u2").tobytes()
    ppm = b"P6 41 33 4095\n" + COLOUR.astype(">u2").tobytes()
    low = b"P5 41 33 100\n" + (GREY % 101).astype(np.uint8).tobytes()
    for data, values, white in ((pgm, GREY, 4095), (ppm, COLOUR, 4095), (low, GREY % 101, 100)):
        assert np.abs(shown(data) - scaled(values, white)).max() <= 1
        assert (shown(data) == shown(data, 65535.0)).all()
        assert brightest(np.frombuffer(data, np.uint8)) is None


def test_white_of_a_12_bit_tiff_is_4095():
    data = tiff12(GREY)
    assert (shown(data) == scaled(GREY, 4095)).all()
    assert (shown(data, 2000.0) == scaled(GREY, 2000)).all()


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (GREY.astype(np.float32) / 4096, 1),
        (GREY.astype(np.float32) % 200, 255),
        (GREY.astype(np.float32), 65535),
        (GREY.astype(np.float32) * 100, 409500),
        (GREY.astype(np.int32) % 200, 255),
        (GREY.astype(np.uint32), 65535),
        (GREY.astype(np.int32) * 100, 409500),
        (GREY.astype(np.int16), 65535),
    ],
)
def test_white_of_other_numbers_is_the_first_level_that_no_pixel_exceeds(values, white):
    values = values.copy()
    values.flat[0] = values.max() if white < 65536 else white
    assert (shown(tiff(values)) == scaled(values.astype(float), white)).all()
    assert (shown(tiff(values), 7.5) == scaled(values.astype(float), 7.5)).all()


def test_nan_is_black_and_infinity_is_white():
    values = GREY.astype(np.float32) / 4096
    values[0, :3] = (np.nan, np.inf, -np.inf)
    expected = scaled(np.nan_to_num(values, posinf=1, neginf=0), 1)
    expected[0, 1] = round(255 * float(values[np.isfinite(values)].max()))
    assert (shown(tiff(values)) == expected).all()
    assert (shown(tiff(np.full((33, 41), np.nan, np.float32))) == 0).all()


def test_negative_values_are_black():
    values = GREY.astype(np.int32) - 2000
    assert (shown(tiff(values)) == scaled(values.clip(0), 65535)).all()


@pytest.mark.parametrize("white", [None, 4095.0])
def test_zero_can_be_white(white):
    expected = 255 - scaled(FULL, white or 65535)
    found = shown(tiff(FULL, photometric="miniswhite"), white)
    assert np.abs(found - expected).max() <= 1
    low = tiff(BYTES[3][:, :, 0], photometric="miniswhite")
    assert (shown(low) == 255 - scaled(BYTES[3][:, :, 0], 255)).all()


def test_more_than_four_channels_are_refused():
    data = tiff(BYTES[5], photometric="rgb")
    with pytest.raises(InputError, match=r"x: unreadable image \(it has 5 channels, and 1 to 4 "):
        shown(data)
    assert (shown(tiff(BYTES[4], photometric="rgb")) == BYTES[4][:, :, :3]).all()


def test_planes_of_16_bits_are_refused_and_planes_of_8_bits_are_read():
    for values in (COLOUR, BYTES[3]):
        data = tiff(values.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate")
        if values.dtype == np.uint8:
            assert (shown(data) == values).all()
        else:
            with pytest.raises(InputError, match="its channels are stored one after the other"):
                shown(data)


@pytest.mark.parametrize(
    "data",
    [
        tiff(BYTES[3], photometric="minisblack", planarconfig="contig"),
        tiff(GREY.astype(np.float64)),
        tiff(COLOUR.astype(np.float32), photometric="rgb"),
    ],
)
def test_tiffs_that_pillow_does_not_know_are_refused(data):
    with pytest.raises(InputError, match=r"x: unreadable image \(cannot identify image file\)"):
        shown(data)


def test_a_tiff_of_several_pages_shows_the_first():
    pages = [Image.fromarray(BYTES[3]), Image.fromarray(255 - BYTES[3])]
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert (shown(data) == BYTES[3]).all()


def test_alpha_is_dropped_and_colours_below_it_are_kept():
    four = Image.fromarray(BYTES[4])
    for data in (saved(four, "PNG"), saved(four, "WEBP", lossless=True, exact=True)):
        assert (shown(data) == BYTES[4][:, :, :3]).all()
    two = Image.merge("LA", [Image.fromarray(BYTES[2][:, :, i].copy()) for i in (0, 1)])
    assert (shown(saved(two, "PNG")) == scaled(BYTES[2][:, :, 0], 255)).all()
    palette = Image.fromarray(BYTES[3]).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert (shown(saved(palette, "PNG")) == expected).all()
    assert (shown(saved(palette, "PNG", transparency=bytes(range(16)))) == expected).all()
    bits = Image.fromarray(BYTES[3]).convert("1")
    assert (shown(saved(bits, "PNG")) == np.asarray(bits.convert("RGB"))).all()


def test_cmyk_and_lab_are_converted():
    cmyk = Image.fromarray(BYTES[3]).convert("CMYK")
    assert (shown(saved(cmyk, "TIFF")) == np.asarray(cmyk.convert("RGB"))).all()
    spaces = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(Image.fromarray(BYTES[3]), *spaces, outputMode="LAB")
    assert np.abs(shown(saved(lab, "TIFF")) - BYTES[3]).mean() < 3


def test_jpeg_2000_is_read():
    assert (shown(saved(Image.fromarray(BYTES[3]), "JPEG2000")) == BYTES[3]).all()
    deep = saved(Image.fromarray(FULL), "JPEG2000")
    assert (shown(deep) == scaled(FULL, 65535)).all() and (shown(deep, 9.0) == shown(deep)).all()


def write(folder, files):
    (folder / "train" / "a").mkdir(parents=True)
    for name, data in files.items():
        (folder / "train" / "a" / name).write_bytes(data)
    return scan(folder, "train")


def test_a_line_proposes_white_for_dark_images(tmp_path, capsys):
    dark, colours = png16(GREY[:, :, None], 0), tiff(COLOUR, photometric="rgb")
    low = saved(Image.fromarray(BYTES[3]), "PNG")
    images = write(tmp_path, {"a.png": dark, "b.tif": colours, "c.png": low, "d.jpg": b"no image"})
    note_dark(images, Decoding())
    found = capsys.readouterr().out
    most = max(GREY.max(), COLOUR.max())
    assert f"16-bit images look dark. The largest value in 2 of them is {most}" in found
    assert "--white 4095 makes them brighter" in found and found.count("\n") == 1
    note_dark(images, Decoding(white=4095.0))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "files",
    [
        {"a.png": png16(FULL[:, :, None], 0), "b.png": png16(GREY[:, :, None], 0)},
        {"a.png": saved(Image.fromarray(BYTES[3] // 20), "PNG")},
        {"a.png": png16(0 * GREY[:, :, None], 0)},
        {"a.pgm": b"P5 41 33 65535\n" + GREY.astype(">u2").tobytes()},
        {"a.jpg": b"no image"},
    ],
)
def test_no_line_proposes_white_for_other_images(files, tmp_path, capsys):
    note_dark(write(tmp_path, files), Decoding())
    assert not capsys.readouterr().out
