"""Tests of `moco.data.folders` on folders that the user may not read."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from conftest import write_images
from folder_helpers import error_message, link, make_files, run_without_home

from moco.data.sources import scan


def refuse(monkeypatch, folder, number):
    """Make os.scandir fail on `folder`. The tests may run as root, who may read everything."""
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
def test_the_error_names_the_folder_that_cannot_be_read(
    images, tmp_path, monkeypatch, inside, number
):
    make_files(images, "train/class1/more/1.jpg")
    link(images / "train" / "class1" / "link", make_files(tmp_path / "disk", "1.jpg"))
    refuse(monkeypatch, images / inside, number)
    message = error_message(scan, images, "train")
    assert message.startswith(f"{images / inside}: cannot be read: {os.strerror(number)}; ")
    assert ("chmod" in message) == (number == errno.EACCES)


PERMISSIONS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from PIL import Image
from moco.data import sources as datasets
from moco.errors import InputError
Image.init()
root = Path(sys.argv[2])

def read_as_another_user():
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
        read_as_another_user()
    (root / folder).chmod(0o755)
read_as_another_user()
(root / "train" / "class0" / "1.jpg").chmod(0o600)
read_as_another_user()
"""


def test_missing_permissions_are_refused():
    """Another user reads a split, class folder or nested folder without r, x or both."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        root = write_images(Path(top) / "data")
        (root / "train" / "class0" / "more").mkdir()
        (root / "train" / "class0" / "0.jpg").rename(root / "train" / "class0" / "more" / "0.jpg")
        *refused, found, again, image = run_without_home(PERMISSIONS, root)
    assert len(refused) == 9 and found == again == "24"
    for folder, error in zip(
        ("train", "train/class0", "train/class0/more"), refused[::3], strict=True
    ):
        assert error.startswith(f"{root / folder}: cannot be read: Permission denied; ")
        i = refused.index(error)
        assert refused[i : i + 3] == [error] * 3
    assert (
        image
        == f"{root}/train/class0/1.jpg: unreadable image (Permission denied); remove or replace it"
    )
