"""How processes are started: one per device, all of them calling the same worker.

Launchers: `--multiprocessing-distributed` (spawns here), `torchrun` and `python -m torch.distributed.launch` (RANK, WORLD_SIZE,
LOCAL_RANK), SLURM's `srun`; with none of them, one process.
"""

import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import devices, user
from moco.data import loader
from moco.engine import interrupt, output, tool, watch
from moco.errors import InputError, of_file

Worker = Callable[[Namespace, torch.device], None]


@dataclass(frozen=True)
class Plan:
    """How this command takes part in the run: which processes it starts and how they meet."""

    launcher: str  # spawn, torchrun, srun or single
    nodes: int  # how many nodes `batch_size` is counted on
    local: int  # processes on this node
    first: int  # global rank of the first process that this command starts
    world: int
    local_rank: int  # of that process
    url: str  # init_method, empty where nothing is distributed


def plan(args: Namespace) -> Plan:
    """Find out from the options and the environment how the run is launched. Raises InputError."""
    kind = devices.chosen(args.device)
    p = _plan(args, kind)
    if p.world > 1 and kind in devices.ONE_PROCESS:
        several = f"--device {kind}: supports a single process, and this run has {p.world}"
        raise InputError(f"{several}; start one process, or give --device cpu")
    return p


def _plan(args: Namespace, kind: str) -> Plan:
    """Return the `plan` for devices of type `kind`, unchecked for support of several processes."""
    gpus = devices.count(kind)
    env = os.environ
    if args.gpu is not None and args.gpu >= gpus:
        if args.device == "cpu":
            raise InputError(f"--gpu {args.gpu}: --device cpu uses no GPU; leave one of both out")
        raise InputError(f"--gpu {args.gpu}: this machine has {gpus} GPU(s); leave --gpu out or choose another")
    if args.dist_backend == "nccl" and kind != "cuda":
        where = "this machine has none" if args.device == "auto" else f"--device is {args.device}"
        raise InputError(f"--dist-backend nccl: needs CUDA GPUs, and {where}; leave it out")
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise InputError("--nproc-per-node must be at least 1")
    launched = "RANK" in env and "WORLD_SIZE" in env
    if args.multiprocessing_distributed and launched and _number("LOCAL_WORLD_SIZE", 1) > 1:
        raise InputError("--multiprocessing-distributed: torchrun has started a process per GPU already; leave it out")
    spawns = args.multiprocessing_distributed
    if spawns is None:  # the script's default: every GPU that it sees, unless told otherwise
        several = args.nproc_per_node or (kind == "cuda" and gpus > 1 and args.gpu is None)
        spawns = several and not launched and _number("SLURM_STEP_NUM_TASKS", 1) <= 1
    if spawns:
        local = args.nproc_per_node or max(gpus, 1)
        if gpus and local > gpus:
            raise InputError(f"--nproc-per-node {local}: this machine has {gpus} GPU(s)")
        nodes, node = _nodes(args)
        return Plan("spawn", nodes, local, node * local, nodes * local, 0, _meeting_point(args, nodes, node))
    if launched:
        r, w = _number("RANK"), _number("WORLD_SIZE")
        _check_below(r, w, "RANK", "WORLD_SIZE")
        local = _number("LOCAL_WORLD_SIZE", w)
        _check_below(local - 1, w, "LOCAL_WORLD_SIZE - 1", "WORLD_SIZE")
        local_rank = _number("LOCAL_RANK", r % local)
        _check_below(local_rank, local, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Plan("torchrun", max(1, w // local), local, r, w, local_rank, _check_url("env://", r))
    if (w := _number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        r, local_rank = _number("SLURM_PROCID"), _number("SLURM_LOCALID")
        _check_below(r, w, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        nodes = _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1))
        _check_below(nodes - 1, w, "SLURM_STEP_NUM_NODES - 1", "SLURM_STEP_NUM_TASKS")
        return Plan("srun", nodes, w // nodes, r, w, local_rank, _check_url(_slurm_url(args), r))
    nodes, node = _nodes(args)
    return Plan("single", nodes, 1, node, nodes, 0, _meeting_point(args, nodes, node) if nodes > 1 else "")


WORKERS = 8  # default limit of loader processes for each process; so many keep a GPU busy


def workers(p: Plan, args: Namespace) -> int:
    """Return the default of `--workers`: a loader process for each core of this node, at most `WORKERS` for each of its processes.

    With `args.batch_is_per_process`, return the number for one process.
    """
    bound = p.launcher == "srun" and "SLURM_CPUS_PER_TASK" in os.environ  # own cores
    node = min(cores() * (p.local if bound else 1), WORKERS * p.local)
    return max(1, node // p.local) if getattr(args, "batch_is_per_process", False) else node


def cores() -> int:
    """Return how many cores this process may use, by its CPU affinity and its container's quota."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # of cgroups v2, and v1
        try:
            quota, period = map(int, " ".join((CGROUP / file).read_text() for file in files).split())
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
        if quota > 0 < period:
            n = min(n, -(-quota // period))
    return max(1, n)


CGROUP = Path("/sys/fs/cgroup")


def _number(name: str, default: int | None = None) -> int:
    """Return an environment variable that a launcher sets. Raises InputError unless it is a count."""
    text = os.environ.get(name, default)
    if text is None:
        raise InputError(f"the environment lacks {name}; start with srun, or unset SLURM_STEP_NUM_TASKS")
    if not str(text).isdecimal():
        raise InputError(f"the environment says {name}={text}, which is not a number; unset it, or start with torchrun")
    return int(text)


def _check_below(value: int, limit: int, name: str, of: str) -> None:
    """Raise InputError unless a launcher's numbers fit together: 0 <= `value` < `limit`."""
    if not 0 <= value < limit:
        raise InputError(
            f"the environment says {name} = {value} and {of} = {limit}, but the first must lie "
            "between 0 and the second; unset both, or start with torchrun"
        )


def launch(worker: Worker, args: Namespace) -> None:
    """Run `worker(args, device)` in every process of the run's plan; returns when all have ended.

    Sets `args.batch_per_process` and `args.nodes`; `args.batch_size` is this node's, or with `args.batch_is_per_process` already a
    process's. A worker's InputError ends this process's run with the same InputError, raised here.
    """
    p = plan(args)
    each = getattr(args, "batch_is_per_process", False)
    args.nodes, args.batch_per_process = p.nodes, args.batch_size if each else args.batch_size // p.local
    if args.batch_per_process < 1:
        raise InputError(f"--batch-size {args.batch_size} is smaller than the {p.local} processes of this node; raise it")
    if p.launcher != "spawn":
        name = os.path.basename(sys.argv[0])
        _process(p, worker, args, p.first, p.local_rank, lambda lost: _tell(name, lost))
        return
    # a rank that is ended because another one failed cannot tidy up; Python's tracker does, and need not report it
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    context = mp.get_context("spawn")
    ends = context.SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    processes = mp.spawn(_spawned, (p, worker, args, ends), nprocs=p.local, join=False)
    with interrupt.passed_on(processes.pids()) as signals:
        killed = _killed(processes.processes)
        try:
            while not processes.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if not ends.empty():  # the others only lost their connection to the process that made it
                raise ends.get() from None
            if signals and hasattr(args, "resume") and signals[0] != signal.SIGINT:
                raise interrupt.nothing_to_save(signals[0]) from None
            if signals:
                interrupt.end_by(signals[0])
            raise _lost(p.first, killed, error) from None
    if not ends.empty():
        raise ends.get()


def _tell(name: str, lost: str) -> None:
    """Print the line about a lost rank; the process ends next, without Python's own flush."""
    print(f"{name}: error: {lost}", file=sys.stderr, flush=True)


class Lost(Exception):
    """A process of the run has failed, or was lost; the message says which and how."""


def _killed(processes: list) -> dict[int, str]:
    """Wait until a process has failed or all have ended; returns, by place, the signals that ended any, the first first.

    The others have a while to end by themselves, as they do without their connection, and are then killed: one that waits for
    the lost one does not listen.
    """
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                first = processes.index(process)
                end = time.monotonic() + PATIENCE
                while running and time.monotonic() < end:
                    for other in wait(list(running), end - time.monotonic()):
                        del running[other]
                codes = [process.exitcode or 0 for process in processes]
                for process in running.values():
                    process.kill()
                order = sorted(range(len(codes)), key=lambda i: i != first)
                return {i: signal.Signals(-codes[i]).name for i in order if codes[i] < 0}
    return {}


PATIENCE = 10.0  # seconds
OUT_OF_MEMORY = "; the system does so where memory runs out: try fewer --workers or a smaller --batch-size"


def _lost(first: int, killed: dict[int, str], error: mp.ProcessExitedException | mp.ProcessRaisedException) -> Lost:
    """What to tell of a failure; the traceback of a process that raised goes to stderr before it."""
    if killed:
        i, name = next(iter(killed.items()))
        return Lost(f"rank {first + i} was ended by {name}{OUT_OF_MEMORY if name == 'SIGKILL' else ''}")
    if isinstance(error, mp.ProcessRaisedException):
        print(error.msg, file=sys.stderr)
        return Lost(f"rank {first + error.error_index}: {error.msg.strip().splitlines()[-1]}")
    return Lost(f"rank {first + error.error_index} ended with status {error.exit_code}")


def _spawned(i: int, p: Plan, worker: Worker, args: Namespace, ends) -> None:
    user.prepare()
    output.guard()
    try:
        _process(p, worker, args, p.first + i, i, lambda lost: ends.put(Lost(lost)))
    except InputError as error:
        ends.put(error)
        sys.exit(2)
    except interrupt.Interrupted as end:  # all of them end so, and are not hurried
        ends.put(end)
    except KeyboardInterrupt:
        sys.exit(130)


def _process(p: Plan, worker: Worker, args: Namespace, r: int, local_rank: int, tell: Callable[[str], None]) -> None:
    """Set up this process's device and process group, run the worker, take the group down.

    `tell` gets the line about a rank that was lost, after which this process ends.
    """
    device = devices.of_process(args.device, args.gpu, local_rank)
    if device.type == "cpu" and p.local > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // p.local))
    if device.type in ("cuda", "xpu"):  # a machine has one MPS device
        torch.get_device_module(device).set_device(device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    guard, store = contextlib.nullcontext(), None
    if p.url:
        backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
        if p.launcher == "srun":
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
        alone = p.launcher == "torchrun" and "LOCAL_RANK" not in os.environ  # started by hand
        store = _meet(p.url, r, p.world, announce=local_rank == 0 or alone)
        timeout = timedelta(minutes=30)
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=r, world_size=p.world, timeout=timeout)
        guard = watch.Watch(store, r, p.world, tell)
    try:
        with guard, interrupt.before_training() if hasattr(args, "resume") else contextlib.nullcontext():
            _work(worker, args, device, r)
    except InputError as error:
        if store is None or p.launcher == "spawn":
            raise
        _say_once(store, error)
        raise InputError() from None
    finally:
        loader.end(mp.active_children())
        if dist.is_initialized():
            dist.destroy_process_group()


def _work(worker: Worker, args: Namespace, device: torch.device, r: int) -> None:
    """Run the worker on rank `r`.

    Raises InputError also for a file, too little memory, and a lost loader process.
    """
    try:
        worker(args, device)
    except OSError as error:
        raise of_file(error) from None
    except (RuntimeError, MemoryError) as error:
        what = " ".join(str(error).split())
        no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if no_memory or "allocate memory" in what or "MPS backend out of memory" in what:
            raise InputError(f"memory runs out on rank {r}; try a smaller --batch-size or network ({what})") from None
        if isinstance(error, NotImplementedError) and device.type in devices.ONE_PROCESS:
            lacks = f"--device {device.type}: PyTorch lacks an operation on this device"
            raise InputError(f"{lacks}; give --device cpu ({what})") from None
        if "DataLoader worker" not in what:
            raise
        raise InputError(f"a loader process of rank {r} was ended: {what}{OUT_OF_MEMORY}") from None


def _say_once(store: dist.Store, error: InputError) -> None:
    """Print an error unless another rank of this node prints the same one.

    It is printed here, because the launcher ends all processes as soon as one has ended.
    """
    key = f"error {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')} {socket.gethostname()} {error}"
    key = key.encode(errors="backslashreplace").decode()  # a store takes UTF-8 only
    try:
        is_first = store.add(key, 1) == 1
    except RuntimeError:  # the rank that keeps the store has ended
        is_first = True
    if is_first:
        lines = tool.printed(os.path.basename(sys.argv[0]), error)
        print(lines, end="", file=sys.stderr, flush=True)


def _nodes(args: Namespace) -> tuple[int, int]:
    """Return the number of nodes and this one's. As in MoCo, env:// takes them from the environment."""
    nodes, node = max(args.world_size, 1), max(args.rank, 0)
    if args.dist_url == "env://" and args.multiprocessing_distributed:
        nodes = _number("WORLD_SIZE", 1) if args.world_size == -1 else nodes
        node = _number("RANK", 0) if args.rank == -1 else node
    if node >= nodes:
        raise InputError(f"--rank {node} with --world-size {nodes}: nodes are counted from 0; use 0 to {nodes - 1}")
    return nodes, node


def _meeting_point(args: Namespace, nodes: int, node: int) -> str:
    """The URL where the processes meet; a free port of this machine where none is given."""
    if args.dist_url == "auto":
        if nodes > 1:
            raise InputError("several nodes need a meeting point: give --dist-url tcp://FIRST_NODE:PORT")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{s.getsockname()[1]}"
    return _check_url(args.dist_url, node)


def _check_url(url: str, r: int) -> str:
    """Return the URL where the processes meet, after checking what can be checked on this machine.

    `r` is 0 if rank 0, which keeps the store, runs here. Raises InputError for a URL of another
    form, a missing or wrong MASTER_ADDR or MASTER_PORT, and a host that cannot be resolved; on
    rank 0 also for a host that is another machine and for a port in use.
    """
    if url.startswith("file:///"):
        return url
    host, port, names = _address(url)
    addresses = _resolve(host, port, names)
    if r == 0 and not _agent_keeps_store(url):
        _check_own(host, port, names, socket.AF_INET if socket.AF_INET in addresses else socket.AF_INET6)
    return url


def _address(url: str) -> tuple[str, int, str]:
    """Return host and port of tcp:// or env://, and what the user calls them. Raises InputError."""
    if url == "env://":
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if absent:
            given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
            said = f"the environment has {' and '.join(given)}" if given else "--dist-url env:// is given"
            alone = f"unset {' and '.join(given)}" if given else "leave --dist-url out"
            raise InputError(
                f"{said}, but not {' and '.join(absent)}, where rank 0 waits for the others; "
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


def _agent_keeps_store(url: str) -> bool:
    """Return whether torchrun keeps the store at env://, and has opened it already."""
    return url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _check_own(host: str, port: int, names: str, family: socket.AddressFamily) -> None:
    """Raise InputError unless this machine, where rank 0 runs, can open the port and be reached as `host`."""
    try:
        listener = socket.create_server(("", port), family=family)  # like the store
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            choose = "or leave --dist-url out to have a free one found" if names == "--dist-url" else "or start with torchrun"
            raise InputError(f"{names}: port {port} is in use; choose another, {choose}") from None
        raise InputError(f"{names}: port {port} cannot be opened: {error.strerror}; choose another") from None
    try:
        with socket.create_connection((host, port), timeout=OWN):
            listener.settimeout(OWN)
            listener.accept()[0].close()
    except OSError:
        raise InputError(
            f"{names} {host}:{port}: rank 0 runs on {socket.gethostname()}, which cannot be reached as {host}; "
            "give this machine's name or address"
        ) from None
    finally:
        listener.close()


OWN = 5.0  # seconds within which a machine must answer itself
MEETING = 300.0  # seconds within which all processes must have connected
SILENCE = 10.0  # seconds, after which a line says what is waited for


def _meet(url: str, r: int, world: int, announce: bool) -> dist.Store:
    """Return the store at `url` when all `world` processes have connected to it.

    With `announce`, a line says what is waited for if it takes long. Raises InputError after
    `MEETING` seconds. Waits in Python code, so that signals are handled.
    """
    began, announced = time.monotonic(), not announce

    def wait_for(what: str, advice: str) -> None:
        nonlocal announced
        waited = time.monotonic() - began
        if waited > MEETING:
            raise InputError(f"{what} for {MEETING:.0f} seconds; {advice}")
        if waited > SILENCE and not announced:
            announced = True
            print(f"{what} ...; {advice}", flush=True)
        time.sleep(0.2)

    if url.startswith("file://"):
        store, _, _ = next(dist.rendezvous(url, r, world))
        where = url
    else:
        host, port, names = _address(url)
        where = f"{host}:{port} ({names})"
        keeps = r == 0 and not _agent_keeps_store(url)
        while not keeps:
            try:
                socket.create_connection((host, port), timeout=OWN).close()
                break
            except OSError as error:
                wait_for(
                    f"rank {r} waits for rank 0 at {where}: {error.strerror or error}",
                    "is rank 0 started, is this its address, and is the port open?",
                )
        store = _open_store(host, port, world, keeps, where)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    place = dist.PrefixStore(f"meeting{attempt}", store)
    came = place.add("came", 1)
    while came < world:
        wait_for(
            f"{came} of {world} processes have connected to {where}; rank {r} waits",
            "start the others, or correct WORLD_SIZE or --world-size",
        )
        came = place.add("came", 0)
    return store


def _open_store(host: str, port: int, world: int, keeps: bool, where: str) -> dist.Store:
    """Connect to the store at host:port; open it first if this process `keeps` it. Raises InputError.

    Runs in a thread, because torch waits forever if another kind of server is there.
    """
    made: list[dist.Store | Exception] = []

    def make() -> None:
        try:
            made.append(dist.TCPStore(host, port, world, is_master=keeps, wait_for_workers=False, multi_tenant=True))
        except RuntimeError as error:
            made.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    end = time.monotonic() + 2 * SILENCE
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.1)
    if not made or isinstance(made[0], Exception):
        why = f": {' '.join(str(made[0]).split())}" if made else ""
        what = "the store cannot be opened" if keeps else "another program answers there, not rank 0 of this run"
        raise InputError(f"{where}: {what}{why}; choose another port")
    return made[0]


def _resolve(host: str, port: int, names: str) -> set[socket.AddressFamily]:
    """Return the families of the host's addresses. Raises InputError if it has none."""
    try:
        return {found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError, OverflowError):
        raise InputError(f"{names}: cannot resolve {host}:{port}; use this node's name or address") from None


def _slurm_url(args: Namespace) -> str:
    if args.dist_url != "auto":
        return args.dist_url
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost"))
    first = nodes
    if "[" in nodes or "," in nodes:
        try:
            names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            first = names.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise InputError(f"cannot read the node list {nodes}; give --dist-url tcp://FIRST_NODE:PORT") from None
    # a port of this job, and of this of the steps that it may run beside each other
    job, step = (_number(name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"tcp://{first}:{20000 + (job + 1009 * step) % 20000}"
