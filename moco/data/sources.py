"""Find and list the images of a data folder, in each layout that it can have.

The layouts are in `LAYOUTS`. The data sets with a layout of their own are in `registry`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moco.data import folders, splits, tables, tars
from moco.data.folders import is_folder, split_folder
from moco.data.images import Images
from moco.data.photos import photos
from moco.errors import InputError


class Layout(NamedTuple):
    """A way to store the images of a split in a folder.

    Attributes:
        holds: Returns whether the folder (first argument) has the images of the split (second
            argument) in this layout. The folder is that of the split, or the data folder itself.
        class_names: Returns the names of the classes; an empty tuple if there are no labels.
        scan: Lists the images. The third argument has the classes that labels are indices into; if
            it is empty, these are the split's own.
    """

    holds: Callable[[Path, str], bool]
    class_names: Callable[[Path, str], tuple[str, ...]]
    scan: Callable[[Path, str, tuple[str, ...]], Images]


class Source(NamedTuple):
    """The images of one split: a folder, and the layout of the images in it."""

    folder: Path
    layout: Layout


CLASS_FOLDERS = Layout(
    lambda folder, split: folder.name in _NAMES[split] and folders.has_class_folders(folder),
    lambda folder, _: folders.class_names(folder),
    lambda folder, _, classes: folders.scan_classes(folder, classes),
)
# images without class folders, nested in any way
FLAT = Layout(
    lambda folder, split: split == "train" and folders.has_images_below(folder),
    lambda _folder, _split: (),
    lambda folder, _split, _classes: folders.scan_flat(folder),
)
TARS = Layout(tars.holds, tars.class_names, tars.scan)
TABLES = Layout(tables.holds, tables.class_names, tables.scan)
# if a folder fits several layouts, the first one is used
LAYOUTS = (CLASS_FOLDERS, TARS, TABLES, FLAT)

_NAMES = splits.FOLDERS


def locate(root: Path, split: str) -> Source | None:
    """Return where the images of a split are, or None if there are none.

    They are in the folder of the split. If the data folder has no folder of any split, its images
    are training images.

    Raises InputError if a folder cannot be read.
    """
    folder = split_folder(root, split)
    if not is_folder(folder):
        if any(is_folder(root / name) for names in _NAMES.values() for name in names):
            return None
        folder = root
    found = (layout for layout in LAYOUTS if layout.holds(folder, split))
    layout = next(found, None)
    return layout and Source(folder, layout)


def find(data: str, splits: tuple[str, ...], labels: bool = True) -> Path:
    """Return the root folder that `data` names: a path, or the word `photos`.

    The folder must have the `splits`, a subset of "train" and "val". Images are neither listed nor
    read.

    Args:
        data: the path, or the word.
        splits: the splits that are needed.
        labels: whether the images must have labels.

    Raises InputError if the folder, a split or its labels are missing, or if val has classes that
    train lacks.
    """
    if data == "photos":
        return photos()
    root = Path(data)
    if not is_folder(root):
        raise InputError(
            f"{data}: no such folder; give an ImageNet-style folder (train/CLASS/*.jpg), or the "
            "word photos"
        )
    for split in splits:
        _check_split(root, split, labels)
    train = class_names(root, "train") if "train" in splits else ()
    if "val" in splits:
        folder, val = split_folder(root, "val"), class_names(root, "val")
        extra = sorted(set(val) - set(train)) if train else []
        if len(val) == 1 and len(train) != 1:
            raise InputError(
                f"{folder}: holds one class folder only ({val[0]}); sort its images into class "
                "folders named as in train/"
            )
        if extra:
            raise InputError(
                f"{folder}: {len(extra)} classes are not among train's, first '{extra[0]}'; "
                "name the folders as in train/"
            )
    return root


def _check_split(root: Path, split: str, labels: bool) -> None:
    """Raise InputError if the split is missing, or if it has no labels and `labels` is true."""
    folder, source = split_folder(root, split), locate(root, split)
    if source is not None and source.layout in (TARS, TABLES):
        if labels and not source.layout.class_names(source.folder, split):
            raise InputError(
                f"{source.folder}: its {split} images have no labels, and labels are needed; "
                "docs/data.md says how files store them"
            )
        return
    if source is not None and source.layout is FLAT and labels:
        if source.folder == root:
            raise InputError(
                f"{root}: has no {split}/ folder, so its images have no labels, and labels are "
                f"needed; expected {split}/CLASS/*.jpg"
            )
        folders.class_names(folder)  # raises the error
    if source is None and is_folder(folder):
        folders.class_names(folder)  # raises the error
    if source is None:
        other = ", nor a test/ folder with class folders" if split == "val" else ""
        expected = f"{split}/CLASS/*.jpg" + " or test/CLASS/*.jpg" * (split == "val")
        raise InputError(
            f"{root}: has no {split}/ folder{other}; expected {expected}, or {split}-*.tar or "
            f"{split}-*.parquet"
        )


def class_names(root: Path, split: str) -> tuple[str, ...]:
    """Return the names of a split's classes; an empty tuple if there are no labels.

    Call `find` first, which raises a clear error if the split is missing.
    """
    source = _located(root, split)
    return source.layout.class_names(source.folder, split)


def scan(root: Path, split: str, classes: tuple[str, ...] = ()) -> Images:
    """List the images of a split. Labels are indices into `classes`, by default the split's own.

    Call `find` first, which raises a clear error if the split is missing.

    Raises InputError if the images cannot be listed, and on every rank if the ranks find different
    images.
    """
    source = _located(root, split)
    return folders.same_on_all_ranks(source.layout.scan(source.folder, split, classes))


def _located(root: Path, split: str) -> Source:
    """Return where the images of a split are. Raises InputError if there are none."""
    source = locate(root, split)
    if source is None:
        _check_split(root, split, labels=False)  # raises the error
        raise InputError(f"{root}: has no {split} images any more; start again")
    return source
