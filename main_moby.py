#!/usr/bin/env python
"""Pre-train a ViT, a Swin or a ResNet with MoBY, SynCo-v2 or BYOL. --batch-size is that of each process.

configs/ holds the published settings: --cfg configs/synco_swin_tiny.yaml.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch
from torch import nn

from moco import distributed
from moco.builder.base import OnlineAndTarget
from moco.builder.byol import BYOL
from moco.builder.moby import MoBY
from moco.cli import actions, entry, options, values
from moco.cli.parser import Options, Parser
from moco.distributed import print_rank0
from moco.encoder import networks, timm_networks
from moco.engine import pretrain
from moco.errors import InputError

# what the papers give each method: momentum, rate (x total batch / 512 there, / 256 here) and decay
OWN = {
    "moby": {"moco_m": 0.99, "lr": 0.0005, "wd": 0.05},
    "synco": {"moco_m": 0.99, "lr": 0.0005, "wd": 0.05},
    "byol": {"moco_m": 0.996, "lr": 0.0001, "wd": 0.03},
}


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_pretrain(p, transformers=True, each=True)
    own = "; ".join(
        f"{name} {', '.join(f'{value:g}' for value in defaults.values())}"
        for name, defaults in OWN.items()
    )
    group = p.add_argument_group(
        "method", f"by default --moco-m, --lr and --wd are the method's own: {own}"
    )
    group.add_argument(
        "--method",
        choices=OWN,
        default="moby",
        help="synco: MoBY with synthetic negatives (SynCo-v2)",
    )
    group = p.add_argument_group("online and target network")
    group.add_argument(
        "--moco-m",
        type=values.average,
        help="momentum of the target at the first step; 1 at the last",
    )
    depth = "stochastic depth of the online encoder (default: 0.2 of the ViTs and Swins by short name, else 0)"
    group.add_argument("--online-drop-path", type=values.real("[0, 1)"), metavar="P", help=depth)
    group.add_argument(
        "--target-drop-path",
        type=values.real("[0, 1)"),
        default=0.0,
        metavar="P",
        help="stochastic depth of the target encoder",
    )
    group.add_argument(
        "--stop-grad-conv1",
        action=actions.Switch,
        default=False,
        help="keep the patch projection as it begins",
    )
    group.add_argument(
        "--proj-layers", type=values.layers, default=2, help="linear layers of the projector"
    )
    group.add_argument(
        "--pred-layers", type=values.layers, default=2, help="linear layers of the predictor"
    )
    group.add_argument(
        "--mlp-dim", type=values.width, default=4096, help="hidden width of projector and predictor"
    )
    group.add_argument("--moco-dim", type=values.width, default=256, help="feature size")
    group = p.add_argument_group("contrast (moby, synco)")
    group.add_argument(
        "--queue",
        type=values.entries,
        default=4096,
        metavar="K",
        help="entries in each view's queue",
    )
    group.add_argument(
        "--moco-t", type=values.temperature, default=0.2, metavar="T", help="softmax temperature"
    )
    group = options.add_synthetic(p, "synthetic negatives (synco)", n_hard=256, each=128, sigma=0.1)
    group.add_argument(
        "--synthetic-first",
        type=values.natural,
        default=30,
        metavar="EPOCH",
        help="first epoch with synthetic negatives",
    )
    group.add_argument(
        "--synthetic-last",
        type=values.natural,
        default=100,
        metavar="EPOCH",
        help="first epoch without them again",
    )
    p.has_effect(
        "queue moco_t",
        lambda args: args.method != "byol",
        "--method byol compares with no negatives; leave it out",
    )
    synthetic = "n_hard n1 n2 n3 n4 n5 n6 sigma delta eta synthetic_first synthetic_last"
    p.has_effect(
        synthetic,
        lambda args: args.method == "synco",
        "synthetic negatives are --method synco's; give it, or leave them out",
    )
    hidden = "a projector and a predictor of one layer have no hidden width; leave it out"
    p.has_effect("mlp_dim", lambda args: max(args.proj_layers, args.pred_layers) > 1, hidden)
    p.set_defaults(
        arch="vit_small",
        epochs=300,
        batch_size=128,
        recipe="byol",
        optimizer="adamw",
        clip_grad=5.0,
        lr=None,
        wd=None,
    )
    p.set_defaults(
        lr_final=2.5e-6, learning_rate_scaling="linear", lr_warmup_epochs=5, lr_by="step", cos=True
    )
    return p


def check(args: Options) -> None:
    for name, value in OWN[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.online_drop_path is None:
        args.online_drop_path = 0.2 if args.arch in timm_networks.SHORT else 0.0
    if args.method == "synco":
        if not options.synthetic(args, args.queue, "--queue").total:
            raise InputError("--method synco: --n1 to --n6 are all 0; give some, or --method moby")
        if args.synthetic_first >= args.synthetic_last:
            raise InputError(
                f"--synthetic-first {args.synthetic_first}: must be below --synthetic-last {args.synthetic_last}"
            )
    for drop_path in {args.online_drop_path, args.target_drop_path}:
        projection(networks.create(args.arch, 1, args.image_size, drop_path, args.stem), args)
    pretrain.check_views(args)
    pretrain.check(args, transformers=True)


def projection(net: nn.Module, args: Options) -> None:
    """Freeze what --stop-grad-conv1 says."""
    if not args.stop_grad_conv1:
        return
    if not hasattr(net, "patch_embed") or not hasattr(net.patch_embed, "proj"):
        raise InputError(f"--stop-grad-conv1: {args.arch} has no patch projection; leave it out")
    net.patch_embed.proj.requires_grad_(False)


def head(width: int, layers: int, args: Options, device: torch.device) -> nn.Module:
    sizes = [width, *[args.mlp_dim] * (layers - 1), args.moco_dim]
    return distributed.sync_batch_norm(networks.projector(sizes, bias=True), device)


def build(args: Options, device: torch.device) -> OnlineAndTarget:
    def encoder(drop_path: float) -> nn.Module:
        net = networks.create(args.arch, 0, args.image_size, drop_path, args.stem)
        projection(net, args)
        return distributed.sync_batch_norm(net, device)

    online, target = encoder(args.online_drop_path), encoder(args.target_drop_path)
    projector = head(networks.num_features(online), args.proj_layers, args, device)
    parts = (online, target, projector, head(args.moco_dim, args.pred_layers, args, device))
    if args.method == "byol":
        return BYOL(*parts, args.moco_m)
    more = {"dim": args.moco_dim, "K": args.queue, "T": args.moco_t}
    if args.method == "synco":
        kind = options.synthetic(args, args.queue, "--queue")
        more |= {"kind": kind, "first": args.synthetic_first, "last": args.synthetic_last}
    return MoBY(*parts, args.moco_m, **more)


def worker(args: Options, device: torch.device) -> None:
    if args.method == "synco":
        total = options.synthetic(args, args.queue, "--queue").total
        when = f"from epoch {args.synthetic_first} on (--synthetic-first), without them from {args.synthetic_last} on"
        print_rank0(f"{total} synthetic negatives per query {when} (--synthetic-last)")
        if args.synthetic_first >= args.epochs:
            print_rank0(
                f"the run ends after {args.epochs} epochs, before the first synthetic negatives: this is MoBY"
            )
    print_rank0(f"target momentum {args.moco_m:g} at the first step, 1 at the last (--moco-m)")
    pretrain.train(args, device, lambda images: build(args, device))


if __name__ == "__main__":
    entry.main(parser(), check, worker)
