#!/usr/bin/env python
"""Pre-train a ResNet with AdCo: negatives that are learned as adversaries of the encoder.

--sym 1 compares both views in both directions; --multi_crop 1 compares several crops, most of them small, with one key view; both
together are possible. All GPUs of the node take part unless --gpu ID or --no-multiprocessing-distributed is given.
configs/ holds the published settings: --cfg configs/adco_200.yaml.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco import distributed
from moco.builder.adco import AdCo, Ascent
from moco.cli import actions, entry, options, values
from moco.cli.parser import Options, Parser
from moco.distributed import print_rank0
from moco.encoder.resnets import resnet
from moco.engine import pretrain


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_pretrain(p, cos=2)
    # None: all GPUs take part, as in the authors' script (see `cli.add_launch`)
    p.set_defaults(cos=1, lr_final=0.0006, multiprocessing_distributed=None)
    options.add_momentum_encoder(p, t=0.12, v2=True)
    bank = p.add_argument_group("AdCo")
    bank.add_argument(
        "--cluster",
        type=values.entries,
        default=65536,
        metavar="K",
        help="number of learned negatives",
    )
    bank.add_argument(
        "--memory-lr",
        type=values.learning_rate,
        default=3.0,
        metavar="LR",
        help="learning rate of the negatives; --cos 2 lowers it, too",
    )
    bank.add_argument(
        "--mem-t",
        type=values.temperature,
        default=0.02,
        metavar="T",
        help="temperature of the loss that the negatives maximize",
    )
    bank.add_argument(
        "--mem-wd",
        type=values.decay,
        default=1e-4,
        metavar="WD",
        help="weight decay of the negatives",
    )
    bank.add_argument(
        "--mem-momentum", type=values.momentum, default=0.9, help="momentum of the negatives' SGD"
    )
    bank.add_argument(
        "--ad-init",
        action=actions.Switch,
        default=True,
        help="fill the bank with keys before epoch 0, else at random",
    )
    bank.add_argument(
        "--sym",
        action=actions.Switch,
        default=False,
        help="both views are compared with the other's keys",
    )
    bank.add_argument(
        "--multi-crop",
        action=actions.Switch,
        default=False,
        help="several query views; recipe multicrop",
    )
    p.has_effect(
        "mem_t mem_wd mem_momentum",
        lambda args: args.memory_lr,
        "with --memory-lr 0 the bank does not learn; leave it out",
    )
    return p


def check(args: Options) -> None:
    if args.multi_crop:
        args.recipe = args.recipe or "multicrop"
    options.check_momentum_encoder(args)
    args.method = "adco"
    pretrain.check_views(args, several_crops=args.multi_crop)
    pretrain.check(args)


def build(args: Options) -> AdCo:
    return AdCo(
        lambda: resnet(args.arch, args.moco_dim, args.mlp, args.stem),
        dim=args.moco_dim,
        K=args.cluster,
        m=args.moco_m,
        T=args.moco_t,
        bn_splits=args.bn_splits,
        bn_splits_query=args.bn_splits_query,
        ascent=Ascent(
            args.memory_lr, args.mem_t, args.mem_momentum, args.mem_wd, cosine=args.cos == 2
        ),
        symmetric=args.sym,
        multi_crop=args.multi_crop,
        fill=args.ad_init,
    )


def worker(args: Options, device: torch.device) -> None:
    if args.multiprocessing_distributed is None:
        n = distributed.world_size()
        one = "for one process give --gpu ID or --no-multiprocessing-distributed"
        print_rank0(
            f"{n} process{'es' * (n > 1)}: one for each visible GPU, or those of the launcher; {one}"
        )
    if args.ad_init and not args.resume:
        print_rank0(
            f"the bank's {args.cluster} negatives begin as keys, gathered before epoch 0 (--ad-init)"
        )
    pretrain.train(args, device, lambda images: build(args))


if __name__ == "__main__":
    entry.main(parser(), check, worker)
