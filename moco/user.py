"""Prepare a process for its terminal, and for a user who may have no name and no home folder."""

import contextlib
import getpass
import io
import os
import signal
import stat
import sys
import tempfile
from pathlib import Path

from moco.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def import_quietly() -> None:
    """Let Ctrl-C stop a script without a traceback while it imports its packages.

    This lasts until `prepare` is called. It applies only to the scripts of this project, not to
    other programs that import the package.
    """
    program = Path(sys.argv[0])
    ours = program.is_file() and program.resolve().parent in (ROOT, ROOT / "tools")
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def prepare() -> None:
    """Make stdout and stderr print any file name, and set USER and HOME if the user has neither.

    Call it when a program starts, and again after slow imports (`import_quietly`). Bytes of a file
    name that are not UTF-8, and letters that the terminal cannot show, are printed as escapes.
    PyTorch and Triton need a user name and a home folder: they name folders after the user, and
    write files in the home folder.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `import_quietly`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        getpass.getuser()
    except (OSError, KeyError):  # a container's user may lack an entry in passwd
        os.environ["USER"] = str(os.getuid())
    try:
        Path.home()
    except RuntimeError:
        # code that needs a home folder raises its own error
        with contextlib.suppress(OSError, InputError):
            os.environ["HOME"] = str(private_folder())


def private_folder() -> Path:
    """Return this user's own folder among the temporary files. Make it on first use.

    Raises InputError if another user owns it or may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"hard-negatives-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise InputError(
            f"{folder}: is not a folder that you alone can write to; set XDG_CACHE_HOME and HOME "
            "to folders of your own"
        )
    return folder
