"""Test which members of a tar file are images and labels, and that damaged files are refused."""

import gzip
import json
import os
import tarfile

import pytest
from shard_helpers import add, write_tar

from moco.data.tar_listing import list_tar
from moco.errors import InputError


def rows(listing):
    return list(zip(listing.members.tolist(), listing.labels.tolist(), strict=True))


def test_images_and_labels_in_any_order_with_any_suffix(tmp_path):
    members = [("b.cls", b"7\n"), ("b.PNG", b"bb"), ("a.jpeg", b"a"), ("a.cls", b"cat")]
    path = write_tar(tmp_path / "x.tar", *members)
    listing = list_tar(path)
    assert rows(listing) == [(b"b.PNG", b"7"), (b"a.jpeg", b"cat")]
    content = path.read_bytes()
    found = [
        content[at : at + size] for at, size in zip(listing.offsets, listing.sizes, strict=True)
    ]
    assert found == [b"bb", b"a"] and not listing.left_out


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ({"label": 3}, b"3"),
        ({"cls": "cat", "label": 3}, b"cat"),
        ({"class": "dog"}, b"dog"),
        ({"label": None, "class_name": "n01"}, b"n01"),
        ({"caption": "x"}, b""),
        ([1, 2], b""),
    ],
)
def test_labels_in_json(tmp_path, value, label):
    path = write_tar(tmp_path / "x.tar", ("a.jpg", b"a"), ("a.json", json.dumps(value).encode()))
    assert rows(list_tar(path)) == [(b"a.jpg", label)]


def test_cls_wins_over_json(tmp_path):
    members = [("a.jpg", b"a"), ("a.cls", b"1"), ("a.json", b'{"label": 2}')]
    assert rows(list_tar(write_tar(tmp_path / "x.tar", *members))) == [(b"a.jpg", b"1")]


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_dots(tmp_path, format_):
    long = "folder/" * 20 + "x" * 150 + ".jpg"
    members = [("./a/0.jpg", b"0"), ("a.b/0.c.jpg", b"1"), (long, b"2"), ("a.b/0.cls", b"k")]
    members += [("b/0.jpg", b"3"), ("\u00e9\udcff.jpg", b"4")]
    path = write_tar(tmp_path / "x.tar", *members, format=format_)
    expected = [
        b"a/0.jpg",
        b"a.b/0.c.jpg",
        long.encode(),
        b"b/0.jpg",
        "\u00e9".encode() + b"\xff.jpg",
    ]
    listing = list_tar(path)
    assert listing.members.tolist() == expected
    assert listing.labels.tolist() == [b"", b"k", b"", b"", b""]


def test_other_members_are_counted(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", b"a")
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, "._a.jpg", b"macOS")
        add(tar, ".git/b.jpg", b"hidden")
        add(tar, "a.txt", b"caption")
        add(tar, "a.seg.npy", b"array")
        add(tar, "lonely.cls", b"1")
        add(tar, "c.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(tar, "d.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "e.jpg", b"", type=tarfile.FIFOTYPE)
    listing = list_tar(path)
    assert rows(listing) == [(b"a.jpg", b"")]
    assert listing.left_out == {
        ".txt": 1,
        ".npy": 1,
        "labels without an image": 1,
        "links": 2,
        "sparse members or special files": 1,
    }


def test_a_sparse_member_is_left_out(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.jpg", b"a")
        facts = {"GNU.sparse.map": "0,1,9,1", "GNU.sparse.size": "10", "GNU.sparse.name": "b.jpg"}
        add(tar, "b.jpg", b"xy", pax_headers=facts)
        add(tar, "c.jpg", b"c")
    listing = list_tar(path)
    assert rows(listing) == [(b"a.jpg", b""), (b"c.jpg", b"")]
    assert listing.left_out["sparse members or special files"] == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no image; remove it"),
        ([("a.txt", b"x"), ("b.txt", b"x")], r"holds no image, but \.txt 2; remove it"),
        ([("n01.tar", b"x")], r"holds no image, but \.tar 1; unpack it first"),
        ([("a.jpg", b"x"), ("a.png", b"y")], r"a\.jpg and a\.png have the same key"),
        ([("a.1.jpg", b"x"), ("a.2.jpg", b"y")], r"a\.1\.jpg and a\.2\.jpg have the same key"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.jpg", b"y")], "have the same key"),
        ([("a.jpg", b"x"), ("a.cls", b" \n")], r"a\.cls: holds no usable label"),
        ([("a.jpg", b"x"), ("a.cls", b"\xff\xfe")], r"a\.cls: is not text in UTF-8"),
        ([("a.jpg", b"x"), ("a.cls", b"two\nlines")], r"a\.cls: holds no usable label"),
        ([("a.jpg", b"x"), ("a.json", b"{")], r"a\.json: is not JSON"),
        ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], r"a\.json: is not JSON"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": 1.5}')], "its label is 1.5, which is neither"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": true}')], "its label is True, which is neither"),
        ([(f"{'x' * 1200}.jpg", b"x")], "is too long"),
    ],
)
def test_unusable_members_are_refused_in_one_line(tmp_path, members, message):
    path = write_tar(tmp_path / "x.tar", *members)
    with pytest.raises(InputError, match=message) as error:
        list_tar(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    members = [(f"{i}.jpg", bytes([i + 1]) * 700) for i in range(3)]
    whole = write_tar(tmp_path / "whole.tar", *members).read_bytes()
    path = tmp_path / "cut.tar"
    end = 3 * (512 + 1024)
    for size in (*range(1, end, 100), 1536, 3072, end, end + 100):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut.tar: (is truncated or damaged|is not a tar)"):
            list_tar(path)
    path.write_bytes(whole[: end + 512])  # one block of the two that mark the end is enough
    assert len(list_tar(path).members) == 3


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", ("a.jpg", b"a"), ("b.jpg", b"b"))
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is truncated or damaged \(no end marker at byte 1024\)"):
        list_tar(path)


def test_a_negative_size_does_not_lead_backwards(tmp_path):
    path = write_tar(tmp_path / "x.tar", ("a.jpg", b"a"), ("b.jpg", b"b"))
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo("b.jpg")
    block = bytearray(header.tobuf())
    block[124:136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    content[1024:1536] = block
    path.write_bytes(content)
    with pytest.raises(InputError, match="is truncated or damaged"):
        list_tar(path)


def test_joined_tar_files_are_refused(tmp_path):
    first = write_tar(tmp_path / "x.tar", ("a.jpg", b"a"))
    content = first.read_bytes()
    first.write_bytes(content[:1536] + content)
    with pytest.raises(InputError, match="has more data after its end at byte 1024"):
        list_tar(first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b"x" * 2000, mtime=0), "is compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed"),
        (b"no tar file " * 100, "is not a tar file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list_tar(path)


def test_an_unreadable_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"x.tar: cannot be read: No such file"):
        list_tar(tmp_path / "x.tar")


def test_progress_adds_up_to_the_size(tmp_path):
    path = write_tar(tmp_path / "x.tar", *((f"{i}.jpg", b"x" * 1000) for i in range(5)))
    passed = []
    list_tar(path, passed.append)
    assert sum(passed) == os.path.getsize(path)
