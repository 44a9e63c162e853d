"""The user that a program runs as, who may have no name and no home, and the terminal."""

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
    """Make standard output take every file name, and give a user without a name or home both.

    Called at a program's start.
    Bytes of a name that are not UTF-8, and letters that the terminal does not have, are printed as
    escapes. PyTorch and Triton name folders after the user, and put files into the home folder.
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
        with contextlib.suppress(OSError, InputError):  # what needs it says so
            os.environ["HOME"] = str(private_folder())


def private_folder() -> Path:
    """Return this user's own folder for temporary files; it is made on first use.

    Raises InputError if somebody else owns it or may write there.
    """
    folder = Path(tempfile.gettempdir()) / f"hard-negatives-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise InputError(f"{folder}: is not this user's alone, and so is not used; set XDG_CACHE_HOME and HOME to folders of yours")
    return folder
