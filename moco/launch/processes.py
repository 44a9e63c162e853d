"""Decide which processes a command starts, from its options and the launcher's environment.

launch.py starts them; address.py checks their address, and rendezvous.py connects them.
"""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moco.errors import InputError
from moco.launch.address import check_url
from moco.messages import counted
from moco.sections import Input, Launch


@dataclass(frozen=True)
class Plan:
    """The processes that this command starts, and how all processes of the run connect."""

    launcher: str  # spawn, torchrun, srun or single
    nodes: int  # number of nodes
    local_world_size: int  # number of processes on this node
    first_rank: int  # global rank of the first process that this command starts
    world_size: int  # number of processes of the run
    local_rank: int  # local rank of the first process
    url: str  # init_method of the process group; "" for a single process


def plan(launch: Launch) -> Plan:
    """Return the plan of the run. Raises InputError if options and environment do not match."""
    from moco import devices  # it imports torch, which --help does not need

    device_type = devices.resolve_type(launch.device)
    p = _plan(launch, device_type, devices.count(device_type))
    if p.world_size > 1 and device_type in devices.ONE_PROCESS:
        several = (
            f"--device {device_type}: supports a single process, and this run has {p.world_size}"
        )
        raise InputError(f"{several}; start one process, or give --device cpu")
    return p


def _plan(launch: Launch, device_type: str, gpus: int) -> Plan:
    """Return the plan, without checking that `device_type` supports several processes."""
    env = os.environ
    if launch.gpu is not None and launch.gpu >= gpus:
        if launch.device == "cpu":
            raise InputError(
                f"--gpu {launch.gpu}: --device cpu uses no GPU; leave one of the two out"
            )
        raise InputError(
            f"--gpu {launch.gpu}: this machine has {counted(gpus, 'GPU')}; "
            "leave --gpu out, or choose another"
        )
    if launch.dist_backend == "nccl" and device_type != "cuda":
        where = (
            "this machine has none" if launch.device == "auto" else f"--device is {launch.device}"
        )
        raise InputError(f"--dist-backend nccl: needs CUDA GPUs, and {where}; leave it out")
    if launch.nproc_per_node is not None and launch.nproc_per_node < 1:
        raise InputError(f"--nproc-per-node {launch.nproc_per_node}: must be at least 1")
    launched = "RANK" in env and "WORLD_SIZE" in env
    if launch.multiprocessing_distributed and launched and _number("LOCAL_WORLD_SIZE", 1) > 1:
        started = "torchrun has started a process per GPU already"
        raise InputError(f"--multiprocessing-distributed: {started}; leave it out")
    spawns = launch.multiprocessing_distributed
    # the default of main_adco.py: every visible GPU, unless a launcher or an option says otherwise
    if spawns is None:
        several = launch.nproc_per_node or (
            device_type == "cuda" and gpus > 1 and launch.gpu is None
        )
        spawns = several and not launched and _number("SLURM_STEP_NUM_TASKS", 1) <= 1
    if spawns:
        local = launch.nproc_per_node or max(gpus, 1)
        if gpus and local > gpus:
            few = f"this machine has {counted(gpus, 'GPU')}"
            raise InputError(f"--nproc-per-node {local}: {few}; give {gpus} or less")
        nodes, node = _nodes(launch)
        return Plan(
            "spawn",
            nodes,
            local,
            node * local,
            nodes * local,
            0,
            _rendezvous_url(launch, nodes, node),
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
        "single",
        nodes,
        1,
        node,
        nodes,
        0,
        _rendezvous_url(launch, nodes, node) if nodes > 1 else "",
    )


def batch_per_process(input: Input, processes: int, nodes: int = 1) -> int:
    """Return the number of images in a pass of each process.

    Args:
        input: the settings of the batch.
        processes: number of processes of each node.
        nodes: number of nodes.

    Raises InputError if there are fewer images than processes.
    """
    if input.batch_is_per_process:
        return input.batch_size
    of = "processes of this node"
    if input.batch_is_of_all_nodes:
        processes, of = processes * nodes, "processes of all nodes"
    if input.batch_size < processes:
        raise InputError(
            f"--batch-size {input.batch_size} is smaller than the {processes} {of}; raise it"
        )
    return input.batch_size // processes


def images_per_pass(input: Input, launch: Launch) -> int:
    """Return the number of images in a pass of all processes of the run.

    Raises InputError if there are fewer images than processes.
    """
    p = plan(launch)
    return batch_per_process(input, p.local_world_size, p.nodes) * p.world_size


WORKERS = 8  # default limit of loader processes per process; 8 keep a GPU busy


def default_workers(p: Plan, input: Input) -> int:
    """Return the default of `--workers`: one loader per core, at most `WORKERS` per process.

    It counts the loaders of this node, or of each process if `input.batch_is_per_process`.
    """
    node = min(_cores_of_node(p), WORKERS * p.local_world_size)
    return max(1, node // p.local_world_size) if input.batch_is_per_process else node


def threads(p: Plan, default: int) -> int:
    """Return the number of threads of each process that computes on the CPU.

    The processes of a node share its cores equally. The result is `default`, PyTorch's own number,
    if the user has set OMP_NUM_THREADS. A single process has at most `default`.

    The number does not depend on what else runs, because the last bits of results depend on it, and
    a resumed run must end with the same bits.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given and not (given == "1" and p.launcher == "torchrun"):  # torchrun sets 1 by itself
        return default
    share = max(1, _cores_of_node(p) // p.local_world_size)
    return share if p.local_world_size > 1 else min(share, default)


def _cores_of_node(p: Plan) -> int:
    """Return the number of cores that all processes of this node may use."""
    # if this variable is set, each task has its own cores
    bound = p.launcher == "srun" and "SLURM_CPUS_PER_TASK" in os.environ
    return cores() * (p.local_world_size if bound else 1)


def cores() -> int:
    """Return the number of cores that the CPU affinity and the container's quota allow."""
    n = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cgroup_v2, cgroup_v1 = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    for files in (cgroup_v2, cgroup_v1):
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
    """Return an environment variable of a launcher. Raises InputError unless it is a number."""
    text = os.environ.get(name, default)
    if text is None:
        raise InputError(
            f"the environment lacks {name}; start with srun, or unset SLURM_STEP_NUM_TASKS"
        )
    if not str(text).isdecimal():
        wrong = f"the environment variable {name}={text} is not a number"
        raise InputError(f"{wrong}; unset it, or start with torchrun")
    return int(text)


def _check_below(value: int, limit: int, name: str, of: str) -> None:
    """Raise InputError unless 0 <= `value` < `limit`.

    Args:
        value: a number from the launcher's environment.
        limit: another number from there, which limits it.
        name: name of `value` in the message.
        of: name of `limit` in the message.
    """
    if not 0 <= value < limit:
        raise InputError(
            f"the environment has {name} = {value} and {of} = {limit}, but the first must be "
            "at least 0 and below the second; unset both, or start with torchrun"
        )


def _nodes(launch: Launch) -> tuple[int, int]:
    """Return the number of nodes, and the index of this node, from 0.

    As in MoCo, `--dist-url env://` reads them from WORLD_SIZE and RANK.
    """
    nodes, node = max(launch.world_size, 1), max(launch.rank, 0)
    if launch.dist_url == "env://" and launch.multiprocessing_distributed:
        nodes = _number("WORLD_SIZE", 1) if launch.world_size == -1 else nodes
        node = _number("RANK", 0) if launch.rank == -1 else node
    if node >= nodes:
        counted = "nodes are counted from 0"
        raise InputError(
            f"--rank {node} with --world-size {nodes}: {counted}; use 0 to {nodes - 1}"
        )
    return nodes, node


def _rendezvous_url(launch: Launch, nodes: int, node: int) -> str:
    """Return the URL at which the processes connect; by default a free port of this machine."""
    if launch.dist_url == "auto":
        if nodes > 1:
            raise InputError(
                "several nodes need an address to connect to: give --dist-url tcp://FIRST_NODE:PORT"
            )
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{s.getsockname()[1]}"
    return check_url(launch.dist_url, node)


def _slurm_url(launch: Launch) -> str:
    """Return the URL at which the tasks of a SLURM step connect; by default on its first node."""
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
    # derived from the job and step ids, so that simultaneous steps use different ports
    job, step = (_number(name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"tcp://{first}:{20000 + (job + 1009 * step) % 20000}"
