"""Ranks that end without the others' knowing, on another node say: they notice, and end as well."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from moco.engine.interrupt import Interrupted

BEAT = 5.0  # seconds between two signs of life
PATIENCE = 40.0  # without one from a rank that has not ended in order
GRACE = 5.0  # to end by itself, as a rank does that shares the mistake or hears of it by its connection

_ENDED = 1 << 40  # more beats than any run has


class Watch:
    """While it is used as a context, this rank shows that it lives, and looks after the next one.

    Args:
        store: where the ranks have met.
        tell: called with a line once a rank is lost; this process then ends at once, with status 1.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, tell: Callable[[str], None]):
        self._rank, self._next, self._tell = rank, (rank + 1) % world, tell
        self._store = dist.PrefixStore("watch", store.clone())  # a connection of its own
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the rank that keeps the store has ended before
            if error is not None and not isinstance(error, Interrupted):
                why = next(iter(str(error).strip().splitlines()), "")
                self._store.compare_set("lost", "", f"rank {self._rank} has ended: {kind.__name__}: {why}")
            self._store.add(str(self._rank), _ENDED)

    def _watch(self) -> None:
        seen, heard, woke = 0, time.monotonic(), time.monotonic()
        while not self._ended.wait(BEAT):
            now = time.monotonic()
            if now - woke > 3 * BEAT:  # stopped for a while itself, as perhaps all ranks were
                heard = now
            woke = now
            try:
                self._store.add(str(self._rank), 1)
                beats = self._store.add(str(self._next), 0)
                if beats != seen:
                    seen, heard = beats, now
                if now - heard > PATIENCE and seen < _ENDED:
                    silence = f"rank {self._next} has given no sign of life for {PATIENCE:.0f} seconds"
                    self._store.compare_set("lost", "", f"{silence}: killed, or its node lost")
                lost = self._store.get("lost").decode() if self._store.check(["lost"]) else ""
            except RuntimeError:
                lost = "the connection to rank 0 is lost: killed, or its node lost"
            if lost and not self._ended.wait(GRACE):
                self._tell(lost)
                os._exit(1)
