"""Keep a run alive if its standard output or error cannot be written, by dropping the output."""

import contextlib
import io
import os
import sys


class _Tolerant(io.FileIO):
    """A file whose writes never fail: they drop data if the reader is gone or the disk is full."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:
                return written
        return len(data)


def guard() -> None:
    """Let this process continue if its output has no reader, no disk space, or is closed.

    Call it at the start of each process; a second call changes nothing. Output that Python code has
    redirected, as tests do, stays as it is.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; the next file to be opened would get this number and the output
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the life of the process)
            continue
        own = stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper)
        if not own or isinstance(getattr(stream.buffer, "raw", None), _Tolerant):
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(_Tolerant(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=name == "stderr" or stream.line_buffering or stream.write_through,
            write_through=stream.write_through,
        )
        setattr(sys, name, guarded)
        setattr(sys, f"__{name}__", guarded)
