"""Compute the features of a frozen encoder, and classify them by weighted k-NN.

The k-NN classifier is that of Wu et al. (arXiv 1805.01978), section 3.4.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.augment.color import normalize
from moco.config import Config
from moco.data import loader
from moco.data.images import Images
from moco.encoder import networks
from moco.engine.precision import autocast, prepare_images

# features [n, D] and labels, [n] or [n, num_classes], of a rank's images of a split. With W ranks,
# a rank has every W-th image.
Features = tuple[Tensor, Tensor]


def eval_batches(
    images: Images,
    config: Config,
    device: torch.device,
    unreadable: list[tuple[int, str]] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of this rank's images: normalized centre crops [B, 3, S, S], and labels.

    With W ranks, a rank has every W-th of `images`. Labels are [B], or [B, num_classes] if
    images can show several classes.

    Images that cannot be read are left out. Their indices and the reasons are appended to
    `unreadable`. If `unreadable` is None, the first such image raises InputError.
    """
    for x, label, _ in indexed_batches(images, config, device, unreadable):
        if len(x):
            yield x, label


def indexed_batches(
    images: Images,
    config: Config,
    device: torch.device,
    unreadable: list[tuple[int, str]] | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the batches of `eval_batches` and the indices of their images, [B], on the CPU.

    A batch without readable images is yielded as well. The first `start` images of this rank are
    left out.
    """
    sampler = loader.EvalBatchSampler(len(images), config.input.batch_per_process)
    sampler.indices, done = sampler.indices[start:], 0
    crop = loader.CenterCrop(config.views.image_size, config.views.test_resize)
    for batch in loader.batches(
        images, crop, sampler, config.input, device, skip_unreadable=unreadable is not None
    ):
        x, label = batch.views[0], batch.label
        wanted = torch.tensor(sampler.indices[done : done + len(x)])
        done += len(wanted)
        if batch.unreadable:
            unreadable += batch.unreadable
            # the loader replaces an image that cannot be read by another one
            own = batch.index == wanted.to(device)
            x, label, wanted = x[own], label[own], wanted[own.cpu()]
        yield prepare_images(normalize(x, config.views.mean, config.views.std)), label, wanted


@torch.inference_mode()
def extract(
    net: nn.Module,
    images: Images,
    config: Config,
    device: torch.device,
    unit_norm: bool = True,
    feature_fn: Callable[[nn.Module, Tensor], Tensor] = networks.features,
    unreadable: list[tuple[int, str]] | None = None,
    on_host: bool = False,
) -> Features:
    """Return the features [n, D] and the labels of this rank's images, every W-th of `images`.

    Args:
        net: the network. It is set to eval mode, and back to its mode at the end.
        images: the images of a split.
        config: the settings of the run.
        device: the device that computes, and on which the labels are returned.
        unit_norm: whether features are normalized to norm 1.
        feature_fn: computes the features of a batch: `feature_fn(net, batch)` -> [B, D]. By
            default, the backbone's features.
        unreadable: see `eval_batches`.
        on_host: whether the features are kept in the host's memory instead of on `device`.

    Raises InputError if an image cannot be read and `unreadable` is None.
    """
    was_training = net.training
    net.eval()
    labels = torch.tensor(
        images.labels[distributed.rank() :: distributed.world_size()], device=device
    )
    rows, done = None, 0  # the features are allocated once, when their size is known
    for batch, label in eval_batches(images, config, device, unreadable):
        with autocast(config.compute.amp, device):
            x = feature_fn(net, batch)
        if rows is None:
            rows = torch.empty(len(labels), x.shape[1], device=feature_device(on_host, device))
        rows[done : done + len(x)] = F.normalize(x.float(), dim=1) if unit_norm else x
        labels[done : done + len(x)] = label  # differs from the old one if images were left out
        done += len(x)
    rows, labels = rows if rows is None else rows[:done], labels[:done]
    net.train(was_training)
    # a rank without images learns the size of a feature from the others
    width = torch.tensor([0 if rows is None else rows.shape[1]], device=device)
    width = int(distributed.all_gather(width).max())
    if rows is None:
        rows = torch.empty(0, width, device=feature_device(on_host, device))
    return rows, labels


def feature_device(on_host: bool, device: torch.device) -> torch.device:
    """Return the device that keeps features: the CPU if `on_host`, else `device`."""
    # host memory is not pinned, because k-NN moves each feature only once
    return torch.device("cpu") if on_host else device


def gather_in_order(x: Tensor) -> Tensor:
    """Return the features or labels [N, ...] of all ranks, in the order of the split.

    Args:
        x: those of this rank, [n, ...]: every W-th of the split.
    """
    full = distributed.all_gather_uneven(x)
    ranks = distributed.world_size()
    indices = torch.cat([torch.arange(rank, len(full), ranks) for rank in range(ranks)])
    return full[indices.argsort().to(full.device)]


# Weighted k-NN computes the similarities of one block of queries to one block of the bank at a
# time, to save memory. These are the numbers of features in a block.
QUERIES, BANK = 1024, 65_536


@torch.inference_mode()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    classes: int,
    ks: list[int],
    temperature: float,
) -> dict[int, float]:
    """Return the top-1 accuracy of the weighted k-NN classifier for each k in `ks`, in [0, 1].

    Each neighbour votes for its class with weight exp(similarity / temperature) (Wu et al.,
    section 3.4). The accuracy is that of the queries of all ranks. It is computed on the device of
    the labels; the features may be in the host's memory. Ranks may have different numbers of
    features.

    Args:
        bank: this rank's features of the bank, [n, D], with norm 1.
        bank_labels: their labels, [n].
        queries: this rank's features to classify, [m, D], with norm 1.
        labels: their labels, [m].
        classes: number of classes.
        ks: numbers of neighbours.
        temperature: T, above 0.
    """
    queries, labels = (
        distributed.all_gather_uneven(queries.to(labels.device)),
        distributed.all_gather_uneven(labels),
    )
    correct = dict.fromkeys(ks, 0)
    found = nearest(bank, bank_labels, queries, max(ks))
    for similarity, neighbour, y in zip(*(x.split(QUERIES) for x in (*found, labels)), strict=True):
        similarity, neighbour = _of_all_ranks(similarity, neighbour, max(ks))
        # For a small T, exp(1 / T) would be infinite. Subtracting the best similarity multiplies
        # all weights of a query by one factor, which changes no vote.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        for k in ks:
            votes = weight.new_zeros(len(y), classes).scatter_add_(
                1, neighbour[:, :k], weight[:, :k]
            )
            correct[k] += int((votes.argmax(1) == y).sum())
    return {k: n / len(labels) for k, n in correct.items()}


def nearest(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> Features:
    """Return the similarities [N, k] and labels [N, k] of each query's k nearest neighbours.

    The neighbours are those in this rank's bank, nearest first. The search is exact: the best k of
    each block of the bank are merged with the best k so far.

    Args:
        bank: features of this rank, [n, D]; each block is moved to the queries' device once.
        bank_labels: their labels, [n].
        queries: features of all ranks, [N, D].
        k: number of neighbours; if n is smaller, all n are returned.
    """
    k = min(k, len(bank))
    best = queries.new_full((len(queries), k), -torch.inf)
    label = bank_labels.new_zeros(best.shape)
    for part, part_label in zip(bank.split(BANK), bank_labels.split(BANK), strict=True):
        part = part.to(queries.device)
        for start in range(0, len(queries), QUERIES):
            block = slice(start, start + QUERIES)
            similarity, index = (queries[block] @ part.T).topk(min(k, len(part)), dim=1)
            best[block], merged = torch.cat([best[block], similarity], 1).topk(k, dim=1)
            label[block] = torch.cat([label[block], part_label[index]], 1).gather(1, merged)
    return best, label


def _of_all_ranks(similarity: Tensor, label: Tensor, k: int) -> Features:
    """Return the similarities and labels [B, k] of the best k neighbours over all ranks.

    Args:
        similarity: similarities of the best k neighbours on this rank, [B, <= k].
        label: their labels.
        k: number of neighbours.
    """
    if distributed.world_size() == 1:
        return similarity, label
    similarity = distributed.all_gather_uneven(similarity.T.contiguous()).T
    label = distributed.all_gather_uneven(label.T.contiguous()).T
    similarity, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return similarity, label.gather(1, index)
