"""Connect the processes of a run: check their common address, and open the store there.

launch.py then initializes the process group with this store.
"""

import errno
import os
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

import torch.distributed as dist

from moco.errors import InputError


def check_url(url: str, r: int) -> str:
    """Check the URL at which the processes connect, as far as this machine can, and return it.

    Args:
        url: tcp://HOST:PORT, env:// or file:///PATH.
        r: 0 if rank 0, which runs the store, is on this machine.

    Raises InputError for another form of URL, a missing or wrong MASTER_ADDR or MASTER_PORT, and a
    host that cannot be resolved. If `r` is 0, also raises it if the host is another machine, or if
    the port is in use.
    """
    if url.startswith("file:///"):
        return url
    host, port, names = _address(url)
    addresses = _resolve(host, port, names)
    if r == 0 and not _agent_runs_store(url):
        _check_own(
            host, port, names, socket.AF_INET if socket.AF_INET in addresses else socket.AF_INET6
        )
    return url


def _address(url: str) -> tuple[str, int, str]:
    """Return host and port of a tcp:// or env:// URL, and the option or variables that set them."""
    if url == "env://":
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if absent:
            given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
            said = (
                f"the environment has {' and '.join(given)}"
                if given
                else "--dist-url env:// is given"
            )
            alone = f"unset {' and '.join(given)}" if given else "leave --dist-url out"
            raise InputError(
                f"{said}, but not {' and '.join(absent)}, the address of rank 0; "
                f"set MASTER_ADDR and MASTER_PORT, start with torchrun, or {alone} to train alone"
            )
        good, names, form = True, "MASTER_ADDR, MASTER_PORT", "a host and a port from 1 to 65535"
    else:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.netloc.rpartition(":")[2]
            good = parts.scheme == "tcp" and bool(host) and not parts.path
        except ValueError:
            host, port, good = "", "", False
        names, form = "--dist-url", "tcp://HOST:PORT"
    if not (good and port.isdecimal() and 0 < int(port) < 2**16):
        shown = url if names == "--dist-url" else f"{host}:{port}"
        raise InputError(f"{names} {shown}: expected {form}")
    return host, int(port), names


def _agent_runs_store(url: str) -> bool:
    """Return whether torchrun runs the store, and has opened it already."""
    return url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _check_own(host: str, port: int, names: str, family: socket.AddressFamily) -> None:
    """Raise InputError unless rank 0's machine, this one, can open the port and is `host`."""
    try:
        listener = socket.create_server(("", port), family=family)  # like the store
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            choose = (
                "or leave --dist-url out to use a free one"
                if names == "--dist-url"
                else "or start with torchrun"
            )
            raise InputError(f"{names}: port {port} is in use; choose another, {choose}") from None
        raise InputError(
            f"{names}: port {port} cannot be opened: {error.strerror}; choose another"
        ) from None
    try:
        with socket.create_connection((host, port), timeout=OWN):
            listener.settimeout(OWN)
            listener.accept()[0].close()
    except OSError:
        machine = socket.gethostname()
        raise InputError(
            f"{names} {host}:{port}: rank 0 runs on {machine}, which cannot be reached as {host}; "
            "give this machine's name or address"
        ) from None
    finally:
        listener.close()


OWN = 5.0  # seconds within which a machine must answer itself
MEETING = 300.0  # seconds within which all processes must have connected
SILENCE = 10.0  # seconds to wait before a message is printed


def connect(url: str, r: int, world_size: int, announce: bool) -> dist.Store:
    """Connect to the store at `url`, and return it when all processes have connected.

    The function waits in Python code, so that signals are handled.

    Args:
        url: a URL that `check_url` has accepted.
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
        host, port, names = _address(url)
        where = f"{host}:{port} ({names})"
        is_master = r == 0 and not _agent_runs_store(url)
        while not is_master:
            try:
                socket.create_connection((host, port), timeout=OWN).close()
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


def _resolve(host: str, port: int, names: str) -> set[socket.AddressFamily]:
    """Return the families (IPv4, IPv6) of the host's addresses. Raises InputError without any."""
    try:
        return {found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError, OverflowError):
        raise InputError(
            f"{names}: cannot resolve {host}:{port}; use this node's name or address"
        ) from None
