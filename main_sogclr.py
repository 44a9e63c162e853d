#!/usr/bin/env python
"""Pre-train a network with SogCLR (--loss_type dcl), or with SimCLR (--loss_type simclr).

SogCLR keeps a moving average for each training image, so that small batches suffice. configs/ holds
the published settings: --cfg configs/sogclr_800.yaml.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from moco import config, sections
from moco.builder.sogclr import SogCLR
from moco.cli import entry
from moco.cli.parser import Parser
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.encoder import networks
from moco.engine import pretrain
from moco.launch import processes
from moco.sections import option

LEAST_T = 0.02  # at half this temperature, exp(1 / T) would overflow float32


@dataclass(frozen=True)
class Contrast:
    """The loss, and the projection head."""

    TITLE: ClassVar[str] = "SimCLR and SogCLR"
    loss_type: str = option(
        "dcl", "dcl: SogCLR's loss, with moving averages", choices=("dcl", "simclr")
    )
    gamma: float = option(
        0.9, "weight of an image's new value in its moving average", range="(0, 1]"
    )
    t: float = option(0.1, "softmax temperature", range=f"[{LEAST_T}, 100]")
    gather_gradient: str = option(
        "all",
        "all: a feature gets the gradient of the losses of all processes, which is exact; local: "
        "that of its own process's loss only, as in the authors' PyTorch code",
        choices=("all", "local"),
    )
    dim: int = option(128, "feature size", range=sections.WIDTH)
    mlp_dim: int = option(2048, "width of the projection head", range=sections.WIDTH)
    num_proj_layers: int = option(2, "linear layers of the projection head", range=sections.LAYERS)


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
    contrast: Contrast = Contrast()


def parser() -> Parser:
    p = Parser(__doc__, Config())
    no_averages = "--loss-type simclr has no moving averages; leave it out"
    p.has_effect("gamma", lambda args: args.loss_type == "dcl", no_averages)
    several = lambda args: processes.plan(args.config.launch).world_size > 1  # noqa: E731
    p.has_effect("gather_gradient", several, "the run has one process", refuse=False)
    no_hidden = "one linear layer has no hidden width; leave it out"
    p.has_effect("mlp_dim", lambda args: args.num_proj_layers > 1, no_hidden)
    p.add_aliases({"warmup-epochs": "lr-warmup-epochs"})
    return p


def complete(c: Config) -> Config:
    method = "sogclr" if c.contrast.loss_type == "dcl" else "simclr"
    c = config.replaced(c, method=method)
    pretrain.check_views(c)
    return pretrain.complete(c)


def encoder(c: Config) -> nn.Module:
    """Return a network with a projection head that ends with a batch norm without parameters."""
    dim, layers = c.contrast.dim, c.contrast.num_proj_layers
    net = networks.create_encoder(c.network, c.views.image_size, dim, zero_init_residual=True)
    widths = [networks.num_features(net), *[c.contrast.mlp_dim] * (layers - 1), dim]
    networks.set_head(net, networks.projector(widths, nn.BatchNorm1d(dim, affine=False)))
    return net


def worker(c: Config, device: torch.device) -> None:
    averages = c.run.method == "sogclr"
    gamma = c.contrast.gamma if averages else None
    how = (
        f"a moving average for each image, gamma {gamma:g}"
        if averages
        else "only the negatives of the batch"
    )
    print_rank0(f"{c.contrast.loss_type}: {how}")

    def build(images: Images) -> SogCLR:
        local = c.contrast.gather_gradient == "local"
        return SogCLR(lambda: encoder(c), len(images), c.contrast.t, gamma, local)

    pretrain.train(c, device, build)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
