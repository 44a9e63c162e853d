"""Image folders in the ImageNet layout, and the built-in `photos`."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moco.data.images import SUFFIXES, ImageFolder
from moco.errors import InputError
from moco.files import replacing


def find(data: str, splits: tuple[str, ...]) -> Path:
    """The root folder that `data` names, checked without reading the images: `photos`, or a folder with `splits`.

    Raises InputError for a missing folder or split, a split without class folders, and for val classes that are not
    train's.
    """
    if data == "photos":
        return photos()
    root = Path(data)
    if not root.is_dir():
        raise InputError(f"{data}: no such folder; give an ImageNet-style folder (train/CLASS/*.jpg), or the word photos")
    for split in splits:
        if not (root / split).is_dir():
            raise InputError(f"{data}: has no {split}/ folder; expected {split}/CLASS/*.jpg")
    train = class_names(root / "train") if "train" in splits else ()
    if "val" in splits:
        val = class_names(root / "val")
        strange = sorted(set(val) - set(train)) if train else []
        if len(val) == 1 and len(train) != 1:
            raise InputError(
                f"{root / 'val'}: holds one class folder only ({val[0]}); sort its images into class folders named as in train/"
            )
        if strange:
            raise InputError(
                f"{root / 'val'}: {len(strange)} classes are not among train's, first '{strange[0]}'; name the folders as in train/"
            )
    return root


def class_names(split: Path) -> tuple[str, ...]:
    """The class folders of a split, sorted. Raises InputError where there is none."""
    entries = list(os.scandir(split))
    names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        flat = any(e.name.lower().endswith(SUFFIXES) for e in entries)
        what = "holds images but no class folders" if flat else "holds no class folders"
        raise InputError(f"{split}: {what}; expected {split.name}/CLASS/*.jpg")
    return tuple(names)


def scan(root: Path, split: str, classes: tuple[str, ...] = ()) -> ImageFolder:
    """List the images of `root`/`split`, sorted; labels are places in `classes` (default: the split's own folders).

    Raises InputError for a class folder without images.
    """
    folder = root / split
    kept = cache_folder() / "scans" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.npz"
    listing = _still_true(folder, kept)
    if listing is None:
        listing = _list(folder)
        _keep(kept, listing)
    own = tuple(os.fsdecode(name) for name in listing["names"])
    classes = classes or own
    place = {name: i for i, name in enumerate(classes)}
    labels = np.array([place[name] for name in own])[listing["labels"]]
    return ImageFolder(folder, labels, classes, listing["paths"])


# A million files take minutes to list on a network disk. The list is kept in the cache folder with the times at which its
# folders changed; a file that comes or goes changes its folder's.

_RACE = 2 * 10**9  # nanoseconds; a folder that changed so shortly before it was listed may change again at the same time


def _list(folder: Path) -> dict[str, np.ndarray]:
    """The images below a split by class, and its folders with their times of change. Raises InputError for an empty class."""
    now = time.time_ns()
    names = class_names(folder)
    folders, paths, labels = [b"."], [], []
    for label, name in enumerate(names):
        images: list[str] = []
        for where, _, files in os.walk(folder / name, followlinks=True):
            inside = os.path.relpath(where, folder)
            folders.append(os.fsencode(inside))
            images += (f"{inside}{os.sep}{file}" for file in files if file.lower().endswith(SUFFIXES) and file[0] != ".")
        if not images:
            raise InputError(f"{folder / name}: holds no image ({', '.join(SUFFIXES)}); remove the folder or fill it")
        paths += map(os.fsencode, sorted(images))
        labels += [label] * len(images)
    changed = _changed(folder, folders)
    changed[changed > now - _RACE] = -1  # never the same again
    listing = {"paths": paths, "labels": labels, "names": [os.fsencode(name) for name in names], "folders": folders}
    return {name: np.array(values) for name, values in listing.items()} | {"changed": changed}


def _changed(folder: Path, inside: Iterable[bytes]) -> np.ndarray:
    root = os.fsencode(folder)
    return np.array([os.stat(os.path.join(root, name)).st_mtime_ns for name in inside])


def _still_true(folder: Path, kept: Path) -> dict[str, np.ndarray] | None:
    """The kept listing, if there is one and no folder has changed since."""
    try:
        with np.load(kept, allow_pickle=False) as file:
            listing = dict(file)
        same = np.array_equal(listing["changed"], _changed(folder, listing["folders"].tolist()))
        return listing if same else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keep(kept: Path, listing: dict[str, np.ndarray]) -> None:
    """Write the listing. A cache that cannot be written is done without."""
    with contextlib.suppress(OSError), replacing(kept) as file:
        np.savez(file, **listing)


# The built-in data set: patches of the photographs that scikit-image and scikit-learn ship.

PHOTOS = (
    "astronaut brick camera cell chelsea coffee coins grass gravel hubble_deep_field ihc moon motorcycle_left page "
    "retina rocket text china flower"
).split()
_PATCH = 96  # pixels
_TRAIN_PATCHES, _VAL_PATCHES = 60, 30  # per photograph
_LEFT = 0.5  # train's share of the width
_FLAT = 2.0  # grey levels of standard deviation; a patch below shows nothing


def photos() -> Path:
    """The folder of the built-in data set, written on first use: 19 classes, one per photograph, JPEGs of 96 pixels.

    Train patches come from the left part and val patches from the right part of each photograph; no pixel is in both.
    """
    home = cache_folder()
    root = home / "photos-v2"
    if root.is_dir():
        return root
    home.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="photos-", dir=home))
    try:
        for label, name in enumerate(PHOTOS):
            _write_patches(made, name, _photograph(name), np.random.default_rng(label))
        made.chmod(0o755)
        made.rename(root)
    except OSError:
        if not root.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return root


def cache_folder() -> Path:
    """The project's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hard-negatives"


def _photograph(name: str):
    import skimage
    import sklearn.datasets
    from PIL import Image

    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"]
    files = [file for folder in folders for file in folder.glob(f"{name}.*")]
    if not files:
        raise InputError(f"photos: no photograph '{name}' among scikit-image's and scikit-learn's; pip install -r requirements.txt")
    return Image.open(files[0]).convert("RGB")


def _write_patches(root: Path, name: str, photograph, rng: np.random.Generator) -> None:
    """Random squares of 96 pixels, or of what the part allows, at 96; black or blank ones are drawn again."""
    width = photograph.size[0]
    border = round(width * _LEFT)
    for split, left, right, count in (("train", 0, border, _TRAIN_PATCHES), ("val", border, width, _VAL_PATCHES)):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            for _ in range(10):
                patch = _patch(photograph, left, right, rng)
                if np.std(patch) >= _FLAT:
                    break
            patch.save(folder / f"{i:03d}.jpg", quality=92)


def _patch(photograph, left: int, right: int, rng: np.random.Generator):
    height = photograph.size[1]
    size = min(_PATCH, right - left, height)
    x, y = int(rng.integers(left, right - size + 1)), int(rng.integers(0, height - size + 1))
    return photograph.crop((x, y, x + size, y + size)).resize((_PATCH, _PATCH), 3)
