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

    Raises InputError, which names the file `path`, if they cannot be told.
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
    """Return the columns' types that the package datasets has stored in the schema's metadata."""
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
        self.columns = find_columns(table.schema, path)
        self.table, self.rows = table, table.num_rows
        self.chunks = [
            _bytes_of(chunk, self.columns) for chunk in table.column(self.columns.image).chunks
        ]
        for chunk in self.chunks:
            chunk.validate(full=True)  # a damaged file must not lead outside the mapped memory
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks])
        self.group_rows = 1

    def column(self, name: str, field: str | None = None) -> Any:
        """Return a column as a pyarrow array, or one `field` of a column of structs."""
        column = self.table.column(name)
        chunks = [chunk.field(field) if field else chunk for chunk in column.chunks]
        return pyarrow().chunked_array(chunks, chunks[0].type) if chunks else column

    def image(self, row: int) -> Any:
        """Return the bytes of an image as a pyarrow buffer; None if there are none."""
        k = int(np.searchsorted(self.ends, row, side="right"))
        chunk = self.chunks[k]
        return chunk[row - int(self.ends[k]) + len(chunk)].as_buffer()


def _bytes_of(chunk: Any, columns: Columns) -> Any:
    """Return the array of encoded images in a chunk of the images' column."""
    return chunk.field("bytes") if columns.nested else chunk


class Parquet:
    """An open parquet file. Reading an image means to read all images of its row group."""

    def __init__(self, path: Path):
        """Open the file and find its columns."""
        pa = pyarrow()
        self.file = pa.parquet.ParquetFile(str(path), memory_map=False)
        self.path, self.columns = path, find_columns(self.file.schema_arrow, path)
        metadata = self.file.metadata
        counts = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        self.ends, self.rows = np.cumsum(counts, dtype=np.int64), metadata.num_rows
        self.group_rows = max(counts, default=0)
        self.lock = threading.Lock()  # the cache's threads read the same file

    def column(self, name: str, field: str | None = None) -> Any:
        """Return a column as a pyarrow array, or one `field` of a column of structs."""
        table = self.file.read(columns=[f"{name}.{field}" if field else name], use_threads=False)
        column = table.column(name).combine_chunks()
        chunks = column.chunks if isinstance(column, pyarrow().ChunkedArray) else [column]
        chunks = [chunk.field(field) if field else chunk for chunk in chunks]
        return pyarrow().chunked_array(chunks, chunks[0].type) if chunks else table.column(name)

    def image(self, row: int) -> Any:
        """Return the bytes of an image as a pyarrow buffer; None if there are none."""
        k = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[k - 1]) if k else 0
        with self.lock:
            group = _kept.get((str(self.path), k), lambda: self._read_group(k))
        return group[row - first].as_buffer()

    def _read_group(self, k: int) -> Any:
        """Read the images of a row group."""
        image, nested = self.columns.image, self.columns.nested
        table = self.file.read_row_group(
            k, columns=[f"{image}.bytes" if nested else image], use_threads=False
        )
        column = table.column(image).combine_chunks()
        if isinstance(column, pyarrow().ChunkedArray):  # of more than 2 GiB
            column = pyarrow().concat_arrays(
                [_bytes_of(chunk, self.columns).cast("large_binary") for chunk in column.chunks]
            )
            return column
        return _bytes_of(column, self.columns)


class _RowGroups:
    """The row groups that this process has read last. Several threads may use them."""

    def __init__(self):
        self.groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple[str, int], read: Callable[[], Any]) -> Any:
        """Return the row group `key`, from memory or by `read`."""
        with self.lock:
            if key in self.groups:
                self.groups.move_to_end(key)
                return self.groups[key]
        group = read()
        with self.lock:
            self.groups[key] = group
            while len(self.groups) > 1 and self._bytes() > KEPT_BYTES:
                self.groups.popitem(last=False)
        return group

    def _bytes(self) -> int:
        return sum(group.nbytes for group in self.groups.values())


_kept = _RowGroups()
