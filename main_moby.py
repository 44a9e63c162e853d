#!/usr/bin/env python
"""Pre-train a ViT, a Swin or a ResNet with MoBY, SynCo-v2 or BYOL. --batch-size is that of each process.

configs/ holds the published settings: --cfg configs/synco_swin_tiny.yaml.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import nn

from moco import config, sections
from moco.builder import moby
from moco.builder.base import OnlineAndTarget
from moco.builder.byol import BYOL
from moco.builder.synco import COUNTS, configured
from moco.cli import entry
from moco.cli.parser import Parser
from moco.distributed import print_rank0
from moco.encoder import networks, timm_networks
from moco.engine import pretrain
from moco.errors import InputError
from moco.loss.synthetic import Synthetic
from moco.sections import option

# the papers' momentum, learning rate (x total batch / 512 there, / 256 here) and weight decay
OWN = {
    "moby": {"moco_m": 0.99, "lr": 0.0005, "wd": 0.05},
    "synco": {"moco_m": 0.99, "lr": 0.0005, "wd": 0.05},
    "byol": {"moco_m": 0.996, "lr": 0.0001, "wd": 0.03},
}
DEFAULTS = "; ".join(
    f"{name} {', '.join(f'{value:g}' for value in own.values())}" for name, own in OWN.items()
)


@dataclass(frozen=True)
class Run(sections.Run):
    """The run, and its method."""

    method: str = option(
        "moby",
        "synco: MoBY with synthetic negatives (SynCo-v2). By default --moco-m, --lr and --wd are "
        f"the method's own: {DEFAULTS}",
        choices=tuple(OWN),
    )


@dataclass(frozen=True)
class Config(config.Pretraining):
    """The settings of this script."""

    TRANSFORMERS: ClassVar[bool] = True
    SCHEDULED: ClassVar[bool] = True  # the target's momentum rises until the last step
    run: Run = Run()
    input: sections.Input = sections.Input(batch_size=128, batch_is_per_process=True)
    views: sections.Views = sections.Views(recipe="byol")
    network: sections.Network = sections.Network(arch="vit_small")
    optimizer: sections.Optimizer = sections.Optimizer(
        epochs=300,
        optimizer="adamw",
        lr=None,
        wd=None,
        schedule=(120, 160),
        clip_grad=5.0,
        lr_final=2.5e-6,
        learning_rate_scaling="linear",
        lr_warmup_epochs=5,
        lr_by="step",
        cos=True,
    )
    networks: moby.Networks = moby.Networks()
    contrast: moby.Contrast = moby.Contrast()
    synthetic: moby.Synthetics = moby.Synthetics(
        n_hard=256, sigma=0.1, **dict.fromkeys(COUNTS, 128)
    )


def parser() -> Parser:
    p = Parser(__doc__, Config())
    none = "--method byol compares with no negatives; leave it out"
    p.has_effect("queue moco_t", lambda args: args.method != "byol", none)
    synthetic = " ".join(one.name for one in fields(moby.Synthetics))
    synco = "synthetic negatives are --method synco's; give it, or leave them out"
    p.has_effect(synthetic, lambda args: args.method == "synco", synco)
    hidden = "a projector and a predictor of one layer have no hidden width; leave it out"
    p.has_effect("mlp_dim", lambda args: max(args.proj_layers, args.pred_layers) > 1, hidden)
    return p


def negatives(c: Config) -> Synthetic:
    return configured(c.synthetic, c.contrast.queue, "--queue")


def complete(c: Config) -> Config:
    settings = config.flat(c)
    own = {name: value for name, value in OWN[c.run.method].items() if settings[name] is None}
    if c.networks.online_drop_path is None:
        own["online_drop_path"] = 0.2 if c.network.arch in timm_networks.SHORT else 0.0
    c = config.replaced(c, **own)
    if c.run.method == "synco":
        first, last = c.synthetic.synthetic_first, c.synthetic.synthetic_last
        if not negatives(c).total:
            raise InputError("--method synco: --n1 to --n6 are all 0; give some, or --method moby")
        if first >= last:
            raise InputError(f"--synthetic-first {first}: must be below --synthetic-last {last}")
    for drop_path in {c.networks.online_drop_path, c.networks.target_drop_path}:
        encoder(c, drop_path, 1)
    pretrain.check_views(c)
    return pretrain.complete(c)


def encoder(c: Config, drop_path: float, out: int = 0) -> nn.Module:
    """Return an encoder; with --stop-grad-conv1 its patch projection does not train."""
    net = networks.create(c.network.arch, out, c.views.image_size, drop_path, c.network.stem)
    if c.networks.stop_grad_conv1:
        if not timm_networks.has_patch_projection(net):
            raise InputError(
                f"--stop-grad-conv1: {c.network.arch} has no patch projection; leave it out"
            )
        net.patch_embed.proj.requires_grad_(False)
    return net


def head(c: Config, width: int, layers: int) -> nn.Module:
    sizes = [width, *[c.networks.mlp_dim] * (layers - 1), c.networks.moco_dim]
    return networks.projector(sizes, bias=True)


def build(c: Config) -> OnlineAndTarget:
    online = encoder(c, c.networks.online_drop_path)
    target = encoder(c, c.networks.target_drop_path)
    projector = head(c, networks.num_features(online), c.networks.proj_layers)
    predictor = head(c, c.networks.moco_dim, c.networks.pred_layers)
    parts = (online, target, projector, predictor, c.networks.moco_m)
    if c.run.method == "byol":
        return BYOL(*parts)
    more = {"dim": c.networks.moco_dim, "K": c.contrast.queue, "T": c.contrast.moco_t}
    if c.run.method == "synco":
        more |= {"kind": negatives(c)}
        more |= {"first": c.synthetic.synthetic_first, "last": c.synthetic.synthetic_last}
    return moby.MoBY(*parts, **more)


def worker(c: Config, device: torch.device) -> None:
    if c.run.method == "synco":
        first, last = c.synthetic.synthetic_first, c.synthetic.synthetic_last
        print_rank0(
            f"{negatives(c).total} synthetic negatives per query from epoch {first} on "
            f"(--synthetic-first), without them from {last} on (--synthetic-last)"
        )
        if first >= (epochs := c.optimizer.epochs):
            print_rank0(
                f"the run ends after {epochs} epochs, before the first synthetic negatives: "
                "this is MoBY"
            )
    print_rank0(
        f"target momentum {c.networks.moco_m:g} at the first step, 1 at the last (--moco-m)"
    )
    pretrain.train(c, device, lambda images: build(c))


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
