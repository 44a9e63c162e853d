"""Record in a run folder what the run is and how it ended: status.json.

A killed run cannot record its end. Its record still says "running", but its folder is not locked.
"""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moco.config import Config, flat
from moco.errors import DivergedError, InputError, short
from moco.files import read_json, write_json
from moco.launch.interrupt import Interrupted

STATUS = "status.json"

# settings in the record, so that a reader need not parse args.yaml
_FACTS = "script method arch data dataset encoder_method epochs knn_every".split()

_PACKAGES = ("hard-negatives", "torch", "torchvision", "timm", "numpy")


class Record:
    """The status.json of a run, in a folder that this process has locked.

    A file that cannot be written is ignored, because the run itself can continue.

    Args:
        config: the settings of the run, with its folder.
        start: an identifier of this start of the run; see `correct`.
    """

    def __init__(self, config: Config, start: str):
        self.folder, settings = Path(config.run.save_dir), flat(config)
        self._before = read(self.folder)
        facts = {name: settings[name] for name in _FACTS if settings.get(name) is not None}
        now = round(time.time(), 3)
        first = self._before.get("first_began", self._before.get("began", now))
        run = {"start": start, "host": socket.gethostname(), "pid": os.getpid()}
        run |= {"command": command(), "versions": versions()}
        began = {"state": "running", "reason": None, "began": now, "ended": None}
        began["first_began"] = first if settings.get("resume") else now
        _write(self.folder, {**began, **run, **facts})

    def end(self, error: BaseException | None) -> None:
        """Record that the run has finished, or the `error` that ended it.

        If the run had finished in an earlier start, and this start failed before it trained, the
        record of the earlier start is restored.
        """
        finished = self._before.get("state") == "finished"
        if error is not None and finished and "steps" not in read(self.folder):
            _write(self.folder, self._before)
        else:
            add(self.folder, **ending(error))


def command() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the main packages, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "torch": torch.__version__}


def ending(error: BaseException | None) -> dict[str, Any]:
    """Return the state, the reason and the time of an end, as keys of a record."""
    reason = " ".join(str(error).split())
    if error is None:
        state, reason = "finished", None
    elif isinstance(error, Interrupted):
        state = "stopped"
    elif isinstance(error, KeyboardInterrupt):
        state, reason = "stopped", f"{signal.SIGINT.name}: interrupted, nothing saved"
    elif isinstance(error, DivergedError):
        state = "diverged"
    elif isinstance(error, InputError):
        state = "failed"
    else:
        state, reason = "crashed", f"{type(error).__name__}: {reason}"
    return {"state": state, "reason": reason and short(reason, 1000), "ended": time.time()}


def read(folder: Path) -> dict[str, Any]:
    """Return the record in a run folder; an empty dict if there is none that can be read."""
    try:
        found = read_json(folder / STATUS)
    except InputError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("state"), str) else {}


def add(folder: str | Path, **facts: Any) -> None:
    """Add keys to the record in a folder that this run has locked, if there is a record."""
    if found := read(Path(folder)):
        _write(Path(folder), {**found, **facts})


def correct(folders: Iterable[Path], start: str, error: BaseException) -> None:
    """Replace the recorded reason by the words that the terminal shows.

    The process that started the others knows best why a run ended: rank 0, which writes the record,
    may only have lost its connection to the rank that failed.

    Args:
        folders: where the run may have been; only the record of this start is changed.
        start: the identifier of this start.
        error: the error that ended the run.
    """
    for folder in folders:
        if read(folder).get("start") == start:
            add(folder, **ending(error))
            return


def _write(folder: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        write_json(folder / STATUS, content)
