#!/usr/bin/env python
"""Pre-train a ResNet with MoCo v1/v2, MoCHI or SynCo.

Without synthetic negatives (--n1 .. --n6 all 0) this is MoCo: v1 as it is, v2 with --mlp --moco-t 0.2 --aug-plus --cos.
MoCHI uses --n1 and --n3; SynCo all six. configs/ holds the published settings: --cfg configs/synco_200.yaml.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco.builder.synco import SynCo
from moco.cli import actions, entry, options, values
from moco.cli.parser import Options, Parser
from moco.distributed import print_rank0
from moco.encoder.resnets import resnet
from moco.engine import pretrain
from moco.loss.synthetic import Synthetic


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_pretrain(p)
    options.add_momentum_encoder(p, t=0.07, v2=False)
    moco = p.add_argument_group("MoCo")
    moco.add_argument("--moco-k", type=values.entries, default=65536, help="negatives in the queue")
    both = "compare each view with the keys of the other view, and add both losses"
    moco.add_argument("--symmetric", action=actions.Switch, default=False, help=both)
    synco = options.add_synthetic(
        p, "synthetic negatives (MoCHI, SynCo)", n_hard=0, each=0, sigma=0.01
    )
    synco.add_argument(
        "--warmup-epochs",
        type=values.natural,
        default=10,
        help="epochs before the first synthetic negatives",
    )
    none = "there are no synthetic negatives; give --n1 to --n6 as well, or leave it out"
    p.has_effect("n_hard", lambda args: kind(args).total, none)
    lr = "(the learning rate's warm-up is --lr-warmup-epochs)"
    p.has_effect("warmup_epochs", lambda args: kind(args).total, f"{none} {lr}")
    return p


def kind(args: Options) -> Synthetic:
    return options.synthetic(args, args.moco_k, "--moco-k")


def method(kind: Synthetic) -> str:
    _, n2, _, n4, n5, n6 = kind.counts
    return ("synco" if any((n2, n4, n5, n6)) else "mochi") if kind.total else "moco"


def check(args: Options) -> None:
    args.method = method(kind(args))
    options.check_momentum_encoder(args)
    pretrain.check_views(args)
    pretrain.check(args)


def build(args: Options) -> SynCo:
    return SynCo(
        lambda: resnet(args.arch, args.moco_dim, args.mlp, args.stem),
        dim=args.moco_dim,
        K=args.moco_k,
        m=args.moco_m,
        T=args.moco_t,
        bn_splits=args.bn_splits,
        bn_splits_query=args.bn_splits_query,
        symmetric=args.symmetric,
        kind=kind(args),
        warmup_epochs=args.warmup_epochs,
    )


def worker(args: Options, device: torch.device) -> None:
    if total := kind(args).total:
        print_rank0(
            f"{total} synthetic negatives per query from epoch {args.warmup_epochs} on (--warmup-epochs)"
        )
        if args.warmup_epochs >= args.epochs:
            print_rank0(
                f"the run ends after {args.epochs} epochs, before the first synthetic negatives: this is MoCo"
            )
    pretrain.train(args, device, lambda images: build(args))


if __name__ == "__main__":
    entry.main(parser(), check, worker)
