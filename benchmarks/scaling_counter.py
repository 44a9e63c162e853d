"""Count the bytes of every collective of a run, in each of its processes.

`CountedGroup` is a process group that counts each collective and passes it on to gloo. DDP's
reducer, which is C++ code, calls it, too. A collective that it does not know raises an error, so
none is missed.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from scaling_counts import wire
from torch import Tensor

from moco import distributed
from moco.config import Pretraining, replaced
from moco.engine import precision
from moco.engine.health import Health
from moco.engine.log import Mean
from moco.engine.pretrain import PretrainingTask
from moco.engine.trainer import Trainer
from moco.files import to_json
from moco.launch import launch

BACKEND = "counted"

# names of torch's methods, in newer and older versions -> name of the collective
_OPS = {
    "allreduce": "all_reduce",
    "broadcast": "broadcast",
    "allgather": "all_gather",
    "all_gather_single": "all_gather",
    "_allgather_base": "all_gather",
    "all_to_all_single": "all_to_all",
    "alltoall_base": "all_to_all",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "barrier": "barrier",
}


class Record:
    """The collectives of a process since the start, by phase.

    A phase is start, step, log line or epoch. Each entry of `found` is (phase, what, op): [calls,
    payload bytes, bytes sent]. The payload is the tensor that a rank gives to the collective.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget all collectives."""
        self.phase = "start"
        self.found: dict[tuple[str, str, str], list[float]] = {}

    def add(self, op: str, payload: int, sent: float) -> None:
        """Count a collective. Its caller in moco/ tells DDP's gradients from the others."""
        key = self.phase, _caller(), op
        entry = self.found.setdefault(key, [0, 0, 0.0])
        for i, value in enumerate((1, payload, sent)):
            entry[i] += value


RECORD = Record()  # of this process


def total() -> float:
    """Return the bytes that this process has sent so far."""
    return sum(sent for _, _, sent in RECORD.found.values())


def _caller() -> str:
    """Return "gradient" if DDP's reducer calls, and "explicit" if code of moco/ does."""
    frame = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("moco."):
            in_pass = module == Trainer.__module__ and frame.f_code.co_name == "_pass"
            return "gradient" if in_pass else "explicit"
        frame = frame.f_back
    return "explicit"


def _size(tensors: object) -> int:
    """Return the bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, list | tuple):
        return sum(map(_size, tensors))
    return 0


class CountedGroup(dist.ProcessGroup):
    """A process group that counts its collectives and passes them on to gloo."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta):
        super().__init__(rank, world_size)
        self.inner = dist.ProcessGroupGloo(store, rank, world_size, timeout)

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        """Return the name of the backend."""
        return BACKEND


def _counted(name: str, op: str):
    """Return the method `name` of `CountedGroup`."""

    def call(self: CountedGroup, *args, **options):
        given = args[1] if op in ("all_gather", "all_to_all", "reduce_scatter") else args[:1]
        payload, n = _size(given), self.inner.size()
        sent = wire(op, payload, n)
        if op == "all_to_all" and (splits := args[3]):
            sent = payload * (1 - splits[self.inner.rank()] / sum(splits))
        RECORD.add(op, payload, sent)
        return getattr(self.inner, name)(*args, **options)

    return call


for _name, _op in _OPS.items():
    setattr(CountedGroup, _name, _counted(_name, _op))
dist.Backend.register_backend(
    BACKEND,
    lambda store, rank, world_size, timeout: CountedGroup(store, rank, world_size, timeout),
    devices=["cpu"],
)


def loopback() -> tuple[int, int]:
    """Return the bytes and the packets that the loopback interface has sent so far."""
    line = next(
        line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip()[:3] == "lo:"
    )
    fields = line.split(":")[1].split()
    return int(fields[8]), int(fields[9])


@contextlib.contextmanager
def phases(first: int) -> Iterator[dict]:
    """Tell the phases of a training run apart.

    Yields a dict that will have the number of steps from step `first` on, of log lines and of
    epochs, and the loopback interface's bytes and packets in those steps. Earlier steps count as
    part of the start, because DDP rearranges its buckets after the first one.
    """
    seen = {"step": 0, "log line": 0, "epoch": 0, "loopback": [0, 0]}
    original = Trainer._step, Health.check, Mean.read, distributed.broadcast_buffers
    original += (PretrainingTask.gather_state,)
    new_group = dist.new_group
    before = (0, 0)

    def step(self, epoch, number, *args):
        nonlocal before
        if number == first:
            before = loopback()
        RECORD.phase = "step" if number >= first else "start"
        seen["step"] += number >= first
        original[0](self, epoch, number, *args)

    def within(phase: str, call, counts: bool):
        def wrapped(*args):
            outer = RECORD.phase
            RECORD.phase = phase if outer != "start" else outer
            seen[phase] += counts and outer != "start"
            found = call(*args)
            RECORD.phase = outer
            return found

        return wrapped

    def gather(task):
        """Gather the shards of a method; this is the first thing after the steps of an epoch."""
        if RECORD.phase == "step":
            seen["loopback"] = [b - a for a, b in zip(before, loopback(), strict=True)]
            within("epoch", original[4], counts=False)(task)
        else:
            original[4](task)

    def buffers(module):
        if RECORD.phase == "step":
            within("epoch", original[3], counts=True)(module)
            RECORD.phase = "end"
        else:
            original[3](module)

    with (
        mock.patch.object(Trainer, "_step", step),
        mock.patch.object(Health, "check", within("log line", original[1], counts=False)),
        mock.patch.object(Mean, "read", within("log line", original[2], counts=True)),
        mock.patch.object(distributed, "broadcast_buffers", buffers),
        mock.patch.object(PretrainingTask, "gather_state", gather),
        mock.patch.object(dist, "new_group", lambda **_: new_group(backend=BACKEND)),
    ):
        yield seen


@dataclass(frozen=True)
class Run:
    """A training run to count.

    Attributes:
        script: name of the script, without .py.
        config: its settings.
        folder: the run folder, which also gets the record of each process.
    """

    script: str
    config: Pretraining
    folder: Path


def prepared(script: str, words: list[object], processes: int, folder: Path) -> Run:
    """Return a run of a script, given its command line, on so many processes."""
    module = importlib.import_module(script)
    options = ["--multiprocessing-distributed", "--nproc-per-node", processes, "--save-dir", folder]
    config = module.parser().parse(list(map(str, [*words, *options])))
    config = module.complete(precision.disable_slow_amp(config))
    return Run(script, replaced(config, dist_backend=BACKEND), folder)


def train(runs: list[Run], first: int, config: Pretraining, device: torch.device) -> None:
    """Train all runs, one after the other, in one process. Write the record of each to its folder.

    Args:
        runs: the runs.
        first: the first step to count.
        config: the settings that the launcher has completed.
        device: the device of this process.
    """
    torch.set_num_threads(1)
    for run in runs:
        RECORD.reset()
        mine = replaced(
            run.config, nodes=config.input.nodes, batch_per_process=config.input.batch_per_process
        )
        with phases(first) as seen, contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(run.script).worker(mine, device)
        found = [[*key, *values] for key, values in RECORD.found.items()]
        record = {"found": found, **seen}
        (run.folder / f"rank{distributed.rank()}.json").write_text(to_json(record))


def count(runs: list[Run], processes: int, first: int) -> list[list[dict]]:
    """Train all runs on so many processes. Return, for each, the records of its processes.

    All runs have the same batch per process. Only steps from `first` on are counted.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    launch.launch(functools.partial(train, runs, first), runs[0].config)
    return [
        [json.loads((run.folder / f"rank{r}.json").read_text()) for r in range(processes)]
        for run in runs
    ]
