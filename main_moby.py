#!/usr/bin/env python
"""Pre-train a ViT, a Swin or a ResNet with MoBY, SynCo-v2 or BYOL. --batch-size is that of each process.

configs/ holds the published settings: --cfg configs/synco_swin_tiny.yaml.
"""

import torch
from torch import nn

from moco import distributed
from moco.builder.moby import BYOL, MoBY, OnlineAndTarget
from moco.encoder import networks
from moco.engine import cli, pretrain
from moco.engine.log import say
from moco.errors import InputError

METHODS = ("moby", "byol", "synco")


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    cli.add_pretrain(p, transformers=True, each=True)
    p.also_named({"use-checkpoint": "grad-checkpoint"})
    group = p.add_argument_group("method")
    group.add_argument("--method", choices=METHODS, default="moby", help="synco: MoBY with synthetic negatives (SynCo-v2)")
    group = p.add_argument_group("online and target network")
    group.add_argument("--moco-m", type=float, default=0.99, help="momentum of the target at the first step; 1 at the last")
    group.add_argument("--online-drop-path", type=float, default=0.2, metavar="P", help="stochastic depth of the online encoder")
    group.add_argument("--target-drop-path", type=float, default=0.0, metavar="P", help="and of the target")
    group.add_argument("--stop-grad-conv1", action=cli.Switch, default=False, help="keep a ViT's patch projection as it begins")
    group.add_argument("--proj-layers", type=cli.positive, default=2, help="linear layers of the projector")
    group.add_argument("--pred-layers", type=cli.positive, default=2, help="and of the predictor")
    group.add_argument("--mlp-dim", type=cli.positive, default=4096, help="width of both")
    group.add_argument("--moco-dim", type=cli.positive, default=256, help="feature size")
    group = p.add_argument_group("contrast (moby, synco)")
    group.add_argument("--queue", type=cli.positive, default=4096, metavar="K", help="rows of each view's queue")
    group.add_argument("--moco-t", type=float, default=0.2, metavar="T", help="softmax temperature")
    group = cli.add_synthetic(p, "synthetic negatives (synco)", n_hard=256, each=128, sigma=0.1)
    group.add_argument("--synthetic-first", type=cli.natural, default=30, metavar="EPOCH", help="of the synthetic negatives")
    group.add_argument("--synthetic-last", type=cli.natural, default=100, metavar="EPOCH", help="the first without them again")
    p.set_defaults(arch="vit_small", epochs=300, batch_size=128, recipe="byol", optimizer="adamw", wd=0.05, clip_grad=5.0)
    # .001 x total batch / 512, down to 5e-6 x total batch / 512
    p.set_defaults(lr=0.0005, lr_final=2.5e-6, learning_rate_scaling="linear", lr_warmup_epochs=5, lr_by="step", cos=True)
    return p


def check(args: cli.Options) -> None:
    if not args.moco_t > 0 or not 0 <= args.moco_m <= 1:
        raise InputError(f"--moco-t must be above 0 and --moco-m in [0, 1]; got {args.moco_t:g} and {args.moco_m:g}")
    for name in ("online_drop_path", "target_drop_path"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name):g}: must be in [0, 1)")
    if args.method == "synco":
        cli.synthetic(args, args.queue, "--queue")
        if args.synthetic_first >= args.synthetic_last:
            raise InputError(f"--synthetic-first {args.synthetic_first}: must be below --synthetic-last {args.synthetic_last}")
    projection(networks.create(args.arch, 0, args.image_size), args)
    pretrain.check_views(args)
    pretrain.check(args, transformers=True)


def projection(net: nn.Module, args: cli.Options) -> None:
    """Freeze what --stop-grad-conv1 says."""
    if not args.stop_grad_conv1:
        return
    if not hasattr(net, "patch_embed"):
        raise InputError(f"--stop-grad-conv1: {args.arch} has no patch projection; leave it out")
    net.patch_embed.requires_grad_(False)


def head(width: int, layers: int, args: cli.Options, device: torch.device) -> nn.Module:
    sizes = [width, *[args.mlp_dim] * (layers - 1), args.moco_dim]
    return distributed.sync_batch_norm(networks.projector(sizes, bias=True), device)


def build(args: cli.Options, device: torch.device) -> OnlineAndTarget:
    def encoder(drop_path: float) -> nn.Module:
        net = networks.create(args.arch, 0, args.image_size, drop_path)
        projection(net, args)
        return distributed.sync_batch_norm(net, device)

    online, target = encoder(args.online_drop_path), encoder(args.target_drop_path)
    projector = head(networks.width(online), args.proj_layers, args, device)
    parts = (online, target, projector, head(args.moco_dim, args.pred_layers, args, device))
    if args.method == "byol":
        return BYOL(*parts, args.moco_m)
    more = {"dim": args.moco_dim, "K": args.queue, "T": args.moco_t}
    if args.method == "synco":
        kind = cli.synthetic(args, args.queue, "--queue")
        more |= {"kind": kind, "first": args.synthetic_first, "last": args.synthetic_last}
    return MoBY(*parts, args.moco_m, **more)


def worker(args: cli.Options, device: torch.device) -> None:
    if args.method == "synco":
        total = cli.synthetic(args, args.queue, "--queue").total
        when = f"from epoch {args.synthetic_first} on (--synthetic-first), without them from {args.synthetic_last} on"
        say(f"{total} synthetic negatives per query {when} (--synthetic-last)")
    say(f"target momentum {args.moco_m:g} at the first step, 1 at the last (--moco-m)")
    pretrain.train(args, device, lambda images: build(args, device))


if __name__ == "__main__":
    cli.main(parser(), check, worker)
