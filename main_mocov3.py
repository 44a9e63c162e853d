#!/usr/bin/env python
"""Pre-train a ResNet, a ViT or another network with MoCo v3.

--batch-size counts the images of all nodes. The defaults are those of a ResNet. configs/ holds the
published settings: --cfg configs/mocov3_vit_small.yaml.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco import config, sections
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device, Method
from moco.encoder import archs
from moco.launch import processes
from moco.messages import print_rank0
from moco.sections import option
from moco.sections_negatives import BatchNegatives, notes


@dataclass(frozen=True)
class Contrast:
    """The moving average, the temperature and the heads."""

    TITLE: ClassVar[str] = "MoCo v3"
    moco_dim: int = option(256, "feature size", range=sections.WIDTH)
    moco_mlp_dim: int = option(
        4096, "hidden width of projector and predictor", range=sections.WIDTH
    )
    moco_m: float = option(0.99, "momentum of the moving average", range=sections.AVERAGE)
    moco_m_cos: bool = option(
        False, "raise the momentum from --moco-m along a half cosine, to 1 after the last step"
    )
    moco_t: float = option(1.0, "softmax temperature", range=sections.TEMPERATURE)
    stop_grad_conv1: bool = option(False, "do not train the patch projection of a ViT or Swin")


@dataclass(frozen=True)
class Config(config.Pretraining):
    """The settings of this script."""

    input: sections.Input = sections.Input(batch_size=4096, batch_is_of_all_nodes=True)
    views: sections.Views = sections.Views(recipe="byol")
    optimizer: sections.Optimizer = sections.Optimizer(
        epochs=100,
        optimizer="lars",
        lr=0.6,
        learning_rate_scaling="linear",
        wd=1e-6,
        schedule=(120, 160),
        lr_warmup_epochs=10,
        lr_by="step",
        cos=True,
    )
    contrast: Contrast = Contrast()
    synthetic: BatchNegatives = BatchNegatives()

    @property
    def depends_on_epochs(self) -> bool:
        """Return whether the momentum rises until the last step."""
        return self.contrast.moco_m_cos


def parser() -> Parser:
    p = Parser(__doc__, Config())
    p.add_aliases({"warmup-epochs": "lr-warmup-epochs", "eta": "synthetic-eta"})
    return p


def complete(c: Config) -> Config:
    from moco.builder.mocov3 import MoCoV3
    from moco.encoder import networks
    from moco.engine import pretrain

    c = config.replaced(c, method="mocov3")
    if c.contrast.stop_grad_conv1:  # check before processes start that there is something to freeze
        net = networks.create_encoder(c.network, c.views.image_size, c.contrast.moco_dim)
        networks.freeze_patch_projection(net, c.network.arch)
    c.synthetic.check(MoCoV3.negatives_of_batch(processes.images_per_pass(c.input, c.launch)))
    pretrain.check_views(c)
    return pretrain.complete(c)


def build(c: Config) -> Method:
    """Return a new model. A transformer has a longer projector, and one more batch norm."""
    from torch import nn

    from moco.builder.mocov3 import MoCoV3
    from moco.encoder import networks

    size, dim, hidden = c.views.image_size, c.contrast.moco_dim, c.contrast.moco_mlp_dim
    transformer = archs.is_transformer(c.network.arch)
    net = networks.create_encoder(c.network, size, dim, zero_init_residual=True)
    if c.contrast.stop_grad_conv1:
        networks.freeze_patch_projection(net, c.network.arch)

    widths = [networks.num_features(net), *[hidden] * (2 if transformer else 1), dim]
    norms = [nn.BatchNorm1d(dim, affine=False) for _ in range(2 if transformer else 1)]
    networks.set_head(net, networks.projector(widths, norms[0]))
    predictor = networks.projector([dim, hidden, dim], *norms[1:])
    m, rises, t = c.contrast.moco_m, c.contrast.moco_m_cos, c.contrast.moco_t
    return MoCoV3(net, predictor, m, rises, t, c.synthetic.schedule())


def worker(c: Config, device: Device) -> None:
    from moco.engine import pretrain

    m, rises = c.contrast.moco_m, c.contrast.moco_m_cos
    how = "at the start, 1 after the last step" if rises else "in all steps; --moco-m-cos raises it"
    print_rank0(f"momentum {m:g} (--moco-m) {how}")
    negatives = c.synthetic.schedule()
    for line in notes(negatives, "--synthetic-first", "MoCo v3", c.optimizer.epochs):
        print_rank0(line)
    pretrain.train(c, device, lambda images: build(c))


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
