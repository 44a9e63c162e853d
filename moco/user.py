"""Prepare a process for its user, who may have no name and no home, and for its terminal."""

import contextlib
import getpass
import io
import os
import stat
import sys
import tempfile
from pathlib import Path

from moco.errors import InputError


def prepare() -> None:
    """Let standard output print any file name; give a user without a name or a home both.

    Called when a program starts. Bytes of a name that are not UTF-8, and letters that the terminal
    cannot show, are printed as escapes. PyTorch and Triton name folders after the user, and put
    files into the home folder.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        getpass.getuser()
    except (OSError, KeyError):  # a container's user without an entry in passwd
        os.environ["USER"] = str(os.getuid())
    try:
        Path.home()
    except RuntimeError:
        with contextlib.suppress(OSError, InputError):  # code that needs a home reports it
            os.environ["HOME"] = str(private_folder())


def private_folder() -> Path:
    """Return this user's own folder for temporary files; make it on first use.

    Raises InputError if somebody else owns it or may write there.
    """
    folder = Path(tempfile.gettempdir()) / f"hard-negatives-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise InputError(
            f"{folder}: is not a folder that you alone can write to; set XDG_CACHE_HOME and HOME to folders of your own"
        )
    return folder
