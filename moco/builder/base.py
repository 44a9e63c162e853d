"""Base classes of the methods: a momentum encoder, shuffled BN, an online and a target network."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.batch_norm import MIN_BN_GROUP, bn_groups, split_batch_norm
from moco.encoder import networks
from moco.loss.contrastive import normalize
from moco.rng import SHUFFLE, Progress
from moco.sections_negatives import Schedule

Metric = Tensor | tuple[Tensor, Tensor]  # a scalar, or a sum and the number of its summands


class Method(nn.Module, ABC):
    """A pre-training method: a module whose call returns the loss of a batch.

    A method must define `forward` and `encoder`. Everything else has a default here. All tensors
    that a resumed run needs are parameters or buffers. docs/adding-a-method.md has an example.

    Attributes:
        encoder: the encoder to evaluate: a network of `networks.create`, stored under a name
            that the evaluations find, such as `encoder`, `encoder_q` or `base_encoder`.
        embedding: the encoder with its projection head.
        query_and_key: the networks of queries and keys, which tools/negatives.py compares.
        learned_negatives: negatives that are parameters, not features of images.
        synthetic: the schedule of the synthetic negatives; by default, there are none.
        images_before_epoch_0: number of images to train on before, for example to fill a bank.
        sync_batch_norm: whether batch norm is synchronized over all processes.
        grad_norm_modules: modules whose gradient norms are logged, by name.
    """

    encoder: nn.Module
    images_before_epoch_0: int = 0
    sync_batch_norm: bool = False
    synthetic: Schedule = Schedule()

    @property
    def embedding(self) -> nn.Module:
        """Return the encoder with its projection head; by default the head is its last layer."""
        return self.encoder

    @property
    def query_and_key(self) -> tuple[nn.Module, nn.Module] | None:
        """Return the networks of queries and keys; None if the method has no negatives.

        Each returns features [B, C] of images [B, 3, H, W], which are not normalized yet.
        """
        return None

    @staticmethod
    def negatives_of_batch(images: int) -> int:
        """Return the number of negatives of a query in a joint batch; 0 if they are not in it.

        Args:
            images: number of images in the joint batch of a pass.
        """
        del images  # for subclasses
        return 0

    @property
    def learned_negatives(self) -> Tensor | None:
        """Return the normalized negatives [K, C] that are learned; None if there are none."""
        return None

    @property
    def grad_norm_modules(self) -> dict[str, nn.Module]:
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
            progress: position in the run. Its generators draw all random numbers, so that a
                resumed run draws the same ones.
        """

    def after_step(self) -> None:
        """Run after each step of the optimizer, for example to update a moving average."""

    def gather_state(self) -> None:
        """Copy the shards of buffers to all ranks, if each rank has only a shard that is current.

        Called on all ranks at the end of an epoch, and before a checkpoint is written.
        """

    def reset_copies(self) -> None:
        """Copy the networks that are trained to their moving averages, if there are any.

        Called after `--init` has loaded weights into the networks that are trained.
        """

    def parameter_groups(self, lr: float, wd: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: by default, one with all trainable parameters.

        Args:
            lr: initial learning rate.
            wd: weight decay.

        A group with `"scheduled": False` keeps its learning rate for the full run. In a group with
        `"decay_all": True`, AdamW also decays biases and the scales of norm layers.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        return [{"params": params, "lr": lr, "weight_decay": wd}]

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the value at `progress` of each quantity that may change during a run, by name."""
        return {}

    def notes(self, images: int) -> list[str]:
        """Return lines to print at the start of a run with `images` images in each pass."""
        return []


class MovingAverage(Method):
    """A method with an encoder `encoder_q` and its exponential moving average `encoder_k`.

    Args:
        encoder: creates an encoder [B, 3, H, W] -> [B, C].
        m: momentum of the moving average, in [0, 1].
    """

    def __init__(self, encoder: Callable[[], nn.Module], m: float):
        super().__init__()
        self.m = m
        self.encoder_q = encoder()
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """Return the encoder to evaluate."""
        return self.encoder_q

    @property
    def query_and_key(self) -> tuple[nn.Module, nn.Module]:
        """Return the encoder and its moving average, or the encoder twice if there is none."""
        return self.encoder_q, self.encoder_k or self.encoder_q

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the momentum of the moving average, which is constant."""
        return {"momentum": self.m}

    def reset_copies(self) -> None:
        """Copy the encoder to its moving average, if there is one."""
        if self.encoder_k is not None:
            self.encoder_k.load_state_dict(self.encoder_q.state_dict())

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the moving average of the encoder."""
        average, online = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(average, online, 1 - self.m)


class QueryAndKey(MovingAverage):
    """A method with queries from `encoder_q`, and keys from `encoder_k` under shuffled BN.

    Args:
        encoder, m: see `MovingAverage`.
        bn_splits: number of groups of the batch that the key encoder's BN normalizes separately.
            Only used by a run of one process, in which it replaces the shuffle between GPUs.
        bn_splits_query: whether the query encoder's BN also normalizes `bn_splits` groups.
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
        self.has_batch_norm = networks.has_batch_norm(self.encoder_k)
        if distributed.world_size() == 1:
            for net in (self.encoder_k, self.encoder_q)[: 1 + bn_splits_query]:
                split_batch_norm(net, bn_splits)

    def notes(self, images: int) -> list[str]:
        """Return a line if a pass of `images` images is too small for `bn_splits` groups.

        Also return one if there is no batch norm.
        """
        if not self.has_batch_norm:
            return ["the network has no batch norm, so the keys need no shuffle and no groups"]
        used = bn_groups(self.bn_splits, images)
        if distributed.world_size() > 1 or used == self.bn_splits:
            return []
        groups = "1 group is" if used == 1 else f"{used} groups are"
        each = f"each needs {MIN_BN_GROUP} images and a pass has {images}"
        return [f"--bn-splits {self.bn_splits}: {groups} used, because {each}"]

    @torch.no_grad()
    def keys(self, images: Tensor, progress: Progress, *counters: int) -> Tensor:
        """Return the normalized keys of the joint batch, [W B, C], computed under shuffled BN.

        The images are shuffled over the ranks, so that a key and its query are normalized with
        different batches. A single process normalizes groups of the shuffled batch instead (MoCo,
        section 3.3). Without batch norm, there is no shuffle.

        Args:
            images: one view of this rank's batch, [B, 3, H, W].
            progress: position in the run; with `counters` it seeds the permutation, which is the
                same on all ranks.
            counters: numbers that tell views apart, so that their permutations differ.
        """
        if not self.has_batch_norm:
            return distributed.all_gather(normalize(self.encoder_k(images)))
        generator = progress.generator(SHUFFLE, "cpu", *counters)
        permutation = torch.randperm(distributed.world_size() * len(images), generator=generator)
        keys = normalize(self.encoder_k(distributed.shuffle(images, permutation)))
        return distributed.unshuffle(keys, permutation)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> Tensor:
    """Overwrite the oldest entries of a queue with `keys`, and return the index of each key, [n].

    Args:
        queue: [K, C]; changed in place.
        pointer: index of the oldest entry, [1]; changed in place.
        keys: [n, C]. The indices wrap around. If n is above K, only the last K keys are kept.
    """
    n, K = len(keys), len(queue)
    indices = (pointer + torch.arange(n, device=keys.device)) % K
    queue[indices[-K:]] = keys[-K:]
    pointer.add_(n).remainder_(K)
    return indices


def rising_momentum(m: float, progress: Progress) -> float:
    """Return a momentum that rises from `m` along a half cosine, to 1 after the last step.

    The momentum belongs to the update after the step at `progress`. As in the code of MoBY and MoCo
    v3, the cosine counts the steps that are done, this one included.
    """
    passed = (progress.step + 1) / (progress.steps_per_epoch * progress.epochs)
    return 1 - (1 - m) * (1 + math.cos(math.pi * passed)) / 2


class OnlineAndTarget(Method):
    """A method with an online network that trains, and a target network that follows it.

    The target is a moving average of the online network. MoBY, SynCo-v2 and BYOL derive from this
    class.

    Args:
        encoder: the online backbone [B, 3, H, W] -> [B, D], without a head.
        encoder_k: the target backbone. It may have another rate of stochastic depth. The weights
            of `encoder` are copied to it.
        projector: the online projection head [B, D] -> [B, C]. The target has a copy.
        predictor: the online prediction head [B, C] -> [B, C].
        m: momentum of the target at the start, in [0, 1]. It rises along a half cosine, to 1
            after the last step.
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
    def grad_norm_modules(self) -> dict[str, nn.Module]:
        """Return the trainable modules, by their names in the log."""
        return {"encoder": self.encoder, "projector": self.projector, "predictor": self.predictor}

    @property
    def embedding(self) -> nn.Module:
        """Return the encoder followed by the projection head."""
        return nn.Sequential(self.encoder, self.projector)

    def forward(
        self,
        views: Sequence[Tensor],
        index: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of this rank's batch.

        Args:
            views: two views, each [B, 3, H, W]. Each predicts the other.
            index: unused.
            progress: position in the run; fixes the momentum and seeds random numbers.
        """
        self._progress = progress
        # predictions p and targets k, each [B, C]
        p = [normalize(self.predictor(self.projector(self.encoder(view)))) for view in views]
        with torch.no_grad():
            k = [normalize(self.projector_k(self.encoder_k(view))) for view in views]
        with torch.autocast(p[0].device.type, enabled=False):
            return self.contrast(p, k, progress)

    @abstractmethod
    def contrast(
        self, p: list[Tensor], k: list[Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics of a batch.

        Args:
            p: normalized predictions of the two views, each [B, C].
            k: normalized target features of the two views, each [B, C].
            progress: position in the run.
        """

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the target's momentum after the step at `progress`."""
        self._progress = progress
        return {"momentum": self.momentum()}

    def reset_copies(self) -> None:
        """Copy the online encoder and projector to the target."""
        self.encoder_k.load_state_dict(self.encoder.state_dict())
        self.projector_k.load_state_dict(self.projector.state_dict())

    def momentum(self) -> float:
        """Return the target's momentum after the current step, in [m, 1] (BYOL, section 3.3)."""
        return rising_momentum(self.m, self._progress)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the target network."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = [*self.encoder_k.parameters(), *self.projector_k.parameters()]
        torch._foreach_lerp_(target, online, 1 - self.momentum())
