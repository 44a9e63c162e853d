#!/usr/bin/env python
"""Pre-train a ResNet with MoCo v1/v2, MoCHI or SynCo.

Without synthetic negatives (--n1 .. --n6 all 0) this is MoCo: v1 as it is, v2 with --mlp --moco-t 0.2 --aug-plus --cos.
MoCHI uses --n1 and --n3; SynCo all six. configs/ holds the published settings: --cfg configs/synco_200.yaml.
"""

import torch

from moco.builder.synco import SynCo
from moco.encoder import resnet
from moco.engine import cli, pretrain
from moco.engine.log import say
from moco.errors import InputError
from moco.loss.synthetic import Synthetic


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    cli.add_pretrain(p)
    cli.add_momentum_encoder(p, t=0.07, v2=False)
    moco = p.add_argument_group("MoCo")
    moco.add_argument("--moco-k", type=cli.positive, default=65536, help="negatives in the queue")
    synco = p.add_argument_group("synthetic negatives (MoCHI, SynCo)")
    synco.add_argument("--n-hard", type=cli.natural, default=0, help="hardest queue rows that they are made of")
    for i, name in enumerate(("interpolated", "extrapolated", "mixup", "noise", "perturbed", "adversarial"), 1):
        synco.add_argument(f"--n{i}", type=cli.natural, default=0, help=f"{name} negatives per query")
    synco.add_argument("--sigma", type=float, default=0.01, help="deviation of the noise")
    synco.add_argument("--delta", type=float, default=0.01, help="size of the perturbation")
    synco.add_argument("--eta", type=float, default=0.01, help="size of the adversarial step")
    synco.add_argument("--warmup-epochs", type=cli.natural, default=10, help="epochs before the first synthetic negatives")
    return p


def counts(args: cli.Options) -> tuple[int, ...]:
    return (args.n1, args.n2, args.n3, args.n4, args.n5, args.n6)


def method(args: cli.Options) -> str:
    if not any(counts(args)):
        return "moco"
    return "synco" if any((args.n2, args.n4, args.n5, args.n6)) else "mochi"


def check(args: cli.Options) -> None:
    if args.n_hard > args.moco_k:
        raise InputError(f"--n-hard {args.n_hard} is above the queue's {args.moco_k} rows (--moco-k); lower it")
    if any(counts(args)) and not args.n_hard:
        raise InputError("synthetic negatives are made of the hardest queue rows: give --n-hard, as in --n-hard 1024")
    cli.check_momentum_encoder(args)
    args.method = method(args)
    pretrain.check_views(args)
    pretrain.check(args)


def build(args: cli.Options) -> SynCo:
    return SynCo(
        lambda: resnet(args.arch, args.moco_dim, args.mlp),
        dim=args.moco_dim,
        K=args.moco_k,
        m=args.moco_m,
        T=args.moco_t,
        bn_splits=args.bn_splits,
        kind=Synthetic(args.n_hard, counts(args), args.sigma, args.delta, args.eta),
        warmup_epochs=args.warmup_epochs,
    )


def worker(args: cli.Options, device: torch.device) -> None:
    if any(counts(args)):
        say(f"{sum(counts(args))} synthetic negatives per query from epoch {args.warmup_epochs} on (--warmup-epochs)")
    pretrain.train(args, device, lambda images: build(args))


if __name__ == "__main__":
    cli.main(parser(), check, worker)
