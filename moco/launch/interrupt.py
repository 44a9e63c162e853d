"""Stop a run on a signal: it finishes its step, saves, and exits with `STATUS`.

A scheduler can then start it again. engine/trainer.py polls `Requests`; launch.py uses the rest.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
import torch.distributed as dist

from moco import distributed

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# seconds after the first signal during which a SIGINT counts as the launcher's copy of it; a later
# SIGINT ends the run at once
PATIENCE = 3.0


class Interrupted(BaseException):
    """Raised when a signal stops the run, after saving if there is something to save.

    The message says how to continue. The class derives from BaseException, so that code that
    catches every Exception does not catch it.
    """


class Requests:
    """A context that receives signals during training. Every rank must enter it."""

    def __init__(self):
        self.received, self._at = 0, 0.0
        self._group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None
        self._flag, self._work = torch.zeros(1, dtype=torch.int), None

    def __enter__(self) -> "Requests":
        """Install the signal handlers."""
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        # Python calls a signal's handler only between two bytecode instructions, and a backward
        # pass is one instruction. To print a line at once, a thread reads the signal's number from
        # a pipe, to which Python's low-level handler writes immediately.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._writer_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(
            target=_acknowledge, args=(reader, distributed.rank() == 0), daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the signal handlers."""
        signal.set_wakeup_fd(self._writer_before)
        os.close(self._writer)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > PATIENCE:
            end_by_signal(number)

    def agreed(self) -> str:
        """Return the name of the received signal once all ranks know it, else "".

        Every rank must call it after every step. The ranks exchange the signal while the next step
        runs. Therefore all of them stop after the same step, and none waits.
        """
        if self._group is None:
            return self._name(self.received)
        if self._work is not None:
            self._work.wait()
        found = int(self._flag)
        self._flag.fill_(self.received)
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return self._name(found)

    def _name(self, number: int) -> str:
        return signal.Signals(number).name if number else ""


def _acknowledge(reader: int, prints: bool) -> None:
    """Read signal numbers from the pipe `reader` until it closes; print a line at the first one.

    Only prints if `prints` is true, as on rank 0.
    """
    with open(reader, "rb", buffering=0) as pipe:
        while numbers := pipe.read(1):
            if prints and numbers[0] in SIGNALS:
                prints = False
                name = signal.Signals(numbers[0]).name
                again = (
                    f"; Ctrl-C after {PATIENCE:.0f} seconds ends at once"
                    if name == "SIGINT"
                    else ""
                )
                line = f"{name}: finishing the step and saving{again}"
                with contextlib.suppress(OSError):
                    os.write(2, f"{chr(10) * os.isatty(2)}{line}\n".encode())


@contextlib.contextmanager
def outside_training() -> Iterator[None]:
    """Raise Interrupted on a scheduler's signal outside training, when there is nothing to save.

    During training, `Requests` receives the signals instead.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise nothing_to_save(number)

    before = {number: signal.signal(number, end) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def nothing_to_save(number: int) -> Interrupted:
    """Return the Interrupted to raise if a signal stops a run before or after training."""
    name = signal.Signals(number).name
    return Interrupted(
        f"{name}: stopped outside training, nothing to save; --resume auto continues the run"
    )


@contextlib.contextmanager
def forward_signals(processes: Sequence[int]) -> Iterator[list[int]]:
    """Forward signals to the processes with these ids, which exit by themselves.

    Used by the process that has started them. Yields the list of the signals received so far.
    """
    signals: list[int] = []

    def send(number: int, _: FrameType | None) -> None:
        signals.append(number)
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, send) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by_signal(number: int) -> None:
    """End this process as the signal would without a handler."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
