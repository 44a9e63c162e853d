#!/usr/bin/env python
"""Pre-train a network with MoCo v1/v2, MoCHI or SynCo.

Without synthetic negatives (--n1 .. --n6 all 0) this is MoCo: v1 by default, v2 with --mlp
--moco-t 0.2 --aug-plus --cos. MoCHI uses --n1 and --n3; SynCo all six. configs/ holds the published
settings: --cfg configs/synco_200.yaml.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moco import config, sections, sections_methods
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device, Method
from moco.messages import print_rank0
from moco.sections import option
from moco.sections_negatives import Schedule, SyntheticNegatives, notes, synthetic_schedule


@dataclass(frozen=True)
class Queue:
    """The queue of keys, and how queries are compared with it."""

    TITLE: ClassVar[str] = "MoCo"
    moco_k: int = option(65536, "number of negatives in the queue", range=sections.ENTRIES)
    symmetric: bool = option(
        False, "compare each view with the keys of the other view, and add both losses"
    )


@dataclass(frozen=True)
class Synthetics(SyntheticNegatives):
    """The synthetic negatives, and the epoch in which they begin."""

    TITLE: ClassVar[str] = "synthetic negatives (MoCHI, SynCo)"
    warmup_epochs: int = option(
        10, "epochs before the first synthetic negatives", range=sections.NATURAL
    )


@dataclass(frozen=True)
class Config(config.Pretraining):
    """The settings of this script."""

    encoders: sections.QueryAndKey = sections.QueryAndKey()
    queue: Queue = Queue()
    objective: sections_methods.Loss = sections_methods.Loss()
    synthetic: Synthetics = Synthetics()

    @property
    def depends_on_epochs(self) -> bool:
        """Return whether --anneal divides the epochs of the run."""
        return self.objective.anneal is not None


def parser() -> Parser:
    p = Parser(__doc__, Config())
    none = "there are no synthetic negatives; give --n1 to --n6 as well, or leave it out"
    lr = "(the learning rate's warm-up is --lr-warmup-epochs)"
    has = lambda args: negatives(args.config).config.total  # noqa: E731
    p.has_effect("n_hard synthetic_ramp_epochs", has, none)
    p.has_effect("warmup_epochs", has, f"{none} {lr}")
    return p


def negatives(c: Config) -> Schedule:
    return synthetic_schedule(c.synthetic, c.queue.moco_k, "--moco-k", c.synthetic.warmup_epochs)


def method(counts: Sequence[int]) -> str:
    """Return moco, mochi or synco, depending on the number of synthetic negatives of each type."""
    of_mochi = counts[0] + counts[2]
    return "moco" if not sum(counts) else "mochi" if of_mochi == sum(counts) else "synco"


def complete(c: Config) -> Config:
    from moco.builder import objectives
    from moco.engine import pretrain

    recipe = c.views.recipe or ("mocov2" if c.encoders.aug_plus else "mocov1")
    c = config.replaced(c, method=method(negatives(c).config.counts), recipe=recipe)
    objectives.check_queue(c.objective, negatives(c).config.total, c.optimizer.epochs)
    pretrain.check_views(c)
    return pretrain.complete(c)


def build(c: Config) -> Method:
    from moco.builder import objectives
    from moco.builder.synco import SynCo
    from moco.encoder.networks import create_encoder

    dim, mlp = c.encoders.moco_dim, c.encoders.mlp
    return SynCo(
        lambda: create_encoder(c.network, c.views.image_size, dim, mlp),
        dim=dim,
        K=c.queue.moco_k,
        m=c.encoders.moco_m,
        T=c.encoders.moco_t,
        bn_splits=c.encoders.bn_splits,
        bn_splits_query=c.encoders.bn_splits_query,
        symmetric=c.queue.symmetric,
        synthetic=negatives(c),
        loss=objectives.create(c.objective),
    )


def worker(c: Config, device: Device) -> None:
    from moco.engine import pretrain

    for line in notes(negatives(c), "--warmup-epochs", "MoCo", c.optimizer.epochs):
        print_rank0(line)
    pretrain.train(c, device, lambda images: build(c))


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
