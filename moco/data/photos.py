"""The built-in data set `photos`, and the cache folder in which it is stored.

`photos` has patches of photographs that come with scikit-image and scikit-learn.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from moco.errors import InputError
from moco.user import private_folder

PHOTOS = [
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "ihc",
    "moon",
    "motorcycle_left",
    "page",
    "retina",
    "rocket",
    "text",
    "china",
    "flower",
]  # the photographs, and the classes named after them

_PHOTOS_FOLDER = "photos-v2"
_PATCH = 96  # pixels
_TRAIN_PATCHES, _VAL_PATCHES = 60, 30  # per photograph
_LEFT = 0.5  # train patches come from this fraction of a photograph's width, from the left
_FLAT = 2.0  # standard deviation in grey levels; a patch below it shows nothing


def photos() -> Path:
    """Return the folder of the built-in data set; write it on first use, or if it is incomplete.

    It has 19 classes, one per photograph, of JPEGs of 96 x 96 pixels. Train patches come from the
    left half of each photograph and val patches from the right half, so that they share no pixel.

    Raises InputError if an incomplete copy cannot be replaced.
    """
    for folder in _cache_folders():
        if _is_complete(folder / _PHOTOS_FOLDER):
            return folder / _PHOTOS_FOLDER
    home = cache_folder()
    root = home / _PHOTOS_FOLDER
    made, old = (Path(tempfile.mkdtemp(prefix="photos-", dir=home)) for _ in range(2))
    try:
        for label, name in enumerate(PHOTOS):
            _write_patches(made, name, _photograph(name), np.random.default_rng(label))
        made.chmod(0o755)
        # fails if another process was faster, or if a damaged copy exists
        with contextlib.suppress(OSError):
            made.rename(root)
        if not _is_complete(root):
            root.rename(old)
            made.rename(root)
    except OSError as error:
        how = "make room, remove it, or set XDG_CACHE_HOME to a folder of your own"
        raise InputError(f"{root}: cannot be written: {error.strerror}; {how}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return root


def _is_complete(root: Path) -> bool:
    """Return whether `root` holds every patch, none of them truncated.

    Some may be missing: operating systems delete old files from temporary folders.
    """
    try:
        for split, count in (("train", _TRAIN_PATCHES), ("val", _VAL_PATCHES)):
            for name in PHOTOS:
                for i in range(count):
                    data = (root / split / name / _patch_name(i)).read_bytes()
                    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
                        return False
                if len(os.listdir(root / split / name)) != count:
                    return False
            if len(os.listdir(root / split)) != len(PHOTOS):
                return False
    except OSError:
        return False
    return True


def cache_folder() -> Path:
    """Return the project's cache folder. It exists, and this user can write to it.

    It is in XDG_CACHE_HOME or ~/.cache or, if these are read-only, in `user.private_folder`.

    Raises InputError if other users can write to the private folder.
    """
    return _cache_folders()[-1]


def _cache_folders() -> list[Path]:
    """Return the cache folders to search: the user's and, if that is read-only, a private one."""
    folders = []
    with contextlib.suppress(RuntimeError):  # there is no home
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _CACHE)
        with contextlib.suppress(OSError):
            folders[0].mkdir(parents=True, exist_ok=True)
            if os.access(folders[0], os.R_OK | os.W_OK | os.X_OK):
                return folders
    folders.append(private_folder() / ".cache" / _CACHE)
    folders[-1].mkdir(parents=True, exist_ok=True)
    return folders


_CACHE = "hard-negatives"


def cache_paths(name: str) -> list[Path]:
    """Return the paths to search for `name` in the cache. Write a new file to the last one."""
    return [folder / name for folder in _cache_folders()]


def _photograph(name: str) -> Image.Image:
    """Open a photograph that comes with scikit-image or scikit-learn, as RGB."""
    import skimage
    import sklearn.datasets

    folders = [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
    ]
    files = [file for folder in folders for file in folder.glob(f"{name}.*")]
    if not files:
        raise InputError(
            f"photos: no photograph '{name}' among scikit-image's and scikit-learn's; "
            "pip install scikit-image scikit-learn"
        )
    return Image.open(files[0]).convert("RGB")


def _write_patches(
    root: Path, name: str, photograph: Image.Image, rng: np.random.Generator
) -> None:
    """Write random square patches of a photograph. Patches that show nothing are drawn again.

    Train patches come from the left of the photograph, val patches from the right.
    """
    width = photograph.size[0]
    border = round(width * _LEFT)
    for split, left, right, count in (
        ("train", 0, border, _TRAIN_PATCHES),
        ("val", border, width, _VAL_PATCHES),
    ):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            for _ in range(10):
                patch = _patch(photograph, left, right, rng)
                if np.std(patch) >= _FLAT:
                    break
            patch.save(folder / _patch_name(i), quality=92)


def _patch_name(i: int) -> str:
    """Return the file name of patch `i` of a class and split."""
    return f"{i:03d}.jpg"


def _patch(photograph: Image.Image, left: int, right: int, rng: np.random.Generator) -> Image.Image:
    """Draw a square patch between two columns. If it is smaller than 96 pixels, scale it up."""
    height = photograph.size[1]
    size = min(_PATCH, right - left, height)
    x, y = int(rng.integers(left, right - size + 1)), int(rng.integers(0, height - size + 1))
    return photograph.crop((x, y, x + size, y + size)).resize((_PATCH, _PATCH), 3)
