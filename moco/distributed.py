"""Ranks: how processes are started, what they exchange, and the permutation behind shuffled BN.

One process per device. Launchers: `--multiprocessing-distributed` (spawns here), `torchrun` and
`python -m torch.distributed.launch` (RANK, WORLD_SIZE, LOCAL_RANK), SLURM's `srun`; with none of them, one process.
"""

import errno
import os
import socket
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco.errors import InputError

Worker = Callable[[Namespace, torch.device], None]


def rank() -> int:
    """This process's global rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes take part; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


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
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise InputError("--nproc-per-node must be at least 1")
    if args.multiprocessing_distributed:
        local = args.nproc_per_node or max(gpus, 1)
        if gpus and local > gpus:
            raise InputError(f"--nproc-per-node {local}: this machine has {gpus} GPU(s)")
        nodes, node = _nodes(args)
        return Plan("spawn", nodes, local, node * local, nodes * local, 0, _meeting_point(args, nodes, node))
    if "RANK" in env and "WORLD_SIZE" in env:
        r, w = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_WORLD_SIZE", w))
        return Plan("torchrun", max(1, w // local), local, r, w, int(env.get("LOCAL_RANK", 0)), "env://")
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        r, w = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        return Plan("srun", nodes, w // nodes, r, w, int(env["SLURM_LOCALID"]), _slurm_url(args))
    nodes, node = _nodes(args)
    return Plan("single", nodes, 1, node, nodes, 0, _meeting_point(args, nodes, node) if nodes > 1 else "")


def launch(worker: Worker, args: Namespace) -> None:
    """Run `worker(args, device)` in every process of the run's plan; returns when all have ended.

    Sets `args.batch_per_process` and `args.nodes`. A worker's InputError ends this process's run with the same
    InputError, raised here.
    """
    p = plan(args)
    args.nodes, args.batch_per_process = p.nodes, args.batch_size // p.local
    if args.batch_per_process < 1:
        raise InputError(f"--batch-size {args.batch_size} is smaller than the {p.local} processes of this node; raise it")
    if p.launcher != "spawn":
        _process(p, worker, args, p.first, p.local_rank)
        return
    # a rank that is ended because another one failed cannot tidy up; Python's tracker does, and need not report it
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    context = mp.get_context("spawn")
    mistakes = context.SimpleQueue()
    try:
        mp.spawn(_spawned, (p, worker, args, mistakes), nprocs=p.local)
    except mp.ProcessExitedException as error:
        if error.exit_code == 2 and not mistakes.empty():
            raise InputError(mistakes.get()) from None
        raise


def _spawned(i: int, p: Plan, worker: Worker, args: Namespace, mistakes) -> None:
    try:
        _process(p, worker, args, p.first + i, i)
    except InputError as error:
        mistakes.put(str(error))
        sys.exit(2)


def _process(p: Plan, worker: Worker, args: Namespace, r: int, local_rank: int) -> None:
    """Set up this process's device and process group, run the worker, take the group down."""
    if torch.cuda.is_available():
        device = torch.device("cuda", args.gpu if args.gpu is not None else local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        if p.local > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // p.local))
    if p.url:
        backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
        if p.launcher == "srun":
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
        dist.init_process_group(backend, init_method=p.url, rank=r, world_size=p.world, timeout=timedelta(minutes=30))
    try:
        worker(args, device)
    finally:
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
    if scheme == "tcp" and not (host and port.isdigit()):
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
    return f"tcp://{first}:{20000 + int(os.environ.get('SLURM_JOB_ID', 0)) % 20000}"


# What the processes exchange. All of it is a plain copy where nothing is distributed.


def all_gather(x: Tensor) -> Tensor:
    """The rows of every rank's `x` [B, ...], in rank order: [W B, ...]. No gradient; B is the same on every rank."""
    if world() == 1:
        return x
    out = x.new_empty((world() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def all_gather_uneven(x: Tensor) -> Tensor:
    """`all_gather` for ranks whose `x` may have different numbers of rows."""
    if world() == 1:
        return x
    sizes = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros((max(sizes) - len(x), *x.shape[1:]))])
    return torch.cat([part[:n] for part, n in zip(all_gather(padded).chunk(world()), sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    """`all_gather` with gradient: what every rank's loss makes of this rank's rows, summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.n = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        return all_reduce_sum(gradient)[rank() * ctx.n :][: ctx.n]


def all_gather_with_gradient(x: Tensor) -> Tensor:
    """`all_gather` through which gradients pass, from every rank's loss to the rank that made the rows."""
    return x if world() == 1 else _AllGather.apply(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def data_parallel(module: nn.Module) -> nn.Module:
    """`module` with gradients averaged over ranks. Buffers stay each rank's own: queues are equal by construction, and
    `broadcast_buffers` shares BatchNorm's once an epoch.
    """
    if world() == 1:
        return module
    with warnings.catch_warnings():
        # newer versions of PyTorch have another name for the option, which older ones do not know
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False)


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch norm over the joint batch of all ranks in place of the rank's own; as it is for one process."""
    if world() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            child.__class__ = _SYNCED[type(child)]
    return module


class _SyncBatchNorm:
    """Before one of torch's batch norms: statistics of the joint batch on a CPU, where torch.nn.SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape = (1, -1, *[1] * (x.dim() - 2))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = world() * x.numel() / x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)  # also under autocast
        mean = _AllReduce.apply(x.sum(axes, dtype=wide)) / count
        centred = x - mean.view(shape)
        variance = _AllReduce.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        return (out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over ranks, and of its gradients over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


_SYNCED = {kind: type(kind.__name__, (_SyncBatchNorm, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d)}


def broadcast_buffers(model: nn.Module) -> None:
    """Make every rank's buffers (BatchNorm's running statistics) those of rank 0, which are the ones saved."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        dist.barrier()


# Shuffled BN: the joint batch's samples change places, pass through the key encoder, and change back.


def shuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """This rank's part of the shuffled joint batch: slot j holds sample `permutation[rank B + j]`, x [B, ...].

    `permutation` [W B] lies on the CPU and is the same on all ranks. The exchange is all-to-all: each rank receives
    B samples, and not W B.
    """
    n, w, r = len(x), world(), rank()
    if w == 1:
        return x[permutation.to(x.device, non_blocking=True)]
    owner = permutation.div(n, rounding_mode="floor").view(w, n)  # [destination, slot]
    # to each destination go my samples that it asked for, in the order of its slots
    send = [permutation.view(w, n)[d][owner[d] == r] - r * n for d in range(w)]
    order = torch.cat([(owner[r] == s).nonzero().squeeze(1) for s in range(w)])  # slot of each row as it arrives
    sent = x[torch.cat(send).to(x.device, non_blocking=True)].contiguous()
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, owner[r].bincount(minlength=w).tolist(), [len(s) for s in send])
    return arrived[order.argsort().to(x.device, non_blocking=True)]


def unshuffle(x: Tensor, permutation: Tensor) -> Tensor:
    """Undo `shuffle` for features: from each rank's shuffled x [B, C] the joint batch in its own order, [W B, C].

    Every rank gets all rows: the queue needs them. This rank's own are rows rank B to (rank + 1) B.
    """
    return all_gather(x)[permutation.argsort().to(x.device, non_blocking=True)]
