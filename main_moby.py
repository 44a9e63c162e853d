#!/usr/bin/env python
"""Pre-train a ViT, a Swin or another network with MoBY, SynCo-v2 or BYOL.

--batch-size counts the images of each process. A recipe: --cfg configs/moby_vit_small.yaml.
"""

from dataclasses import dataclass, fields

from moco import config, sections, sections_methods
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device, Method
from moco.encoder import archs
from moco.messages import print_rank0
from moco.sections import option
from moco.sections_negatives import COUNTS, notes


@dataclass(frozen=True)
class Run(sections.Run):
    """The run, and its method."""

    method: str = option(
        "moby",
        "synco: MoBY with synthetic negatives (SynCo-v2). Each method has its own defaults of "
        f"--moco-m, --lr and --wd: {sections_methods.MOBY_DEFAULTS}",
        choices=tuple(sections_methods.MOBY),
    )


@dataclass(frozen=True)
class Config(config.Pretraining):
    """The settings of this script."""

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
        lr_warmup_from=2.5e-7,
        lr_by="previous-step",
        cos=True,
    )
    networks: sections_methods.MobyNetworks = sections_methods.MobyNetworks()
    contrast: sections_methods.MobyContrast = sections_methods.MobyContrast()
    synthetic: sections_methods.MobyNegatives = sections_methods.MobyNegatives(
        n_hard=256, sigma=0.1, **dict.fromkeys(COUNTS, 128)
    )

    @property
    def depends_on_epochs(self) -> bool:
        """Return True: the target's momentum rises until the last step."""
        return True


def parser() -> Parser:
    p = Parser(__doc__, Config())
    none = "--method byol has no negatives; leave it out"
    p.has_effect("queue moco_t", lambda args: args.method != "byol", none)
    synthetic = " ".join(one.name for one in fields(sections_methods.MobyNegatives))
    synco = "only --method synco has synthetic negatives; give it as well, or leave this out"
    p.has_effect(synthetic, lambda args: args.method == "synco", synco)
    hidden = "a projector and a predictor of one layer have no hidden width; leave it out"
    p.has_effect("mlp_dim", lambda args: max(args.proj_layers, args.pred_layers) > 1, hidden)
    return p


def complete(c: Config) -> Config:
    from moco.builder import moby
    from moco.engine import pretrain

    settings = config.flat(c)
    own = {k: v for k, v in sections_methods.MOBY[c.run.method].items() if settings[k] is None}
    if c.networks.online_drop_path is None:
        own["online_drop_path"] = 0.2 if c.network.arch in archs.SHORT else 0.0
    c = config.replaced(c, **own)
    if c.run.method == "synco":
        moby.synco_v2(c.synthetic, c.contrast)  # so that wrong settings are errors here
    # create the networks once, so that impossible settings are errors before processes start
    for drop_path in {c.networks.online_drop_path, c.networks.target_drop_path}:
        moby.create_encoder(c.network, c.views.image_size, drop_path, 1, c.networks.stop_grad_conv1)
    pretrain.check_views(c)
    return pretrain.complete(c)


def build(c: Config) -> Method:
    from moco.builder import moby

    parts = (c.network, c.views.image_size, c.networks, c.contrast, c.synthetic)
    return moby.create_method(c.run.method, *parts)


def worker(c: Config, device: Device) -> None:
    from moco.builder import moby
    from moco.engine import pretrain

    if c.run.method == "synco":
        negatives = moby.synco_v2(c.synthetic, c.contrast)
        for line in notes(negatives, "--synthetic-first", "MoBY", c.optimizer.epochs):
            print_rank0(line)
    m = c.networks.moco_m
    print_rank0(f"target momentum {m:g} at the start, 1 after the last step (--moco-m)")
    pretrain.train(c, device, lambda images: build(c))


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
