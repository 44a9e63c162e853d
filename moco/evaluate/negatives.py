"""Measure the negatives of queries: how similar they are, and how many show the query's class.

A negative that shows the class of its query is a false negative. Labels are only used to count
these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from moco import rng
from moco.augment import color
from moco.augment.recipes import Recipe
from moco.config import Config
from moco.data import loader
from moco.data.images import Images
from moco.engine.precision import autocast, prepare_images
from moco.errors import InputError
from moco.loss import synthetic
from moco.loss.contrastive import normalize
from moco.loss.synthetic import Synthetic
from moco.messages import counted

DRAWN = 64  # synthetic negatives of each type that are drawn for each query
LEARNED = 4096  # maximum number of learned negatives that each query is compared with
TIE = 1e-6  # smaller differences are ties: a mixup of an entry with itself equals the entry
CHUNK = 64  # queries that are compared with the bank at a time


@dataclass(frozen=True)
class Group:
    """The negatives of one type, of Q queries.

    Attributes:
        similarity: similarity of each query to its n negatives of this type, [Q, n].
        above_positive: fraction of them that are more similar to the query than its positive.
        above_real: fraction of them that are more similar than the query's hardest entry of the
            bank.
        false: fraction of them that are false negatives. For synthetic negatives, the fraction that
            is made from at least one false negative. None without labels.
    """

    similarity: Tensor
    above_positive: float
    above_real: float
    false: float | None

    def quantiles(self, *levels: float) -> list[float]:
        """Return quantiles of the similarities; the levels are in [0, 1]."""
        return np.quantile(self.similarity.numpy(), levels).tolist()


@dataclass(frozen=True)
class Measured:
    """The negatives of Q queries in a bank of N images.

    Attributes:
        positive: similarity of each query to its positive, [Q].
        groups: the negatives by type: "all", "hardest", "learned" if there are any, and one for
            each type of synthetic negative.
        nearest: bank indices of each query's hardest negatives, the hardest first, [Q, n].
        similarity: their similarities, [Q, n].
        false: fraction of false negatives among the k hardest negatives of a query, mean over the
            queries, at index k - 1: [N - 1]. The last value is the fraction among all negatives,
            which is chance. None without labels.
    """

    positive: Tensor
    groups: dict[str, Group]
    nearest: Tensor
    similarity: Tensor
    false: Tensor | None


@torch.inference_mode()
def measure(
    q: Tensor,
    own: Tensor,
    bank: Tensor,
    labels: Tensor | None,
    config: Synthetic,
    seed: int = 0,
    learned: Tensor | None = None,
    shown: int = 6,
) -> Measured:
    """Compare queries with the images of a bank, and with synthetic negatives made from them.

    The positive of a query is the bank's entry of the same image. All other entries are negatives.

    Args:
        q: normalized queries, [Q, C].
        own: index in the bank of each query's image, [Q].
        bank: normalized keys of N images, [N, C].
        labels: their labels, [N], or [N, classes] with 1 for the classes that an image shows.
        config: the synthetic negatives. `DRAWN` negatives of each of its types are made for each
            query, because their distribution does not depend on their number.
        seed: seed of the draws.
        learned: normalized negatives that are learned, [K, C].
        shown: the number of hardest negatives in `Measured.nearest`.

    Raises InputError if the bank has fewer than two images, or if `config.n_hard` is too large.
    """
    check(len(bank), config.n_hard)
    negatives = len(bank) - 1
    counts = tuple(DRAWN * bool(count) for count in config.counts)
    config = replace(config, counts=counts)
    if learned is not None:
        learned = learned[:: -(-len(learned) // LEARNED)]
    generator = rng.generator(q.device, rng.NEGATIVES, seed)
    parts: dict[str, list[tuple[Tensor, ...]]] = {}
    positives, nearest, similarities, shares = [], [], [], []
    for start in range(0, len(q), CHUNK):
        queries, mine = q[start : start + CHUNK], own[start : start + CHUNK, None]
        similarity = queries @ bank.T  # [B, N]
        positive = similarity.gather(1, mine)  # [B, 1]
        similarity.scatter_(1, mine, -torch.inf)
        ranked, order = similarity.sort(dim=1, descending=True)
        ranked, order = ranked[:, :-1], order[:, :-1]  # without the own image
        same = None if labels is None else shares_class(labels, mine[:, 0])
        found = {"all": (ranked, order), "hardest": (ranked[:, : config.n_hard], order)}
        if learned is not None:
            found["learned"] = (queries @ learned.T, None)
        of_types = _synthetic(queries, bank, similarity, order, config, generator)
        for name, (values, *parents) in {**found, **of_types}.items():
            false = torch.zeros(0)
            parents = [one[:, : values.shape[1]] for one in parents if one is not None]
            if same is not None and parents:
                false = torch.stack([same.gather(1, one) for one in parents]).any(0)
            hard = ranked[:, :1]
            part = values, values > positive + TIE, values > hard + TIE, false
            parts.setdefault(name, []).append(tuple(one.cpu() for one in part))
        positives.append(positive[:, 0])
        nearest.append(order[:, :shown])
        similarities.append(ranked[:, :shown])
        if same is not None:
            shares.append(same.gather(1, order).cpu().double().cumsum(1).sum(0))
    false = None
    if shares:
        per_k = torch.arange(1, negatives + 1, dtype=torch.float64)
        false = torch.stack(shares).sum(0) / len(q) / per_k
    return Measured(
        torch.cat(positives).cpu(),
        {name: _group(rows) for name, rows in parts.items()},
        torch.cat(nearest).cpu(),
        torch.cat(similarities).cpu(),
        false,
    )


def check(images: int, n_hard: int) -> None:
    """Raise InputError if `images` images have fewer than `n_hard` negatives of each."""
    if images < 2:
        raise InputError("a single image has no negatives; give a folder with two images or more")
    if not 1 <= n_hard <= images - 1:
        raise InputError(
            f"--n-hard {n_hard}: each of the {images} images has "
            f"{counted(images - 1, 'negative')}; lower --n-hard, or give more images (--images)"
        )


def _synthetic(
    q: Tensor,
    bank: Tensor,
    similarity: Tensor,
    order: Tensor,
    config: Synthetic,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, ...]]:
    """Return the synthetic negatives of each type: their similarities, and indices of n (and n').

    Args:
        q: normalized queries, [B, C].
        bank: normalized entries, [N, C].
        similarity: q @ bank.T, [B, N].
        order: indices of the bank's entries, the hardest first, [B, n].
        config: the synthetic negatives.
        generator: draws the random numbers.
    """
    if not config.total:
        return {}
    draws = synthetic.draw(config, *q.shape, generator, q.dtype)
    mixture = synthetic.mix(q, bank, similarity, order[:, : config.n_hard], config, draws)
    found = {}
    for columns in mixture.layout:
        parents = [mixture.indices[:, columns.all]]
        if columns.type.second is not None:
            parents.append(mixture.indices[:, columns.second])
        found[columns.type.name] = (mixture.similarity[:, columns.all], *parents)
    return found


def _group(rows: Sequence[tuple[Tensor, ...]]) -> Group:
    """Return the group of all queries, given its parts for chunks of queries."""
    similarity, positive, real, false = (torch.cat(one) for one in zip(*rows, strict=True))
    shares = [float(one.double().mean()) for one in (positive, real)]
    return Group(similarity, *shares, float(false.double().mean()) if len(false) else None)


def shares_class(labels: Tensor, queries: Tensor) -> Tensor:
    """Return whether each image shares a class with each query, [Q, N].

    Args:
        labels: labels of the images, [N] or [N, classes]; see `Images.labels`.
        queries: indices of the queries' images, [Q].
    """
    if labels.ndim == 1:
        return labels[queries][:, None] == labels[None, :]
    shown = (labels == 1).float()
    return shown[queries] @ shown.T > 0


@torch.inference_mode()
def view_features(
    net: nn.Module,
    images: Images,
    recipe: Recipe,
    view: int,
    config: Config,
    device: torch.device,
) -> Tensor:
    """Return the normalized features [N, C] of one view of all `images`, as training draws it.

    Args:
        net: the network, in eval mode on `device`.
        images: the images.
        recipe: the views of the training.
        view: index of the view.
        config: the settings of the run. The views are those of its seed in epoch 0.
        device: the device that computes and returns the features.

    Raises InputError if a feature is NaN or infinite, or if an image cannot be read.
    """
    crops = loader.RandomCrops(recipe, config.run.seed)
    sampler = loader.EvalBatchSampler(len(images), config.input.batch_per_process)
    rows = []
    for step, batch in enumerate(loader.batches(images, crops, sampler, config.input, device)):
        generator = rng.Progress(config.run.seed, step=step).generator(rng.COLOR, "cpu", 0, view)
        x = color.augment(batch.views[view], recipe[view], generator)
        with autocast(config.compute.amp, device):
            rows.append(normalize(net(prepare_images(x))))
    found = torch.cat(rows)
    if not found.isfinite().all():
        raise InputError("the network's features contain NaN or infinity: it has diverged")
    return found
