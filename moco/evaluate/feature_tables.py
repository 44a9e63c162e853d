"""Write the names and features of images to one file (.npz, .parquet or .csv), and read it."""

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moco.errors import InputError, short
from moco.files import parse_json, to_json, unreadable

_ROWS = 8192  # rows in a block, and in a row group of a parquet file


class Table(NamedTuple):
    """The content of a file of features.

    Attributes:
        names: The names of the images, N of them.
        width: The number D of features.
        blocks: Yields the features in blocks [n, D] of float32.
        points: A map of the images, float32 [N, 2], or None.
        about: The facts about the encoder.
    """

    names: list[str]
    width: int
    blocks: Callable[[], Iterator[np.ndarray]]
    points: np.ndarray | None
    about: dict[str, object]

    def rows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield blocks of `_ROWS` features, and the slice of the images that they belong to.

        The blocks do not depend on the sizes of those of `blocks`.
        """
        held, start = np.empty((0, self.width), np.float32), 0
        for block in self.blocks():
            held = np.concatenate([held, block])
            while len(held) >= _ROWS:
                yield slice(start, start + _ROWS), held[:_ROWS]
                held, start = held[_ROWS:], start + _ROWS
        if len(held):
            yield slice(start, start + len(held)), held


def write_npz(file: BinaryIO, table: Table) -> None:
    """Write the arrays names [N], features [N, D], map [N, 2] and about, for numpy.load."""
    with zipfile.ZipFile(file, "w") as archive:
        _member(archive, "names", np.array(table.names, dtype=str))
        # without a date, so that equal features give equal files
        with archive.open(zipfile.ZipInfo("features.npy"), "w", force_zip64=True) as out:
            header = {"descr": "<f4", "fortran_order": False}
            shape = (len(table.names), table.width)
            np.lib.format.write_array_header_1_0(out, header | {"shape": shape})
            for _, block in table.rows():
                out.write(block.tobytes())
        if table.points is not None:
            _member(archive, "map", table.points)
        _member(archive, "about", np.array(to_json(table.about)))


def _member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as out:
        np.lib.format.write_array(out, array, allow_pickle=False)


def write_csv(file: BinaryIO, table: Table) -> None:
    """Write a line for each image: name, map (x and y), and features, in enough digits."""
    # a name that is not UTF-8 keeps its bytes
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    lines = csv.writer(text, lineterminator="\n")
    at = [] if table.points is None else ["x", "y"]
    lines.writerow(["name", *at, *(f"f{i}" for i in range(table.width))])
    for part, block in table.rows():
        if table.points is not None:
            block = np.concatenate([table.points[part], block], axis=1)
        for name, row in zip(table.names[part], block.tolist(), strict=True):
            lines.writerow([name, *(f"{value:.9g}" for value in row)])
    text.flush()
    text.detach()


def write_parquet(file: BinaryIO, table: Table) -> None:
    """Write the columns name, features (lists of D floats), and x and y of the map."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("name", pa.string()), ("features", pa.list_(pa.float32(), table.width))]
    fields += [] if table.points is None else [("x", pa.float32()), ("y", pa.float32())]
    schema = pa.schema(fields, metadata={"about": to_json(table.about)})
    with pq.ParquetWriter(file, schema, use_dictionary=False) as out:
        for part, block in table.rows():
            features = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), table.width)
            points = [] if table.points is None else [pa.array(x) for x in table.points[part].T]
            out.write_table(pa.table([pa.array(table.names[part]), features, *points], schema))


WRITERS = {".npz": write_npz, ".parquet": write_parquet, ".csv": write_csv}


def check_package(suffix: str) -> None:
    """Raise InputError if a package that writes files with this suffix is not installed."""
    if suffix != ".parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a .parquet file needs the package pyarrow ({error}): pip install pyarrow, "
            "or give a file that ends in .npz or .csv"
        ) from None


def check_names(suffix: str, names: list[str]) -> None:
    """Raise InputError if a name cannot be stored in a file with this suffix."""
    if suffix != ".parquet":
        return
    for name in names:
        if name != name.encode(errors="replace").decode():
            raise InputError(
                f"{name}: its name is not UTF-8, which parquet needs; rename it, or give a file "
                "that ends in .npz or .csv"
            )


def read(path: Path) -> tuple[list[str], np.ndarray, dict[str, object]]:
    """Return the names, features [N, D] and facts in a file of `WRITERS`; see `Table`.

    A .csv has no facts. Raises InputError if the file is damaged or was not written here.
    """
    suffix = path.suffix.lower()
    check_package(suffix)
    try:
        names, rows, about = _READERS[suffix](path)
        about = parse_json(about)
        if not (rows.ndim == 2 and len(names) == len(rows) and isinstance(about, dict)):
            raise ValueError("its names and features do not match")
        return names, np.ascontiguousarray(rows, np.float32), about
    except (OSError, MemoryError) as error:
        raise unreadable(error).at(path) from None
    except Exception as error:  # a damaged file raises errors of many types
        reason = short(" ".join(str(error).split()))
        raise InputError(f"{path}: is not a file of tools/embed.py ({reason})") from None


def _read_npz(path: Path) -> tuple[list[str], np.ndarray, str]:
    with np.load(path, allow_pickle=False) as found:
        return found["names"].tolist(), found["features"], str(found["about"])


def _read_csv(path: Path) -> tuple[list[str], np.ndarray, str]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file)
        header = next(lines)
        first = header.index("f0")
        names, rows = [], []
        for line in lines:
            names.append(line[0])
            rows.append(np.array(line[first:], np.float32))
    return names, np.stack(rows), "{}"


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray, str]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["name", "features"])
    features = table["features"].combine_chunks()
    rows = features.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return table["name"].to_pylist(), rows, table.schema.metadata[b"about"].decode()


_READERS = {".npz": _read_npz, ".parquet": _read_parquet, ".csv": _read_csv}
