#!/usr/bin/env python
"""Measure the memory of one process that pre-trains a large network with MoCo v3.

The first table counts the tensors that do not depend on the batch: parameters, their gradients, the
state of the optimizer, and the moving average. Each of W processes of DDP has all of them. FSDP
would leave each process 1/W.

The second table measures, in real steps on the CPU, the peak of the memory that each further image
of the batch needs, in both views, with and without --amp bf16 and --grad-checkpoint. The last
column is the number of images of a process that fit into --gib, next to the first table's tensors.
"""

import argparse
import contextlib
import io

import measure
import torch
from torch import nn

import main_mocov3
from moco.config import replaced
from moco.encoder.recompute import recompute_blocks
from moco.engine import optim, precision
from moco.rng import Progress
from moco.sections import Optimizer

GIB = 2**30
CPU = torch.device("cpu")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    measure.add_json(parser)
    parser.add_argument("--arch", default="vit_large_patch16_224")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument(
        "--batches", type=int, nargs=2, default=[2, 4], help="two batches, whose peaks are compared"
    )
    parser.add_argument("--gib", type=float, default=80, help="memory of a GPU")
    args = parser.parse_args()
    fixed = count(args)
    every = sum(fixed[name] for name in ("parameters", "gradients", "AdamW", "moving average"))
    rows = [{"what": name, "GiB": size / GIB} for name, size in fixed.items()]
    rows.append({"what": "all, with AdamW", "GiB": every / GIB})
    figures = {"fixed_gib": every / GIB, "parameters_millions": fixed["parameters"] / 4e6}
    print("\n".join(f"{row['what']:>20}  {row['GiB']:.2f} GiB" for row in rows))
    table = []
    for amp in ("off", "bf16"):
        for recompute in (False, True):
            peaks = [peak(args, batch, amp, recompute) for batch in args.batches]
            each = (peaks[1] - peaks[0]) / (args.batches[1] - args.batches[0])
            fits = int((args.gib * GIB - every) // each)
            name = f"amp {amp}{', --grad-checkpoint' * recompute}"
            table.append({"settings": name, "MiB per image": each / 2**20, "images": fits})
            figures[f"mib_per_image_{amp}{'_grad_checkpoint' * recompute}"] = each / 2**20
    facts = {"arch": args.arch, "pixels": args.size, "batches": str(args.batches), "GiB": args.gib}
    facts["fixed"] = rows
    shown = {name: value for name, value in facts.items() if name != "fixed"}
    measure.report("memory", table, figures, shown, args.json)


def build(args: argparse.Namespace) -> nn.Module:
    """Return MoCo v3's model."""
    torch.manual_seed(0)
    config = main_mocov3.parser().parse(["DIR", "-a", args.arch])
    with contextlib.redirect_stdout(io.StringIO()):
        return main_mocov3.build(replaced(config, image_size=args.size))


def count(args: argparse.Namespace) -> dict[str, int]:
    """Return the bytes of the tensors that do not depend on the batch, after a step."""
    model = build(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    average = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    for p in trained:
        p.grad = torch.zeros_like(p)
    found = {
        "parameters": sum(p.nbytes for p in trained),
        "gradients": sum(p.grad.nbytes for p in trained),
    }
    for name in ("adamw", "lars"):
        groups = model.parameter_groups(1e-4, 0.1)
        optimizer = optim.make(groups, Optimizer(optimizer=name), "off")
        optimizer.step()
        tensors = [x for state in optimizer.state.values() for x in state.values()]
        found[{"adamw": "AdamW", "lars": "LARS"}[name]] = sum(x.nbytes for x in tensors)
    return found | {"moving average": average}


def peak(args: argparse.Namespace, batch: int, amp: str, recompute: bool) -> int:
    """Return the peak memory of a step's forward and backward pass on `batch` images."""
    model = build(args)
    if recompute:
        recompute_blocks(model)
    views = [torch.randn(batch, 3, args.size, args.size) for _ in range(2)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None

    def step() -> None:
        with precision.autocast(amp, CPU):
            loss, _ = model(views, None, Progress(epochs=1))
        loss.backward()

    return measure.peak_memory(step, CPU)


if __name__ == "__main__":
    main()
