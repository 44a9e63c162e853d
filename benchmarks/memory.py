#!/usr/bin/env python
"""Count the memory of one process that pre-trains a large network with MoCo v3.

The first table counts the tensors that do not depend on the batch. Each process of DDP has all of
them. With FSDP, each of W processes would have 1/W of them. Autograd adds the gradients of the two
views of a batch, and keeps those of one view until it has those of the other.

The second table counts the tensors that a real forward pass on the CPU keeps for the backward pass,
per image of the batch, for both views. With --grad-checkpoint, it adds those of the block that is
recomputed. The last column is the number of images that fit into --gib, next to the tensors of the
first table.
"""

import argparse
import contextlib
import copy
import io

import measure
import torch
from torch import Tensor, nn

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
    parser = measure.bare_parser(__doc__.splitlines()[0])
    measure.add_json(parser)
    parser.add_argument("--arch", type=measure.arch, default="vit_large_patch16_224")
    parser.add_argument(
        "--blocks", type=measure.at_least(1), default=24, help="number of blocks of the network"
    )
    parser.add_argument("--size", type=measure.pixels, default=224, help="image size in pixels")
    parser.add_argument("--gib", type=measure.above_0, default=80, help="memory of a GPU")
    args = parser.parse_args()
    model = build(args)
    fixed = count(copy.deepcopy(model).to("meta"))
    every = sum(size for name, size in fixed.items() if name != "LARS")
    for name, size in {**fixed, "all, with AdamW": every}.items():
        print(f"{name:>28}  {size / GIB:.2f} GiB")
    figures = {"fixed_gib": every / GIB, "parameters_millions": fixed["parameters"] / 4e6}
    sizes = {(amp, False): kept(model, args.size, amp) for amp in ("off", "bf16")}
    recompute_blocks(model)
    sizes |= {(amp, True): kept(model, args.size, amp) for amp in ("off", "bf16")}
    table = []
    for amp in ("off", "bf16"):
        full, few = sizes[amp, False], sizes[amp, True]
        block = (full - few) / (2 * args.blocks)  # of one view
        for name, size in ((f"amp {amp}", full), (f"amp {amp}, --grad-checkpoint", few + block)):
            fits = int((args.gib * GIB - every) // size)
            table.append({"settings": name, "MiB per image": size / 2**20, "images": fits})
        figures |= {
            f"mib_per_image_{amp}": full / 2**20,
            f"mib_per_image_{amp}_grad_checkpoint": (few + block) / 2**20,
        }
    facts = {"arch": args.arch, "pixels": args.size, "GiB": args.gib}
    measure.report("memory", table, figures, facts, args.json)


def build(args: argparse.Namespace) -> nn.Module:
    """Return MoCo v3's model."""
    torch.manual_seed(0)
    config = main_mocov3.parser().parse(["DIR", "-a", args.arch])
    with contextlib.redirect_stdout(io.StringIO()):
        return main_mocov3.build(replaced(config, image_size=args.size))


def count(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the tensors that do not depend on the batch, after a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    average = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    for p in trained:
        p.grad = torch.zeros_like(p)
    size = sum(p.nbytes for p in trained)
    found = {"parameters": size, "gradients": size, "gradients of the other view": size}
    for name in ("adamw", "lars"):
        groups = model.parameter_groups(1e-4, 0.1)
        optimizer = optim.make(groups, Optimizer(optimizer=name), "off")
        optimizer.step()
        tensors = [x for state in optimizer.state.values() for x in state.values()]
        found[{"adamw": "AdamW", "lars": "LARS"}[name]] = sum(x.nbytes for x in tensors)
    return found | {"moving average": average}


def kept(model: nn.Module, size: int, amp: str) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, for each image."""
    sizes = []
    for batch in (2, 3):  # their difference leaves out what does not depend on the batch
        storages = {}

        def pack(x: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x
            return x

        views = [torch.randn(batch, 3, size, size) for _ in range(2)]
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, precision.autocast(amp, CPU):
            _loss = model(views, None, Progress(epochs=1))[0]
        sizes.append(sum(x.untyped_storage().nbytes() for x in storages.values()))
    return sizes[1] - sizes[0]


if __name__ == "__main__":
    measure.main(main)
