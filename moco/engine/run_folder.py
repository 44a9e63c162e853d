"""Claim a folder for each run, so that no run overwrites the files of another."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from moco import distributed
from moco.config import AnyConfig, Config, replaced
from moco.engine import record
from moco.errors import InputError
from moco.files import numbered_paths
from moco.messages import print_rank0

# a run locks this file while it writes to the folder; the system unlocks it, however the run ends
LOCK = ".lock"

# seconds to wait for the lock, because tools/status.py takes it for an instant to see whether a run
# holds it
_WAIT = 0.3

# files of this project or of detectron2 that a second run in the same folder would replace
_OUTPUTS = (
    "results.json",
    "subset.txt",
    "*.pth.tar",
    "*.pth.tar.*",
    "last_checkpoint",
    "metrics.json",
    "model_*.pth",
)


def is_free(folder: Path) -> bool:
    """Return whether no run has logged or saved in `folder`, so that a new run may write to it.

    An empty log and an args.yaml do not count: a run that failed before its first step leaves them.
    """
    log = folder / "log.jsonl"
    if log.exists() and log.stat().st_size:
        return False
    return not any(True for pattern in _OUTPUTS for _ in folder.glob(pattern))


def check_free(folder: str | Path) -> None:
    """Raise InputError if `folder` holds another run, or cannot be written."""
    folder = Path(folder)
    if folder.exists():
        lock_first_free(folder, iter([folder]), continues=False).release()


def _occupied(folder: str | Path, option: str = "--save-dir") -> str:
    """Return the error message for a `folder`, given with `option`, that holds another run."""
    resume = "--resume" if option == "OUTPUT_DIR" else "--resume auto"
    return f"{option} {folder}: holds another run; {resume} continues it, or choose another folder"


@contextlib.contextmanager
def claim(config: AnyConfig, continues: bool, named: bool, start: str = "") -> Iterator[AnyConfig]:
    """Lock a run folder; yield `config` with its name; unlock it at the end. Runs on every rank.

    If the folder holds another run, an evaluation uses a subfolder. A run without `--save-dir` uses
    another name if a second run started at the same time. A line says which folder is used instead.
    A run that writes nothing leaves no folder behind. The folder's status.json records how the run
    ended.

    Args:
        config: the settings, with the requested folder.
        continues: whether this run continues the one in the folder.
        named: whether the user chose the folder.
        start: an identifier of this start of the run; see `recorded`.

    Raises InputError, on every rank, if the folder cannot be written, if pre-training is given a
    folder that is not free, or if another run is writing there.
    """
    held: LockedFolder | None = None
    wanted = config.run.save_dir
    found: str | InputError = ""
    if distributed.rank() == 0:
        try:
            held = lock_first_free(
                Path(wanted), _candidates_of(config, continues, named), continues
            )
            found = str(held.folder)
        except InputError as error:
            found = error
    found = distributed.broadcast_from_rank0(found)
    if isinstance(found, InputError):
        raise found
    if found != wanted:
        print_rank0(f"{wanted} holds another run; this one writes to {found}")
    config = replaced(config, save_dir=found)
    status = record.Record(config, start) if held else None
    try:
        yield config
        if status:
            status.end(None)
    except BaseException as error:
        if status:
            status.end(error)
        raise
    finally:
        if held:
            held.release()


@contextlib.contextmanager
def recorded(config: Config, continues: bool, named: bool) -> Iterator[str]:
    """Yield an identifier for this start of a run, to give to `claim` in each of its processes.

    If an error ends the run, the record in its folder gets the words that the terminal shows.
    """
    start = secrets.token_hex(8)
    try:
        yield start
    except BaseException as error:
        if str(error) or not isinstance(error, InputError):  # otherwise a rank has printed it
            folders = _candidates_of(config, continues, named)
            record.correct(takewhile(Path.exists, folders), start, error)
        raise


def _candidates_of(config: Config, continues: bool, named: bool) -> Iterator[Path]:
    """Return the folders that this run may write to, the first choice first."""
    folder = Path(config.run.save_dir)
    if continues:
        return iter([folder])
    if config.EVALUATES:
        return candidates(folder, config.run.script)
    return iter([folder]) if named else numbered_paths(folder)


def candidates(folder: Path, name: str) -> Iterator[Path]:
    """Yield `folder` and then its subfolders NAME, NAME-2, NAME-3, ..."""
    yield folder
    yield from numbered_paths(folder / name)


class LockedFolder:
    """A locked folder, created if it does not exist.

    Args:
        folder: the folder to lock.

    Raises filelock.Timeout if another run holds the lock, and OSError if the folder cannot be
    written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]
        self._lock = FileLock(folder / LOCK, timeout=_WAIT)
        folder.mkdir(parents=True, exist_ok=True)
        # some file systems have no locks
        with contextlib.suppress(NotImplementedError):
            self._lock.acquire()

    def release(self) -> None:
        """Unlock the folder. Remove it if this object created it and nothing was written to it."""
        with contextlib.suppress(OSError):
            if self._made and set(os.listdir(self.folder)) <= {LOCK, record.STATUS}:
                for name in os.listdir(self.folder):
                    (self.folder / name).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._lock.release()


def lock_first_free(
    given: Path, candidates: Iterator[Path], continues: bool, option: str = "--save-dir"
) -> LockedFolder:
    """Lock and return the first of `candidates` that is free.

    Args:
        given: the folder that the user gave, for messages.
        candidates: the folders to try, in this order.
        continues: whether the run continues a run in the folder. Then the folder need not be free,
            and only must not be locked by another run.
        option: the option that gave the folder, for messages.

    Raises InputError if none is free, or if a folder cannot be written.
    """
    busy = False
    try:
        for folder in candidates:
            try:
                held = LockedFolder(folder)
            except Timeout:
                busy = True
                continue
            if continues or is_free(folder):
                return held
            held.release()
    except OSError as error:
        raise InputError(
            f"{option} {given}: cannot be written: {error.strerror}; choose another folder"
        ) from None
    if busy:
        raise InputError(
            f"{option} {given}: another run is writing there; "
            "wait until it ends, or choose another folder"
        )
    raise InputError(_occupied(given, option))
