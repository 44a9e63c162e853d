"""Features of a frozen encoder, and the weighted k-NN classifier on them (Wu et al., arXiv 1805.01978, section 3.4)."""

from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed, encoder
from moco.augment.color import normalize
from moco.data import loader
from moco.data.images import Images
from moco.engine.precision import autocast, layout


def test_batches(images: Images, args: Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of `images` (every W-th) as normalized centre crops [B, 3, S, S] and labels [B]."""
    order = loader.EvalOrder(len(images), args.batch_per_process)
    for batch in loader.batches(images, loader.CenterCrop(args.image_size), order, args, device):
        yield layout(normalize(batch.views[0])), batch.label


@torch.inference_mode()
def extract(net: nn.Module, images: Images, args: Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit backbone features [n, D] and labels [n] of this rank's share of `images`, in eval mode."""
    was_training = net.training
    net.eval()
    rows, labels = [], []
    for batch, label in test_batches(images, args, device):
        with autocast(args.amp, device):
            x = encoder.features(net, batch)
        rows.append(F.normalize(x.float(), dim=1))
        labels.append(label)
    net.train(was_training)
    if not rows:
        return torch.empty(0, 1, device=device), torch.empty(0, dtype=torch.long, device=device)
    return torch.cat(rows), torch.cat(labels)


@torch.inference_mode()
def knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int, ks: list[int], temperature: float
) -> dict[int, float]:
    """Top-1 of the weighted k-NN classifier for each k in `ks`, in [0, 1]; each neighbour votes with exp(similarity / T).

    Args:
        bank, bank_labels: this rank's share of the bank, unit rows [n, D] and [n].
        queries, labels: this rank's share of the queries; every rank may hold another number of rows.
    """
    queries, labels = distributed.all_gather_uneven(queries), distributed.all_gather_uneven(labels)
    correct = dict.fromkeys(ks, 0)
    for q, y in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, neighbour = nearest(bank, bank_labels, q, max(ks))
        for k in ks:
            weight = torch.exp(similarity[:, :k] / temperature)
            votes = weight.new_zeros(len(q), classes).scatter_add_(1, neighbour[:, :k], weight)
            correct[k] += int((votes.argmax(1) == y).sum())
    return {k: n / len(labels) for k, n in correct.items()}


def nearest(bank: Tensor, bank_labels: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of all ranks' banks that are nearest to each query: similarities [N, k] and labels [N, k]."""
    similarity, place = (q @ bank.T).topk(min(k, len(bank)), dim=1)
    label = bank_labels[place]
    if distributed.world() > 1:  # each rank's best k hold the best k of all
        similarity = distributed.all_gather_uneven(similarity.T.contiguous()).T
        label = distributed.all_gather_uneven(label.T.contiguous()).T
        similarity, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
        label = label.gather(1, place)
    return similarity, label
