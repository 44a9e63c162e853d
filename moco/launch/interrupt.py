"""Signals that ask a run to end: it finishes its step, saves, and exits with `STATUS`, so that a scheduler may start it again."""

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


PATIENCE = 3.0  # seconds; a launcher's and a terminal's may both arrive, but a SIGINT that comes later is meant to end at once


class Interrupted(BaseException):
    """The run was asked to end, and has saved if there was anything to save; the message says how to go on.

    It may come at any place, and is nothing that code which catches every Exception should take for its own.
    """


class Requests:
    """Takes the signals while a run trains. Used as a context, on every rank."""

    def __init__(self):
        self.received, self._at = 0, 0.0
        self._group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None
        self._flag, self._work = torch.zeros(1, dtype=torch.int), None

    def __enter__(self) -> "Requests":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        # Python calls a signal's handler only between two bytecode instructions, and a backward
        # pass is one. So a thread prints the line: it reads the signal's number from a pipe, to
        # which Python's low-level handler writes at once.
        ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._mouth_before = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        threading.Thread(
            target=_acknowledge, args=(ear, distributed.rank() == 0), daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._mouth_before)
        os.close(self._mouth)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > PATIENCE:
            end_by_signal(number)

    def agreed(self) -> str:
        """To be asked after every step, on every rank: the signal's name, once all ranks know of it; empty if there is none.

        The ranks' answers are exchanged while the next step runs, so that all of them end after the same one, and none waits.
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


def _acknowledge(ear: int, speaks: bool) -> None:
    """Print a line at the first of `SIGNALS`, if this process `speaks`; end with the pipe."""
    with open(ear, "rb", buffering=0) as pipe:
        while numbers := pipe.read(1):
            if speaks and numbers[0] in SIGNALS:
                speaks = False
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
    """Until `Requests` takes the signals, and after it: those of a scheduler raise Interrupted, since there is nothing to save."""

    def end(number: int, frame: FrameType | None) -> None:
        raise nothing_to_save(number)

    before = {number: signal.signal(number, end) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def nothing_to_save(number: int) -> Interrupted:
    """What a run says that a signal has ended before it trained, or after."""
    return Interrupted(
        f"{signal.Signals(number).name}: not in training, nothing to save; --resume auto goes on"
    )


@contextlib.contextmanager
def forward_signals(processes: Sequence[int]) -> Iterator[list[int]]:
    """A launcher's part: signals go to the processes with these ids, which end by themselves. Yields the signals so far."""
    signals: list[int] = []

    def send(number: int, frame: FrameType | None) -> None:
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
    """End this process as the signal does by itself."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
