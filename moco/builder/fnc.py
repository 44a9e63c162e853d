"""FNC: false negatives are attracted, or eliminated (Huynh et al., arXiv 2011.11765)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moco import devices, distributed
from moco.builder.base import Metric, MovingAverage, enqueue
from moco.loss.contrastive import feature_statistics, normalize
from moco.loss.false_negatives import (
    Cancellation,
    cancelled_nt_xent,
    find_false_negatives,
    same_class_entries,
)
from moco.rng import Progress


class FNC(MovingAverage):
    """FNC: each view is compared with a memory of the latest features, or with the joint batch.

    Args:
        encoder, m: see `MovingAverage`. The moving average computes the features of the memory.
        dim: feature size C.
        memory_size: number of entries R of the memory; at least the views of a joint batch. If 0,
            there is no memory and no moving average, and views are compared with the joint batch.
        T: softmax temperature.
        cancellation: how false negatives are found, and whether they are attracted or eliminated.
        chunk: images that are compared with the memory at a time.
        labels: class of each training image, [N], if known. If the false negatives come from
            similarities, the classes are only used to report their precision.
    """

    sync_batch_norm = True

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        dim: int = 128,
        memory_size: int = 65536,
        m: float = 0.999,
        T: float = 0.1,
        cancellation: Cancellation = Cancellation(),  # noqa: B008 (frozen)
        chunk: int = 256,
        labels: Tensor | None = None,
    ):
        super().__init__(encoder, m)
        self.memory_size, self.T, self.cancellation, self.chunk = (
            memory_size,
            T,
            cancellation,
            chunk,
        )
        self.register_buffer("labels", labels, persistent=False)
        if not memory_size:
            self.encoder_k = None
            return
        self.register_buffer("memory", normalize(torch.randn(memory_size, dim)))  # M [R, C]
        # index of each entry's image in the training set; -1 while the entry is random
        self.register_buffer("memory_index", torch.full((memory_size,), -1))
        self.register_buffer("memory_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self,
        views: Sequence[Tensor],
        index: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss and metrics of this rank's batch, whose features enter the memory.

        All views pass the network at once, so that batch norm normalizes them together.

        Args:
            views: V views, each [B, 3, H, W].
            index: index of each image in the training set, [B].
            progress: unused.
        """
        images, shape = torch.cat(list(views)), (len(views), len(views[0]), -1)
        z = normalize(self.encoder_q(images)).view(shape)  # [V, B, C]
        keys = z
        if self.memory_size:
            with torch.no_grad():
                keys = normalize(self.encoder_k(images)).view(shape)
        with torch.autocast(z.device.type, enabled=False):
            return self.contrast(z, keys, index)

    def contrast(self, z: Tensor, keys: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of this rank's anchors against the memory or joint batch, and metrics.

        The metric `acc1` is the fraction of pairs of an anchor and another view of its image that
        are more similar than the anchor and every negative. `fn_found` is the mean number of false
        negatives of an image.
        `fn_precision` is the fraction of them that have the image's class; it is left out if they
        come from labels. `fn_precision` and `hardness` are a sum and a count each.

        Args:
            z: normalized anchors, [V, B, C].
            keys: normalized features that enter the memory, [V, B, C].
            index: index of each image in the training set, [B].
        """
        V, B, _ = z.shape
        bank, images, entries = self.bank(keys, index)
        own = entries.view(V, -1)[:, distributed.rank() * B :][:, :B]
        if self.cancellation.mode != "off" and self.cancellation.source == "labels":
            # random entries have the index -1 and no class
            bank_labels = self.labels[images].masked_fill(images < 0, -1)
            found = same_class_entries(self.labels[index], bank_labels, own)
        else:
            found = find_false_negatives(bank.detach(), own, self.cancellation, self.chunk)
        loss, nearest, hardness = cancelled_nt_xent(
            z, bank, own, found, self.cancellation.mode, self.T, self.chunk
        )
        metrics: dict[str, Metric] = {
            "acc1": nearest,
            **feature_statistics(z[0], (z[0] * keys[1]).sum(1)),
            "hardness": hardness,
        }
        if self.cancellation.mode != "off":
            metrics["fn_found"] = found.mask.sum(1).to(devices.widest_float(z.device)).mean()
            if self.labels is not None and found.indices is not None:
                whose = images[found.indices]  # -1 for entries that are still random
                # the image itself may be in the memory, from the last epoch
                others = found.mask & (whose != index[:, None])
                right = others & (self.labels[whose] == self.labels[index][:, None]) & (whose >= 0)
                metrics["fn_precision"] = right.sum(), others.sum()
        return loss, metrics

    def bank(self, keys: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add all ranks' keys to the memory; return the entries to compare anchors with.

        Args:
            keys: normalized features of this rank, [V, B, C].
            index: index of each image in the training set, [B].

        Returns:
            The features of the memory or joint batch [R, C]; the index of each entry's image [R];
            and the entry of each key [V W B], view by view, each in the order of the joint batch.
        """
        latest = distributed.all_gather_with_gradient(keys.transpose(0, 1).contiguous())
        latest = latest.transpose(0, 1).flatten(0, 1)
        images = distributed.all_gather(index).repeat(len(keys))
        if not self.memory_size:
            return latest, images, torch.arange(len(latest), device=latest.device)
        entries = enqueue(self.memory, self.memory_ptr, latest)
        self.memory_index[entries] = images
        return self.memory, self.memory_index, entries

    def after_step(self) -> None:
        """Update the moving average of the encoder, if there is a memory."""
        if self.memory_size:
            super().after_step()
