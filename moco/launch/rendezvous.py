"""Connect the processes of a run: open the store at their common address.

launch.py then initializes the process group with this store.
"""

import os
import socket
import sys
import threading
import time

import torch.distributed as dist

from moco.errors import InputError
from moco.launch import address

MEETING = 300.0  # seconds within which all processes must have connected
SILENCE = 10.0  # seconds to wait before a message is printed


def connect(url: str, r: int, world_size: int, announce: bool) -> dist.Store:
    """Connect to the store at `url`, and return it when all processes have connected.

    The function waits in Python code, so that signals are handled.

    Args:
        url: a URL that `address.check_url` has accepted.
        r: global rank.
        world_size: number of processes of the run.
        announce: whether to print a message if waiting takes long.

    Raises InputError after `MEETING` seconds.
    """
    began, announced = time.monotonic(), not announce

    def wait_for(what: str, advice: str) -> None:
        nonlocal announced
        waited = time.monotonic() - began
        if waited > MEETING:
            raise InputError(f"{what} for {MEETING:.0f} seconds; {advice}")
        if waited > SILENCE and not announced:
            announced = True
            sys.stdout.write(f"{what} ...; {advice}\n")
            sys.stdout.flush()
        time.sleep(0.2)

    if url.startswith("file://"):
        store, _, _ = next(dist.rendezvous(url, r, world_size))
        where = url
    else:
        host, port, names = address.read(url)
        where = f"{host}:{port} ({names})"
        is_master = r == 0 and not address.agent_runs_store(url)
        while not is_master:
            try:
                socket.create_connection((host, port), timeout=address.OWN).close()
                break
            except OSError as error:
                wait_for(
                    f"rank {r} waits for rank 0 at {where}: {error.strerror or error}",
                    "is rank 0 started, is this its address, and is the port open?",
                )
        store = _open_store(host, port, world_size, is_master, where)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    counter = dist.PrefixStore(f"meeting{attempt}", store)
    came = counter.add("came", 1)
    while came < world_size:
        wait_for(
            f"{came} of {world_size} processes have connected to {where}; rank {r} waits",
            "start the others, or correct WORLD_SIZE or --world-size",
        )
        came = counter.add("came", 0)
    return store


def _open_store(host: str, port: int, world_size: int, is_master: bool, where: str) -> dist.Store:
    """Connect to the store at host:port; open it first if `is_master`.

    Connects in a thread, because torch waits forever if another kind of server answers. Raises
    InputError if the store cannot be opened or does not answer.
    """
    made: list[dist.Store | Exception] = []

    def make() -> None:
        try:
            made.append(
                dist.TCPStore(
                    host,
                    port,
                    world_size,
                    is_master=is_master,
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            )
        except RuntimeError as error:
            made.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    end = time.monotonic() + 2 * SILENCE
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.1)
    if not made or isinstance(made[0], Exception):
        why = f": {' '.join(str(made[0]).split())}" if made else ""
        what = (
            "the store cannot be opened"
            if is_master
            else "another program answers there, not rank 0 of this run"
        )
        raise InputError(f"{where}: {what}{why}; choose another port")
    return made[0]
