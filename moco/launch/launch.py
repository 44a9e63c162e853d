"""Start one process per device, each of which calls the same worker.

Launchers: `--multiprocessing-distributed` (processes are spawned here), `torchrun` and
`python -m torch.distributed.launch` (RANK, WORLD_SIZE, LOCAL_RANK), and SLURM's `srun`. Without a
launcher, the run is a single process. processes.py decides which of these applies.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import devices, errors, user
from moco.config import Config, replaced
from moco.data import loader
from moco.errors import InputError, from_os_error
from moco.files import as_utf8
from moco.launch import heartbeat, interrupt, output
from moco.launch.processes import Plan, batch_per_process, plan, threads
from moco.launch.rendezvous import connect

Worker = Callable[[Config, torch.device], None]


def launch(worker: Worker, config: Config) -> None:
    """Run `worker(config, device)` in every process of the run; return when all have ended.

    Sets `batch_per_process` and `nodes` in the worker's config. An InputError of a worker is also
    raised here.
    """
    p = plan(config.launch)
    images = batch_per_process(config.input, p.local_world_size, p.nodes)
    config = replaced(config, nodes=p.nodes, batch_per_process=images)
    if p.launcher != "spawn":
        name = os.path.basename(sys.argv[0])
        _process(
            p, worker, config, p.first_rank, p.local_rank, lambda lost: _print_lost(name, lost)
        )
        return
    # A rank that is killed because another one failed cannot release its resources. Python's
    # resource tracker releases them, and need not warn about it.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    context = mp.get_context("spawn")
    errors_of_ranks = context.SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    processes = mp.spawn(
        _spawned, (p, worker, config, errors_of_ranks), nprocs=p.local_world_size, join=False
    )
    with interrupt.forward_signals(processes.pids()) as signals:
        killed = _killed(processes.processes)
        try:
            while not processes.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            # The first error is the cause. The other ranks only lost their connection to that rank.
            if not errors_of_ranks.empty():
                raise errors_of_ranks.get() from None
            if signals and config.TRAINS and signals[0] != signal.SIGINT:
                raise interrupt.nothing_to_save(signals[0]) from None
            if signals:
                interrupt.end_by_signal(signals[0])
            raise _lost(p.first_rank, killed, error) from None
    if not errors_of_ranks.empty():
        raise errors_of_ranks.get()


def _print_lost(name: str, lost: str) -> None:
    """Print the message about a lost rank, and flush it, because the process exits right after."""
    sys.stderr.write(f"{name}: error: {lost}\n")
    sys.stderr.flush()


class LostRankError(Exception):
    """Raised when a process of the run has failed or was lost; the message says which and how."""


def _killed(processes: list) -> dict[int, str]:
    """Wait until all processes have ended or one has failed; return the signals that killed any.

    After a failure, the other processes have `PATIENCE` seconds to exit, which they do when they
    lose their connection to the failed one. Then they are killed, because a process that waits for
    the failed one may wait forever.

    Returns:
        Names of signals by index of the process; the process that failed first comes first.
    """
    running = {process.sentinel: process for process in processes}
    while running:
        # the sentinel of a killed process is ready only when its loader processes have ended
        ended = [one for one, process in running.items() if process.exitcode is not None]
        for sentinel in ended or wait(list(running), POLL):
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
POLL = 1.0  # seconds

OUT_OF_MEMORY = (
    "; the system kills processes when memory runs out: "
    "try fewer --workers or a smaller --batch-size"
)


def _lost(
    first: int, killed: dict[int, str], error: mp.ProcessExitedException | mp.ProcessRaisedException
) -> LostRankError:
    """Return the error about a failed process. If it raised an exception, print the traceback.

    Args:
        first: global rank of this node's first process.
        killed: the result of `_killed`.
        error: the exception that torch.multiprocessing raised.
    """
    if killed:
        i, name = next(iter(killed.items()))
        hint = OUT_OF_MEMORY if name == "SIGKILL" else ""
        return LostRankError(f"rank {first + i} was killed by {name}{hint}")
    if isinstance(error, mp.ProcessRaisedException):
        sys.stderr.write(f"{error.msg}\n")
        return LostRankError(
            f"rank {first + error.error_index}: {error.msg.strip().splitlines()[-1]}"
        )
    return LostRankError(f"rank {first + error.error_index} ended with status {error.exit_code}")


def _spawned(i: int, p: Plan, worker: Worker, config: Config, errors_of_ranks) -> None:
    """Run the worker in spawned process `i` of this node; put its error, if any, into the queue."""
    # A spawned process would also spawn its loader processes, which takes seconds in every epoch.
    # The system's default on Linux is to fork them, as in runs of torchrun or of one process.
    mp.set_start_method(None, force=True)
    user.prepare()
    output.guard()

    def on_lost(lost: str) -> None:
        errors_of_ranks.put(LostRankError(lost))

    try:
        _process(p, worker, config, p.first_rank + i, i, on_lost)
    except InputError as error:
        errors_of_ranks.put(error)
        sys.exit(2)
    # a normal exit: the other ranks are also interrupted, and must not be killed while they save
    except interrupt.Interrupted as end:
        errors_of_ranks.put(end)
    except KeyboardInterrupt:
        sys.exit(130)


def _process(
    p: Plan, worker: Worker, config: Config, r: int, local_rank: int, on_lost: Callable[[str], None]
) -> None:
    """Set up the device and the process group, run the worker, and destroy the group.

    `r` is the global rank, `local_rank` the rank on this node. If another rank is lost, `on_lost`
    is called with a message, and this process exits.
    """
    device = devices.for_process(config.launch.device, config.launch.gpu, local_rank)
    if device.type == "cpu":
        torch.set_num_threads(threads(p, torch.get_num_threads()))
    if device.type in ("cuda", "xpu"):  # there is only one MPS device
        torch.get_device_module(device).set_device(device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    guard, store = contextlib.nullcontext(), None
    if p.url:
        backend = config.launch.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
        if p.launcher == "srun":
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
        by_hand = p.launcher == "torchrun" and "LOCAL_RANK" not in os.environ
        store = connect(p.url, r, p.world_size, announce=local_rank == 0 or by_hand)
        timeout = timedelta(minutes=30)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=r,
            world_size=p.world_size,
            timeout=timeout,
        )
        guard = heartbeat.Heartbeat(store, r, p.world_size, on_lost)
    try:
        with (
            guard,
            interrupt.outside_training() if config.TRAINS else contextlib.nullcontext(),
        ):
            _work(worker, config, device, r)
    except InputError as error:
        if store is None or p.launcher == "spawn":
            raise
        _print_once(store, error)
        raise InputError() from None  # without lines: nothing more to print
    finally:
        loader.kill_workers(mp.active_children())
        if dist.is_initialized():
            dist.destroy_process_group()


def _work(worker: Worker, config: Config, device: torch.device, r: int) -> None:
    """Run the worker on rank `r`.

    Converts errors that the user can fix to InputError: a file that cannot be read or written, too
    little memory, an operation that the device lacks, and a loader process that died.
    """
    try:
        worker(config, device)
    except OSError as error:
        raise from_os_error(error) from None
    except (RuntimeError, MemoryError) as error:
        message = " ".join(str(error).split())
        no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if no_memory or "allocate memory" in message or "MPS backend out of memory" in message:
            raise InputError(
                f"memory runs out on rank {r}; try a smaller --batch-size or network ({message})"
            ) from None
        if isinstance(error, NotImplementedError) and device.type in devices.ONE_PROCESS:
            lacks = f"--device {device.type}: PyTorch lacks an operation on this device"
            raise InputError(f"{lacks}; give --device cpu ({message})") from None
        if "DataLoader worker" not in message:
            raise
        died = f"a loader process of rank {r} died: {message}"
        raise InputError(f"{died}{OUT_OF_MEMORY}") from None


def _print_once(store: dist.Store, error: InputError) -> None:
    """Print an error unless another rank of this node has printed the same one.

    A launcher such as torchrun kills all processes when one has exited. Therefore this process
    prints the error before it exits.
    """
    key = f"error {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')} {socket.gethostname()} {error}"
    try:
        first = store.add(as_utf8(key), 1) == 1  # a store takes UTF-8 only
    except RuntimeError:  # the rank that runs the store has exited
        first = True
    if first:
        lines = errors.format_error(os.path.basename(sys.argv[0]), error)
        sys.stderr.write(lines)
        sys.stderr.flush()
