#!/usr/bin/env python
"""Time a full training step of MoCo, SynCo and AdCo, next to plain MoCo, in one and two processes.

The views are already in memory.

plain     MoCo with a momentum update per parameter and concatenated logits. Every rank gathers all
          images to shuffle them, and the loss is read every step. Always in fp32, despite --amp.
moco      our code, with one call for the momentum update, fused SGD, a loss that reads the queue in
          blocks, and all-to-all. No value is read between log lines.
synco     moco with synthetic negatives
adco      AdCo, with a bank of learned negatives, as many as the queue has entries
"""

import argparse
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from moco import distributed
from moco.builder.adco import AdCo, Ascent
from moco.builder.batch_norm import MIN_BN_GROUP
from moco.builder.moco import MoCo
from moco.builder.synco import SynCo
from moco.config import Config, replaced
from moco.encoder.archs import ARCHS
from moco.encoder.resnets import resnet
from moco.engine import optim, precision
from moco.engine.log import Mean
from moco.files import to_json
from moco.launch import launch
from moco.loss.synthetic import Synthetic
from moco.rng import SHUFFLE, Progress
from moco.sections import Optimizer
from moco.sections_negatives import Schedule

T, M, LR = 0.2, 0.999, 0.03
GROUPS = 8  # batch norm groups of the key encoder; the default of --bn-splits
SYNCO = Synthetic(1024, (256, 256, 256, 64, 64, 64))


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="resnet50")
    parser.add_argument("--size", type=measure.pixels, default=224, help="image size in pixels")
    parser.add_argument(
        "--batch", type=measure.at_least(2), default=32, help="images of one process"
    )
    parser.add_argument(
        "--k", type=measure.at_least(SYNCO.n_hard), default=65536, help="entries in the queue"
    )
    parser.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="bf16" if torch.cuda.is_available() else "off",
        help="mixed precision of our methods",
    )
    parser.add_argument(
        "--processes",
        type=measure.at_least(1),
        nargs="+",
        default=[1] if torch.cuda.device_count() == 1 else [1, 2],
        metavar="N",
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="also find the largest batch that fits; only for one process on a GPU",
    )
    args = parser.parse_args()
    table, ratios = [], {}
    for n in args.processes:
        found = on_processes(n, args)
        times = found["times"]
        table += [
            {"processes": n, "step": name, "ms": 1e3 * s, "images/s": n * args.batch / s}
            for name, s in measure.medians(times).items()
        ]
        suffix = "" if n == 1 else f"_{n}_processes"
        ratios |= {
            f"synco_over_moco{suffix}": measure.ratio(times["synco"], times["moco"]),
            f"adco_over_moco{suffix}": measure.ratio(times["adco"], times["moco"]),
            f"ours_over_plain{suffix}": measure.ratio(times["moco"], times["plain"]),
            **{f"largest_batch_{name}{suffix}": batch for name, batch in found["largest"].items()},
        }
    facts = {
        "arch": args.arch,
        "pixels": args.size,
        "batch": args.batch,
        "K": args.k,
        "amp": args.amp,
        "device": found["device"],
    }
    targets = {"adco_over_moco_2_processes": measure.Target(1.05)} if 2 in args.processes else {}
    measure.report("step", table, ratios, facts, args.json, targets)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the networks and the batch."""

    arch: str
    size: int  # width and height of the images
    batch: int  # images of a process
    k: int  # entries in the queue
    amp: str


def on_processes(n: int, args: argparse.Namespace) -> dict:
    """Measure in `n` processes; return the figures of rank 0."""
    config = replaced(
        Config(),
        multiprocessing_distributed=n > 1,
        nproc_per_node=n,
        world_size=1,
        rank=0,
        batch_size=n * args.batch,
    )
    sizes = Sizes(args.arch, args.size, args.batch, args.k, args.amp)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        measured = functools.partial(worker, sizes, args.rounds, args.largest_batch, found)
        launch.launch(measured, config)
        return json.loads(found.read_text())


def worker(
    sizes: Sizes, rounds: int, find_largest: bool, found: Path, _: Config, device: torch.device
) -> None:
    """Measure all steps side by side; rank 0 writes to `found`."""
    steps = {name: Step(name, sizes, device) for name in KINDS}
    check(steps, sizes.batch)
    times = measure.side_by_side(
        {name: lambda s=step: s(sizes.batch) for name, step in steps.items()}, rounds, device
    )
    largest = {}
    if find_largest and device.type == "cuda" and distributed.world_size() == 1:
        del steps
        largest = {name: largest_batch(name, sizes, device) for name in KINDS}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if distributed.rank() == 0:
        found.write_text(to_json({"times": times, "largest": largest, "device": name}))


class Step:
    """A method with its optimizer. A call takes one optimizer step on random views."""

    def __init__(self, name: str, sizes: Sizes, device: torch.device):
        torch.manual_seed(0)
        self.sizes, self.device, self.plain, self.count = sizes, device, name == "plain", 0
        model = KINDS[name](lambda: resnet(sizes.arch, 128, mlp=True), 128, sizes.k, M, T)
        self.model = (
            model.to(device)
            if self.plain
            else precision.prepare_model(model, device, compile=False, recompute=False)
        )
        groups = [{"params": list(model.encoder_q.parameters()), "lr": LR, "weight_decay": 1e-4}]
        self.amp = "off" if self.plain else sizes.amp
        self.optimizer = (
            torch.optim.SGD(groups, momentum=0.9)
            if self.plain
            else optim.make(groups, Optimizer(), self.amp)
        )
        self.scaler = precision.scaler(self.amp, device)
        self.ddp = distributed.data_parallel(model)
        self.mean, self.views = Mean(), None

    def __call__(self, batch: int) -> Tensor:
        """Take one step on `batch` images; return the loss."""
        if self.views is None or len(self.views[0]) != batch:
            generator = torch.Generator().manual_seed(distributed.rank())
            shape = (batch, 3, self.sizes.size, self.sizes.size)
            views = [torch.randn(shape, generator=generator).to(self.device) for _ in range(2)]
            self.views = views if self.plain else [precision.prepare_images(view) for view in views]
        progress, self.count = Progress(step=self.count), self.count + 1
        with precision.autocast(self.amp, self.device):
            loss, metrics = self.ddp(self.views, None, progress)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.after_step()
        if self.plain:
            loss.item()
        else:
            self.mean.add({"loss": loss, **metrics})
        return loss.detach()


class PlainMoCo(MoCo):
    """A plain MoCo: the same method, written without attention to speed."""

    def forward(self, views, index, progress):  # noqa: ARG002 (the interface of all methods)
        """Return the loss and the accuracies."""
        q = F.normalize(self.encoder_q(views[0]), dim=1)
        with torch.no_grad():
            k = self.plain_keys(views[1], progress)
        own = k[distributed.rank() * len(q) :][: len(q)]
        logits = (
            torch.cat(
                [
                    torch.einsum("nc,nc->n", q, own)[:, None],
                    torch.einsum("nc,kc->nk", q, self.queue.clone()),
                ],
                1,
            )
            / self.T
        )
        labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
        top = logits.topk(5, 1).indices
        self.k = k
        return F.cross_entropy(logits, labels), {
            "acc1": (top[:, 0] == 0).float().mean(),
            "acc5": (top == 0).any(1).float().mean(),
        }

    def plain_keys(self, images, progress):
        """Return the keys of all ranks, computed on images that are shuffled over the ranks."""
        everything = distributed.all_gather(images)
        permutation = torch.randperm(
            len(everything), generator=progress.generator(SHUFFLE, "cpu")
        ).to(images.device)
        mine = everything[permutation.view(distributed.world_size(), -1)[distributed.rank()]]
        groups = (
            1 if distributed.world_size() > 1 else max(1, min(GROUPS, len(images) // MIN_BN_GROUP))
        )
        k = torch.cat(
            [F.normalize(self.encoder_k(group), dim=1) for group in mine.tensor_split(groups)]
        )
        return distributed.all_gather(k)[permutation.argsort()]

    @torch.no_grad()
    def after_step(self):
        """Update the key encoder and the queue."""
        for of_q, of_k in zip(
            self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True
        ):
            of_k.data = of_k.data * self.m + of_q.data * (1 - self.m)
        self.enqueue(self.k)


KINDS = {
    "plain": functools.partial(PlainMoCo, bn_splits=1),  # forms its batch norm groups itself
    "moco": MoCo,
    "synco": functools.partial(SynCo, synthetic=Schedule(SYNCO)),
    "adco": functools.partial(AdCo, ascent=Ascent(), fill=False),
}


def check(steps: dict[str, Step], batch: int) -> None:
    """Check that two steps of plain MoCo and of ours have the same losses, within rounding."""
    tolerance = 1e-3 if steps["moco"].amp == "off" else 0.1
    for _ in range(2):
        torch.testing.assert_close(
            steps["moco"](batch), steps["plain"](batch), rtol=0, atol=tolerance
        )


def largest_batch(name: str, sizes: Sizes, device: torch.device) -> int:
    """Return the largest batch with which two steps fit into the GPU's memory.

    The batch grows by an eighth per trial.
    """
    batch, fits = sizes.batch, 0
    while True:
        try:
            step = Step(name, sizes, device)
            for _ in range(2):
                step(batch)
        except torch.OutOfMemoryError:
            return fits
        finally:
            step = None
            torch.cuda.empty_cache()
        fits, batch = batch, batch + max(8, batch // 8)


if __name__ == "__main__":
    measure.main(main)
