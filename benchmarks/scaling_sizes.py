"""Find the sizes of a method that determine what it communicates, keeps and computes."""

import contextlib
import importlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moco.augment import recipes
from moco.builder.base import Method
from moco.config import Pretraining, replaced
from moco.data.images import Images
from moco.engine import pretrain
from moco.rng import Progress


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine what a method communicates, on a rank.

    Attributes:
        batch: images B of a pass.
        pixels: width and height of each view.
        dim: feature size C.
        entries: entries K of the queue or bank; 0 without one.
        images: images N of the training set.
        gradient: bytes of the parameters that are trained.
        buffers: bytes of all buffers.
        buffer_count: number of buffers.
        online: channels of all batch norms of the trained networks, and their number.
        target: channels of all batch norms of the moving averages, and their number.
        metrics: number of metrics.
        state: bytes of the method's state in a checkpoint.
        moments: values that the optimizer keeps for each parameter.
        gmac: 10^9 multiply-adds of a step, in forward and backward pass.
        saved: float32 bytes that the forward pass keeps for the backward pass.
    """

    batch: int
    pixels: tuple[int, ...]
    dim: int
    entries: int
    images: int
    gradient: int
    buffers: int
    buffer_count: int
    online: tuple[int, int]
    target: tuple[int, int]
    metrics: int
    state: int
    moments: int
    gmac: float
    saved: int


def _norms(module: nn.Module) -> tuple[int, int]:
    found = [
        m.num_features for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    return sum(found), len(found)


def sizes(script: str, words: list[object], batch: int, images: int, ranks: int) -> Sizes:
    """Return the sizes of the method that a script builds, with `batch` images on each rank.

    One step runs on tensors without values, with a small batch. What depends on the batch is
    scaled.

    Args:
        script: name of the script, without .py.
        words: its options.
        batch: images of a rank.
        images: images N of the training set.
        ranks: number of ranks; FNC's memory grows with it.
    """
    module = importlib.import_module(script)
    config = module.parser().parse(["DIR", *map(str, words)])
    found: list[Sizes] = []

    def one_step(config: Pretraining, _: torch.device, build: Callable[[Images], Method]) -> None:
        labels = np.zeros(images, dtype=np.int64)
        method = build(Images(Path("DIR"), labels, ("one", "two"))).to("meta")
        found.append(_measured(method, config, batch, images))

    with (
        # autocast does not support the meta device
        mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(pretrain, "train", one_step),
        mock.patch.object(pretrain, "complete", lambda config, *_: config),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        total = batch if config.input.batch_is_per_process else batch * ranks
        config = module.complete(replaced(config, batch_size=total))
        # one process stands for all: FNC's memory has a number of total batches
        config = replaced(config, batch_per_process=batch * ranks)
        module.worker(config, torch.device("cpu"))
    return found[0]


def _measured(method: Method, config: Pretraining, batch: int, images: int) -> Sizes:
    """Return the sizes of a method on the meta device."""
    small = min(batch, 32)
    pixels = tuple(view.size for view in recipes.from_settings(config.views))
    kept: dict[int, int] = {}  # bytes of each memory block that autograd keeps
    own = {t.untyped_storage()._cdata for t in [*method.parameters(), *method.buffers()]}

    def keep(x: torch.Tensor) -> torch.Tensor:
        block = x.untyped_storage()
        if block._cdata not in own:
            kept[block._cdata] = block.nbytes()
            alive.append(x)  # so that no other block gets this one's address
        return x

    alive: list[torch.Tensor] = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        views = [torch.zeros(small, 3, size, size) for size in pixels]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            index = torch.zeros(small, dtype=torch.long)
            loss, metrics = method(views, index, Progress(epochs=config.optimizer.epochs))
        loss.backward()
    parts = dict(method.named_children())
    average = [part for name, part in parts.items() if name[-2:] == "_k" or "momentum" in name]
    online = [part for part in parts.values() if part not in average]
    banks = [getattr(method, name, None) for name in ("queue", "queue1", "bank", "memory")]
    bank = next((bank for bank in banks if isinstance(bank, torch.Tensor)), None)
    buffers = list(method.buffers())
    return Sizes(
        batch=batch,
        pixels=pixels,
        dim=_dim(method, bank),
        entries=0 if bank is None else len(bank),
        images=images,
        gradient=_bytes(p for p in method.parameters() if p.requires_grad),
        buffers=_bytes(buffers),
        buffer_count=len(buffers),
        online=_norms(nn.ModuleList(online)),
        target=_norms(nn.ModuleList(average)),
        metrics=1 + len(metrics) + len(method.grad_norm_modules),
        state=_bytes(method.state_dict().values()),
        moments=2 if config.optimizer.optimizer.startswith("adam") else 1,
        gmac=counter.get_total_flops() / 2e9 * batch / small,
        saved=sum(kept.values()) * batch // small,
    )


def _dim(method: Method, bank: torch.Tensor | None) -> int:
    """Return the feature size C."""
    if bank is not None:
        return bank.shape[1]
    linear = [m for m in method.modules() if isinstance(m, nn.Linear)]
    return linear[-1].out_features


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
