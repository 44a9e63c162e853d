"""Features of a frozen encoder, in memory and in files, and weighted k-NN on them (Wu et al., arXiv 1805.01978, section 3.4)."""

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
from moco.engine.precision import autocast, layout

Features = tuple[
    Tensor, Tensor
]  # of this rank's share of a split, every W-th image: rows [n, D], labels [n] or [n, classes]


def test_batches(
    images: Images,
    config: Config,
    device: torch.device,
    unreadable: list[tuple[int, str]] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of `images` (every W-th) as normalized centre crops [B, 3, S, S] and labels [B].

    Images that cannot be read are left out, and their numbers and reasons are added to
    `unreadable`. Raises InputError for the first one if that is None.
    """
    sampler = loader.EvalBatchSampler(len(images), config.input.batch_per_process)
    crop, done = loader.CenterCrop(config.views.image_size), 0
    for batch in loader.batches(
        images, crop, sampler, config.input, device, skip_unreadable=unreadable is not None
    ):
        x, label = batch.views[0], batch.label
        if batch.unreadable:
            unreadable += batch.unreadable
            # the loader puts another image in the place of one that cannot be read
            wanted = [i for _, i in sampler.samples[done : done + len(x)]]
            own = batch.index == torch.tensor(wanted, device=device)
            x, label = x[own], label[own]
        done += len(batch.index)
        if len(x):
            yield layout(normalize(x, config.views.mean, config.views.std)), label


@torch.inference_mode()
def extract(
    net: nn.Module,
    images: Images,
    config: Config,
    device: torch.device,
    unit_norm: bool = True,
    of: Callable[[nn.Module, Tensor], Tensor] = networks.features,
    unreadable: list[tuple[int, str]] | None = None,
    on_host: bool = False,
) -> Features:
    """Return the features of this rank's share of `images`, and their labels, in eval mode.

    `of(net, batch)` computes the features: by default those of the backbone. With `unit_norm` they are
    normalized to norm 1. `unreadable` is that of `test_batches`.

    The labels are on `device`, and so are the features, unless `on_host` keeps them in the host's memory. There is
    one copy of them.
    """
    was_training = net.training
    net.eval()
    labels = torch.tensor(
        images.labels[distributed.rank() :: distributed.world_size()], device=device
    )
    rows, done = None, 0
    for batch, label in test_batches(images, config, device, unreadable):
        with autocast(config.compute.amp, device):
            x = of(net, batch)
        if rows is None:
            rows = torch.empty(len(labels), x.shape[1], device=feature_device(on_host, device))
        rows[done : done + len(x)] = F.normalize(x.float(), dim=1) if unit_norm else x
        labels[done : done + len(x)] = label  # these move up where an image is left out
        done += len(x)
    rows, labels = rows if rows is None else rows[:done], labels[:done]
    net.train(was_training)
    # a rank without images learns from the others how long features are
    width = int(
        distributed.all_gather(
            torch.tensor([0 if rows is None else rows.shape[1]], device=device)
        ).max()
    )
    return (
        torch.empty(0, width, device=feature_device(on_host, device)) if rows is None else rows
    ), labels


def feature_device(on_host: bool, device: torch.device) -> torch.device:
    """Where features are kept. Host memory is not pinned: k-NN moves them only once."""
    return torch.device("cpu") if on_host else device


def in_order(x: Tensor) -> Tensor:
    """The rows of every rank's share of a split (every W-th), as the split has them."""
    whole = distributed.all_gather_uneven(x)
    ranks = distributed.world_size()
    places = torch.cat([torch.arange(rank, len(whole), ranks) for rank in range(ranks)])
    return whole[places.argsort().to(whole.device)]


# Weighted k-NN. What is kept of all similarities at a time is one block of queries against one block of the bank.

QUERIES, BANK = 1024, 65_536  # rows of a block


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
    """Top-1 of the weighted k-NN classifier for each k in `ks`, in [0, 1]; each neighbour votes with exp(similarity / T).

    It is computed where the labels are; the features may be in the host's memory.

    Args:
        bank, bank_labels: this rank's share of the bank, unit rows [n, D] and [n].
        queries, labels: this rank's share of the queries; every rank may hold another number of rows.
    """
    queries, labels = (
        distributed.all_gather_uneven(queries.to(labels.device)),
        distributed.all_gather_uneven(labels),
    )
    correct = dict.fromkeys(ks, 0)
    found = nearest(bank, bank_labels, queries, max(ks))
    for similarity, neighbour, y in zip(*(x.split(QUERIES) for x in (*found, labels)), strict=True):
        similarity, neighbour = _of_all_ranks(similarity, neighbour, max(ks))
        # less the best similarity: exp(1 / T) of a small T would be infinite, and a common factor changes no vote
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        for k in ks:
            votes = weight.new_zeros(len(y), classes).scatter_add_(
                1, neighbour[:, :k], weight[:, :k]
            )
            correct[k] += int((votes.argmax(1) == y).sum())
    return {k: n / len(labels) for k, n in correct.items()}


def nearest(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> Features:
    """The k rows of this rank's bank that are nearest to each query, nearest first: similarities [N, k] and labels [N, k].

    k is at most the bank's rows. Each block of the bank is moved to the queries' device once, and its best are merged with
    the best so far, which is exact.
    """
    k = min(k, len(bank))
    best = queries.new_full((len(queries), k), -torch.inf)
    label = bank_labels.new_zeros(best.shape)
    for part, part_label in zip(bank.split(BANK), bank_labels.split(BANK), strict=True):
        part = part.to(queries.device)
        for start in range(0, len(queries), QUERIES):
            block = slice(start, start + QUERIES)
            similarity, place = (queries[block] @ part.T).topk(min(k, len(part)), dim=1)
            best[block], place_of_both = torch.cat([best[block], similarity], 1).topk(k, dim=1)
            label[block] = torch.cat([label[block], part_label[place]], 1).gather(1, place_of_both)
    return best, label


def _of_all_ranks(similarity: Tensor, label: Tensor, k: int) -> Features:
    """The best k of what every rank found: each rank's best k hold the best k of all."""
    if distributed.world_size() == 1:
        return similarity, label
    similarity = distributed.all_gather_uneven(similarity.T.contiguous()).T
    label = distributed.all_gather_uneven(label.T.contiguous()).T
    similarity, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return similarity, label.gather(1, place)
