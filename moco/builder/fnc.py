"""FNC: negatives that look like the image itself are attracted, or left out (Huynh et al., arXiv 2011.11765)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moco import devices, distributed
from moco.builder.base import Metric, MovingAverage, enqueue
from moco.loss.contrastive import feature_statistics, normalize
from moco.loss.false_negatives import MODES, Cancellation, cancelled_nt_xent, find
from moco.rng import Progress
from moco.sections import AVERAGE, LAYERS, NATURAL, POSITIVE, TEMPERATURE, WIDTH, option


@dataclass(frozen=True)
class FalseNegatives:
    """The views, the memory, and which of its entries are false negatives."""

    TITLE: ClassVar[str] = "FNC"
    support_size: int = option(
        8,
        "extra views per image, used to find false negatives",
        range="[0, 100]",
        metavar="N",
    )
    fn_mode: str = option(
        "attract", "what becomes of false negatives; off: they are not searched", choices=MODES
    )
    fn_topk: int = option(
        10, "maximum number of false negatives per image", range=NATURAL, metavar="K"
    )
    fn_threshold: float = option(
        0.7, "minimum cosine similarity of a false negative", range="[-1, 1]", metavar="COS"
    )
    memory_multiplier: int = option(
        16,
        "size of the memory, in total batches; 0: no memory, images are compared with the batch",
        range="[0, 100000]",
        metavar="N",
    )
    ema: float = option(0.999, "momentum of the encoder that fills the memory", range=AVERAGE)
    temperature: float = option(0.1, "softmax temperature", range=TEMPERATURE, metavar="T")
    num_proj_layers: int = option(3, "linear layers of the projection head", range=LAYERS)
    proj_out_dim: int = option(128, "feature size", range=WIDTH)
    loss_chunk: int = option(
        256,
        "images compared at a time; fewer need less memory",
        range=POSITIVE,
        metavar="IMAGES",
    )


class FNC(MovingAverage):
    """Contrast of each view with a memory of the latest features of all views, or with the joint batch alone.

    Args:
        encoder, m: `MovingAverage`'s; the average makes what enters the memory.
        dim: feature size C.
        rows: of the memory, at least those of a joint batch's views; 0 compares with the joint batch itself, in the features of
            the one encoder, which then has no average.
        T: softmax temperature.
        how: which rows are false negatives, and what becomes of them.
        chunk: images that are compared with the memory at a time.
        labels: the class of each image of the data set [N]; known, they tell how many false negatives are of their image's class.
    """

    sync_batch_norm = True

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        dim: int = 128,
        rows: int = 65536,
        m: float = 0.999,
        T: float = 0.1,
        how: Cancellation = Cancellation(),  # noqa: B008 (frozen)
        chunk: int = 256,
        labels: Tensor | None = None,
    ):
        super().__init__(encoder, m)
        self.rows, self.T, self.how, self.chunk = rows, T, how, chunk
        self.register_buffer("labels", labels, persistent=False)
        if not rows:
            self.encoder_k = None
            return
        self.register_buffer("memory", normalize(torch.randn(rows, dim)))  # M [R, C]
        self.register_buffer(
            "memory_index", torch.full((rows,), -1)
        )  # whose features they are, as places in the data set
        self.register_buffer("memory_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self, views: Sequence[Tensor], index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Loss and metrics of this rank's batch; its features enter the memory.

        Args:
            views: V of them, each [B, 3, H, W].
            index: each sample's place in the data set, [B].
            progress: unused.
        """
        z = torch.stack([normalize(self.encoder_q(view)) for view in views])  # [V, B, C]
        keys = z
        if self.rows:
            with torch.no_grad():
                keys = torch.stack([normalize(self.encoder_k(view)) for view in views])
        with torch.autocast(z.device.type, enabled=False):
            return self.contrast(z, keys, index)

    def contrast(self, z: Tensor, keys: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """Loss of this rank's anchors z, compared with what the keys have entered, and metrics; unit features [V, B, C] both.

        `acc1` says how often a view is nearer to its image's others than to any negative, `fn_found` how many false negatives an
        image has, and `fn_precision`, as a sum and a count, which share of them is of its class.
        """
        V, B, _ = z.shape
        bank, images, places = self.bank(keys, index)
        own = places.view(V, -1)[:, distributed.rank() * B :][:, :B]
        found = find(bank.detach(), own, self.how, self.chunk)
        loss, nearest, hardness = cancelled_nt_xent(
            z, bank, own, found, self.how.mode, self.T, self.chunk
        )
        metrics: dict[str, Metric] = {
            "acc1": nearest,
            **feature_statistics(z[0], (z[0] * keys[1]).sum(1)),
            "hardness": hardness,
        }
        if self.how.mode != "off":
            metrics["fn_found"] = found.mask.sum(1).to(devices.widest(z.device)).mean()
            if self.labels is not None:
                whose = images[found.indices]  # -1 where nothing has entered the memory yet
                others = found.mask & (
                    whose != index[:, None]
                )  # not the image itself, as it was in the last epoch
                right = others & (self.labels[whose] == self.labels[index][:, None]) & (whose >= 0)
                metrics["fn_precision"] = right.sum(), others.sum()
        return loss, metrics

    def bank(self, keys: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What anchors are compared with, after this step's keys [V, B, C] of every rank have entered it.

        Returns rows [R, C], the image of each [R], and where the keys lie, view by view, each in the joint batch's order [V W B].
        """
        latest = (
            distributed.all_gather_with_gradient(keys.transpose(0, 1).contiguous())
            .transpose(0, 1)
            .flatten(0, 1)
        )
        images = distributed.all_gather(index).repeat(len(keys))
        if not self.rows:
            return latest, images, torch.arange(len(latest), device=latest.device)
        places = enqueue(self.memory, self.memory_ptr, latest)
        self.memory_index[places] = images
        return self.memory, self.memory_index, places

    def after_step(self) -> None:
        """What changes after the optimizer's step: the average follows."""
        if self.rows:
            super().after_step()
