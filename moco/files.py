"""Files: a stranger's is read as plain values and never as code (YAML of options, JSON, lists, pickles of arrays); ours replace
what was there only when they are whole.
"""

import codecs
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from moco.errors import InputError, short

Scalar = str | int | float | bool | None


class Unreadable(InputError):
    """The system failed to read a file, which may be intact. The message is the system's reason."""

    def at(self, path: object) -> "Unreadable":
        """Return the error to show to the user: with the file's name, and what to do."""
        look = "check its permissions, the disk and the file server; its content may be intact"
        return Unreadable(f"{path}: cannot be read: {self}; {look}")


def unreadable(error: OSError | MemoryError) -> Unreadable:
    """Return an `Unreadable` with the system's reason for a failed read."""
    if isinstance(error, MemoryError):
        return Unreadable("not enough memory")
    return Unreadable(error.strerror or str(error))


_STORES = {"gs": "Google Cloud Storage", "s3": "Amazon S3", "hdfs": "Hadoop's file system"}
_STORES |= {"http": "the web", "https": "the web", "ftp": "an FTP server", "file": "a local file"}


def refuse_remote(path: str, option: str = "") -> None:
    """Raise InputError if `path`, the value of an option, is a URL."""
    if match := re.match(r"([a-z][a-z0-9+.-]+):/", path, re.I):  # pathlib merges two slashes
        store = _STORES.get(match[1].lower(), "another system")
        what = f"{option} {path}".strip()
        raise InputError(
            f"{what}: is a URL ({store}), and only files on this machine are read or written;"
            " copy it to a local disk first, and give its path there"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, beside `path`: at the end it is flushed to disk and renamed to `path`.

    Where an error comes before that, it is removed, and what was at `path` is still there. Of a process that is killed it stays
    behind; `half_written` finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # some mounts know no modes
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # nor can all of them flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_new(path: Path, force: bool = False) -> None:
    """Raise InputError if there is a folder at `path`, or a file unless `force` (a tool's `--force`)."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; choose another place")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path}: exists; give --force to replace it, or choose another place")


@contextlib.contextmanager
def creating(path: Path, force: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write next to `path`, and rename it at the end, as `replacing` does.

    Raises InputError if `path` exists, unless `force`. If two programs create the same file at the
    same time, one succeeds and the other one fails.
    """
    check_new(path, force)
    if force:
        with replacing(path) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))  # reserve the name
    except FileExistsError:
        check_new(path)
        raise
    try:
        with replacing(path) as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def names_like(path: Path) -> Iterator[Path]:
    """Yield `path`, and then NAME-2, NAME-3, ... with the same ending."""
    yield path
    yield from (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))


def new_folder(path: Path) -> Path:
    """Make the first folder of `names_like(path)` that does not exist yet, and return it."""
    for folder in names_like(path):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("names_like does not end")


def half_written(folder: Path, name: str) -> list[Path]:
    """What `replacing` has left behind of the files whose names fit the pattern `name`."""
    return list(folder.glob(f".{name}-{'?' * 8}"))


def read_text(path: str | Path) -> str:
    """Return the text in `path`. Raises InputError or Unreadable, whose message lacks the path."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("not text in UTF-8") from None
    except OSError as error:
        raise unreadable(error) from None
    except ValueError as error:  # an invalid path
        raise InputError(str(error)) from None


def read_lines(path: str | Path) -> list[bytes]:
    """Return the lines in `path` as bytes, in any encoding with ASCII's line breaks.

    Raises InputError, whose message lacks the path, if the file cannot be read.
    """
    try:
        text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise InputError(getattr(error, "strerror", None) or str(error)) from None
    if b"\0" in text:
        raise InputError("not text in UTF-8")
    return text.splitlines()


def read_yaml(path: str | Path) -> dict[str, Scalar | list[Scalar]]:
    """Options by name. Raises InputError, without the path, where the file is none of `option: value` lines.

    A value is a word, a number, true, false, nothing, or a list of these: there is no more to an option, and a value that holds
    others could be made to unfold without end.
    """
    text = read_text(path)
    try:
        values = yaml.load(text, Loader=_OptionLoader)
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {short(' '.join(str(error).split()), 600)}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # dates that there are not, numbers of thousands of digits
        raise InputError(
            f"not YAML of options: {short(' '.join(str(error).split()), 600)}"
        ) from None
    if not isinstance(values, dict):
        raise InputError("expected lines of the form 'option: value'")
    for key, value in values.items():
        if not all(
            isinstance(one, Scalar)
            for one in (key, *(value if isinstance(value, list) else [value]))
        ):
            raise InputError(
                f"{short(key) if isinstance(key, str) else 'a key'}: expected one value, or a list of values"
            )
    return {str(key): value for key, value in values.items()}


class _OptionLoader(yaml.SafeLoader):
    """PyYAML's, which keeps the last of two values silently, and unfolds what `<<` merges."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "'<<' is not read; write the options out", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                name = key.value.replace("_", "-")
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{short(key.value)}' stands twice", key.start_mark
                    )
                seen.add(name)


# a day without quotes is a word here
_OptionLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def to_json(value: Any, **format: Any) -> str:
    """Return `value` as JSON. NaN and infinite numbers, which JSON cannot hold, become null."""
    return json.dumps(_finite(value), allow_nan=False, **format)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """The JSON in `path`. Raises InputError, without the path, where it cannot be read."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """What `text` says. Raises InputError where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {short(' '.join(str(error).split()), 600)}") from None


def read_pickle(path: str | Path) -> Any:
    """The plain values, and numpy's arrays and numbers, that `path` holds.

    Raises InputError, whose message lacks the path, if the file is damaged or holds anything else;
    no other object is created or called. Raises Unreadable if the system cannot read the file.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except InputError:
        raise
    except (OSError, MemoryError) as error:
        raise unreadable(error) from None
    except Exception as error:  # damaged ones end in many kinds
        raise InputError(
            f"damaged, or no pickle ({short(' '.join(str(error).split()), 600) or type(error).__name__})"
        ) from None


class _ArrayUnpickler(pickle.Unpickler):
    """Knows only what arrays are made of."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # its name since numpy 2
        if (module, name) not in _OF_ARRAYS:
            raise InputError(
                f"holds {short(f'{module}.{name}')}, and only plain values and numpy's arrays are read; save these alone"
            )
        return _OF_ARRAYS[module, name]


def _scalar(kind: np.dtype, data: bytes) -> np.generic:
    if kind.hasobject:
        raise InputError(
            "holds an array of Python objects, and only numbers and words are read; save these alone"
        )
    return np.empty(0).dtype.type(0).__reduce__()[0](kind, data)


_OF_ARRAYS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("_codecs", "encode"): lambda text, _: text.encode(
        "latin1"
    ),  # bytes, as protocols without them have it
    ("collections", "OrderedDict"): dict,
}


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, replacing the file at once; a number that is NaN or infinite becomes null."""
    with replacing(path) as file:
        file.write(f"{to_json(value, indent=2)}\n".encode())
