"""Find and list the images of a data folder, in each layout that it can have.

The layouts are in `LAYOUTS`. The data sets with a layout of their own are in `registry`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moco.data import folders, splits, tables, tars
from moco.data.decoding import SUFFIXES
from moco.data.folders import is_folder, split_folder
from moco.data.images import Images
from moco.data.photos import photos
from moco.errors import InputError
from moco.messages import counted


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
    lambda folder, _: folders.has_class_folders(folder),
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
        if _has_split(root):
            return None
        folder = root
    # the folders in a data folder without splits are not classes
    layouts = (one for one in LAYOUTS if not (one is CLASS_FOLDERS and folder == root))
    layout = next((one for one in layouts if one.holds(folder, split)), None)
    return layout and Source(folder, layout)


def _has_split(root: Path) -> bool:
    """Return whether the data folder has the folder of a split."""
    return any(is_folder(root / name) for names in _NAMES.values() for name in names)


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
        what = "is a file, and a folder is needed" if root.is_file() else "no such folder"
        listed = " (pre-training reads a list of images with --file-list)" * root.is_file()
        raise InputError(
            f"{data}: {what}{listed}; give a folder of images, such as ImageNet's "
            "(train/CLASS/*.jpg), or the word photos"
        )
    names = {split: _check_split(root, split, labels) for split in splits}
    train = names.get("train", ())
    if "val" in splits:
        folder, val = split_folder(root, "val"), names["val"]
        extra = sorted(set(val) - set(train)) if train else []
        if (folder / "val_annotations.txt").is_file() and val == ("images",):
            raise InputError(
                f"{folder}: holds its images in one folder, as Tiny ImageNet does; give "
                "--dataset tiny_imagenet"
            )
        if len(val) == 1 and len(train) != 1:
            raise InputError(
                f"{folder}: holds one class folder only ({val[0]}); sort its images into class "
                "folders named as in train/"
            )
        if extra:
            raise InputError(
                f"{folder}: {counted(len(extra), 'class is', 'classes are')} not among train's, "
                f"first '{extra[0]}'; name the folders as in train/"
            )
    return root


def _check_split(root: Path, split: str, labels: bool) -> tuple[str, ...]:
    """Return the class names of a split; an empty tuple if its images have no labels.

    Raises InputError if the split is missing, or if it has no labels and `labels` is true.
    """
    folder, source = split_folder(root, split), locate(root, split)
    names = source.layout.class_names(source.folder, split) if source else ()
    if source is not None and (names or not labels):
        return names
    if source is not None and source.layout in (TARS, TABLES):
        raise InputError(
            f"{source.folder}: its {split} images have no labels, and labels are needed; "
            "docs/data.md says how files store them"
        )
    if source is not None and source.folder == root:
        raise InputError(
            f"{root}: has no {split}/ folder, so its images have no labels, and labels are "
            f"needed; expected {split}/CLASS/*.jpg"
        )
    if is_folder(folder) and not labels:
        raise InputError(
            f"{folder}: holds no image ({', '.join(SUFFIXES)}), nor a folder with images"
        )
    if is_folder(folder):
        folders.class_names(folder)  # raises the error
    if split == "val":
        # a folder with val/, or images that it can be made from
        made = locate(root, "train") is not None
        how = "; docs/data.md has a command that makes val/ from a part of the training images"
        raise InputError(
            f"{root}: has no val/ folder, nor a test/ folder with class folders; expected "
            f"val/CLASS/*.jpg or test/CLASS/*.jpg, val-*.tar or val-*.parquet{how * made}"
        )
    if not labels and not _has_split(root):
        raise InputError(
            f"{root}: holds no image ({', '.join(SUFFIXES)}), nor a folder with images; expected "
            f"images anywhere in it, {split}/CLASS/*.jpg, {split}-*.tar or {split}-*.parquet"
        )
    raise InputError(
        f"{root}: has no {split}/ folder; expected {split}/CLASS/*.jpg, {split}-*.tar or "
        f"{split}-*.parquet"
    )


def holds_folders_without_labels(root: Path) -> bool:
    """Return whether training images lie in `root` itself, and folders there might be classes."""
    source = locate(root, "train")
    return source == Source(root, FLAT) and folders.has_class_folders(root)


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
