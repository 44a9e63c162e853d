#!/usr/bin/env python
"""Pre-train a ResNet with SogCLR (--loss_type dcl), or with SimCLR (--loss_type simclr).

SogCLR keeps a moving average for each training image, so that small batches do; see configs/sogclr_800.yaml.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch
from torch import nn

from moco import distributed
from moco.builder.sogclr import SogCLR
from moco.cli import entry, options, values
from moco.cli.parser import Options, Parser
from moco.distributed import print_rank0
from moco.encoder.networks import projector
from moco.encoder.resnets import resnet
from moco.engine import pretrain

LEAST_T = 0.02  # exp(1 / T) of one half as large leaves float32's range


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_pretrain(p)
    group = p.add_argument_group("SimCLR and SogCLR")
    group.add_argument(
        "--loss-type",
        choices=("dcl", "simclr"),
        default="dcl",
        help="dcl: SogCLR's, with moving averages",
    )
    group.add_argument(
        "--gamma",
        type=values.real("(0, 1]"),
        default=0.9,
        help="weight of an image's new value in its moving average",
    )
    group.add_argument(
        "--t", type=values.real(f"[{LEAST_T}, 100]"), default=0.1, help="softmax temperature"
    )
    group.add_argument("--dim", type=values.width, default=128, help="feature size")
    group.add_argument(
        "--mlp-dim", type=values.width, default=2048, help="width of the projection head"
    )
    group.add_argument(
        "--num-proj-layers",
        type=values.layers,
        default=2,
        help="linear layers of the projection head",
    )
    no_averages = "--loss-type simclr has no moving averages; leave it out"
    p.has_effect("gamma", lambda args: args.loss_type == "dcl", no_averages)
    p.has_effect(
        "mlp_dim",
        lambda args: args.num_proj_layers > 1,
        "one linear layer has no hidden width; leave it out",
    )
    p.also_named({"warmup-epochs": "lr-warmup-epochs"})
    p.set_defaults(
        epochs=800,
        recipe="sogclr",
        optimizer="lars",
        lr=0.075,
        learning_rate_scaling="sqrt",
        wd=1e-6,
    )
    p.set_defaults(lr_warmup_epochs=10, lr_by="step", cos=True)
    return p


def check(args: Options) -> None:
    args.method = "sogclr" if args.loss_type == "dcl" else "simclr"
    pretrain.check_views(args)
    pretrain.check(args)


def encoder(args: Options, device: torch.device) -> nn.Module:
    net = resnet(args.arch, args.dim, stem=args.stem, zero_init_residual=True)
    widths = [net.fc.in_features, *[args.mlp_dim] * (args.num_proj_layers - 1), args.dim]
    net.fc = projector(widths, nn.BatchNorm1d(args.dim, affine=False))
    return distributed.sync_batch_norm(net, device)


def worker(args: Options, device: torch.device) -> None:
    gamma = args.gamma if args.method == "sogclr" else None
    print_rank0(
        f"{args.loss_type}: "
        + (
            f"a moving average for each image, gamma {gamma:g}"
            if gamma
            else "the batch's negatives alone"
        )
    )
    pretrain.train(
        args,
        device,
        lambda images: SogCLR(lambda: encoder(args, device), len(images), args.t, gamma),
    )


if __name__ == "__main__":
    entry.main(parser(), check, worker)
