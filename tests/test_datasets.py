"""The built-in photographs, and what is said about image folders that are not laid out as expected."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from moco.data import datasets
from moco.data.datasets import find, scan
from moco.errors import InputError

BOTH = ("train", "val")


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
    return {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}


def contents(root):
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
        for name in datasets.PHOTOS:
            files = contents(photos / split / name)
            assert len(set(files.values())) == len(files)


def use_photographs(monkeypatch, photographs):
    monkeypatch.setattr(datasets, "PHOTOS", list(photographs))
    monkeypatch.setattr(datasets, "_photograph", photographs.__getitem__)


def test_photos_are_written_once(cache, monkeypatch):
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    root = find("photos", BOTH)
    assert root.is_relative_to(cache)
    written = {name: path.stat().st_mtime_ns for name, path in files_under(root).items()}
    monkeypatch.setattr(datasets, "_photograph", lambda name: pytest.fail(f"read {name} again"))
    assert find("photos", BOTH) == root
    assert {name: path.stat().st_mtime_ns for name, path in files_under(root).items()} == written
    assert [path.name for path in root.parent.iterdir()] == [root.name]


def test_photos_are_the_same_wherever_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "PHOTOS", ["chelsea", "text", "china"])
    written = []
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        written.append(contents(find("photos", BOTH)))
    assert len(written[0]) == 270
    assert written[0] == written[1]


def test_photos_show_something(cache):
    root = find("photos", BOTH)
    flat = [name for name, path in files_under(root).items() if np.std(Image.open(path)) < 1.5]
    assert flat == []


def test_photos_that_another_process_finished_first_are_used(cache, monkeypatch):
    theirs = cache / "hard-negatives" / "photos-v2"

    def photograph(name):
        (theirs / "train" / name).mkdir(parents=True)
        (theirs / "train" / name / "000.jpg").write_bytes(b"theirs")
        return picture(lambda x: x % 256, 300, 200)

    monkeypatch.setattr(datasets, "PHOTOS", ["noise"])
    monkeypatch.setattr(datasets, "_photograph", photograph)
    assert find("photos", BOTH) == theirs
    assert list(contents(theirs).values()) == [b"theirs"]
    assert list(theirs.parent.iterdir()) == [theirs]


def test_a_missing_photograph_leaves_nothing_half_written(cache, monkeypatch):
    monkeypatch.setattr(datasets, "PHOTOS", ["chelsea", "no-such-photograph"])
    with pytest.raises(InputError, match="no-such-photograph"):
        find("photos", BOTH)
    assert files_under(cache) == {}
    monkeypatch.setattr(datasets, "PHOTOS", ["chelsea"])
    assert len(files_under(find("photos", BOTH))) == 90


def picture(value_of_column, width, height):
    row = np.array([value_of_column(x) for x in range(width)], np.uint8)
    return Image.fromarray(np.repeat(np.tile(row, (height, 1))[:, :, None], 3, axis=2))


SIZES = {"wide": (512, 300), "odd": (333, 500), "small": (161, 120), "low": (448, 60)}


def patches(root, split, name):
    files = sorted((root / split / name).iterdir())
    return np.stack([np.asarray(Image.open(file).convert("L")) for file in files]).astype(int)


def test_train_lies_left_of_val(cache, monkeypatch):
    ramps = {name: picture(lambda x, width=width: 255 * x / width, width, height) for name, (width, height) in SIZES.items()}
    use_photographs(monkeypatch, ramps)
    root = find("photos", BOTH)
    jpeg_error = 4
    for name in SIZES:
        train, val = patches(root, "train", name), patches(root, "val", name)
        assert train.max() < val.min() + 2 * jpeg_error
        assert train.min() < 30 and val.max() > 225
    assert len(np.unique(patches(root, "train", "wide")[:, 48, 48])) > 20


def test_train_and_val_share_not_one_column_of_pixels(cache, monkeypatch):
    """Black left of the border and white right of it: one foreign column would stand out as a stripe."""
    border = {name: round(0.5 * width) for name, (width, _) in SIZES.items()}
    halves = {name: picture(lambda x, b=border[name]: 255 * (x >= b), *size) for name, size in SIZES.items()}
    use_photographs(monkeypatch, halves)
    root = find("photos", BOTH)
    for name in SIZES:
        assert patches(root, "train", name).max() < 40
        assert patches(root, "val", name).min() > 215


def make(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_bytes(b"found by name, not read")
        else:
            path.mkdir()
    return root


def complaint(call, *arguments):
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_missing_folder(tmp_path):
    message = complaint(find, str(tmp_path / "nowhere"), BOTH)
    assert str(tmp_path / "nowhere") in message
    assert "no such folder" in message and "photos" in message


def test_a_file_is_not_a_folder(tmp_path):
    make(tmp_path, "data.tar")
    assert str(tmp_path / "data.tar") in complaint(find, str(tmp_path / "data.tar"), BOTH)


def test_no_train_folder(tmp_path):
    make(tmp_path, "val/cat/1.jpg", "val/dog/1.jpg")
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path) in message and "train/" in message


def test_no_val_folder(tmp_path):
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg")
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path) in message and "val/" in message and "train/" not in message


def test_only_the_splits_in_use_must_exist(tmp_path):
    make(tmp_path / "a", "train/cat/1.jpg")
    make(tmp_path / "b", "val/cat/1.jpg", "val/dog/1.jpg")
    assert find(str(tmp_path / "a"), ("train",)) == tmp_path / "a"
    assert find(str(tmp_path / "b"), ("val",)) == tmp_path / "b"


@pytest.mark.parametrize("split", BOTH)
@pytest.mark.parametrize("image", ["ILSVRC2012_val_00000001.JPEG", "1.png"])
def test_images_without_class_folders(tmp_path, split, image):
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg")
    (tmp_path / split).rename(tmp_path / "aside")
    make(tmp_path, f"{split}/{image}")
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path / split) in message
    assert "no class folders" in message and f"{split}/CLASS" in message and "images" in message


def test_an_empty_split(tmp_path):
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val")
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path / "val") in message and "no class folders" in message and "holds images" not in message


def test_val_with_one_class_folder(tmp_path):
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/images/1.jpg")
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path / "val") in message and "images" in message and "one class" in message


def test_val_classes_that_train_lacks(tmp_path):
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/zebra/1.jpg", "val/eel/1.jpg")
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path / "val") in message
    assert "2 classes" in message and "eel" in message


@pytest.mark.parametrize("split", BOTH)
def test_an_empty_class_folder(tmp_path, split):
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg", f"{split}/emu/notes.txt")
    message = complaint(scan, tmp_path, split)
    assert str(tmp_path / split / "emu") in message and "no image" in message


def test_labels_of_val_are_places_among_trains_classes(tmp_path):
    make(tmp_path, "train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "val/cat/1.jpg", "val/ant/1.jpg", "val/ant/2.jpg")
    root = find(str(tmp_path), BOTH)
    train = scan(root, "train")
    val = scan(root, "val", train.classes)
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [0, 0, 2]
    assert [val.path(i) for i in range(3)] == [str(tmp_path / "val" / file) for file in ("ant/1.jpg", "ant/2.jpg", "cat/1.jpg")]


def test_scan_finds_nested_and_oddly_named_images_and_nothing_else(tmp_path):
    make(tmp_path, "train/cat/b.JPEG", "train/cat/deep/er/a.png", "train/cat/.hidden.jpg", "train/cat/notes.txt")
    make(tmp_path, "train/Äpfel/ö 1.webp", "train/.thumbnails/1.jpg", "train/readme.md")
    folder = scan(tmp_path, "train")
    assert folder.classes == ("cat", "Äpfel")
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0, 0, 1]
    expected = ["cat/b.JPEG", "cat/deep/er/a.png", "Äpfel/ö 1.webp"]
    assert [folder.path(i) for i in range(len(folder))] == [str(tmp_path / "train" / file) for file in expected]


# the kept list of a folder's images


@pytest.fixture
def listed(images, cache, monkeypatch):
    """An image folder that last changed a minute ago, and a call that scans it and says whether its files were walked."""
    (images / "train" / "class0" / "more").mkdir()
    (images / "train" / "class0" / "more" / "nested.png").touch()
    age(images)
    walked = []
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: walked.append(args) or walk(*args, **options))

    def scanned():
        walked.clear()
        folder = scan(images, "train")
        return [os.fsdecode(path) for path in folder.paths], folder.labels.tolist(), folder.classes, bool(walked)

    return images, scanned


def age(root, seconds=60):
    then = time.time() - seconds
    for folder, _, _ in os.walk(root):
        os.utime(folder, (then, then))


def test_a_folder_is_walked_once(listed):
    _, scanned = listed
    *first, walked = scanned()
    assert walked and len(first[0]) == 25
    assert first[0] == sorted(first[0]) and "class0/more/nested.png" in first[0]
    *second, walked = scanned()
    assert not walked and second == first


def test_a_kept_list_takes_the_classes_it_is_asked_for(listed):
    images, _ = listed
    for _ in range(2):
        folder = scan(images, "train", ("class0", "a", "class1"))
        assert set(folder.labels.tolist()) == {0, 2} and folder.classes == ("class0", "a", "class1")


@pytest.mark.parametrize("change", ["add", "remove", "rename", "nested", "class", "remove class"])
def test_a_changed_folder_is_noticed(listed, change):
    images, scanned = listed
    before, *_ = scanned()
    folder = images / "train"
    if change == "add":
        (folder / "class1" / "new.jpg").touch()
    elif change == "remove":
        (folder / "class1" / "3.jpg").unlink()
    elif change == "rename":
        (folder / "class1" / "3.jpg").rename(folder / "class1" / "other.jpg")
    elif change == "nested":
        (folder / "class0" / "more" / "deep.png").touch()
    elif change == "class":
        (folder / "class2").mkdir()
        (folder / "class2" / "x.jpg").touch()
    else:
        (folder / "class1").rename(images / "elsewhere")
    after, labels, _, walked = scanned()
    assert walked and after != before
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".jpg", ".png")}
    assert set(after) == on_disk and len(labels) == len(after)


def test_a_folder_that_changed_just_before_it_was_listed_is_listed_again(listed):
    images, scanned = listed
    (images / "train" / "class1" / "new.jpg").touch()
    assert scanned()[-1] and scanned()[-1]


def test_a_damaged_list_is_made_again(listed, cache):
    _, scanned = listed
    *first, _ = scanned()
    (kept,) = (cache / "hard-negatives" / "scans").iterdir()
    for damage in (b"", kept.read_bytes()[:300], b"PK nothing"):
        kept.write_bytes(damage)
        *again, walked = scanned()
        assert walked and again == first
        assert not scanned()[-1]


def test_a_cache_that_cannot_be_written_is_done_without(listed, cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where a folder should be")
    _, scanned = listed
    assert scanned() == scanned()
