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
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco.data import loader
from moco.engine import interrupt, watch
from moco.errors import InputError

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
    gpus = torch.cuda.device_count()
    env = os.environ
    if args.gpu is not None and args.gpu >= gpus:
        raise InputError(f"--gpu {args.gpu}: this machine has {gpus} GPU(s); leave --gpu out or choose another")
    if args.dist_backend == "nccl" and not gpus:
        raise InputError("--dist-backend nccl: is for GPUs, and this machine has none; leave it out")
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise InputError("--nproc-per-node must be at least 1")
    if args.multiprocessing_distributed:
        local = args.nproc_per_node or max(gpus, 1)
        if gpus and local > gpus:
            raise InputError(f"--nproc-per-node {local}: this machine has {gpus} GPU(s)")
        nodes, node = _nodes(args)
        return Plan("spawn", nodes, local, node * local, nodes * local, 0, _meeting_point(args, nodes, node))
    if "RANK" in env and "WORLD_SIZE" in env:
        r, w = _number("RANK"), _number("WORLD_SIZE")
        local = max(1, _number("LOCAL_WORLD_SIZE", w))
        return Plan("torchrun", max(1, w // local), local, r, w, _number("LOCAL_RANK", 0), "env://")
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        r, w = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        return Plan("srun", nodes, w // nodes, r, w, int(env["SLURM_LOCALID"]), _slurm_url(args))
    nodes, node = _nodes(args)
    return Plan("single", nodes, 1, node, nodes, 0, _meeting_point(args, nodes, node) if nodes > 1 else "")


def _number(name: str, default: int = 0) -> int:
    """An environment variable that a launcher sets."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment says {name}={text}, which is no number; unset it, or start with torchrun")
    return int(text)


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
        _process(p, worker, args, p.first, p.local_rank, lambda lost: print(f"{name}: error: {lost}", file=sys.stderr))
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
    try:
        _process(p, worker, args, p.first + i, i, lambda lost: ends.put(Lost(lost)))
    except InputError as error:
        ends.put(error)
        sys.exit(2)
    except OSError as error:
        if not error.filename:
            raise
        ends.put(InputError(f"{os.fsdecode(error.filename)}: {error.strerror}"))
        sys.exit(2)
    except interrupt.Interrupted as end:  # all of them end so, and are not hurried
        ends.put(end)
    except KeyboardInterrupt:
        sys.exit(130)


def _process(p: Plan, worker: Worker, args: Namespace, r: int, local_rank: int, tell: Callable[[str], None]) -> None:
    """Set up this process's device and process group, run the worker, take the group down.

    `tell` gets the line about a rank that was lost, after which this process ends.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", args.gpu if args.gpu is not None else local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        if p.local > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // p.local))
    guard = contextlib.nullcontext()
    if p.url:
        backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
        if p.launcher == "srun":
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
        timeout = timedelta(minutes=30)
        store, _, _ = next(dist.rendezvous(p.url, r, p.world, timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=r, world_size=p.world, timeout=timeout)
        guard = watch.Watch(store, r, p.world, tell)
    try:
        with guard, interrupt.before_training() if hasattr(args, "resume") else contextlib.nullcontext():
            worker(args, device)
    except (RuntimeError, MemoryError) as error:
        what = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in what:
            raise InputError(f"memory runs out on rank {r}; try a smaller --batch-size or network ({what[:200]})") from None
        if "DataLoader worker" not in what:
            raise
        raise InputError(f"a loader process of rank {r} was ended: {what}{OUT_OF_MEMORY}") from None
    finally:
        loader.end(mp.active_children())
        if dist.is_initialized():
            dist.destroy_process_group()


def _nodes(args: Namespace) -> tuple[int, int]:
    nodes, node = max(args.world_size, 1), max(args.rank, 0)
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
    scheme, _, address = args.dist_url.partition("://")
    host, _, port = address.rpartition(":")
    good = {"tcp": host and port.isdecimal() and 0 < int(port) < 2**16, "env": not address, "file": address.startswith("/")}
    if not good.get(scheme):
        raise InputError(f"--dist-url {args.dist_url}: expected tcp://HOST:PORT")
    if scheme == "tcp" and node == 0:
        _check_free(host, int(port))
    return args.dist_url


def _check_free(host: str, port: int) -> None:
    for family, kind, protocol, _, address in _resolve(host, port):
        with socket.socket(family, kind, protocol) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise InputError(
                        f"--dist-url: port {port} is in use; choose another, or leave --dist-url out to have a free one found"
                    ) from None


def _resolve(host: str, port: int) -> list:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, OverflowError):
        raise InputError(f"--dist-url: cannot resolve {host}:{port}; use this node's name or address") from None


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
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"tcp://{first}:{20000 + (job + 1009 * step) % 20000}"
