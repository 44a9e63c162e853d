#!/usr/bin/env python
"""Pre-train a network with FNC: false negatives are attracted, or eliminated from the loss.

--fn-from labels takes them from the labels. With --support-size 0 --fn-mode off
--memory-multiplier 0, this is SimCLR. configs/ holds the published settings: configs/fnc_100.yaml.
"""

from dataclasses import dataclass

from moco import config, sections
from moco.cli import compat, entry
from moco.cli.parser import Parser
from moco.cli.types import Device, Images, Method, Module
from moco.errors import InputError
from moco.launch import processes
from moco.messages import print_rank0
from moco.sections_methods import FalseNegatives


@dataclass(frozen=True)
class Config(config.Pretraining):
    """The settings of this script. As by the authors, images are not normalized by default."""

    input: sections.Input = sections.Input(batch_size=4096)
    views: sections.Views = sections.Views(recipe="fnc", mean=(0.0,) * 3, std=(1.0,) * 3)
    optimizer: sections.Optimizer = sections.Optimizer(
        epochs=100,
        optimizer="lars_tf",
        lr=0.1,
        learning_rate_scaling="sqrt",
        schedule=(120, 160),
        lr_warmup_epochs=10,
        lr_by="step",
        cos=True,
    )
    fnc: FalseNegatives = FalseNegatives()


def parser() -> Parser:
    p = Parser(__doc__, Config(), compat.FNC_REPLACEMENTS)
    p.add_aliases(compat.FNC_ALIASES)
    return p


def complete(c: Config) -> Config:
    from moco.engine import pretrain

    method = "fnc-labels" if c.fnc.uses_labels else "fnc"
    c = config.replaced(c, method=method, views=2 + c.fnc.support_size)
    c.fnc.check()
    check_memory(c)
    pretrain.check_one_size(c)
    return pretrain.complete(c, c.fnc.uses_labels)


def check_memory(c: Config) -> None:
    """Raise InputError if the memory cannot hold a batch, or may hold only false negatives."""
    fnc, views, accumulated = c.fnc, c.views.views, c.optimizer.accumulation_steps
    if 0 < fnc.memory_multiplier * accumulated < views:
        raise InputError(
            f"--memory-multiplier {fnc.memory_multiplier} with --support-size {fnc.support_size}: "
            f"the memory must hold a batch's {views} views; "
            f"give {-(-views // accumulated)} or more, or 0 for none"
        )
    per_pass = processes.images_per_pass(c.input, c.launch)
    entries = fnc.memory_multiplier * accumulated * per_pass or views * per_pass
    others = entries - views  # an image's own views are neither negatives nor false negatives
    if fnc.fn_mode != "off" and not fnc.uses_labels and fnc.fn_topk >= others > 0:
        memory = fnc.memory_multiplier
        where = "the memory (--memory-multiplier)" if memory else "the batch (--batch-size)"
        raise InputError(
            f"--fn-topk {fnc.fn_topk}: {where} has {others} entries of other images, and at least "
            f"one must stay a negative; give {others - 1} or fewer, or --fn-mode off"
        )


def encoder(c: Config) -> Module:
    """Return a network with a projection head that ends with a batch norm without bias."""
    from torch import nn

    from moco.encoder import networks

    dim, layers = c.fnc.proj_out_dim, c.fnc.num_proj_layers
    net = networks.create_encoder(c.network, c.views.image_size, dim, zero_init_residual=True)
    last = nn.BatchNorm1d(dim)
    last.bias.requires_grad_(False)  # so that it stays 0
    head = networks.projector([*[networks.num_features(net)] * layers, dim], last)
    networks.set_head(net, head)
    return net


def worker(c: Config, device: Device) -> None:
    from moco import distributed
    from moco.builder.fnc import FNC
    from moco.engine import pretrain
    from moco.loss.false_negatives import Cancellation

    fnc = c.fnc
    total = c.input.batch_per_process * distributed.world_size() * c.optimizer.accumulation_steps
    entries = fnc.memory_multiplier * total
    cancellation = Cancellation(fnc.fn_mode, fnc.fn_topk, fnc.fn_threshold, fnc.fn_from)

    def build(images: Images) -> Method:
        pretrain.require_labels(images, fnc.uses_labels)
        sizes = (fnc.proj_out_dim, entries, fnc.ema, fnc.temperature)
        return FNC(lambda: encoder(c), *sizes, cancellation, fnc.loss_chunk, images.single_labels)

    print_rank0(fnc.note(c.views.views, entries))
    pretrain.train(c, device, build)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
