#!/usr/bin/env python
"""Pre-train a network with AdCo: negatives that are learned as adversaries of the encoder.

--sym 1 compares both views in both directions. --multi_crop 1 compares several crops, most of them
small, with one key view. Both can be combined. All GPUs of the node are used, unless --gpu ID or
--no-multiprocessing-distributed is given. configs/ holds the published settings:
--cfg configs/adco_200.yaml.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco import config, sections
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device, Method
from moco.launch import processes
from moco.messages import counted, print_rank0
from moco.sections import option


@dataclass(frozen=True)
class Optimizer(sections.Optimizer):
    """The encoder's optimizer, with a half or a quarter of a cosine as schedule."""

    cos: int = option(True, "cosine schedule; 2: a quarter of a cosine", switch=True, max_level=2)


@dataclass(frozen=True)
class Bank:
    """The learned negatives."""

    TITLE: ClassVar[str] = "AdCo"
    cluster: int = option(65536, "number of learned negatives", range=sections.ENTRIES, metavar="K")
    memory_lr: float = option(
        3.0, "learning rate of the negatives, constant", range=sections.LEARNING_RATE, metavar="LR"
    )
    mem_t: float = option(
        0.02,
        "temperature of the loss that the negatives maximize",
        range=sections.TEMPERATURE,
        metavar="T",
    )
    mem_wd: float = option(
        1e-4, "weight decay of the negatives", range=sections.WEIGHT_DECAY, metavar="WD"
    )
    mem_momentum: float = option(0.9, "momentum of the negatives' SGD", range=sections.MOMENTUM)
    ad_init: bool = option(True, "fill the bank with keys before epoch 0; otherwise it is random")
    sym: bool = option(False, "compare each of two views with the keys of the other")
    multi_crop: bool = option(False, "several query views per key view; recipe multicrop")


@dataclass(frozen=True)
class Config(config.Pretraining):
    """The settings of this script."""

    # None: use all GPUs, as the authors' script does
    launch: sections.Launch = sections.Launch(multiprocessing_distributed=None)
    optimizer: Optimizer = Optimizer(schedule=(120, 160), lr_final=0.0006)
    encoders: sections.QueryAndKey = sections.QueryAndKey(moco_t=0.12, mlp=True, aug_plus=True)
    bank: Bank = Bank()


def parser() -> Parser:
    p = Parser(__doc__, Config())
    fixed = "with --memory-lr 0, the bank does not learn; leave it out"
    p.has_effect("mem_t mem_wd mem_momentum", lambda args: args.memory_lr, fixed)
    return p


def complete(c: Config) -> Config:
    from moco.builder import adco
    from moco.engine import pretrain

    recipe = "multicrop" if c.bank.multi_crop else "mocov2" if c.encoders.aug_plus else "mocov1"
    c = config.replaced(c, method="adco", recipe=c.views.recipe or recipe)
    pretrain.check_views(c, several_crops=c.bank.multi_crop)
    adco.check_bank(c.bank.cluster, processes.plan(c.launch).world_size)
    return pretrain.complete(c)


def build(c: Config) -> Method:
    from moco.builder.adco import AdCo, Ascent
    from moco.encoder.networks import create_encoder

    bank, encoders = c.bank, c.encoders
    dim, mlp = encoders.moco_dim, encoders.mlp
    return AdCo(
        lambda: create_encoder(c.network, c.views.image_size, dim, mlp),
        dim=dim,
        K=bank.cluster,
        m=encoders.moco_m,
        T=encoders.moco_t,
        bn_splits=encoders.bn_splits,
        bn_splits_query=encoders.bn_splits_query,
        ascent=Ascent(bank.memory_lr, bank.mem_t, bank.mem_momentum, bank.mem_wd),
        symmetric=bank.sym,
        multi_crop=bank.multi_crop,
        fill=bank.ad_init,
    )


def worker(c: Config, device: Device) -> None:
    from moco import distributed
    from moco.engine import pretrain

    if c.launch.multiprocessing_distributed is None:
        n = counted(distributed.world_size(), "process", "processes")
        print_rank0(
            f"{n}: one for each visible GPU, or those of the launcher; "
            "for one process, give --gpu ID or --no-multiprocessing-distributed"
        )
    if c.bank.ad_init and not c.log.resume:
        entries = f"the bank's {c.bank.cluster} negatives"
        print_rank0(f"{entries} are initialized with keys before epoch 0 (--ad-init)")
    pretrain.train(c, device, lambda images: build(c))


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
