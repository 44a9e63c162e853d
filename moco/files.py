"""Read untrusted files safely, as plain values and never as code, and write files atomically.

Checkpoints are read by `encoder.weights`.
"""

import codecs
import contextlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from moco.errors import InputError, short

Scalar = str | int | float | bool | None


class UnreadableError(InputError):
    """An error of the system when it reads a file that may be intact: no permission, a failed disk.

    Its message is the system's reason. `at` adds the file's name.
    """

    def at(self, path: object) -> "UnreadableError":
        """Return the error to show to the user, with the file's name and what to do."""
        look = "check its permissions, the disk and the file server; its content may be intact"
        return UnreadableError(f"{path}: cannot be read: {self}; {look}")


def unreadable(error: OSError | MemoryError) -> UnreadableError:
    """Return an `UnreadableError` with the system's reason for the `error`."""
    if isinstance(error, MemoryError):
        return UnreadableError("not enough memory")
    return UnreadableError(error.strerror or str(error))


_STORES = {"gs": "Google Cloud Storage", "s3": "Amazon S3", "hdfs": "Hadoop's file system"}
_STORES |= {"http": "the web", "https": "the web", "ftp": "an FTP server", "file": "a local file"}


def refuse_remote(path: str, option: str = "") -> None:
    """Raise InputError if `path`, the value of an option, is a URL."""
    if match := re.match(r"([a-z][a-z0-9+.-]+):/", path, re.I):  # pathlib merges two slashes
        store = _STORES.get(match[1].lower(), "another system")
        value = f"{option} {path}".strip()
        raise InputError(
            f"{value}: is a URL ({store}), and only files on this machine are read or written;"
            " copy it to a local disk first, and give its path there"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing. At the end, flush it to disk and rename it to `path`.

    The temporary file is in the folder of `path`. If an error is raised before the end, the
    temporary file is removed, and an old file at `path` remains. If the process is killed, the
    temporary file stays behind; `half_written` finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # some file systems have no permissions
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some cannot flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_new(path: Path, force: bool = False) -> None:
    """Raise InputError if `path` is a folder, or a file unless `force` (a tool's `--force`)."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; choose another place")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path}: exists; give --force to replace it, or choose another place")


@contextlib.contextmanager
def creating(path: Path, force: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file for writing. At the end, rename it to `path`, as `replacing` does.

    If two programs create the same file at the same time, one of them fails.

    Raises InputError if `path` exists, unless `force`.
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


def numbered_paths(path: Path) -> Iterator[Path]:
    """Yield `path`, then NAME-2, NAME-3, ... with the same suffix, without end."""
    yield path
    yield from (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))


def new_folder(path: Path) -> Path:
    """Make the first folder of `numbered_paths(path)` that does not exist yet, and return it."""
    for folder in numbered_paths(path):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("numbered_paths does not end")


def half_written(folder: Path, name: str) -> list[Path]:
    """Return the temporary files that killed processes have left behind in `folder`.

    `name` is a glob pattern for the final names of the files, as given to `replacing`.
    """
    return list(folder.glob(f".{name}-{'?' * 8}"))


def read_text(path: str | Path) -> str:
    """Return the text in `path`, in UTF-8.

    Raises InputError if it is something else, and UnreadableError if the system cannot read the
    file. The messages do not contain the path.
    """
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

    Raises InputError if the file cannot be read. The message does not contain the path.
    """
    try:
        text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise InputError(getattr(error, "strerror", None) or str(error)) from None
    if b"\0" in text:
        raise InputError("not text in UTF-8")
    return text.splitlines()


def read_yaml(path: str | Path) -> dict[str, Scalar | list[Scalar]]:
    """Return the options in a YAML file by name.

    A value is a word, a number, true, false, nothing, or a list of these. No option needs nested
    values, and a small malicious file could use them to fill the memory.

    Raises InputError if the file has anything but `option: value` lines, and UnreadableError if the
    system cannot read it. The messages do not contain the path.
    """
    text = read_text(path)
    try:
        values = yaml.load(text, Loader=_OptionLoader)
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {short(' '.join(str(error).split()), 600)}") from None
    except (ValueError, RecursionError) as error:  # such as a number with thousands of digits
        reason = short(" ".join(str(error).split()), 600)
        raise InputError(f"not YAML of options: {reason}") from None
    if not isinstance(values, dict):
        raise InputError("expected lines of the form 'option: value'")
    for key, value in values.items():
        values_of_key = value if isinstance(value, list) else [value]
        if not all(isinstance(one, Scalar) for one in (key, *values_of_key)):
            name = short(key) if isinstance(key, str) else "a key"
            raise InputError(f"{name}: expected one value, or a list of values")
    return {str(key): value for key, value in values.items()}


class _OptionLoader(yaml.SafeLoader):
    """A YAML loader that refuses an option that is given twice, and merge keys (`<<`).

    PyYAML's own loader silently keeps the last of two values, and expands merge keys.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check the keys of a mapping. PyYAML calls this to expand its merge keys."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "'<<' is not supported; write the options out", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                name = key.value.replace("_", "-")
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{short(key.value)}' is given twice", key.start_mark
                    )
                seen.add(name)


# PyYAML would turn a word such as 2024-10-03 into a date
_OptionLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def to_json(value: Any, **format: Any) -> str:
    """Return `value` as JSON. NaN and infinite numbers become null, because JSON has neither."""
    return json.dumps(_finite(value), allow_nan=False, **format)


def _finite(value: Any) -> Any:
    """Replace NaN and infinite numbers in `value` by None."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_utf8(text: str) -> str:
    """Return `text` with bytes of paths escaped that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def read_json(path: str | Path) -> Any:
    """Return the value of the JSON in `path`.

    Raises InputError if it is not JSON, and UnreadableError if the system cannot read the file.
    The messages do not contain the path.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Return the value of the JSON in `text`. Raises InputError if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {short(' '.join(str(error).split()), 600)}") from None


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` as indented JSON, atomically; see `to_json` for NaN."""
    with replacing(path) as file:
        file.write(f"{to_json(value, indent=2)}\n".encode())
