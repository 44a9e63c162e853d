#!/usr/bin/env python
"""Write the images of a data folder to tar files, from which they are read fast in any order.

DIR is a folder with a Hugging Face data set (parquet files, or arrow files of save_to_disk), or any
other data folder that pre-training reads. The tool writes OUT/train-00000-of-N.tar and so on, and
val-*.tar if DIR has validation images. The bytes, the order and the classes of the images stay the
same. Integer labels are in .cls members, and their names in OUT/classes.txt. If the tool is
stopped, the same command continues; each tar file appears under its name when it is complete.
"""

import argparse
import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from moco import sections
from moco.cli import tool, values
from moco.errors import InputError
from moco.files import half_written, read_text, replacing, to_json
from moco.messages import counted

if TYPE_CHECKING:
    from moco.data.images import EncodedImages

STATE = ".parquet_to_tar.json"  # what OUT is made from
_STARTS = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}
_STARTS |= {b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"}


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", metavar="DIR", help="data folder to read")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the tar files")
    parser.add_argument(
        "--shard-size",
        type=values.in_range(int, sections.POSITIVE),
        default=5000,
        metavar="N",
        help="images in a tar file (default: %(default)s)",
    )
    return tool.run(parser, convert)


def convert(args: argparse.Namespace) -> None:
    """Write the tar files. Raises InputError if DIR or OUT cannot be used."""
    from moco.data import sources
    from moco.data.images import EncodedImages

    root, out = sources.find(args.dir, ("train",), labels=False), args.out
    if out.exists() and out.samefile(root):
        raise InputError(f"{out}: is the folder to read; choose another one for the tar files")
    splits = {"train": sources.scan(root, "train")}
    if sources.locate(root, "val") is not None:
        classes = splits["train"].classes
        names = sources.class_names(root, "val")
        splits["val"] = sources.scan(root, "val", classes if names else ())
    for images in splits.values():
        if not isinstance(images, EncodedImages):
            raise InputError(f"{images.root}: its images are not in files; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_state(out, splits, args.shard_size)
        if classes := next((one.classes for one in splits.values() if one.labelled), None):
            _write_classes(out, classes)
        for split, images in splits.items():
            write_split(out, split, images, args.shard_size)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); make room or choose another "
            "folder, and start again"
        ) from None


def _check_state(out: Path, splits: "dict[str, EncodedImages]", shard_size: int) -> None:
    """Record what OUT is made from.

    Raises InputError if it was made from something else, or if the scripts would read other images
    in it than those of the tar files.
    """
    from moco.data.splits import FOLDERS

    facts: dict[str, object] = {"shard_size": shard_size}
    for split, images in splits.items():
        digest = hashlib.sha256(repr(images.classes).encode() + images.content()).hexdigest()
        facts[split] = {"images": len(images), "sha256": digest}
    text = to_json(facts, indent=2)
    if (out / STATE).exists():
        if read_text(out / STATE).strip() != text:
            raise InputError(
                f"{out}: was made from other images, or with another --shard-size; choose another "
                "folder"
            )
        return
    if there := sorted(out.glob("*.tar")):
        raise InputError(f"{there[0]}: exists already; choose an empty folder")
    folders = (out / name for names in FOLDERS.values() for name in names)
    if there := [folder for folder in folders if folder.is_dir()]:
        raise InputError(
            f"{there[0]}: exists, and its images would be used instead of the tar files; choose an "
            "empty folder"
        )
    with replacing(out / STATE) as file:
        file.write(f"{text}\n".encode())


def _write_classes(out: Path, classes: tuple[str, ...]) -> None:
    """Write the names of the classes. Raises InputError if one does not fit in a line of text."""
    from moco.data.labels import CLASSES_FILE

    if bad := next((name for name in classes if not name.isprintable()), None):
        raise InputError(
            f"the class {bad!r} cannot be written to {CLASSES_FILE}; let its name be printable text"
        )
    with replacing(out / CLASSES_FILE) as file:
        file.write("".join(f"{name}\n" for name in classes).encode())


def write_split(out: Path, split: str, images: "EncodedImages", shard_size: int) -> None:
    """Write the tar files of a split that do not exist yet."""
    from tqdm import tqdm

    count = -(-len(images) // shard_size)
    keys, written = _keys(images), 0
    with tqdm(total=len(images), desc=split, unit="image", disable=None) as bar:
        for k in range(count):
            path = out / f"{split}-{k:05d}-of-{count:05d}.tar"
            rows = range(k * shard_size, min((k + 1) * shard_size, len(images)))
            if not path.exists():
                for old in half_written(out, path.name):
                    old.unlink(missing_ok=True)
                with replacing(path) as file:
                    _write(file, images, rows, keys)
                written += 1
            bar.update(len(rows))
    there = f", of which {count - written} were there" if written < count else ""
    print(
        f"{split}: {counted(len(images), 'image')} in {counted(count, 'tar file')}{there}, in {out}"
    )


def _write(file: BinaryIO, images: "EncodedImages", rows: range, keys: list[str]) -> None:
    """Write a tar file with the images of these rows, in their order."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in rows:
            data = images.encoded(i).tobytes()
            _add(tar, keys[i] + _suffix(data, images.name(i)), data)
            if images.labelled:
                _add(tar, f"{keys[i]}.cls", str(images.labels[i]).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member. Its time and owner are constant, so that the same images give equal files."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _suffix(data: bytes, name: str) -> str:
    """Return the suffix of an image by its content or, if that is unknown, by its name."""
    from moco.data.decoding import SUFFIXES

    known = next((suffix for start, suffix in _STARTS.items() if data.startswith(start)), None)
    given = os.path.splitext(name)[1].lower()
    return known or (given if given in SUFFIXES else ".jpg")


def _keys(images: "EncodedImages") -> list[str]:
    """Return a key for each image: the name of its file, with folders if names repeat, or a number.

    A file name's own dots are replaced, because a key ends at its first dot.
    """
    from moco.data.images import ImageFolder

    names = [os.path.splitext(images.name(i))[0] for i in range(len(images))]
    parts = [os.path.split(name) for name in names]
    bases = [base.replace(".", "_") for _, base in parts]
    in_folders = [
        os.path.join(folder, base) for (folder, _), base in zip(parts, bases, strict=True)
    ]
    for keys in (bases, in_folders) if isinstance(images, ImageFolder) else (bases,):
        if len(set(keys)) == len(keys) and all(0 < len(key) <= _MAX_KEY for key in keys):
            return keys
    return [f"{i:08d}" for i in range(len(images))]


_MAX_KEY = 200  # characters


if __name__ == "__main__":
    sys.exit(main())
