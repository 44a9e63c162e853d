"""The built-in data set: patches of four photographs that come with scikit-learn and scikit-image."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from moco.errors import InputError
from moco.user import private_folder

# The built-in data set: patches of the photographs that scikit-image and scikit-learn ship.

PHOTOS = (
    "astronaut brick camera cell chelsea coffee coins grass gravel hubble_deep_field ihc moon motorcycle_left page "
    "retina rocket text china flower"
).split()


_PATCH = 96  # pixels


_TRAIN_PATCHES, _VAL_PATCHES = 60, 30  # per photograph


_LEFT = 0.5  # train's share of the width


_PHOTOS_FOLDER = "photos-v2"


_FLAT = 2.0  # grey levels of standard deviation; a patch below shows nothing


def photos() -> Path:
    """The folder of the built-in data set, written on first use: 19 classes, one per photograph, JPEGs of 96 pixels.

    Train patches come from the left part and val patches from the right part of each photograph; no pixel is in both.
    Writes an incomplete copy again. Raises InputError if it cannot be replaced.
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
        with contextlib.suppress(OSError):  # the folder exists: another process's, or a damaged one
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

    Operating systems delete old files from temporary folders.
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
    """Return the project's cache folder, which exists and which this user can write to.

    It is in XDG_CACHE_HOME or ~/.cache; if that cannot be written, in `user.private_folder`. Raises
    InputError if the private folder is not this user's alone.
    """
    return _cache_folders()[-1]


def _cache_folders() -> list[Path]:
    """Return the cache folders to search: the home's and, if it is read-only, a private one."""
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


def in_cache(name: str) -> list[Path]:
    """Return the paths at which `name` may lie in the cache; the last one is the one to write."""
    return [folder / name for folder in _cache_folders()]


def _photograph(name: str):
    import skimage
    import sklearn.datasets
    from PIL import Image

    folders = [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
    ]
    files = [file for folder in folders for file in folder.glob(f"{name}.*")]
    if not files:
        raise InputError(
            f"photos: no photograph '{name}' among scikit-image's and scikit-learn's; pip install scikit-image scikit-learn"
        )
    return Image.open(files[0]).convert("RGB")


def _write_patches(root: Path, name: str, photograph, rng: np.random.Generator) -> None:
    """Random squares of 96 pixels, or of what the part allows, at 96; black or blank ones are drawn again."""
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
    return f"{i:03d}.jpg"


def _patch(photograph, left: int, right: int, rng: np.random.Generator):
    height = photograph.size[1]
    size = min(_PATCH, right - left, height)
    x, y = int(rng.integers(left, right - size + 1)), int(rng.integers(0, height - size + 1))
    return photograph.crop((x, y, x + size, y + size)).resize((_PATCH, _PATCH), 3)
