"""Read the variables of a TensorFlow checkpoint without TensorFlow.

A checkpoint is a "tensor bundle": PREFIX.index is a sorted table of names in LevelDB's format, with
a small protocol buffer for each variable, and PREFIX.data-0000I-of-0000N hold the values. The files
may come from strangers: every offset and size is checked before it is used, and every checksum.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moco.encoder.crc32c import masked_crc32c
from moco.errors import InputError, short
from moco.files import refuse_remote, unreadable

_MAGIC = bytes.fromhex("57fb808b247547db")
_FOOTER = 48  # bytes: two block handles, padding, the magic number
_TRAILER = 5  # bytes after a block: its compression, and a checksum
_LARGEST_INDEX = 1 << 26  # bytes; that of a ResNet-50 with its optimizer takes 17 kB
_MOST_SHARDS = 99_999
# TensorFlow's numbers of types
_DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}
DAMAGED = "it is truncated or damaged; copy or download it again"


class Variable(NamedTuple):
    """The type, shape and storage of a variable in a bundle."""

    dtype: int  # TensorFlow's number of the type
    shape: tuple[int, ...]
    shard: int
    offset: int  # bytes
    size: int  # bytes
    crc: int  # masked CRC-32C of the bytes
    sliced: bool  # whether it is stored in parts, under other names


class Bundle:
    """A TensorFlow checkpoint.

    Attributes:
        prefix: the name of the files without `.index`.
        variables: the variables by name.
        shards: number of data files.
    """

    def __init__(self, path: str | Path):
        """Read the index.

        Args:
            path: the prefix, one of the files, or a folder with a single checkpoint.

        Raises InputError if the index cannot be read or is damaged.
        """
        self.prefix = _prefix(path)
        self.index = Path(f"{self.prefix}.index")
        try:
            entries = dict(_table(_read_index(self.index)))
            self.shards = _shards(entries.pop(b"", b""))
            # names of parts of variables are binary
            self.variables = {
                name.decode(errors="backslashreplace"): _variable(x) for name, x in entries.items()
            }
        except _DamagedError as error:
            raise InputError(f"{self.index}: {str(error) or DAMAGED}") from None

    def tensor(self, name: str) -> Tensor:
        """Return the values of a variable.

        Raises InputError if its type or layout is not supported, or if the data file is missing,
        truncated or damaged.
        """
        variable = self.variables[name]
        where = f"{self.prefix}: the variable '{short(name)}'"
        if variable.sliced:
            raise InputError(
                f"{where} is stored in parts, which are not read; save it unpartitioned"
            )
        if variable.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
            raise InputError(
                f"{where} has TensorFlow's type {variable.dtype}, which is not read; read: {known}"
            )
        dtype = _DTYPES[variable.dtype]
        if variable.size != math.prod(variable.shape) * dtype.itemsize:
            raise InputError(f"{where} has a size that does not fit its shape; {DAMAGED}")
        if variable.shard >= self.shards:
            raise InputError(f"{where} is in a data file that the index does not have; {DAMAGED}")
        data = self._read(variable)
        if masked_crc32c(data) != variable.crc:
            raise InputError(f"{where} does not have its checksum; {DAMAGED}")
        if not variable.size:
            return torch.empty(variable.shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(variable.shape)

    def _read(self, variable: Variable) -> bytes:
        """Return the bytes of a variable. Raises InputError if the file is missing or too short."""
        path = Path(f"{self.prefix}.data-{variable.shard:05d}-of-{self.shards:05d}")
        try:
            with path.open("rb") as file:
                length = os.fstat(file.fileno()).st_size
                if variable.offset + variable.size > length:
                    raise InputError(f"{path}: is too short for its index; {DAMAGED}")
                file.seek(variable.offset)
                data = file.read(variable.size)
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file; the checkpoint has {self.shards} data files, which must be "
                "in the folder of the index"
            ) from None
        except (OSError, MemoryError) as error:
            raise unreadable(error).at(path) from None
        if len(data) != variable.size:
            raise InputError(f"{path}: is too short for its index; {DAMAGED}")
        return data


def _prefix(path: str | Path) -> Path:
    """Return the prefix of the checkpoint's files. Raises InputError if there is no index."""
    refuse_remote(str(path))
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            names = ", ".join(one.stem for one in found[:3])
            names += f" and {len(found) - 3} more" * (len(found) > 3)
            what = (
                f"holds {len(found)} checkpoints ({names}); give one"
                if found
                else (
                    "holds no TensorFlow checkpoint (NAME.index and NAME.data-00000-of-00001); "
                    "give another folder"
                )
            )
            raise InputError(f"{path}: {what}")
        path = found[0]
    prefix = path.with_name(re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name))
    if not Path(f"{prefix}.index").exists():
        other = " (the file itself is no TensorFlow checkpoint)" if path.is_file() else ""
        raise InputError(
            f"{prefix}.index: no such file{other}; give the prefix of a TensorFlow checkpoint, "
            "such as model.ckpt-100 for model.ckpt-100.index"
        )
    return prefix


# The table


class _DamagedError(Exception):
    """An index that cannot be read. The message is the reason, or "" for damage."""


def _read_index(path: Path) -> bytes:
    """Return the content of the index. Raises InputError or _DamagedError."""
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise _DamagedError(f"is larger than {_LARGEST_INDEX >> 20} MiB, so it is no index")
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise unreadable(error).at(path) from None
    if len(data) < _FOOTER or data[-8:] != _MAGIC:
        raise _DamagedError(f"is not the index of a TensorFlow checkpoint, or {DAMAGED}")
    return data


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table in LevelDB's format. Raises _DamagedError.

    Keys that share their beginnings, and blocks that are named twice, could make a small file fill
    the memory, so the sum of all lengths is limited.
    """
    total = 0
    footer = _Reader(data[-_FOOTER:-8])
    footer.varint(), footer.varint()  # the block of meta data
    index = _block(data, footer.varint(), footer.varint())
    for _, handle in _entries(index):
        reader = _Reader(handle)
        for key, value in _entries(_block(data, reader.varint(), reader.varint())):
            total += len(key) + len(value)
            if total > _LARGEST_INDEX:
                raise _DamagedError
            yield key, value


def _block(data: bytes, offset: int, size: int) -> bytes:
    """Return the content of a block. Raises _DamagedError."""
    end = offset + size
    if end + _TRAILER > len(data) - _FOOTER:
        raise _DamagedError
    compression = data[end]
    if int.from_bytes(data[end + 1 : end + _TRAILER], "little") != masked_crc32c(
        data[offset : end + 1]
    ):
        raise _DamagedError
    if compression:
        raise _DamagedError(
            "is compressed, which TensorFlow's own checkpoints are not; save it again"
        )
    return data[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block. A key shares its beginning with the one before it."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise _DamagedError
    reader, key = _Reader(block[:end]), b""
    while not reader.done:
        shared, rest, length = reader.varint(), reader.varint(), reader.varint()
        if shared > len(key):
            raise _DamagedError
        key = key[:shared] + reader.take(rest)
        yield key, reader.take(length)


class _Reader:
    """Reads numbers and bytes from the start of `data`. Raises _DamagedError at its end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    @property
    def done(self) -> bool:
        return self.at == len(self.data)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _DamagedError
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        """Return a number of up to 64 bits, 7 bits in each byte."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value
        raise _DamagedError


# Protocol buffers


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a message. Raises _DamagedError."""
    reader = _Reader(message)
    while not reader.done:
        tag = reader.varint()
        match tag & 7:
            case 0:
                yield tag >> 3, reader.varint()
            case 1:
                yield tag >> 3, int.from_bytes(reader.take(8), "little")
            case 2:
                yield tag >> 3, reader.take(reader.varint())
            case 5:
                yield tag >> 3, int.from_bytes(reader.take(4), "little")
            case _:
                raise _DamagedError


def _numbers(message: bytes) -> dict[int, int]:
    """Return the fields that are numbers. A field that is 0 is absent."""
    return {field: value for field, value in _fields(message) if isinstance(value, int)}


def _shards(header: bytes) -> int:
    """Return the number of data files from a BundleHeaderProto."""
    found = _numbers(header)
    if found.get(2):
        raise _DamagedError(
            "holds big-endian numbers, which are not read; save it on another machine"
        )
    if not 1 <= found.get(1, 0) <= _MOST_SHARDS:
        raise _DamagedError
    return found[1]


def _variable(entry: bytes) -> Variable:
    """Return the `Variable` of a BundleEntryProto."""
    found, shape, sliced = _numbers(entry), (), False
    for field, value in _fields(entry):
        if field == 2 and isinstance(value, bytes):
            dims = [dim for number, dim in _fields(value) if number == 2]
            if not all(isinstance(dim, bytes) for dim in dims):
                raise _DamagedError
            shape = tuple(_numbers(dim).get(1, 0) for dim in dims)
        sliced |= field == 7
    if any(size >= 1 << 63 for size in (*shape, found.get(4, 0), found.get(5, 0))):
        raise _DamagedError
    number = (found.get(field, 0) for field in (1, 3, 4, 5, 6))
    dtype, shard, offset, size, crc = number
    return Variable(dtype, shape, shard, offset, size, crc, sliced)
