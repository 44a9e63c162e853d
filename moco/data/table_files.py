"""Open parquet and arrow files, and find their columns of images and labels. It needs pyarrow."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco.data import labels
from moco.errors import InputError, short
from moco.files import unreadable

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png")
LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "target")
KEPT_BYTES = 64 << 20  # of row groups that a process keeps, unless a single one is larger


class Columns(NamedTuple):
    """The columns of a table that are used.

    Attributes:
        image: The column with the images.
        nested: Whether that column is a struct of `bytes` and `path`.
        has_path: Whether it is a struct with a `path`.
        label: The column with the labels; None if there are no labels.
        class_names: The names of the classes 0, 1, 2, ..., if the table has them.
    """

    image: str
    nested: bool
    has_path: bool
    label: str | None
    class_names: tuple[str, ...]


def pyarrow() -> Any:
    """Return the module pyarrow. Raises InputError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "parquet and arrow files need the package pyarrow: pip install pyarrow"
        ) from None
    return pyarrow


def find_columns(schema: Any, path: Path) -> Columns:
    """Return the columns of images and labels in a table with this pyarrow schema.

    Raises InputError, which names the file `path`, if they cannot be identified.
    """
    features = _features(schema)
    image = _one_of(
        [f.name for f in schema if _is(features, f.name, "Image") and _holds_bytes(f.type)]
        or [f.name for f in schema if _holds_bytes(f.type)],
        IMAGE_NAMES,
        f"{path}: several columns may hold the images",
    )
    if image is None:
        there = ", ".join(f"{f.name} ({short(str(f.type), 60)})" for f in schema)
        raise InputError(
            f"{path}: has no column with the bytes of images, as a struct of bytes and path or as "
            f"binary; its columns are {short(there, 600)}"
        )
    types = pyarrow().types
    scalar = (types.is_integer, types.is_string, types.is_large_string)
    usable = {f.name for f in schema if any(is_(f.type) for is_ in scalar)}
    label = _one_of(
        [name for name in schema.names if _is(features, name, "ClassLabel") and name in usable]
        or [name for name in LABEL_NAMES if name in usable][:1],
        LABEL_NAMES,
        f"{path}: several columns have labels",
    )
    names: Sequence[str] = ()
    if label is not None and _is(features, label, "ClassLabel"):
        given = features[label].get("names")
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            names = given
            labels.check_names(f"{path}: column {label}", names)
    type_ = schema.field(image).type
    nested = types.is_struct(type_)
    has_path = nested and types.is_string(_field_type(type_, "path"))
    return Columns(image, nested, has_path, label, tuple(names))


def _features(schema: Any) -> dict[str, Any]:
    """Return the column types that the package datasets stores in the schema's metadata."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is(features: dict[str, Any], name: str, type_: str) -> bool:
    """Return whether the package datasets gives a column this type."""
    return isinstance(features.get(name), dict) and features[name].get("_type") == type_


def _field_type(struct: Any, name: str) -> Any:
    """Return the type of a field of a struct type; null if there is no such field."""
    i = struct.get_field_index(name)
    return struct.field(i).type if i >= 0 else pyarrow().null()


def _holds_bytes(type_: Any) -> bool:
    """Return whether a column of this type may hold encoded images."""
    types = pyarrow().types
    if types.is_struct(type_):
        type_ = _field_type(type_, "bytes")
    return types.is_binary(type_) or types.is_large_binary(type_)


def _one_of(found: list[str], preferred: Sequence[str], problem: str) -> str | None:
    """Return the column to use of those `found`. Raises InputError if none is preferred."""
    if len(found) < 2:
        return found[0] if found else None
    name = next((name for name in preferred if name in found), None)
    if name is None:
        raise InputError(f"{problem} ({short(', '.join(found))}); name one of them {preferred[0]}")
    return name


def attempt(path: Path, read: Callable[[], Any]) -> Any:
    """Return `read()`. Raises InputError, which names the file, if the file is damaged."""
    try:
        return read()
    except InputError:
        raise
    except OSError as error:
        if error.strerror:
            raise unreadable(error).at(path) from None
        reason: Exception = error
    except Exception as error:  # pyarrow raises errors of many types
        reason = error
    text = short(" ".join(str(reason).split())) or type(reason).__name__
    raise InputError(f"{path}: is truncated or damaged ({text}); copy or download it again")


class _Images:
    """The encoded images in a pyarrow column, which consists of chunks."""

    def __init__(self, column: Any, columns: Columns):
        """Take the column of images and the facts about it."""
        self.chunks = [_field(chunk, "bytes" * columns.nested) for chunk in column.chunks]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64)
        self.nbytes = sum(chunk.nbytes for chunk in self.chunks)

    def __getitem__(self, i: int) -> Any:
        """Return the bytes of image `i` as a pyarrow buffer; None if there are none."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        chunk = self.chunks[k]
        return chunk[i - int(self.ends[k]) + len(chunk)].as_buffer()


def _field(chunk: Any, name: str) -> Any:
    """Return a field of an array of structs; the array itself if `name` is empty."""
    return chunk.field(name) if name else chunk


def _values(table: Any, name: str, field: str) -> list[Any]:
    """Return the values in a column, or in a field of a column of structs."""
    chunks = table.column(name).chunks
    return [value for chunk in chunks for value in _field(chunk, field).to_pylist()]


class Arrow:
    """An open arrow file, mapped into memory: any of its images is read at once."""

    def __init__(self, path: Path):
        """Open the file and find its columns."""
        pa = pyarrow()
        source = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_file(source).read_all()
        self.table, self.rows = table, table.num_rows
        self.columns = find_columns(table.schema, path)
        self.images = _Images(table.column(self.columns.image), self.columns)
        for name in filter(None, (self.columns.image, self.columns.label)):
            for chunk in table.column(name).chunks:
                chunk.validate(full=True)  # a damaged file must not lead outside the mapped memory

    def values(self, column: str, field: str = "") -> list[Any]:
        """Return the values in a column, or in a `field` of a column of structs."""
        return _values(self.table, column, field)

    def image(self, row: int) -> Any:
        """Return the bytes of an image as a pyarrow buffer; None if there are none."""
        return self.images[row]


class Parquet:
    """An open parquet file. Reading an image means to read all images of its row group."""

    def __init__(self, path: Path):
        """Open the file and find its columns."""
        self.file = pyarrow().parquet.ParquetFile(str(path), memory_map=False)
        self.path, self.columns = path, find_columns(self.file.schema_arrow, path)
        metadata = self.file.metadata
        counts = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        self.ends, self.rows = np.cumsum(counts, dtype=np.int64), metadata.num_rows
        self.group_rows = max(counts, default=0)
        self.lock = threading.Lock()  # the threads that fill the cache read the same file

    def values(self, column: str, field: str = "") -> list[Any]:
        """Return the values in a column, or in a `field` of a column of structs."""
        name = f"{column}.{field}" if field else column
        return _values(self.file.read(columns=[name], use_threads=False), column, field)

    def image(self, row: int) -> Any:
        """Return the bytes of an image as a pyarrow buffer; None if there are none."""
        k = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[k - 1]) if k else 0
        with self.lock:
            group = _kept.get((str(self.path), k), lambda: self._read_group(k))
        return group[row - first]

    def _read_group(self, k: int) -> _Images:
        """Read the images of a row group."""
        image = self.columns.image
        name = f"{image}.bytes" if self.columns.nested else image
        table = self.file.read_row_group(k, columns=[name], use_threads=False)
        return _Images(table.column(image), self.columns)


class _RowGroups:
    """The row groups that this process has read last. Several threads may use them."""

    def __init__(self):
        self.groups: OrderedDict[tuple[str, int], _Images] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple[str, int], read: Callable[[], _Images]) -> _Images:
        """Return the row group `key`, from memory or by `read`."""
        with self.lock:
            if key in self.groups:
                self.groups.move_to_end(key)
                return self.groups[key]
        group = read()
        with self.lock:
            self.groups[key] = group
            kept = self.groups.values()
            while len(kept) > 1 and sum(one.nbytes for one in kept) > KEPT_BYTES:
                self.groups.popitem(last=False)
        return group


_kept = _RowGroups()
