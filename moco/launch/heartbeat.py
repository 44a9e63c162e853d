"""Ranks that end without the others' knowing, on another node say: they notice, and end as well."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from moco.launch.interrupt import Interrupted

BEAT = 5.0  # seconds between two signs of life


PATIENCE = 30.0  # without one from a rank that has not ended in order


GRACE = (
    5.0  # to end by itself, as a rank does that shares the mistake or hears of it by its connection
)


LAST = 60.0  # that the rank which may keep the store waits for the others to end in order


_ENDED = 1 << 40  # more beats than any run has


class Heartbeat:
    """While it is used as a context, this rank shows that it lives, and looks after the next one.

    Args:
        store: where the ranks have met.
        tell: called with a line once a rank is lost; this process then ends at once, with status 1.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, tell: Callable[[str], None]):
        self._rank, self._world, self._tell = rank, world_size, tell
        self._store = dist.PrefixStore(
            f"watch{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", _second_connection(store)
        )
        self._ended, self._answered, self._lost = threading.Event(), time.monotonic(), ""
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._exchange, self._judge)
        ]

    def __enter__(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(GRACE)
        if self._threads[0].is_alive():  # the store does not answer
            return
        in_order = error is None or isinstance(error, Interrupted)
        with contextlib.suppress(RuntimeError):  # the rank that keeps the store has ended before
            if not in_order:
                why = next(iter(str(error).strip().splitlines()), "")
                why = why.encode(errors="backslashreplace").decode()  # a store takes UTF-8 only
                self._store.compare_set(
                    "lost", "", f"rank {self._rank} has ended: {kind.__name__}: {why}"
                )
            self._store.add(str(self._rank), _ENDED)
            end = time.monotonic() + LAST
            while (
                in_order
                and self._rank == 0
                and time.monotonic() < end
                and not self._store.check(["lost"])
            ):
                if all(self._store.add(str(other), 0) >= _ENDED for other in range(self._world)):
                    break
                time.sleep(0.05)

    def _exchange(self) -> None:
        """Show that this rank lives, and see whether the next one does; what the store answers, and when, is for `_judge`."""
        seen, heard, next_one = 0, time.monotonic(), (self._rank + 1) % self._world
        while not self._ended.wait(BEAT):
            try:
                self._store.add(str(self._rank), 1)
                beats, now = self._store.add(str(next_one), 0), time.monotonic()
                if (
                    beats != seen or now - self._answered > 3 * BEAT
                ):  # or stopped for a while itself, as perhaps all ranks were
                    seen, heard = beats, now
                if now - heard > PATIENCE and seen < _ENDED:
                    silence = (
                        f"rank {next_one} has given no sign of life for {PATIENCE:.0f} seconds"
                    )
                    self._store.compare_set("lost", "", f"{silence}: killed, or its node lost")
                if self._store.check(["lost"]):
                    self._lost = self._store.get("lost").decode()
                self._answered = now
            except RuntimeError:
                self._lost = "the connection to rank 0 is lost: killed, or its node lost"
            if self._lost:
                return

    def _judge(self) -> None:
        woke = time.monotonic()
        while not self._ended.wait(1.0):
            now = time.monotonic()
            if now - woke > 3 * BEAT:
                self._answered = now
            woke = now
            lost = self._lost
            if not lost and now - self._answered > PATIENCE + BEAT:
                lost = f"rank 0 has given no sign of life for {PATIENCE:.0f} seconds: its node lost"
            if lost and not self._ended.wait(GRACE):
                self._tell(lost)
                os._exit(1)


def _second_connection(store: dist.Store) -> dist.Store:
    """To the same store: a connection serves one thread at a time, and may be waiting."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return store
    return dist.TCPStore(
        store.host,
        store.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=PATIENCE),
    )
