"""Check the address at which the processes connect. rendezvous.py opens the store there."""

import errno
import os
import socket
from urllib.parse import urlsplit

from moco.errors import InputError

OWN = 5.0  # seconds within which a machine must answer itself


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
    host, port, names = read(url)
    addresses = _resolve(host, port, names)
    if r == 0 and not agent_runs_store(url):
        _check_own(
            host, port, names, socket.AF_INET if socket.AF_INET in addresses else socket.AF_INET6
        )
    return url


def read(url: str) -> tuple[str, int, str]:
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


def agent_runs_store(url: str) -> bool:
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


def _resolve(host: str, port: int, names: str) -> set[socket.AddressFamily]:
    """Return the families (IPv4, IPv6) of the host's addresses. Raises InputError without any."""
    try:
        return {found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError, OverflowError):
        raise InputError(
            f"{names}: cannot resolve {host}:{port}; use this node's name or address"
        ) from None
