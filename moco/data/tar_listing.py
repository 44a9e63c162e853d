"""List the images and labels in a tar file, in WebDataset's layout.

An image is a member KEY.jpg (or another image suffix). Its label is in the member KEY.cls or
KEY.json of the same file. A key ends at the first dot of the member's file name.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moco.data.decoding import SUFFIXES
from moco.errors import InputError, one_line, short
from moco.files import unreadable

BLOCK = 512  # the bytes of a header; a member's content starts at a multiple of them
_MAX_NAME = 1000  # bytes
_MAX_LABEL = 1 << 20  # bytes of a .cls or .json member
_MAX_CLASS_NAME = 1000  # bytes
JSON_KEYS = ("cls", "label", "class", "class_name")  # of a label, the first that is there is used


class Listing(NamedTuple):
    """The images in one tar file, in the order of the file.

    Attributes:
        members: Their names in the tar file, as bytes [n].
        offsets: The first byte of each image in the tar file, int64 [n].
        sizes: The bytes of each image, int64 [n].
        labels: Their labels in UTF-8 [n]. An integer is in decimal digits. Empty: no label.
        left_out: The numbers of other members, by ending or type.
    """

    members: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    left_out: Counter[str]


class _Found:
    """The images and labels that were found in a tar file so far, by key."""

    def __init__(self):
        self.images: dict[str, tuple[bytes, int, int]] = {}
        self.labels: dict[str, bytes] = {}  # of .cls
        self.json_labels: dict[str, bytes] = {}
        self.left_out: Counter[str] = Counter()


def list_tar(path: Path, progress: Callable[[int], None] = lambda _size: None) -> Listing:
    """List the images in a tar file. `progress` is called with the number of bytes passed.

    Raises InputError if the file is not a complete tar file without compression, if it holds no
    image, or if a key has two images or an unreadable label.
    """
    found, at = _Found(), 0
    try:
        # headers are far apart, so a large buffer would read much in vain
        with open(path, "rb", buffering=8 * BLOCK) as file, _opened(path, file) as tar:
            size = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps them all otherwise
                if tar.offset <= at or member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                _add(found, path, file, member)
                progress(tar.offset - at)
                at = tar.offset
            _check_end(path, file, tar.offset)
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        raise unreadable(error).at(path) from None
    except (ValueError, OverflowError, RecursionError) as error:  # from a damaged header
        raise _damaged(path, str(error)) from None
    progress(size - at)
    return _sorted_out(path, found)


def _opened(path: Path, file: BinaryIO) -> tarfile.TarFile:
    """Open a tar file. Raises InputError if it is empty, compressed, or something else."""
    start = file.read(BLOCK)
    file.seek(0)
    if not start:
        raise InputError(f"{path}: is empty; copy or download it again")
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise compressed(path)
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
    except tarfile.TarError:
        raise InputError(f"{path}: is not a tar file; remove or replace it") from None


def compressed(path: Path) -> InputError:
    """Return the error to raise for a compressed tar file."""
    return InputError(
        f"{path}: is compressed, so its images cannot be read in any order; decompress it "
        "(gzip -d, zstd -d, ...), or move it elsewhere"
    )


def _damaged(path: Path, reason: str) -> InputError:
    """Return the error to raise for a damaged tar file."""
    return InputError(
        f"{path}: is truncated or damaged ({short(reason)}); copy or download it again"
    )


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Raise InputError unless the marker of the end is at `end`, with nothing but zeros after it.

    tarfile takes a damaged header for the end.
    """
    file.seek(end)
    rest = file.read(64 * BLOCK)
    if len(rest) < BLOCK or any(rest[:BLOCK]):
        raise tarfile.ReadError(f"no end marker at byte {end}")
    if any(rest):
        raise InputError(
            f"{path}: has more data after its end at byte {end}, such as a second tar file; keep "
            "each tar file in a file of its own"
        )


def _add(found: _Found, path: Path, file: BinaryIO, member: tarfile.TarInfo) -> None:
    """Add a member to `found`."""
    name = _plain(member.name)
    folder, base = os.path.split(name)
    if member.isdir() or any(part.startswith(".") for part in (*folder.split("/"), base)):
        return  # hidden files, such as those of macOS
    if not member.isreg() or member.issparse():
        link = member.issym() or member.islnk()
        found.left_out["links" if link else "sparse members or special files"] += 1
        return
    stem, ending = base.split(".", 1) if "." in base else (base, "")
    key, lower = os.path.join(folder, stem), "." + ending.lower()
    if lower.endswith(SUFFIXES):
        encoded = os.fsencode(name)
        if len(encoded) > _MAX_NAME:
            raise InputError(f"{path}: the name of {short(name)} is too long; shorten it")
        if key in found.images:
            first = os.fsdecode(found.images[key][0])
            raise InputError(
                f"{path}: {short(first)} and {short(name)} have the same key, which ends at the "
                "first dot; rename one of them"
            )
        found.images[key] = (encoded, member.offset_data, member.size)
    elif lower in (".cls", ".json") and member.size <= _MAX_LABEL:
        file.seek(member.offset_data)
        content, where = file.read(member.size), f"{path}: {short(name)}"
        if lower == ".cls":
            found.labels[key] = _label(content, where)
        elif label := _json_label(content, where):
            found.json_labels[key] = label
    else:
        found.left_out[os.path.splitext(base)[1].lower() or "no ending"] += 1


def _plain(name: str) -> str:
    """Return a member's name without ./ at its start."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name.lstrip("/")


def _label(content: bytes, where: str) -> bytes:
    """Return the label in a .cls member. Raises InputError if there is none."""
    try:
        label = content.decode().strip()
    except UnicodeDecodeError:
        raise InputError(
            f"{where}: is not text in UTF-8; write the class's number or name"
        ) from None
    return _checked(label, where)


def _checked(label: str, where: str) -> bytes:
    """Return a label in UTF-8. Raises InputError unless it is one short line."""
    text = label.encode(errors="replace")
    if not label or not label.isprintable() or len(text) > _MAX_CLASS_NAME:
        raise InputError(
            f"{where}: holds no usable label ('{one_line(short(label))}'); write the class's "
            "number or name"
        )
    return text


def _json_label(content: bytes, where: str) -> bytes:
    """Return the label in a .json member; an empty string if it has none.

    Raises InputError if it is not JSON, or if the label is neither an integer nor a name.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: is not JSON; replace or remove it") from None
    if not isinstance(value, dict):
        return b""
    name = next((name for name in JSON_KEYS if value.get(name) is not None), None)
    if name is None:
        return b""
    label = value[name]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise InputError(
            f"{where}: its {name} is {short(str(label))}, which is neither an integer nor a name"
        )
    return _checked(str(label).strip(), where)


def _sorted_out(path: Path, found: _Found) -> Listing:
    """Return the listing of the images in `found`. Raises InputError if there is none."""
    left_out = found.left_out
    if not found.images:
        others = ", ".join(f"{ending} {count}" for ending, count in left_out.most_common(5))
        how = "; unpack it first" if left_out[".tar"] else "; remove it, or put images in it"
        raise InputError(f"{path}: holds no image{f', but {others}' if others else ''}{how}")
    labels = found.json_labels | found.labels
    if lonely := len(labels.keys() - found.images.keys()):
        left_out["labels without an image"] += lonely
    members, offsets, sizes = zip(*found.images.values(), strict=True)
    return Listing(
        np.array(members),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.array([labels.get(key, b"") for key in found.images]),
        left_out,
    )
