"""Modules that methods share: a moving average of the encoder, keys under shuffled BN, an online and a target network."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.batch_norm import MIN_BN_GROUP, bn_groups, split_batch_norm
from moco.loss.contrastive import normalize
from moco.rng import SHUFFLE, Progress

Metric = Tensor | tuple[Tensor, Tensor]  # a scalar, or a sum and the count of what it sums up


class Method(nn.Module, ABC):
    """A method of pre-training: a module whose call gives the loss of a batch.

    A method must define `forward` and `encoder`. Everything else has a default here. All tensors
    that a resumed run needs are parameters or buffers. docs/adding-a-method.md has an example.

    Attributes:
        encoder: the encoder that the evaluations judge: a ResNet or one of timm's networks, stored
            under a name that they read, such as `encoder`, `encoder_q` or `base_encoder`.
        embedding: the encoder with its projection head.
        images_before: images that train before epoch 0, for example to fill a bank.
        sync_batch_norm: whether batch norm is joined over all processes.
        parts: modules whose gradient norms are logged, by name.
    """

    encoder: nn.Module
    images_before: int = 0
    sync_batch_norm: bool = False

    @property
    def embedding(self) -> nn.Module:
        """Return the encoder with its projection head; by default the head is its last layer."""
        return self.encoder

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Return the modules whose gradient norms are logged, by name."""
        return {}

    @abstractmethod
    def forward(
        self, views: Sequence[Tensor], index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of this rank's batch, a scalar, and metrics to log.

        Args:
            views: the views of the batch, each [B, 3, H, W].
            index: index of each image in the training set, [B].
            progress: where in the run this pass stands. Random numbers are drawn from its
                generators, so that a resumed run draws the same ones.
        """

    def after_step(self) -> None:
        """Do what follows the optimizer's step, such as to update a moving average."""

    def groups(self, lr: float, wd: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; by default one with all that trains.

        A group with `"scheduled": False` keeps its learning rate for the whole run.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        return [{"params": params, "lr": lr, "weight_decay": wd}]

    def notes(self, images: int) -> list[str]:
        """Return lines to print at the start of a run with `images` images in a pass."""
        return []


class MovingAverage(Method):
    """An encoder that trains, `encoder_q`, and its exponential moving average `encoder_k`.

    Args:
        encoder: makes one encoder [B, 3, H, W] -> [B, C].
        m: momentum of the average, in [0, 1].
    """

    def __init__(self, encoder: Callable[[], nn.Module], m: float):
        super().__init__()
        self.m = m
        self.encoder_q = encoder()
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """The encoder that evaluation uses."""
        return self.encoder_q

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the average follows."""
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m
        )


class QueryAndKey(MovingAverage):
    """Queries from `encoder_q`, keys from `encoder_k` under shuffled BN: what MoCo and AdCo share.

    Args:
        encoder, m: `MovingAverage`'s.
        bn_splits: with one process, groups of a shuffled batch over which the key encoder's BN runs.
        bn_splits_query: whether the query encoder's BN also runs over `bn_splits` groups.
    """

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        m: float,
        bn_splits: int,
        bn_splits_query: bool = False,
    ):
        super().__init__(encoder, m)
        self.bn_splits = bn_splits
        if distributed.world_size() == 1:
            for net in (self.encoder_k, self.encoder_q)[: 1 + bn_splits_query]:
                split_batch_norm(net, bn_splits)

    def notes(self, images: int) -> list[str]:
        """Return a line if the batch is too small for `bn_splits` groups."""
        used = bn_groups(self.bn_splits, images)
        if distributed.world_size() > 1 or used == self.bn_splits:
            return []
        groups = "1 group is" if used == 1 else f"{used} groups are"
        each = f"each needs {MIN_BN_GROUP} images and a pass has {images}"
        return [f"--bn-splits {self.bn_splits}: {groups} used, because {each}"]

    @torch.no_grad()
    def keys(self, images: Tensor, progress: Progress, *counters: int) -> Tensor:
        """Unit keys of the joint batch in its own order, [W B, C], under shuffled BN.

        Images change places by a permutation that all ranks share and every pass draws anew, so that a key's BN group
        is not its query's. With a single process, batch norm runs over groups of the shuffled batch
        instead. Give each view other `counters`, so that their permutations differ.
        """
        generator = progress.generator(SHUFFLE, "cpu", *counters)
        permutation = torch.randperm(distributed.world_size() * len(images), generator=generator)
        return distributed.unshuffle(
            normalize(self.encoder_k(distributed.shuffle(images, permutation))), permutation
        )


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> Tensor:
    """Overwrite the rows of `queue` [K, C] from `pointer` [1] on, which moves along, with `keys` [n, C]; any n, it wraps around.

    Returns where each key belongs, [n]; with n above K only the last K keys stay.
    """
    n, K = len(keys), len(queue)
    places = (pointer + torch.arange(n, device=keys.device)) % K
    queue[places[-K:]] = keys[-K:]
    pointer.add_(n).remainder_(K)
    return places


class OnlineAndTarget(Method):
    """What the three methods share.

    Args:
        encoder: the online backbone [B, 3, H, W] -> [B, D] without a head, which trains.
        encoder_k: the target's, which may differ in its stochastic depth; it takes the online one's weights.
        projector: the head D -> C; the target has a copy.
        predictor: the online head C -> C.
        m: momentum of the target at the first step, in [0, 1]; by a half cosine it is 1 at the last.
    """

    sync_batch_norm = True

    def __init__(
        self,
        encoder: nn.Module,
        encoder_k: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        m: float = 0.99,
    ):
        super().__init__()
        self.m = m
        self.encoder, self.projector, self.predictor = encoder, projector, predictor
        self.encoder_k, self.projector_k = encoder_k, copy.deepcopy(projector)
        self.encoder_k.load_state_dict(encoder.state_dict())
        for target in (self.encoder_k, self.projector_k):
            target.requires_grad_(False)
        self._progress = Progress()

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What trains, by the names that the log has for it."""
        return {"encoder": self.encoder, "projector": self.projector, "predictor": self.predictor}

    @property
    def embedding(self) -> nn.Module:
        """Return the encoder followed by the projection head."""
        return nn.Sequential(self.encoder, self.projector)

    def forward(
        self, views: Sequence[Tensor], index: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of this rank's batch.

        Args:
            views: two, each [B, 3, H, W]; either is predicted from the other.
            index: unused.
            progress: where in the run this pass stands: fixes the momentum and the draws.
        """
        self._progress = progress
        p = [
            normalize(self.predictor(self.projector(self.encoder(view)))) for view in views
        ]  # [B, C] each
        with torch.no_grad():
            k = [normalize(self.projector_k(self.encoder_k(view))) for view in views]
        with torch.autocast(p[0].device.type, enabled=False):
            return self.contrast(p, k, progress)

    @abstractmethod
    def contrast(
        self, p: list[Tensor], k: list[Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the two views' predictions and target features, unit rows [B, C] each."""

    def momentum(self) -> float:
        """The target's, after the step that the last pass belongs to."""
        steps = self._progress.steps_per_epoch * self._progress.epochs
        passed = self._progress.step / max(1, steps - 1)
        return 1 - (1 - self.m) * (1 + math.cos(math.pi * passed)) / 2

    @torch.no_grad()
    def after_step(self) -> None:
        """What changes after the optimizer's step: the target follows."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = [*self.encoder_k.parameters(), *self.projector_k.parameters()]
        torch._foreach_lerp_(target, online, 1 - self.momentum())
