"""Test the kept index of the images in tar files: it is used if it is valid, and never trusted."""

import os
import threading
import zipfile

import numpy as np
import pytest
from shard_helpers import write_tar

from moco.data import splits, tar_index
from moco.errors import InputError


@pytest.fixture
def shards(tmp_path):
    """A folder with two tar files of two images each."""
    for k in range(2):
        members = [(f"{k}{i}.jpg", b"x" * (10 + i)) for i in range(2)]
        members += [(f"{k}{i}.cls", b"%d" % i) for i in range(2)]
        write_tar(tmp_path / "shards" / f"{k}.tar", *members, ("note.txt", b"x"))
    return tmp_path / "shards"


def load(folder):
    """Load the index as a new process would."""
    tar_index.load.cache_clear()
    names = splits.names(folder, "train", (".tar",))
    return tar_index.load(folder, "train", splits.files(folder, names))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_list_has_the_images_of_all_files_and_is_read_only(shards):
    index = load(shards)
    assert index.shards.tolist() == [0, 0, 1, 1]
    assert index.members.tolist() == [b"00.jpg", b"01.jpg", b"10.jpg", b"11.jpg"]
    assert index.codes.tolist() == [0, 1, 0, 1] and index.texts.tolist() == [b"0", b"1"]
    assert index.counts() == {".txt": 2}
    with pytest.raises(ValueError, match="read-only"):
        index.offsets[0] = 0


def test_a_kept_list_is_used_again(shards, monkeypatch, capsys):
    first = load(shards)
    line = (
        f"4 images listed in 2 tar files in 0.0 s; the index is kept in {shards}/.tar-index-train"
    )
    assert line in capsys.readouterr().err
    monkeypatch.setattr(tar_index, "list_tar", lambda *_: pytest.fail("listed again"))
    assert equal(load(shards), first) and capsys.readouterr().err == ""


def test_only_changed_files_are_listed_again(shards, monkeypatch, capsys):
    load(shards)
    write_tar(shards / "1.tar", ("new.jpg", b"n"), ("new.cls", b"5"))
    write_tar(shards / "2.tar", ("newer.jpg", b"n"), ("newer.cls", b"1"))
    listed, list_tar = [], tar_index.list_tar
    monkeypatch.setattr(
        tar_index, "list_tar", lambda path, on: listed.append(path.name) or list_tar(path, on)
    )
    index = load(shards)
    assert sorted(listed) == ["1.tar", "2.tar"]
    assert "(2 are new or have changed)" in capsys.readouterr().err
    (shards / ".tar-index-train.npz").unlink()
    assert equal(load(shards), index)
    assert [index.texts[code] for code in index.codes] == [b"0", b"1", b"5", b"1"]


def test_a_file_with_the_same_size_and_another_time_has_changed(shards, capsys):
    load(shards)
    os.utime(shards / "0.tar", ns=(1, 1))
    load(shards)
    assert "(1 is new or has changed)" in capsys.readouterr().err


def corrupt(folder, /, **changes):
    """Replace arrays in the kept index."""
    path = folder / ".tar-index-train.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("offsets", lambda x: x + (1 << 40), "an image is outside its tar file"),
        ("offsets", lambda x: x - 512, "an image is outside its tar file"),
        ("offsets", lambda x: x + 1, "an image is outside its tar file"),
        ("offsets", lambda x: x.astype(float), "offsets has another type"),
        ("sizes", lambda x: x - 100, "an image is outside its tar file"),
        ("sizes", lambda x: x + (1 << 62), "an image is outside its tar file"),
        ("sizes", lambda x: x[:3], "its arrays differ in length"),
        ("shards", lambda x: x + 7, "a tar file has no images"),
        ("shards", lambda x: x[::-1], "not in the order"),
        ("codes", lambda x: x + 1, "a label is out of range"),
        ("codes", lambda x: x - 2, "a label is out of range"),
        ("texts", lambda x: np.array([b"\xff", b"1"]), "is damaged"),
        ("texts", lambda x: np.array([b"\x1b[2J", b"1"]), "a label is not text"),
        ("left_out", lambda x: np.array([b"{", b"{"]), "is damaged"),
        ("left_out", lambda x: np.array([b'{"a": "b"}', b"{}"]), "its counts are no numbers"),
        ("members", lambda x: x.astype("U"), "members has another type"),
        ("members", lambda x: np.array([{}] * 4), "is damaged"),  # Python objects
        ("mtimes", lambda x: x[:1], "is damaged"),
    ],
)
def test_a_damaged_or_hostile_list_is_made_again(shards, capsys, name, change, reason):
    good = load(shards)
    corrupt(shards, **{name: change})
    capsys.readouterr()
    assert equal(load(shards), good)
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and "it is replaced" in line
    assert equal(load(shards), good) and not capsys.readouterr().err


def test_a_list_that_is_no_list_is_made_again(shards, capsys):
    good, path = load(shards), shards / ".tar-index-train.npz"
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert equal(load(shards), good) and "is damaged" in capsys.readouterr().err
    corrupt(shards, version=lambda x: x + 1)
    assert equal(load(shards), good) and "is of another version" in capsys.readouterr().err
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:  # unpacks to 100 MB
        file.writestr("offsets.npy", bytes(100_000_000))
    assert equal(load(shards), good) and "is damaged: compressed" in capsys.readouterr().err


def test_a_read_only_folder_has_its_list_in_the_cache(shards, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replacing = tar_index.replacing

    def refuse(path):
        if path.parent == shards:
            raise PermissionError(13, "Permission denied")
        return replacing(path)

    monkeypatch.setattr(tar_index, "replacing", refuse)
    good = load(shards)
    assert f"the index is kept in {tmp_path / 'cache'}" in capsys.readouterr().err
    assert not (shards / ".tar-index-train.npz").exists()
    assert equal(load(shards), good) and capsys.readouterr().err == ""


def test_without_a_place_for_the_list_it_is_made_at_each_start(shards, monkeypatch, capsys):
    def refuse(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tar_index, "replacing", refuse)
    for _ in range(2):
        assert len(load(shards).shards) == 4
        line = "the index cannot be kept (No space left on device), so each start makes it again"
        assert line in capsys.readouterr().err


def test_an_error_in_one_file_names_it(shards):
    (shards / "1.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"1.tar: is empty"):
        load(shards)
    assert not (shards / ".tar-index-train.npz").exists()


def test_processes_take_turns(shards, monkeypatch):
    """While one lists the files, the other waits, and then uses its index."""
    names = splits.files(shards, ["0.tar", "1.tar"])
    listing, going_on, counts = threading.Event(), threading.Event(), []
    list_tar = tar_index.list_tar

    def slow(path, on):
        counts.append(path.name)
        listing.set()
        assert going_on.wait(20)
        return list_tar(path, on)

    monkeypatch.setattr(tar_index, "list_tar", slow)
    load_once = tar_index.load.__wrapped__  # two processes do not share the results in memory
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(load_once(shards, "train", names)))
        for _ in range(2)
    ]
    threads[0].start()
    assert listing.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and not found
    going_on.set()
    for thread in threads:
        thread.join(20)
    assert sorted(counts) == ["0.tar", "1.tar"] and equal(*found)


def test_progress_is_printed_now_and_then(shards, monkeypatch, capsys):
    monkeypatch.setattr(tar_index, "_EVERY", 0.0)
    load(shards)
    lines = [line for line in capsys.readouterr().err.splitlines() if "listing the images" in line]
    assert lines[0].startswith(f"{shards}: listing the images in tar files, ")
    assert "100% of " in lines[-1]
