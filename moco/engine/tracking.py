"""Track a run with Weights & Biases, Trackio or MLflow, in a process of its own.

The tracker cannot disturb the training: it has its own process, and messages to it never wait. If
it fails, hangs or is killed, a line says so, and the run continues without it.
"""

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moco import distributed
from moco.config import Config, flat
from moco.engine import trackers
from moco.errors import InputError, short
from moco.files import as_utf8, to_json
from moco.launch.interrupt import Interrupted
from moco.messages import print_rank0

MOST = 4 << 20  # bytes of messages that may wait for the tracker, about 10,000 log lines
# seconds to wait for the tracker when the run ends
PATIENCE = {"finished": 60.0, "stopped": 10.0, "failed": 10.0}

LAST = 5.0  # seconds to wait for the exit of its process, when everything is tracked


def check(config: Config) -> None:
    """Raise InputError if the package of `--track` is not installed."""
    name = config.tracking.track
    if name is None:
        return
    spec = importlib.util.find_spec(name)
    # a folder of the same name, such as wandb's own, is found as a package without a file
    if spec is None or spec.origin is None:
        raise InputError(
            f"--track {name}: the package {name} is not installed; install it with "
            f"pip install {name}, or leave --track out"
        )


class Tracker:
    """The process that tracks this run. It starts when the run begins to log.

    Args:
        config: the settings of the run.
        continues: whether the run continues the one in its folder, and so its tracked run.
    """

    def __init__(self, config: Config, continues: bool):
        self.name, self.continues = config.tracking.track, continues
        self.folder = Path(config.run.save_dir)
        self.process: subprocess.Popen | None = None
        self._begun = self._done = False
        self._unsent, self._heard = bytearray(), b""

    def begin(self, config: Config) -> None:
        """Start the tracker, unless it has been started before."""
        if self._begun:
            return
        self._begun = True
        file, found = trackers.id_file(self.folder, self.name), None
        if self.continues:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found = file.read_text().strip() or None
        try:
            with open(self.folder / "tracking.log", "ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, trackers.__file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    # a group of its own: Ctrl-C is for the training, and all of it can be killed
                    start_new_session=True,
                )
        except OSError as error:
            self._stop(f"cannot be started: {error.strerror}")
            return
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._send(
            {
                "tracker": self.name,
                "folder": str(self.folder),
                "name": as_utf8(_name(self.folder)),
                "id": found,
                "config": {
                    name: as_utf8(value) if isinstance(value, str) else value
                    for name, value in flat(config).items()
                },
                "argv": sys.argv,
            }
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._send({"metrics": values, "step": step})

    def results(self, values: dict[str, float]) -> None:
        """Send the final results."""
        self._send({"results": values})

    def end(self, how: str) -> None:
        """End the tracked run, and wait for the tracker, but not for long.

        Args:
            how: a key of `PATIENCE`.
        """
        try:
            self._send({"end": how})
            limit = time.monotonic() + PATIENCE[how]
            while self.process and not self._done and (left := limit - time.monotonic()) > 0:
                unsent = [self.process.stdin] if self._unsent else []
                select.select([self.process.stdout], unsent, [], left)
                self._exchange()
            if self.process and not self._done:
                self._stop(f"has not finished within {PATIENCE[how]:.0f} seconds")
            if self.process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(LAST)  # a package may hang when its process exits
        finally:
            self._kill()

    def _send(self, message: dict[str, Any]) -> None:
        """Send a message, or keep it until the tracker takes it. Never waits."""
        if self.process is None:
            return
        self._unsent += f"{to_json(message)}\n".encode()
        self._exchange()
        if self.process and len(self._unsent) > MOST:
            self._stop("does not answer")

    def _exchange(self) -> None:
        """Write and read as much as the pipes to the tracker allow without waiting."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: os.write(self.process.stdin.fileno(), self._unsent[:65536])]
        try:
            while heard := os.read(self.process.stdout.fileno(), 65536):
                self._heard += heard
            ended = True
        except BlockingIOError:
            ended = False
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            word, _, text = line.decode(errors="replace").partition(" ")
            if word == "note":
                print_rank0(f"--track {self.name}: {text}")
            elif word == "error":
                self._stop(text)
                return
            self._done |= word == "done"
        if ended and not self._done:
            self._stop("its process has ended")

    def _stop(self, why: str) -> None:
        """Kill the tracker, and print why the run is not tracked any more."""
        self._kill()
        print_rank0(
            f"warning: --track {self.name} stops: {short(why, 300)} "
            f"({self.folder / 'tracking.log'} may say more); the run continues without it"
        )

    def _kill(self) -> None:
        """Kill the tracker's processes, if any are left, and close the pipes to it."""
        if self.process is None:
            return
        # also the processes that the tracker has started
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self.process = None


def _name(folder: Path) -> str:
    """Return the name of the tracked run; that of an evaluation in a run folder has both names."""
    folder = folder.resolve()
    return "/".join(folder.parts[-2 if (folder.parent / "args.yaml").exists() else -1 :])


_current: Tracker | None = None


@contextlib.contextmanager
def tracked(config: Config, continues: bool) -> Iterator[None]:
    """Let `begin`, `log` and `results` reach the tracker of `--track`, on rank 0; then end it.

    Args:
        config: the settings of the run, whose folder exists.
        continues: whether the run continues the one in its folder.
    """
    global _current
    if config.tracking.track is None or distributed.rank() != 0:
        yield
        return
    _current, how = Tracker(config, continues), "failed"
    try:
        yield
        how = "finished"
    except Interrupted:
        how = "stopped"
        raise
    finally:
        tracker, _current = _current, None
        tracker.end(how)


def begin(config: Config) -> None:
    """Start tracking the run of this process with its final settings, if it has a tracker."""
    if _current:
        _current.begin(config)


def log(values: dict[str, float], step: int) -> None:
    """Track the metrics of a step of this process's run, if it has a tracker."""
    if _current:
        _current.log(values, step)


def results(values: dict[str, float]) -> None:
    """Track the final results of this process's run, if it has a tracker."""
    if _current:
        _current.results(values)
