"""How processes are started: one per device, all of them calling the same worker.

Launchers: `--multiprocessing-distributed` (spawns here), `torchrun` and `python -m torch.distributed.launch` (RANK, WORLD_SIZE,
LOCAL_RANK), SLURM's `srun`; with none of them, one process."""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import devices, errors, user
from moco.data import loader
from moco.errors import InputError, of_file
from moco.launch import heartbeat, interrupt, output
from moco.launch.processes import Plan, plan
from moco.launch.rendezvous import meet

Worker = Callable[[Namespace, torch.device], None]


def launch(worker: Worker, args: Namespace) -> None:
    """Run `worker(args, device)` in every process of the run's plan; returns when all have ended.

    Sets `args.batch_per_process` and `args.nodes`; `args.batch_size` is this node's, or with `args.batch_is_per_process` already a
    process's. A worker's InputError ends this process's run with the same InputError, raised here.
    """
    p = plan(args)
    each = getattr(args, "batch_is_per_process", False)
    args.nodes, args.batch_per_process = (
        p.nodes,
        args.batch_size if each else args.batch_size // p.local,
    )
    if args.batch_per_process < 1:
        raise InputError(
            f"--batch-size {args.batch_size} is smaller than the {p.local} processes of this node; raise it"
        )
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
    with interrupt.forward_signals(processes.pids()) as signals:
        killed = _killed(processes.processes)
        try:
            while not processes.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if (
                not ends.empty()
            ):  # the others only lost their connection to the process that made it
                raise ends.get() from None
            if signals and hasattr(args, "resume") and signals[0] != signal.SIGINT:
                raise interrupt.nothing_to_save(signals[0]) from None
            if signals:
                interrupt.end_by_signal(signals[0])
            raise _lost(p.first, killed, error) from None
    if not ends.empty():
        raise ends.get()


def _tell(name: str, lost: str) -> None:
    """Print the line about a lost rank; the process ends next, without Python's own flush."""
    print(f"{name}: error: {lost}", file=sys.stderr, flush=True)


class LostRankError(Exception):
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


OUT_OF_MEMORY = (
    "; the system does so where memory runs out: try fewer --workers or a smaller --batch-size"
)


def _lost(
    first: int, killed: dict[int, str], error: mp.ProcessExitedException | mp.ProcessRaisedException
) -> LostRankError:
    """What to tell of a failure; the traceback of a process that raised goes to stderr before it."""
    if killed:
        i, name = next(iter(killed.items()))
        return LostRankError(
            f"rank {first + i} was ended by {name}{OUT_OF_MEMORY if name == 'SIGKILL' else ''}"
        )
    if isinstance(error, mp.ProcessRaisedException):
        print(error.msg, file=sys.stderr)
        return LostRankError(
            f"rank {first + error.error_index}: {error.msg.strip().splitlines()[-1]}"
        )
    return LostRankError(f"rank {first + error.error_index} ended with status {error.exit_code}")


def _spawned(i: int, p: Plan, worker: Worker, args: Namespace, ends) -> None:
    user.prepare()
    output.guard()
    try:
        _process(p, worker, args, p.first + i, i, lambda lost: ends.put(LostRankError(lost)))
    except InputError as error:
        ends.put(error)
        sys.exit(2)
    except interrupt.Interrupted as end:  # all of them end so, and are not hurried
        ends.put(end)
    except KeyboardInterrupt:
        sys.exit(130)


def _process(
    p: Plan, worker: Worker, args: Namespace, r: int, local_rank: int, tell: Callable[[str], None]
) -> None:
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
        store = meet(p.url, r, p.world_size, announce=local_rank == 0 or alone)
        timeout = timedelta(minutes=30)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=r,
            world_size=p.world_size,
            timeout=timeout,
        )
        guard = heartbeat.Heartbeat(store, r, p.world_size, tell)
    try:
        with (
            guard,
            interrupt.outside_training() if hasattr(args, "resume") else contextlib.nullcontext(),
        ):
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
            raise InputError(
                f"memory runs out on rank {r}; try a smaller --batch-size or network ({what})"
            ) from None
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
        speaks_for_run = store.add(key, 1) == 1
    except RuntimeError:  # the rank that keeps the store has ended
        speaks_for_run = True
    if speaks_for_run:
        lines = errors.printed(os.path.basename(sys.argv[0]), error)
        print(lines, end="", file=sys.stderr, flush=True)
