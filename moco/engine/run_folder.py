"""Run folders: each run writes to a folder of its own, and no other run overwrites anything in it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from moco import distributed
from moco.config import AnyConfig, Config, replaced
from moco.distributed import print_rank0
from moco.errors import InputError
from moco.files import numbered_paths

LOCK = (
    ".lock"  # held while a run writes to the folder; the system releases it, however the run ends
)

# Files that a run of this project or of detectron2 writes, and that a second run would replace.
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
    """Return whether a new run may write to `folder`: no run has logged or saved anything there.

    An empty log and an args.yaml do not count: a run that failed before its first step leaves them.
    """
    log = folder / "log.jsonl"
    if log.exists() and log.stat().st_size:
        return False
    return not any(True for pattern in _OUTPUTS for _ in folder.glob(pattern))


def check_free(folder: str | Path) -> None:
    """Raise InputError if `folder` holds another run."""
    folder = Path(folder)
    if folder.exists():
        take(folder, iter([folder]), continues=False).release()


def _taken(folder: str | Path, option: str = "--save-dir") -> str:
    resume = "--resume" if option == "OUTPUT_DIR" else "--resume auto"
    return f"{option} {folder}: holds another run; {resume} continues it, or choose another folder"


@contextlib.contextmanager
def claim(config: AnyConfig, continues: bool, named: bool) -> Iterator[AnyConfig]:
    """Hold a run folder for this run alone, on every rank; yield `config` with its name.

    An evaluation that is given a folder with another run in it gets a subfolder, and a run without
    `--save-dir` (not `named`) that starts in the same second as another one gets the next name; a
    line says so. A run that writes nothing leaves no folder behind.

    Args:
        config: the settings, with the folder that is wanted.
        continues: whether this run continues the one in that folder.
        named: whether the user chose the folder.

    Raises InputError, on every rank, if the folder cannot be written, if a pre-training is given a
    folder that is not free, or if another run is writing there.
    """
    held: Held | None = None
    wanted = config.run.save_dir
    found: str | InputError = ""
    if distributed.rank() == 0:
        try:
            held = take(Path(wanted), _places_of(config, continues, named), continues)
            found = str(held.folder)
        except InputError as error:
            found = error
    found = distributed.broadcast_from_rank0(found)
    if isinstance(found, InputError):
        raise found
    if found != wanted:
        print_rank0(f"{wanted} holds another run; this one writes to {found}")
    try:
        yield replaced(config, save_dir=found)
    finally:
        if held:
            held.release()


def _places_of(config: Config, continues: bool, named: bool) -> Iterator[Path]:
    """Return the folders that this run may write to, in the order in which they are tried."""
    folder = Path(config.run.save_dir)
    if continues:
        return iter([folder])
    if config.EVALUATES:
        return places(folder, config.run.script)
    return iter([folder]) if named else numbered_paths(folder)


def places(folder: Path, name: str) -> Iterator[Path]:
    """Yield `folder` and then its subfolders NAME, NAME-2, NAME-3, ..."""
    yield folder
    yield from numbered_paths(folder / name)


class Held:
    """A locked folder; `release` unlocks it, and removes it if nothing was written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]
        self._lock = FileLock(folder / LOCK, blocking=False)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):  # the file system has no locks
            self._lock.acquire()

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if self._made and os.listdir(self.folder) == [LOCK]:
                (self.folder / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._lock.release()


def take(given: Path, places: Iterator[Path], continues: bool, option: str = "--save-dir") -> Held:
    """Lock the first of `places` that is free; with `continues`, the first that no run has locked.

    Raises InputError, which names `option` and its folder `given`, if there is none.
    """
    busy = False
    try:
        for folder in places:
            try:
                held = Held(folder)
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
            f"{option} {given}: another run is writing there; wait for its end, or choose another"
        )
    raise InputError(_taken(given, option))
