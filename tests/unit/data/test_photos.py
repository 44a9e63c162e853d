"""Tests of `moco.data.photos`: the built-in data set, and the cache folder."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from folder_helpers import BOTH, error_message
from PIL import Image

from moco.data import photos as photo_set
from moco.data.photos import PHOTOS, cache_folder
from moco.data.sources import find, scan
from moco.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return find("photos", BOTH)


def files_under(root):
    """Return the files below `root` by their relative path."""
    return {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}


def contents(root):
    """Return the bytes of the files below `root` by their relative path."""
    return {name: path.read_bytes() for name, path in files_under(root).items()}


def test_photos_are_19_classes_of_jpegs_of_96_pixels(photos):
    train, val = scan(photos, "train"), scan(photos, "val")
    assert len(train.classes) == 19 and train.classes == val.classes
    assert np.bincount(train.labels).tolist() == [60] * 19
    assert np.bincount(val.labels).tolist() == [30] * 19
    for folder in (train, val):
        for i in range(0, len(folder), 7):
            with Image.open(folder.path(i)) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (96, 96), "RGB")
    assert len(files_under(photos)) == len(train) + len(val)


def test_photos_of_a_class_differ_from_each_other(photos):
    for split in BOTH:
        for name in PHOTOS:
            files = contents(photos / split / name)
            assert len(set(files.values())) == len(files)


def use_photographs(monkeypatch, photographs):
    """Replace the photographs by these, which are images by name."""
    monkeypatch.setattr(photo_set, "PHOTOS", list(photographs))
    monkeypatch.setattr(photo_set, "_photograph", photographs.__getitem__)


def test_photos_are_written_once(cache, monkeypatch):
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    root = find("photos", BOTH)
    assert root.is_relative_to(cache)
    written = {name: path.stat().st_mtime_ns for name, path in files_under(root).items()}
    monkeypatch.setattr(photo_set, "_photograph", lambda name: pytest.fail(f"read {name} again"))
    assert find("photos", BOTH) == root
    assert {name: path.stat().st_mtime_ns for name, path in files_under(root).items()} == written
    assert [path.name for path in root.parent.iterdir()] == [root.name]


def test_photos_are_the_same_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_set, "PHOTOS", ["chelsea", "text", "china"])
    written = []
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        written.append(contents(find("photos", BOTH)))
    assert len(written[0]) == 270
    assert written[0] == written[1]


def test_no_patch_is_blank(cache):
    root = find("photos", BOTH)
    flat = [name for name, path in files_under(root).items() if np.std(Image.open(path)) < 1.5]
    assert flat == []


def test_photos_that_another_process_wrote_first_are_used(cache, monkeypatch):
    theirs = cache / "hard-negatives" / "photos-v2"

    def photograph(name):
        for split, count in (("train", 60), ("val", 30)):
            (theirs / split / name).mkdir(parents=True)
            for i in range(count):
                (theirs / split / name / f"{i:03d}.jpg").write_bytes(b"\xff\xd8theirs\xff\xd9")
        return picture(lambda x: x % 256, 300, 200)

    monkeypatch.setattr(photo_set, "PHOTOS", ["noise"])
    monkeypatch.setattr(photo_set, "_photograph", photograph)
    assert find("photos", BOTH) == theirs
    assert set(contents(theirs).values()) == {b"\xff\xd8theirs\xff\xd9"}
    assert list(theirs.parent.iterdir()) == [theirs]


def test_a_missing_photograph_is_an_error_and_leaves_no_files(cache, monkeypatch):
    monkeypatch.setattr(photo_set, "PHOTOS", ["chelsea", "no-such-photograph"])
    with pytest.raises(InputError, match="no-such-photograph"):
        find("photos", BOTH)
    assert files_under(cache) == {}
    monkeypatch.setattr(photo_set, "PHOTOS", ["chelsea"])
    assert len(files_under(find("photos", BOTH))) == 90


def picture(value_of_column, width, height):
    """Return a grey image whose columns have the grey levels `value_of_column(x)`."""
    row = np.array([value_of_column(x) for x in range(width)], np.uint8)
    return Image.fromarray(np.repeat(np.tile(row, (height, 1))[:, :, None], 3, axis=2))


SIZES = {"wide": (512, 300), "odd": (333, 500), "small": (161, 120), "low": (448, 60)}


def patches(root, split, name):
    """Return the grey levels of all patches of a class, [n, 96, 96]."""
    files = sorted((root / split / name).iterdir())
    return np.stack([np.asarray(Image.open(file).convert("L")) for file in files]).astype(int)


def test_train_patches_are_left_of_val_patches(cache, monkeypatch):
    ramps = {
        name: picture(lambda x, width=width: 255 * x / width, width, height)
        for name, (width, height) in SIZES.items()
    }
    use_photographs(monkeypatch, ramps)
    root = find("photos", BOTH)
    jpeg_error = 4
    for name in SIZES:
        train, val = patches(root, "train", name), patches(root, "val", name)
        assert train.max() < val.min() + 2 * jpeg_error
        assert train.min() < 30 and val.max() > 225
    assert len(np.unique(patches(root, "train", "wide")[:, 48, 48])) > 20


def test_train_and_val_patches_share_no_column_of_pixels(cache, monkeypatch):
    """The photographs are black to the left of the border and white to the right of it.

    A column from the other side would show as a stripe.
    """
    border = {name: round(0.5 * width) for name, (width, _) in SIZES.items()}
    halves = {
        name: picture(lambda x, b=border[name]: 255 * (x >= b), *size)
        for name, size in SIZES.items()
    }
    use_photographs(monkeypatch, halves)
    root = find("photos", BOTH)
    for name in SIZES:
        assert patches(root, "train", name).max() < 40
        assert patches(root, "val", name).min() > 215


def _no_home(_: type[Path]) -> Path:
    # the error for a user without an entry in passwd
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """Simulate a user without HOME and passwd entry. Return the folder for temporary files."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(_no_home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("home", [None, "a file", "below a file", "read-only"])
def test_photos_are_in_a_private_folder_if_the_home_cannot_be_written(no_home, monkeypatch, home):
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    if home:
        path = no_home / "home"
        path.touch() if "file" in home else path.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(path / "x" if home == "below a file" else path))
    if home == "read-only":
        access = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda file, how: not Path(file).is_relative_to(path) and access(file, how),
        )
    own = no_home / f"hard-negatives-{os.getuid()}"
    cache = own / ".cache" / "hard-negatives"
    assert find("photos", BOTH) == cache / "photos-v2" and cache_folder() == cache
    assert len(contents(cache / "photos-v2")) == 90 and own.stat().st_mode & 0o777 == 0o700


def test_photos_in_a_read_only_home_are_used_unless_damaged(no_home, monkeypatch):
    """The image of a container may have them."""
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home / "home"))
    theirs = find("photos", BOTH)
    assert theirs.is_relative_to(no_home / "home")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert find("photos", BOTH) == theirs
    next(theirs.rglob("007.jpg")).unlink()
    assert find("photos", BOTH).is_relative_to(no_home / f"hard-negatives-{os.getuid()}")


@pytest.mark.parametrize("whose", ["theirs", "everybody's", "a link", "a file"])
def test_a_private_folder_that_others_can_write_is_refused(no_home, monkeypatch, whose):
    own = no_home / f"hard-negatives-{os.getuid()}"
    if whose == "a link":
        (no_home / "elsewhere").mkdir(mode=0o700)
        own.symlink_to("elsewhere")
    elif whose == "a file":
        own.touch()
    else:
        own.mkdir(mode=0o700)
        own.chmod(0o777 if whose == "everybody's" else 0o700)
    if whose == "theirs":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        own = own.rename(no_home / f"hard-negatives-{other}")
    message = error_message(find, "photos", BOTH)
    assert message.startswith(
        f"{own}: is not a folder that you alone can write to; set XDG_CACHE_HOME"
    )


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "no image", "class", "all"])
def test_damaged_photos_are_written_again(cache, monkeypatch, damage):
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    root = find("photos", BOTH)
    complete = contents(root)
    file = root / "val" / "noise" / "003.jpg"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "class":
        file.parent.rename(cache / "aside")
    elif damage == "all":
        root.rename(cache / "aside")
        root.mkdir()
    else:
        contents_of = {"empty": b"", "truncated": data[:-100], "no image": b"x" * len(data)}
        file.write_bytes(contents_of[damage])
    assert find("photos", BOTH) == root and contents(root) == complete
    assert list(root.parent.iterdir()) == [root]


def test_damaged_photos_that_cannot_be_replaced_are_refused(cache, monkeypatch):
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    root = find("photos", BOTH)
    (root / "val" / "noise" / "003.jpg").unlink()
    rename = Path.rename

    def failing(path, to):
        if path == root:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    assert error_message(find, "photos", BOTH).startswith(
        f"{root}: cannot be written: Permission denied; "
    )
    assert list(root.parent.iterdir()) == [root]
