#!/usr/bin/env python
"""Pre-train a network with SogCLR, iSogCLR, SimCLR, DCL, DCLW, the debiased loss, HCL or SupCon.

--loss selects the method. SogCLR keeps a moving average for each training image, so that small
batches suffice. SupCon uses labels. configs/ holds the published settings: --cfg
configs/sogclr_800.yaml. The published name --loss_type dcl is SogCLR.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco import config, sections, sections_methods
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device, Images, Method, Module
from moco.launch import processes
from moco.messages import print_rank0
from moco.sections import option
from moco.sections_negatives import BatchNegatives, notes


@dataclass(frozen=True)
class Head:
    """The projection head."""

    TITLE: ClassVar[str] = "projection head"
    dim: int = option(128, "feature size", range=sections.WIDTH)
    mlp_dim: int = option(2048, "width of the projection head", range=sections.WIDTH)
    num_proj_layers: int = option(2, "linear layers of the projection head", range=sections.LAYERS)
    last_bn: bool = option(
        True, "end the projection head with a batch norm without parameters, not with a bias"
    )


@dataclass(frozen=True)
class Config(config.Pretraining):
    """The settings of this script."""

    views: sections.Views = sections.Views(recipe="sogclr")
    optimizer: sections.Optimizer = sections.Optimizer(
        epochs=800,
        optimizer="lars",
        lr=0.075,
        learning_rate_scaling="sqrt",
        wd=1e-6,
        schedule=(120, 160),
        lr_warmup_epochs=10,
        lr_by="step",
        cos=True,
    )
    contrast: sections_methods.BatchLoss = sections_methods.BatchLoss()
    head: Head = Head()
    temperatures: sections_methods.Temperatures = sections_methods.Temperatures()
    synthetic: BatchNegatives = BatchNegatives()

    @property
    def depends_on_epochs(self) -> bool:
        """Return whether --anneal divides the epochs of the run."""
        return self.contrast.anneal is not None


def parser() -> Parser:
    p = Parser(__doc__, Config())
    several = lambda args: processes.plan(args.config.launch).world_size > 1  # noqa: E731
    p.has_effect("gather_gradient", several, "the run has one process", refuse=False)
    no_hidden = "one linear layer has no hidden width; leave it out"
    p.has_effect("mlp_dim", lambda args: args.num_proj_layers > 1, no_hidden)
    p.add_aliases({"warmup-epochs": "lr-warmup-epochs", "tau-init": "t", "eta-init": "eta"})
    p.add_renamed("loss-type", "loss", {"dcl": "sogclr", "simclr": "simclr"})
    return p


def complete(c: Config) -> Config:
    from moco.builder import objectives
    from moco.builder.simclr import SimCLR
    from moco.engine import pretrain

    c = config.replaced(c, method=c.contrast.loss, gamma=c.contrast.own_gamma)
    objectives.check(c.contrast, c.temperatures, c.optimizer.epochs)
    objectives.check_synthetic(c.contrast.loss, c.synthetic.schedule().config.total)
    c.synthetic.check(SimCLR.negatives_of_batch(processes.images_per_pass(c.input, c.launch)))
    pretrain.check_views(c)
    return pretrain.complete(c, c.contrast.uses_labels)


def encoder(c: Config) -> Module:
    """Return a network with a projection head of --num-proj-layers linear layers."""
    from torch import nn

    from moco.encoder import networks

    dim, layers = c.head.dim, c.head.num_proj_layers
    net = networks.create_encoder(c.network, c.views.image_size, dim, zero_init_residual=True)
    widths = [networks.num_features(net), *[c.head.mlp_dim] * (layers - 1), dim]
    last = [nn.BatchNorm1d(dim, affine=False)] if c.head.last_bn else []
    networks.set_head(net, networks.projector(widths, *last, last_bias=not last))
    return net


def worker(c: Config, device: Device) -> None:
    from moco.builder import objectives
    from moco.engine import pretrain

    print_rank0(objectives.note(c.contrast))
    negatives = c.synthetic.schedule()
    for line in notes(negatives, "--synthetic-first", c.contrast.loss, c.optimizer.epochs):
        print_rank0(line)

    def build(images: Images) -> Method:
        pretrain.require_labels(images, c.contrast.uses_labels)
        data = len(images), images.single_labels
        parts = c.contrast, c.temperatures, lambda: encoder(c), *data, negatives
        return objectives.create_method(*parts)

    pretrain.train(c, device, build)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
