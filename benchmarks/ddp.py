#!/usr/bin/env python
"""Time a training step of SimCLR on several processes, for several ways to average gradients.

default         DDP of PyTorch, with buckets of 25 MB and a separate copy of each gradient
views           gradients that are views of the buckets, as moco/distributed.py sets up
static graph    views, and a promise to DDP that all steps use the same parameters
10, 50, 100 MB  views, with buckets of other sizes
bf16            views, and gradients that are exchanged in bf16 (--grad-compress bf16)
no SyncBN       views, without synchronized batch norm; all others have it
no exchange     views, with SyncBN's arithmetic on a CPU, but without its communication

For each, the script computes the payload of the collectives of a step, per process: the bytes of
the gradients, and 16 for each channel of each call of SyncBN (mean, variance and their gradients).
It also measures the largest error of a parameter tensor's gradient: the norm of its difference from
the mean of all processes' own gradients, divided by the norm of this mean.
"""

import argparse
import contextlib
import functools
import json
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import measure
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from moco import distributed
from moco.builder.simclr import SimCLR
from moco.config import Config, replaced
from moco.encoder.archs import ARCHS
from moco.encoder.resnets import resnet
from moco.engine import optim
from moco.files import to_json
from moco.launch import launch
from moco.rng import Progress
from moco.sections import Optimizer

VIEWS = {"gradient_as_bucket_view": True}
CANDIDATES: dict[str, dict[str, object]] = {
    "default": {},
    "views": VIEWS,
    "static graph": VIEWS | {"static_graph": True},
    "10 MB": VIEWS | {"bucket_cap_mb": 10},
    "50 MB": VIEWS | {"bucket_cap_mb": 50},
    "100 MB": VIEWS | {"bucket_cap_mb": 100},
    "bf16": VIEWS,
    "no SyncBN": VIEWS,
    "no exchange": VIEWS,
}
SEPARATE = ("no SyncBN", "no exchange")  # compared with "views" in figures of their own


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="resnet18")
    parser.add_argument("--size", type=measure.pixels, default=64, help="image size in pixels")
    parser.add_argument(
        "--batch", type=measure.at_least(2), default=32, help="images of one process"
    )
    parser.add_argument("--processes", type=measure.at_least(1), default=2, metavar="N")
    args = parser.parse_args()
    config = replaced(
        Config(),
        multiprocessing_distributed=True,
        nproc_per_node=args.processes,
        world_size=1,
        rank=0,
        batch_size=args.processes * args.batch,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        launch.launch(functools.partial(worker, args, file), config)
        found = json.loads(file.read_text())
    times, medians = found["times"], measure.medians(found["times"])
    ratios = {
        f"{name.replace(' ', '_')}_over_{base}": measure.ratio(times[name], times[base])
        for name in CANDIDATES
        for base in ["default" if name == "views" else "views"]
        if name not in ("default", *SEPARATE)
    }
    ratios["SyncBN_over_BN"] = measure.ratio(times["views"], times["no SyncBN"])
    ratios["SyncBN_exchange"] = measure.ratio(times["views"], times["no exchange"])
    table = [
        {
            "DDP": name,
            "ms": 1e3 * medians[name],
            "gradient MB": found["gradients"][name] / 1e6,
            "SyncBN MB": found["norms"][name] / 1e6,
            "SyncBN calls": found["calls"][name],
            "error": found["errors"][name],
        }
        for name in CANDIDATES
    ]
    facts = {
        "arch": args.arch,
        "pixels": args.size,
        "batch": args.batch,
        "processes": args.processes,
        "device": found["device"],
    }
    measure.report("ddp", table, ratios, facts, args.json)


def worker(args: argparse.Namespace, file: Path, _: Config, device: torch.device) -> None:
    """Measure all candidates side by side; rank 0 writes to `file`."""
    steps = {name: Step(name, args, device) for name in CANDIDATES}
    exact = {steps[name].synced: steps[name].exact() for name in ("views", "no SyncBN")}
    found: dict[str, dict] = {"gradients": {}, "norms": {}, "calls": {}, "errors": {}}
    for name, step in steps.items():
        channels = step.backward()
        found["gradients"][name] = step.gradient_bytes()
        found["norms"][name], found["calls"][name] = 16 * sum(channels), len(channels)
        found["errors"][name] = step.error(exact[step.synced])
        step.optimizer.zero_grad(set_to_none=True)
    found["times"] = measure.side_by_side(steps, args.rounds, device)
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if distributed.rank() == 0:
        file.write_text(to_json(found))


class Step:
    """SimCLR in DDP, with its optimizer. A call takes one step on the same views."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(0)
        self.synced = name != "no SyncBN"
        self.model: nn.Module = SimCLR(lambda: resnet(args.arch, 128, mlp=True)).to(device)
        if self.synced:
            self.model = distributed.sync_batch_norm(self.model, device)
        self.exchanges = name != "no exchange"
        self.bytes_each = 2 if name == "bf16" else 4
        options = CANDIDATES[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False, **options)
        if name == "bf16":
            self.ddp.register_comm_hook(None, bf16_compress_hook)
        self.channels: list[int] = []  # of each call of SyncBN
        for norm in self.model.modules():
            if self.synced and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.register_forward_hook(self.count)
        parameters = list(self.model.parameters())
        groups = [{"params": parameters, "lr": 1e-3, "weight_decay": 1e-4}]
        self.optimizer = optim.make(groups, Optimizer(), "off")
        generator = torch.Generator().manual_seed(distributed.rank())
        shape = (args.batch, 3, args.size, args.size)
        self.views = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
        self.index = torch.arange(args.batch, device=device)

    def __call__(self) -> None:
        """Take a step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self) -> list[int]:
        """Compute the gradient, averaged over processes; return the channels of SyncBN's calls."""
        self.channels.clear()
        alone = mock.patch.object(distributed, "all_reduce_sum", lambda x: x)
        with contextlib.nullcontext() if self.exchanges else alone:
            self.ddp(self.views, self.index, Progress())[0].backward()
        return self.channels

    def count(self, norm: nn.Module, *_: object) -> None:
        """Count a call of SyncBN."""
        self.channels.append(norm.num_features)

    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients that a process hands to the all-reduce."""
        return self.bytes_each * sum(p.numel() for p in self.model.parameters())

    def exact(self) -> list[Tensor]:
        """Return the mean over processes of their own gradients, in float64."""
        with self.ddp.no_sync():
            self.backward()
        gradients = [p.grad.double() for p in self.model.parameters()]
        self.optimizer.zero_grad(set_to_none=True)
        return [distributed.all_reduce_sum(x) / distributed.world_size() for x in gradients]

    def error(self, exact: list[Tensor]) -> float:
        """Return the largest relative error of the gradient of a parameter tensor."""
        pairs = zip(self.model.parameters(), exact, strict=True)
        return max(float((p.grad - x).norm() / x.norm()) for p, x in pairs)


if __name__ == "__main__":
    measure.main(main)
