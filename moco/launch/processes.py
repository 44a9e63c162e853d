"""Decide which processes a command starts, from its options and the launcher's environment."""

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from moco import devices
from moco.errors import InputError
from moco.launch.rendezvous import check_url
from moco.sections import Input, Launch


@dataclass(frozen=True)
class Plan:
    """How this command takes part in the run: which processes it starts and how they meet."""

    launcher: str  # spawn, torchrun, srun or single
    nodes: int  # how many nodes `batch_size` is counted on
    local: int  # processes on this node
    first: int  # global rank of the first process that this command starts
    world_size: int
    local_rank: int  # of that process
    url: str  # init_method, empty where nothing is distributed


def plan(launch: Launch) -> Plan:
    """Find out from the options and the environment how the run is launched. Raises InputError."""
    kind = devices.chosen(launch.device)
    p = _plan(launch, kind)
    if p.world_size > 1 and kind in devices.ONE_PROCESS:
        several = f"--device {kind}: supports a single process, and this run has {p.world_size}"
        raise InputError(f"{several}; start one process, or give --device cpu")
    return p


def _plan(launch: Launch, kind: str) -> Plan:
    """Return the `plan` for devices of type `kind`, unchecked for support of several processes."""
    gpus = devices.count(kind)
    env = os.environ
    if launch.gpu is not None and launch.gpu >= gpus:
        if launch.device == "cpu":
            raise InputError(f"--gpu {launch.gpu}: --device cpu uses no GPU; leave one of both out")
        raise InputError(
            f"--gpu {launch.gpu}: this machine has {gpus} GPU(s); leave --gpu out or choose another"
        )
    if launch.dist_backend == "nccl" and kind != "cuda":
        where = (
            "this machine has none" if launch.device == "auto" else f"--device is {launch.device}"
        )
        raise InputError(f"--dist-backend nccl: needs CUDA GPUs, and {where}; leave it out")
    if launch.nproc_per_node is not None and launch.nproc_per_node < 1:
        raise InputError("--nproc-per-node must be at least 1")
    launched = "RANK" in env and "WORLD_SIZE" in env
    if launch.multiprocessing_distributed and launched and _number("LOCAL_WORLD_SIZE", 1) > 1:
        raise InputError(
            "--multiprocessing-distributed: torchrun has started a process per GPU already; leave it out"
        )
    spawns = launch.multiprocessing_distributed
    if spawns is None:  # the script's default: every GPU that it sees, unless told otherwise
        several = launch.nproc_per_node or (kind == "cuda" and gpus > 1 and launch.gpu is None)
        spawns = several and not launched and _number("SLURM_STEP_NUM_TASKS", 1) <= 1
    if spawns:
        local = launch.nproc_per_node or max(gpus, 1)
        if gpus and local > gpus:
            raise InputError(f"--nproc-per-node {local}: this machine has {gpus} GPU(s)")
        nodes, node = _nodes(launch)
        return Plan(
            "spawn",
            nodes,
            local,
            node * local,
            nodes * local,
            0,
            _meeting_point(launch, nodes, node),
        )
    if launched:
        r, w = _number("RANK"), _number("WORLD_SIZE")
        _check_below(r, w, "RANK", "WORLD_SIZE")
        local = _number("LOCAL_WORLD_SIZE", w)
        _check_below(local - 1, w, "LOCAL_WORLD_SIZE - 1", "WORLD_SIZE")
        local_rank = _number("LOCAL_RANK", r % local)
        _check_below(local_rank, local, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Plan("torchrun", max(1, w // local), local, r, w, local_rank, check_url("env://", r))
    if (w := _number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        r, local_rank = _number("SLURM_PROCID"), _number("SLURM_LOCALID")
        _check_below(r, w, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        nodes = _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1))
        _check_below(nodes - 1, w, "SLURM_STEP_NUM_NODES - 1", "SLURM_STEP_NUM_TASKS")
        return Plan("srun", nodes, w // nodes, r, w, local_rank, check_url(_slurm_url(launch), r))
    nodes, node = _nodes(launch)
    return Plan(
        "single", nodes, 1, node, nodes, 0, _meeting_point(launch, nodes, node) if nodes > 1 else ""
    )


WORKERS = 8  # default limit of loader processes for each process; so many keep a GPU busy


def workers(p: Plan, input: Input) -> int:
    """Return the default of `--workers`: a loader process for each core of this node, at most `WORKERS` for each of its processes.

    With `input.batch_is_per_process`, return the number for one process.
    """
    bound = p.launcher == "srun" and "SLURM_CPUS_PER_TASK" in os.environ  # own cores
    node = min(cores() * (p.local if bound else 1), WORKERS * p.local)
    return max(1, node // p.local) if input.batch_is_per_process else node


def cores() -> int:
    """Return how many cores this process may use, by its CPU affinity and its container's quota."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (
        ("cpu.max",),
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
    ):  # of cgroups v2, and v1
        try:
            quota, period = map(
                int, " ".join((CGROUP / file).read_text() for file in files).split()
            )
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
        raise InputError(
            f"the environment lacks {name}; start with srun, or unset SLURM_STEP_NUM_TASKS"
        )
    if not str(text).isdecimal():
        raise InputError(
            f"the environment says {name}={text}, which is not a number; unset it, or start with torchrun"
        )
    return int(text)


def _check_below(value: int, limit: int, name: str, of: str) -> None:
    """Raise InputError unless a launcher's numbers fit together: 0 <= `value` < `limit`."""
    if not 0 <= value < limit:
        raise InputError(
            f"the environment says {name} = {value} and {of} = {limit}, but the first must lie "
            "between 0 and the second; unset both, or start with torchrun"
        )


def _nodes(launch: Launch) -> tuple[int, int]:
    """Return the number of nodes and this one's. As in MoCo, env:// takes them from the environment."""
    nodes, node = max(launch.world_size, 1), max(launch.rank, 0)
    if launch.dist_url == "env://" and launch.multiprocessing_distributed:
        nodes = _number("WORLD_SIZE", 1) if launch.world_size == -1 else nodes
        node = _number("RANK", 0) if launch.rank == -1 else node
    if node >= nodes:
        raise InputError(
            f"--rank {node} with --world-size {nodes}: nodes are counted from 0; use 0 to {nodes - 1}"
        )
    return nodes, node


def _meeting_point(launch: Launch, nodes: int, node: int) -> str:
    """The URL where the processes meet; a free port of this machine where none is given."""
    if launch.dist_url == "auto":
        if nodes > 1:
            raise InputError(
                "several nodes need a meeting point: give --dist-url tcp://FIRST_NODE:PORT"
            )
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{s.getsockname()[1]}"
    return check_url(launch.dist_url, node)


def _slurm_url(launch: Launch) -> str:
    if launch.dist_url != "auto":
        return launch.dist_url
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost"))
    first = nodes
    if "[" in nodes or "," in nodes:
        try:
            names = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
            )
            first = names.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise InputError(
                f"cannot read the node list {nodes}; give --dist-url tcp://FIRST_NODE:PORT"
            ) from None
    # a port of this job, and of this of the steps that it may run beside each other
    job, step = (_number(name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"tcp://{first}:{20000 + (job + 1009 * step) % 20000}"
