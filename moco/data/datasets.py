"""Image folders in the ImageNet layout, and the built-in `photos`."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


@dataclass(frozen=True)
class ImageFolder:
    """The images of one split: ROOT/CLASS/.../IMAGE.

    `paths` is an array of bytes relative to `root` and `labels` an int64 array, both [N]: arrays, because worker processes
    that count references to a million strings copy the memory that they share.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        """The full path of image `i`."""
        return os.path.join(self.root, os.fsdecode(self.paths[i]))


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
    classes = classes or class_names(folder)
    paths: list[bytes] = []
    labels: list[int] = []
    for name in class_names(folder):
        images = sorted(_images(folder / name))
        if not images:
            raise InputError(f"{folder / name}: holds no image ({', '.join(SUFFIXES)}); remove the folder or fill it")
        paths += (os.fsencode(os.path.relpath(image, folder)) for image in images)
        labels += [classes.index(name)] * len(images)
    return ImageFolder(folder, np.array(paths), np.array(labels), classes)


def _images(folder: Path) -> list[str]:
    return [
        os.path.join(where, name)
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]


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
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hard-negatives"
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
