"""Exchange heartbeats between ranks: when one dies silently, the others exit too.

launch.py runs every distributed worker inside a `Heartbeat`.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from moco.files import as_utf8
from moco.launch.interrupt import Interrupted

BEAT = 5.0  # seconds between two heartbeats of a rank
PATIENCE = 30.0  # seconds without a heartbeat after which a rank counts as lost
GRACE = 5.0  # seconds that a rank has to exit by itself, with its own message
LAST = 60.0  # seconds that rank 0, which may run the store, waits for the other ranks to finish
_FINISHED = 1 << 40  # added to the heartbeats of a finished rank; more than any run can count


class Heartbeat:
    """A context in which this rank sends heartbeats and monitors the next rank.

    The ranks form a ring: each monitors the next one, and the last monitors rank 0.

    Args:
        store: the store that connects the ranks.
        rank: the global rank of this process.
        world_size: number of ranks.
        on_lost: called with a message if a rank is lost, before this process exits with status 1.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, on_lost: Callable[[str], None]
    ):
        self._rank, self._world_size, self._on_lost = rank, world_size, on_lost
        self._store = dist.PrefixStore(
            f"watch{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", _second_connection(store)
        )
        self._exited = threading.Event()  # this rank has left the context
        self._answered = time.monotonic()  # when the store last answered
        self._lost = ""  # the message about a lost rank
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._exchange, self._watch)
        ]

    def __enter__(self) -> "Heartbeat":
        """Start the threads."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Tell the other ranks that this one has finished or failed.

        If it has finished and is rank 0, wait for the others, because it may run the store.
        """
        self._exited.set()
        for thread in self._threads:
            thread.join(GRACE)
        if self._threads[0].is_alive():  # the store does not answer
            return
        in_order = error is None or isinstance(error, Interrupted)
        with contextlib.suppress(RuntimeError):  # the rank that runs the store has already exited
            if not in_order:
                why = next(iter(str(error).strip().splitlines()), "")
                # a store takes UTF-8 only
                failed = f"rank {self._rank} failed: {kind.__name__}: {as_utf8(why)}"
                self._store.compare_set("lost", "", failed)
            self._store.add(str(self._rank), _FINISHED)
            if not in_order or self._rank != 0:
                return
            end = time.monotonic() + LAST
            while time.monotonic() < end and not self._store.check(["lost"]):
                beats = [self._store.add(str(other), 0) for other in range(self._world_size)]
                if all(count >= _FINISHED for count in beats):
                    break
                time.sleep(0.05)

    def _exchange(self) -> None:
        """Send this rank's heartbeats and read the next rank's; record a lost rank in `_lost`.

        A store that does not answer blocks this thread, so `_watch` runs in another thread.
        """
        seen, heard, next_rank = 0, time.monotonic(), (self._rank + 1) % self._world_size
        while not self._exited.wait(BEAT):
            try:
                self._store.add(str(self._rank), 1)
                beats, now = self._store.add(str(next_rank), 0), time.monotonic()
                # if this process was paused, the other ranks may have been paused, too
                paused = now - self._answered > 3 * BEAT
                if beats != seen or paused:
                    seen, heard = beats, now
                if now - heard > PATIENCE and seen < _FINISHED:
                    silent = (
                        f"rank {next_rank} has given no sign of life for {PATIENCE:.0f} seconds"
                    )
                    died = f"{silent}: it was killed, or its node was lost"
                    self._store.compare_set("lost", "", died)
                if self._store.check(["lost"]):
                    self._lost = self._store.get("lost").decode()
                self._answered = now
            except RuntimeError:
                self._lost = "the connection to rank 0 is lost: it was killed, or its node was lost"
            if self._lost:
                return

    def _watch(self) -> None:
        """End this process when a rank is lost, or when the store no longer answers."""
        woke = time.monotonic()
        while not self._exited.wait(1.0):
            now = time.monotonic()
            if now - woke > 3 * BEAT:  # this process was paused
                self._answered = now
            woke = now
            lost = self._lost
            if not lost and now - self._answered > PATIENCE + BEAT:
                silent = f"rank 0 has given no sign of life for {PATIENCE:.0f} seconds"
                lost = f"{silent}: its node was lost"
            if lost and not self._exited.wait(GRACE):
                self._on_lost(lost)
                os._exit(1)


def _second_connection(store: dist.Store) -> dist.Store:
    """Return a new connection to `store`.

    A connection serves one thread at a time, and the main thread's connection may be waiting.
    """
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
