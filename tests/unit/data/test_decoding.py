"""Tests of `moco.data.decoding`: file formats, damaged files, and reduced sizes."""

import numpy as np
import pytest
import torch
from data_helpers import BAD, smooth_rgb, some_photographs, write_large_photograph
from decoding_helpers import decode_file, png16
from PIL import Image

from moco.data import decoding, jpeg
from moco.data.decoding import Decoding, decode_full, decoded_size
from moco.errors import InputError

SHRINK = Decoding(shrink_on_decode=True)


@pytest.fixture(scope="module")
def photographs():
    return some_photographs()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_large_photograph(tmp_path_factory.mktemp("large"))


def assert_decodes_to(path, pixels, tolerance=0):
    """Assert that the decoded file equals `pixels` [H, W, 3], up to `tolerance` grey levels."""
    image = decode_file(str(path))
    assert image.dtype == torch.uint8 and image.shape == (3, *pixels.shape[:2])
    expected = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    assert (image.int() - expected.int()).abs().max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.ppm", "a.tif", "a.PNG"])
def test_decode_reads_lossless_files_exactly(tmp_path, name):
    Image.fromarray(smooth_rgb()).save(tmp_path / name)
    assert_decodes_to(tmp_path / name, smooth_rgb())


@pytest.mark.parametrize(("name", "tolerance"), [("a.jpg", 4), ("a.webp", 12)])
def test_decode_reads_lossy_files(tmp_path, name, tolerance):
    Image.fromarray(smooth_rgb()).save(tmp_path / name, quality=95, subsampling=0)
    assert_decodes_to(tmp_path / name, smooth_rgb(), tolerance)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.png", 0), ("a.jpg", 3), ("a.bmp", 0), ("a.gif", 0)]
)
def test_decode_repeats_a_gray_image_in_three_channels(tmp_path, name, tolerance):
    gray = smooth_rgb()[:, :, 0]
    Image.fromarray(gray).save(tmp_path / name, quality=95)
    assert_decodes_to(tmp_path / name, np.stack([gray] * 3, axis=2), tolerance)


def test_decode_drops_alpha(tmp_path):
    alpha = np.full((40, 56, 1), 128, np.uint8)
    Image.fromarray(np.concatenate([smooth_rgb(), alpha], axis=2)).save(tmp_path / "rgba.png")
    assert_decodes_to(tmp_path / "rgba.png", smooth_rgb())


def test_decode_hides_pillows_warnings(tmp_path, recwarn):
    paletted = Image.fromarray(smooth_rgb()).quantize(32)
    paletted.save(tmp_path / "palette.png", transparency=bytes(range(32)))  # makes Pillow warn
    decode_file(str(tmp_path / "palette.png"))
    assert not [warning for warning in recwarn if "Palette" in str(warning.message)]
    Image.open(tmp_path / "palette.png").convert("RGB")
    assert [warning for warning in recwarn if "Palette" in str(warning.message)]


def test_decode_reads_palettes(tmp_path):
    paletted = Image.fromarray(smooth_rgb()).quantize(32)
    paletted.save(tmp_path / "palette.png")
    assert_decodes_to(tmp_path / "palette.png", np.asarray(paletted.convert("RGB")))


def test_decode_reads_pngs_of_16_bits_a_channel(tmp_path):
    deep = smooth_rgb().astype(np.uint16) * 256 + 77
    (tmp_path / "rgb16.png").write_bytes(png16(deep, 2))
    assert_decodes_to(tmp_path / "rgb16.png", smooth_rgb(), tolerance=1)
    gray = smooth_rgb()[:, :, 1]
    Image.fromarray(gray.astype(np.uint16) * 256 + 77).save(tmp_path / "gray16.png")
    assert_decodes_to(tmp_path / "gray16.png", np.stack([gray] * 3, axis=2), tolerance=1)


def test_decode_reads_cmyk_jpegs(tmp_path):
    Image.fromarray(smooth_rgb()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert_decodes_to(tmp_path / "cmyk.jpg", smooth_rgb(), tolerance=10)


def test_decode_returns_the_first_frame_of_an_animation(tmp_path):
    frames = [
        Image.fromarray(np.full((30, 20, 3), color, np.uint8))
        for color in ((250, 20, 20), (20, 250, 20), (20, 20, 250))
    ]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "moves.gif") as gif:
        assert gif.n_frames == 3
    assert_decodes_to(tmp_path / "moves.gif", np.asarray(frames[0]), tolerance=4)


@pytest.mark.parametrize("name", [name for name, _ in jpeg.working()])
@pytest.mark.parametrize("content", [b"", b"\xff" * 3000, b"\xff\xc0\0\3", b"\xff\xdb\0\5\7\7\7"])
def test_damaged_headers_are_errors_with_every_decoder(name, content, tmp_path, monkeypatch):
    decoder = next(one for one in jpeg.working() if one[0] == name)
    monkeypatch.setattr(jpeg, "decoder", lambda: decoder)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + content)
    with pytest.raises(InputError, match=r"broken\.jpg"):
        decode_file(str(tmp_path / "broken.jpg"))


@BAD
def test_the_error_names_the_file_that_decode_cannot_read(tmp_path, write_bad):
    write_bad(tmp_path / "broken 7.jpg")
    with pytest.raises(InputError) as error:
        decode_file(str(tmp_path / "broken 7.jpg"))
    assert str(tmp_path / "broken 7.jpg") in str(error.value)
    assert "\n" not in str(error.value)


def test_the_error_names_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(InputError) as error:
        decode_file(str(tmp_path / "gone.jpg"))
    path = tmp_path / "gone.jpg"
    assert str(error.value) == f"{path}: unreadable image (the file is missing); restore it"


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_decode_shrinks_a_large_jpeg(large, factor):
    full, shrunk = (
        large.read(0),
        large.read(0, SHRINK, lambda height, width: factor),
    )
    assert full.shape == (3, 1400, 1600) and shrunk.shape == (3, 1400 // factor, 1600 // factor)
    means = torch.nn.functional.avg_pool2d(full.float(), factor)
    assert (shrunk.float() - means).abs().mean() < 1


def test_decode_asks_for_a_reduction_of_large_jpegs_only(large, photographs):
    assert torch.equal(
        photographs.read(0, SHRINK, lambda height, width: 8),
        photographs.read(0),
    )
    asked = []
    assert torch.equal(
        large.read(0, SHRINK, lambda height, width: asked.append((height, width)) or 1),
        large.read(0),
    )
    assert asked == [(1400, 1600)]


def test_decode_keeps_every_pixel_unless_told_to_shrink(large):
    full = large.read(0, reduction=lambda height, width: 8)
    assert full.shape == (3, 1400, 1600)
    data = decoding.read_bytes(large.path(0))
    assert torch.equal(decode_full(data, "large"), full)
    assert decoded_size(data) == full.numel()
    assert decode_full(data, "large", SHRINK) is None and decoded_size(data, SHRINK) == 0


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a", "JPEG XL"),
    ],
)
def test_the_error_names_a_format_that_is_not_supported(start, name):
    data = np.frombuffer(start + bytes(40), np.uint8)
    message = rf"^x: unreadable image \({name} is not supported\); remove or replace it$"
    with pytest.raises(InputError, match=message):
        decoding.decode(data, "x")


def test_a_read_only_array_is_decoded_without_a_warning(photographs, recwarn):
    data = decoding.read_bytes(photographs.path(0))
    expected = decoding.decode(data, "x")
    data.flags.writeable = False
    assert torch.equal(decoding.decode(data, "x"), expected)
    assert not recwarn.list
