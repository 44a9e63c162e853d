"""The built-in photographs, and what is said about image folders that are not laid out as expected."""

import errno
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, on_two_ranks, write_images
from PIL import Image

from moco import user
from moco.data import photos as photo_set
from moco.data.folders import find, scan
from moco.data.photos import PHOTOS, cache_folder
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
        for name in PHOTOS:
            files = contents(photos / split / name)
            assert len(set(files.values())) == len(files)


def use_photographs(monkeypatch, photographs):
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


def test_photos_are_the_same_wherever_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_set, "PHOTOS", ["chelsea", "text", "china"])
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


def test_a_missing_photograph_leaves_nothing_half_written(cache, monkeypatch):
    monkeypatch.setattr(photo_set, "PHOTOS", ["chelsea", "no-such-photograph"])
    with pytest.raises(InputError, match="no-such-photograph"):
        find("photos", BOTH)
    assert files_under(cache) == {}
    monkeypatch.setattr(photo_set, "PHOTOS", ["chelsea"])
    assert len(files_under(find("photos", BOTH))) == 90


def picture(value_of_column, width, height):
    row = np.array([value_of_column(x) for x in range(width)], np.uint8)
    return Image.fromarray(np.repeat(np.tile(row, (height, 1))[:, :, None], 3, axis=2))


SIZES = {"wide": (512, 300), "odd": (333, 500), "small": (161, 120), "low": (448, 60)}


def patches(root, split, name):
    files = sorted((root / split / name).iterdir())
    return np.stack([np.asarray(Image.open(file).convert("L")) for file in files]).astype(int)


def test_train_lies_left_of_val(cache, monkeypatch):
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


def test_train_and_val_share_not_one_column_of_pixels(cache, monkeypatch):
    """Black left of the border and white right of it: one foreign column would stand out as a stripe."""
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
    assert (
        str(tmp_path / "val") in message
        and "no class folders" in message
        and "holds images" not in message
    )


def test_val_with_one_class_folder(tmp_path):
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/images/1.jpg")
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path / "val") in message and "images" in message and "one class" in message


def test_val_classes_that_train_lacks(tmp_path):
    make(
        tmp_path,
        "train/cat/1.jpg",
        "train/dog/1.jpg",
        "val/cat/1.jpg",
        "val/zebra/1.jpg",
        "val/eel/1.jpg",
    )
    message = complaint(find, str(tmp_path), BOTH)
    assert str(tmp_path / "val") in message
    assert "2 classes" in message and "eel" in message


@pytest.mark.parametrize("split", BOTH)
def test_an_empty_class_folder(tmp_path, split):
    make(
        tmp_path,
        "train/cat/1.jpg",
        "train/dog/1.jpg",
        "val/cat/1.jpg",
        "val/dog/1.jpg",
        f"{split}/emu/notes.txt",
    )
    message = complaint(scan, tmp_path, split)
    assert str(tmp_path / split / "emu") in message and "no image" in message


def test_labels_of_val_are_places_among_trains_classes(tmp_path):
    make(
        tmp_path,
        "train/ant/1.jpg",
        "train/bee/1.jpg",
        "train/cat/1.jpg",
        "val/cat/1.jpg",
        "val/ant/1.jpg",
        "val/ant/2.jpg",
    )
    root = find(str(tmp_path), BOTH)
    train = scan(root, "train")
    val = scan(root, "val", train.classes)
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [0, 0, 2]
    assert [val.path(i) for i in range(3)] == [
        str(tmp_path / "val" / file) for file in ("ant/1.jpg", "ant/2.jpg", "cat/1.jpg")
    ]


def test_scan_finds_nested_and_oddly_named_images_and_nothing_else(tmp_path):
    make(
        tmp_path,
        "train/cat/b.JPEG",
        "train/cat/deep/er/a.png",
        "train/cat/.hidden.jpg",
        "train/cat/notes.txt",
    )
    make(tmp_path, "train/Äpfel/ö 1.webp", "train/.thumbnails/1.jpg", "train/readme.md")
    folder = scan(tmp_path, "train")
    assert folder.classes == ("cat", "Äpfel")
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0, 0, 1]
    expected = ["cat/b.JPEG", "cat/deep/er/a.png", "Äpfel/ö 1.webp"]
    assert [folder.path(i) for i in range(len(folder))] == [
        str(tmp_path / "train" / file) for file in expected
    ]


# listing


def names_of(folder):
    return [folder.name(i) for i in range(len(folder))]


def age(root):
    """Give every folder the same old modification time, as tar, rsync -a and some mounts do."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1.5e9, 1.5e9))


@pytest.mark.parametrize("change", ["add", "remove", "rename", "nested", "class", "remove class"])
def test_a_change_is_noticed_though_no_folder_changes_its_time(images, change):
    folder = images / "train"
    make(folder, "class0/more/nested.png")
    age(images)
    before = names_of(scan(images, "train"))
    assert len(before) == 25 and before == sorted(before) and "class0/more/nested.png" in before
    if change == "add":
        (folder / "class1" / "new.jpg").touch()
    elif change == "remove":
        (folder / "class1" / "3.jpg").unlink()
    elif change == "rename":
        (folder / "class1" / "3.jpg").rename(folder / "class1" / "other.jpg")
    elif change == "nested":
        (folder / "class0" / "more" / "deep.png").touch()
    elif change == "class":
        make(folder, "class2/x.jpg")
    else:
        (folder / "class1").rename(images / "elsewhere")
    age(images)
    after = scan(images, "train")
    on_disk = {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".jpg", ".png")
    }
    assert set(names_of(after)) == on_disk != set(before) and len(after.labels) == len(after)
    assert [after.classes[label] for label in after.labels] == [
        name.split("/")[0] for name in names_of(after)
    ]


def test_no_file_is_looked_at(images, monkeypatch):
    """Opening a million files would take minutes on a network disk."""
    looked = []
    stat = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **more: looked.append(os.fspath(path)) or stat(path, **more)
    )
    assert len(scan(images, "train")) == 24
    assert [path for path in looked if path.endswith(".jpg")] == []


def test_hidden_and_system_folders_are_ignored_and_other_endings_counted_once(tmp_path, capsys):
    for place in ("train", "train/cat", "train/cat/more"):
        for name in (
            ".ipynb_checkpoints",
            "@eaDir",
            "__MACOSX",
            "lost+found",
            "#recycle",
            ".snapshot",
            "$RECYCLE.BIN",
        ):
            make(tmp_path, f"{place}/{name}/1.jpg")
    link(tmp_path / "train" / "cat" / "#snapshot2", tmp_path / "train" / "cat" / "#snapshot")
    (tmp_path / "train" / "cat" / "#snapshot2").rename(tmp_path / "train" / "@Recycle")
    make(
        tmp_path,
        "train/cat/1.JPG",
        "train/cat/2.jfif",
        "train/cat/3.JPE",
        "train/cat/more/4.gif",
        "train/cat/._1.JPG",
    )
    assert scan(tmp_path, "train").classes == ("cat",)
    assert capsys.readouterr().err == ""  # nothing is left out that is worth a line
    make(
        tmp_path,
        "train/dog/1.jpg",
        *(f"train/dog/{i}.heic" for i in range(3)),
        "train/dog/a.txt",
        "train/cat/more/b.TXT",
    )
    make(tmp_path, "train/loose.jpg", "train/classes.csv")
    (tmp_path / "train" / "cat" / "README").write_text("")
    for _ in range(2):
        folder = scan(tmp_path, "train")
    assert names_of(folder) == [
        "cat/1.JPG",
        "cat/2.jfif",
        "cat/3.JPE",
        "cat/more/4.gif",
        "dog/1.jpg",
    ]
    assert capsys.readouterr().err == (
        f"{tmp_path / 'train'}: left out: 7 files with other endings (.heic 3, .txt 2, .csv 1, no ending 1); "
        "1 images outside the class folders\n"
    )


def test_an_empty_class_folder_says_what_it_holds(tmp_path):
    make(
        tmp_path, "train/cat/1.jpg", "train/dog/1.heic", "train/dog/2.heic", "train/dog/.hidden.jpg"
    )
    assert "dog: holds no image (" in complaint(scan, tmp_path, "train")
    assert "), but .heic 2; remove" in complaint(scan, tmp_path, "train")


# links


def link(path, to):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def test_class_folders_and_others_may_lie_elsewhere(tmp_path):
    make(tmp_path / "disk", "c/1.jpg", "c/more/2.jpg", "extra/3.jpg", "4.jpg")
    make(tmp_path, "train/ant/1.jpg")
    link(tmp_path / "train" / "cat", tmp_path / "disk" / "c")
    link(tmp_path / "train" / "ant" / "extra", "../../disk/extra")
    link(tmp_path / "train" / "ant" / "file.jpg", tmp_path / "disk" / "4.jpg")
    folder = scan(tmp_path, "train")
    assert names_of(folder) == [
        "ant/1.jpg",
        "ant/extra/3.jpg",
        "ant/file.jpg",
        "cat/1.jpg",
        "cat/more/2.jpg",
    ]
    assert folder.labels.tolist() == [0, 0, 0, 1, 1] and all(
        os.path.exists(folder.path(i)) for i in range(5)
    )
    link(tmp_path / "linked", tmp_path)
    assert names_of(scan(tmp_path / "linked", "train")) == names_of(folder)


@pytest.mark.parametrize("to", [".", "..", "../..", "more", "more/deep", "/"])
def test_a_link_back_counts_no_image_twice(tmp_path, capsys, to):
    """To its own class, the split, the data folder, one above, or one listed before or after."""
    make(
        tmp_path, "train/cat/1.jpg", "train/cat/more/deep/2.jpg", "train/dog/3.jpg", "val/cat/4.jpg"
    )
    link(tmp_path / "train" / "cat" / "again", to)
    link(tmp_path / "train" / "cat" / "more" / "zzz", tmp_path / "train" / "cat" / "again")
    folder = scan(tmp_path, "train")
    assert names_of(folder) == [
        "cat/1.jpg",
        "cat/more/deep/2.jpg",
        "dog/3.jpg",
    ] and folder.labels.tolist() == [0, 0, 1]
    said = capsys.readouterr().err
    assert f"2 links to folders that are listed already, first {tmp_path}/train/cat/again\n" in said


def test_two_links_to_one_folder_count_it_once(tmp_path):
    """Also below a class that is itself a link, and if one link leads above the other."""
    make(tmp_path / "disk", "c/1.jpg", "other/deep/2.jpg")
    for name in ("a", "b"):
        link(tmp_path / "disk" / "c" / name, "../other/deep" if name == "a" else "../other")
    link(tmp_path / "train" / "cat", tmp_path / "disk" / "c")
    assert names_of(scan(tmp_path, "train")) == ["cat/1.jpg", "cat/a/2.jpg"]


@pytest.mark.parametrize(
    ("where", "to"),
    [
        ("train/dog", "cat"),
        ("train/cow/x", "../cat"),
        ("train/cow/x", "../cat/more"),
        ("train/cow/x", "../../disk"),
    ],
)
def test_a_folder_in_two_classes_is_refused(tmp_path, where, to):
    make(tmp_path, "train/cat/1.jpg", "train/cat/more/2.jpg", "train/cow/1.jpg", "disk/eel/1.jpg")
    link(tmp_path / "train" / "eel", "../disk/eel")
    link(tmp_path / where, to)
    message = complaint(scan, tmp_path, "train")
    two = ("cow", "eel") if "disk" in to else ("cat", where.split("/")[1])
    assert (
        message.startswith(f"{tmp_path}/train/{two[0]} and {tmp_path}/train/{two[1]}: ")
        and "two classes" in message
    )


@pytest.mark.parametrize("where", ["train/dog", "train/cat/more"])
def test_a_broken_link_is_not_left_out(tmp_path, where):
    """If a disk is not mounted, a class would be missing, and others would change labels."""
    make(tmp_path, "train/cat/1.jpg", "train/emu/1.jpg")
    link(tmp_path / where, "/no/such/disk")
    message = complaint(scan, tmp_path, "train")
    assert message.startswith(
        f"{tmp_path / where}: is a link to /no/such/disk, which does not exist"
    )
    (tmp_path / where).unlink()
    link(tmp_path / where, tmp_path / where)
    assert str(tmp_path / where) in complaint(scan, tmp_path, "train")


# what cannot be read


def refuse(monkeypatch, folder, number):
    """os.scandir fails on `folder`: the tests may run as root, who may read everything."""
    scandir = os.scandir

    def failing(path):
        if os.fspath(path) == str(folder):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    "inside", ["train", "train/class1", "train/class1/more", "train/class1/link"]
)
def test_a_folder_that_cannot_be_read_is_named(images, tmp_path, monkeypatch, inside, number):
    make(images, "train/class1/more/1.jpg")
    link(images / "train" / "class1" / "link", make(tmp_path / "disk", "1.jpg"))
    refuse(monkeypatch, images / inside, number)
    message = complaint(scan, images, "train")
    assert message.startswith(f"{images / inside}: cannot be read: {os.strerror(number)}; ")
    assert ("chmod" in message) == (number == errno.EACCES)


PERMISSIONS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from PIL import Image
from moco.data import folders as datasets
from moco.errors import InputError
Image.init()
root = Path(sys.argv[2])

def another_reads():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
    try:
        folder = datasets.scan(datasets.find(str(root), ("train",)), "train")
        print(len(folder))
        folder.read(0)
    except InputError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)

for folder in ("train", "train/class0", "train/class0/more"):
    for mode in (0o700, 0o711, 0o744):
        (root / folder).chmod(mode)
        another_reads()
    (root / folder).chmod(0o755)
another_reads()
(root / "train" / "class0" / "1.jpg").chmod(0o600)
another_reads()
"""


@pytest.fixture
def another_user():
    """Call a script as a user without a home or a name, who owns no file; return what it prints."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def call(text, *words, **env):
        free = {
            name: value
            for name, value in os.environ.items()
            if name not in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")
        }
        with tempfile.TemporaryDirectory() as top:  # pytest's own folders are root's alone
            os.chmod(top, 0o755)
            command = [sys.executable, "-B", "-c", text, str(ROOT), *map(str, words)]
            result = subprocess.run(
                command, capture_output=True, text=True, cwd=top, env=free | env
            )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return call


def test_permissions_of_folders(another_user):
    """Without r, x or both, for the split, a class folder or one below; and with both."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        root = write_images(Path(top) / "data")
        (root / "train" / "class0" / "more").mkdir()
        (root / "train" / "class0" / "0.jpg").rename(root / "train" / "class0" / "more" / "0.jpg")
        *refused, found, again, image = another_user(PERMISSIONS, root)
    assert len(refused) == 9 and found == again == "24"
    for folder, said in zip(
        ("train", "train/class0", "train/class0/more"), refused[::3], strict=True
    ):
        assert said.startswith(f"{root / folder}: cannot be read: Permission denied; ")
        i = refused.index(said)
        assert refused[i : i + 3] == [said] * 3
    assert (
        image
        == f"{root}/train/class0/1.jpg: unreadable image (Permission denied); remove or replace it"
    )


# several processes


def list_of_rank(rank, folder):
    """Rank 1 may see other images, in another data folder."""
    try:
        return len(scan(Path(f"{folder}{rank}"), "train"))
    except InputError as error:
        return [str(error)]


def test_ranks_with_different_images_are_refused_on_each(tmp_path):
    for name in ("same", "fewer", "others", "labels"):
        for rank in range(2):
            make(
                tmp_path / f"{name}{rank}", "train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg"
            )
    (tmp_path / "fewer1" / "train" / "cat" / "2.jpg").unlink()
    (tmp_path / "others1" / "train" / "cat" / "2.jpg").rename(
        tmp_path / "others1" / "train" / "cat" / "3.jpg"
    )
    (tmp_path / "labels1" / "train" / "dog").rename(tmp_path / "labels1" / "train" / "elk")
    names = ("same", "fewer", "others", "labels")
    of = on_two_ranks({name: (list_of_rank, str(tmp_path / name)) for name in names}, tmp_path)
    assert of("same") == [3, 3]
    for name, count in (("fewer", 2), ("others", 3), ("labels", 3)):
        for rank, (message,) in enumerate(of(name)):
            said = f"rank 0 and rank 1 find different images (3 and {count} of them)"
            assert message.startswith(f"{tmp_path}/{name}{rank}/train: {said}")


# names that are not UTF-8


def latin(name):
    return os.fsdecode(name.encode("latin-1"))


def test_names_that_are_not_utf_8(tmp_path):
    make(
        tmp_path,
        latin("train/pi\xe8ces/\xe9.jpg"),
        latin("train/pi\xe8ces/1.jpg"),
        "train/cat/1.jpg",
    )
    folder = scan(tmp_path, "train")
    assert folder.classes == ("cat", latin("pi\xe8ces"))
    assert [os.path.exists(folder.path(i)) for i in range(3)] == [True] * 3
    assert os.fsencode(folder.name(2)) == b"pi\xe8ces/\xe9.jpg"


# the cache folder


def _no_home(_: type[Path]) -> Path:
    raise RuntimeError(
        "Could not determine home directory."
    )  # as of a user without an entry in passwd


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """Remove HOME and the entry in passwd; return the folder for temporary files."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(_no_home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("home", [None, "a file", "below a file", "read-only"])
def test_photos_without_a_home_that_can_be_written(no_home, monkeypatch, home):
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    if home:
        place = no_home / "home"
        place.touch() if "file" in home else place.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / "x" if home == "below a file" else place))
    if home == "read-only":
        access = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda path, how: not Path(path).is_relative_to(place) and access(path, how),
        )
    own = no_home / f"hard-negatives-{os.getuid()}"
    cache = own / ".cache" / "hard-negatives"
    assert find("photos", BOTH) == cache / "photos-v2" and cache_folder() == cache
    assert len(contents(cache / "photos-v2")) == 90 and own.stat().st_mode & 0o777 == 0o700


def test_photos_in_a_home_that_can_only_be_read_are_used(no_home, monkeypatch):
    """A container's image may hold them; damaged ones are not used."""
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home / "home"))
    theirs = find("photos", BOTH)
    assert theirs.is_relative_to(no_home / "home")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert find("photos", BOTH) == theirs
    next(theirs.rglob("007.jpg")).unlink()
    assert find("photos", BOTH).is_relative_to(no_home / f"hard-negatives-{os.getuid()}")


@pytest.mark.parametrize("whose", ["theirs", "everybody's", "a link", "a file"])
def test_a_temporary_folder_of_somebody_else_is_not_used(no_home, monkeypatch, whose):
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
    message = complaint(find, "photos", BOTH)
    assert message.startswith(
        f"{own}: is not a folder that you alone can write to; set XDG_CACHE_HOME"
    )


WITHOUT_A_NAME = """
import getpass, os, sys
sys.path.insert(0, sys.argv[1])
from moco import user
from moco.data import folders, photos
photos.PHOTOS = ["chelsea"]
photos._photograph("chelsea")
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
user.prepare()
print(getpass.getuser(), os.path.expanduser("~"))
print(folders.find("photos", ("train", "val")))
"""


def test_a_user_without_a_name_or_home_gets_both(another_user):
    """PyTorch's compiler and others ask for them."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o1777)
        home = f"{top}/hard-negatives-54321"
        said = another_user(WITHOUT_A_NAME, TMPDIR=top)
        assert said == [f"54321 {home}", f"{home}/.cache/hard-negatives/photos-v2"]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "no image", "class", "all"])
def test_damaged_photos_are_written_again(cache, monkeypatch, damage):
    use_photographs(monkeypatch, {"noise": picture(lambda x: x % 256, 300, 200)})
    root = find("photos", BOTH)
    whole = contents(root)
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
        file.write_bytes({"empty": b"", "cut": data[:-100], "no image": b"x" * len(data)}[damage])
    assert find("photos", BOTH) == root and contents(root) == whole
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
    assert complaint(find, "photos", BOTH).startswith(
        f"{root}: cannot be written: Permission denied; "
    )
    assert list(root.parent.iterdir()) == [root]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-8", b"pi\\udce8ces \xe6\x97\xa5\n"), ("ascii", b"pi\\udce8ces \\u65e5\n")],
)
def test_any_name_can_be_printed(monkeypatch, encoding, text):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    user.prepare()
    for stream in (sys.stdout, sys.stderr):
        print("pi\udce8ces \u65e5", file=stream, flush=True)
        assert stream.buffer.getvalue() == text
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # closed
    user.prepare()
