"""Train a linear layer on frozen features of VOC2007's augmented images, as AdCo's authors do.

The views, the loss and the schedule follow the authors' code (Hu et al., arXiv 2011.08435).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional as tf

from moco import distributed, rng
from moco.augment import crop
from moco.augment.color import normalize
from moco.config import Evaluation
from moco.data import loader, registry
from moco.data.images import Images
from moco.encoder import networks
from moco.engine import features, lr_schedule
from moco.engine.precision import autocast, prepare_images
from moco.errors import InputError
from moco.evaluate import inputs, metrics
from moco.evaluate.classifier import init_classifier
from moco.messages import print_rank0
from moco.sections import Schedule

Batch = tuple[Tensor, Tensor]  # features [B, D] and labels [B, num_classes]

MOMENTUM = 0.9
PERIOD = 12  # epochs in which the learning rate falls to 0, and in which it rises again


@dataclass(frozen=True)
class Stretched(loader.Transform):
    """A transform that resizes both sides of an image to `size` pixels."""

    size: int

    def __call__(
        self, image: Tensor, _sample: loader.SampleId, _out: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return the view of `image`, uint8 [3, H, W], as a list of one uint8 [3, size, size]."""
        return [crop.resized_crop(image, (0, 0, *image.shape[1:]), self.size)]


@dataclass(frozen=True)
class Augmented(Stretched):
    """A transform that stretches, recolors, flips and rotates an image.

    One of two changes of color is chosen at random: the brightness times a factor in [0.8, 1.2],
    or grayscale with probability 0.25. Then the image is flipped with probability 0.25, and rotated
    by up to 25 degrees. The draws depend on (seed, epoch, index).
    """

    seed: int

    def __call__(
        self, image: Tensor, sample: loader.SampleId, _out: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return the view of `image`, uint8 [3, H, W], as a list of one uint8 [3, size, size]."""
        (x,) = super().__call__(image, sample)
        key = rng.key(rng.CROP, self.seed, *sample)
        which, colour, flip, angle = (rng.uniform(key, i) for i in range(4))
        if which < 0.5:
            x = tf.adjust_brightness(x, 0.8 + 0.4 * colour)
        elif colour < 0.25:
            x = tf.rgb_to_grayscale(x, num_output_channels=3)
        if flip < 0.25:
            x = tf.horizontal_flip(x)
        return [tf.rotate(x, 50 * angle - 25).contiguous()]


@dataclass(frozen=True)
class FiveCrops(Stretched):
    """A transform that crops the corners and the center, without stretching.

    The shorter side of the image becomes 1.1 times `size`, which is 330 pixels for 300.
    """

    def __call__(
        self, image: Tensor, _sample: loader.SampleId, _out: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return five views of `image`, uint8 [3, H, W], each uint8 [3, size, size]."""
        resized = tf.resize(image, [round(1.1 * self.size)], antialias=True)
        return [x.contiguous() for x in tf.five_crop(resized, [self.size, self.size])]


class EpochSampler(Sampler):
    """A batch sampler that yields this rank's images of each batch of one epoch.

    The order of an epoch depends on (seed, epoch) only. The last batch may be smaller, and a rank
    may have no image of it.
    """

    def __init__(self, n: int, batch: int, seed: int, epoch: int):
        """Prepare the batches of `n` images, each with at most `batch` of them over all ranks."""
        draw = rng.generator("cpu", rng.ORDER, seed, epoch)
        order = torch.randperm(n, generator=draw).tolist()
        rank, size = distributed.rank(), distributed.world_size()
        whole = [order[start : start + batch] for start in range(0, n, batch)]
        self.parts = [[(epoch, i) for i in part[rank::size]] for part in whole]

    def __len__(self) -> int:
        """Return the number of batches in which this rank has images."""
        return sum(map(bool, self.parts))

    def __iter__(self) -> Iterator[list[loader.SampleId]]:
        """Yield this rank's images of each batch in which it has any."""
        return filter(None, self.parts)


class FrozenEncoder:
    """A frozen encoder and the settings with which it reads images.

    Args:
        net: the network, in eval mode.
        config: the settings of the evaluation.
        device: the device of this process.
    """

    def __init__(self, net: nn.Module, config: Evaluation, device: torch.device):
        self.net, self.config, self.device = net, config, device

    @torch.no_grad()
    def features(self, batch: loader.Batch) -> Tensor:
        """Return the mean over views of the features of a batch, [B, D]."""
        found = []
        for view in batch.views:
            x = prepare_images(normalize(view, self.config.views.mean, self.config.views.std))
            with autocast(self.config.compute.amp, self.device):
                found.append(networks.features(self.net, x).float())
        return torch.stack(found).mean(0)

    def read(self, images: Images, transform: loader.Transform, order: Sampler) -> Iterator[Batch]:
        """Yield the features and labels of each batch of `order`."""
        for batch in loader.batches(images, transform, order, self.config.input, self.device):
            yield self.features(batch), batch.label

    def split(self, images: Images, transform: loader.Transform) -> Batch:
        """Return the features and labels of a split over all ranks, in its order."""
        order = loader.EvalBatchSampler(len(images), self.config.input.batch_per_process)
        found = [self.none(images), *self.read(images, transform, order)]
        return tuple(features.gather_in_order(torch.cat(part)) for part in zip(*found, strict=True))

    def epoch(self, images: Images, epoch: int) -> Iterator[Batch]:
        """Yield this rank's features and labels of each batch of an epoch of augmented images."""
        batch = self.config.input.batch_per_process * distributed.world_size()
        seed = self.config.run.seed
        order = EpochSampler(len(images), batch, seed, epoch)
        found = self.read(images, Augmented(self.config.views.image_size, seed), order)
        for part in order.parts:
            yield next(found) if part else self.none(images)

    def none(self, images: Images) -> Batch:
        """Return the features and labels of no image."""
        rows = torch.empty(0, networks.num_features(self.net), device=self.device)
        return rows, torch.empty(0, len(images.classes), dtype=torch.long, device=self.device)


def lr_of_epoch(lr: float, epoch: int) -> float:
    """Return the learning rate of an epoch: a cosine that falls to 0 and rises to `lr` in turn."""
    return lr_schedule.curve(Schedule(sgdr=1, sgdr_t0=PERIOD), lr, epoch)


def loss_sum(logits: Tensor, label: Tensor) -> Tensor:
    """Return the binary cross entropy, summed over classes and images.

    Args:
        logits: [B, num_classes].
        label: [B, num_classes] of 1 (shown), 0 (not shown) and -1 (ignored).
    """
    target, counts = label.clamp_min(0).to(logits.dtype), (label >= 0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, counts, reduction="sum")


def train_layer(
    layer: nn.Linear,
    batches_of: Callable[[int], Iterable[Batch]],
    val: Batch,
    epochs: int,
    lr: float,
) -> float:
    """Train `layer` by SGD, and restore the weights of its best epoch on `val`.

    Args:
        layer: the linear layer, equal on all ranks.
        batches_of: returns this rank's batches of an epoch. Every rank has the same number of them,
            and any of them may be empty.
        val: features and labels of the images to choose the epoch on, equal on all ranks.
        epochs: number of epochs.
        lr: learning rate of the first epoch; see `lr_of_epoch`.

    Returns:
        The mean average precision of the best epoch on `val`, in [0, 1].

    Raises InputError if the loss of an epoch is NaN or infinite.
    """
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=MOMENTUM)
    best, weights = -1.0, layer.state_dict()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr_of_epoch(lr, epoch)
        total, images = torch.zeros(2, device=val[0].device)
        for x, label in batches_of(epoch):
            loss = loss_sum(layer(x), label)
            optimizer.zero_grad()
            loss.backward()
            # the loss is a sum, so the gradient of the batch is the sum over ranks
            for p in layer.parameters():
                p.grad = distributed.all_reduce_sum(p.grad)
            optimizer.step()
            total, images = total + loss.detach(), images + len(x)
        total, images = distributed.all_reduce_sum(torch.stack([total, images])).tolist()
        if not math.isfinite(total):
            raise InputError(
                f"the loss of the linear layer is {total} in epoch {epoch}: the encoder diverged, "
                "--amp fp16 overflows, or --lr is too high"
            )
        with torch.no_grad():
            scores, labels = (part.cpu().numpy() for part in (layer(val[0]), val[1]))
        found = metrics.mean_average_precision(scores, labels)["map11"]
        print_rank0(f"epoch {epoch}  loss {total / images:.4f}  mAP on val {100 * found:.3f}")
        if found > best:
            best, weights = found, copy.deepcopy(layer.state_dict())
    layer.load_state_dict(weights)
    return best


def classify(
    config: Evaluation, device: torch.device, epochs: int, lr: float
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, float]:
    """Train the layer on VOC2007's train, choose the epoch on val, and apply it to test.

    The score of a test image is the mean of its five crops' scores. Every rank must call this
    function.

    Args:
        config: the settings of the evaluation.
        device: the device of this process.
        epochs: number of epochs.
        lr: learning rate of the first epoch.

    Returns:
        The class names; scores and labels of the test images, [M, num_classes]; and the mean
        average precision on val of the chosen epoch, in [0, 1].

    Raises InputError if an image cannot be read, or if the training diverges.
    """
    train, val = registry.load_voc_halves(config.run.data)
    _, test = registry.load(config.input.dataset, config.run.data)
    net = inputs.load_network(config, len(train.classes), device).eval()
    encoder, size = FrozenEncoder(net, config, device), config.views.image_size
    torch.manual_seed(config.run.seed)
    layer = nn.Linear(networks.num_features(net), len(train.classes))
    init_classifier(layer)
    layer.to(device)
    val_features = encoder.split(val, Stretched(size))
    best = train_layer(layer, lambda epoch: encoder.epoch(train, epoch), val_features, epochs, lr)
    # the layer is linear: the score of the mean of the crops' features is their mean score
    x, labels = encoder.split(test, FiveCrops(size))
    with torch.no_grad():
        scores = layer(x)
    return train.classes, scores.cpu().numpy(), labels.cpu().numpy(), best
