"""Compute the metrics of an evaluation: top-1, top-5, mean per class, and average precision.

classifier.py adds logits batch by batch. Each image counts once, whatever the number of ranks.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moco import distributed
from moco.messages import print_rank0

TITLES = {
    "acc1": "Acc@1",
    "acc5": "Acc@5",
    "mean_per_class": "mean per class",
    "map11": "mAP (11 points)",
    "map": "mAP (area)",
}


def correct(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each label has the highest logit, and one of the five highest.

    Args:
        logits: [..., B, num_classes].
        label: [B].

    Returns:
        Two bool tensors [..., B].
    """
    top = logits.topk(min(5, logits.shape[-1]), -1).indices == label[:, None]
    return top[..., 0], top.any(-1)


class Accuracy:
    """The accuracies of several classifiers on images of one class each.

    Args:
        heads: number of classifiers.
        num_classes: number of classes.
        device: device of the logits and labels.
    """

    def __init__(self, heads: int, num_classes: int, device: torch.device):
        # counts per class: correct top-1 of each head, correct top-5 of each head, images
        self.counts = torch.zeros(2 * heads + 1, num_classes, dtype=torch.long, device=device)

    def add(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch with logits [heads, B, num_classes] and labels [B]."""
        image = torch.ones_like(label, dtype=torch.bool)[None]
        counted = torch.cat([*correct(logits, label), image])  # [2 heads + 1, B]
        self.counts.index_add_(1, label, counted.long())

    def read(self) -> list[dict[str, float]]:
        """Return `acc1`, `acc5` and `mean_per_class` of each classifier, in [0, 1], over all ranks.

        `mean_per_class` is the mean of the classes' top-1 accuracies. Classes without images are
        left out. Every rank must call this method, and only once.
        """
        counts = distributed.all_reduce_sum(self.counts).cpu().double()
        images = counts[-1]
        top1, top5 = counts[:-1].chunk(2)
        per_class = (top1 / images)[:, images > 0].mean(1)
        rates = torch.stack([top1.sum(1) / images.sum(), top5.sum(1) / images.sum(), per_class], 1)
        return [
            dict(zip(("acc1", "acc5", "mean_per_class"), row, strict=True))
            for row in rates.tolist()
        ]


class AveragePrecision:
    """The mean average precision of several classifiers on images that can show several classes.

    Args:
        heads: number of classifiers.
        num_classes: number of classes.
        device: device of the logits and labels.
    """

    def __init__(self, heads: int, num_classes: int, device: torch.device):
        self.scores = [torch.empty(0, heads, num_classes, device=device)]
        self.labels = [torch.empty(0, num_classes, dtype=torch.long, device=device)]

    def add(self, logits: Tensor, label: Tensor) -> None:
        """Keep a batch with logits [heads, B, num_classes] and labels [B, num_classes].

        A label is 1 (shown), 0 (not shown) or -1 (ignored).
        """
        self.scores.append(logits.float().transpose(0, 1))
        self.labels.append(label)

    def read(self) -> list[dict[str, float]]:
        """Return `map11` (VOC07's eleven points) and `map` (area) of each classifier, in [0, 1].

        Every rank must call this method.
        """
        scores = distributed.all_gather_uneven(torch.cat(self.scores)).cpu().numpy()
        labels = distributed.all_gather_uneven(torch.cat(self.labels)).cpu().numpy()
        return [mean_average_precision(scores[:, head], labels) for head in range(scores.shape[1])]


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return `map11` and `map` in [0, 1], the means of `average_precisions` over classes.

    Classes that no image shows are left out. The arguments are those of `average_precisions`.
    """
    eleven, areas = average_precisions(scores, labels)
    shown = ~np.isnan(eleven)
    return (
        {"map11": float(eleven[shown].mean()), "map": float(areas[shown].mean())}
        if shown.any()
        else {"map11": 0.0, "map": 0.0}
    )


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `eleven_points` and `area` of each class, [2, num_classes].

    They are NaN for a class that no image shows.

    Args:
        scores: [N, num_classes], higher if the class is more likely.
        labels: [N, num_classes]: 1 shown, 0 not shown, -1 ignored (VOC's `difficult`).
    """
    scores = np.nan_to_num(scores)  # if a classifier diverged, all its images tie
    pairs = [(scores[known, c], labels[known, c]) for c, known in enumerate((labels >= 0).T)]
    return np.array(
        [(eleven_points(y, s), area(y, s)) if y.any() else (np.nan, np.nan) for s, y in pairs]
    ).T


def area(label: np.ndarray, score: np.ndarray) -> float:
    """Return scikit-learn's average precision, in [0, 1].

    It is the mean of the precisions, each weighted by its increase in recall.

    Args:
        label: [N] of 0 and 1.
        score: [N], higher if 1 is more likely.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(label, score))


def eleven_points(label: np.ndarray, score: np.ndarray) -> float:
    """Return VOC07's average precision, in [0, 1].

    It is the mean, over the recalls 0, .1, ..., 1, of the best precision at that recall or above
    (Everingham et al., IJCV 2010, section 4.2).

    Args:
        label: [N] of 0 and 1.
        score: [N], higher if 1 is more likely.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(label, score)
    # scikit-learn appends the point of recall 0 and precision 1, which is not measured
    precision, recall = precision[:-1], recall[:-1]
    # the tolerance keeps a recall of exactly a multiple of .1 from being rounded below it
    return float(
        np.mean([precision[recall >= tenth / 10 - 1e-9].max(initial=0) for tenth in range(11)])
    )


def create_meter(
    multi_label: bool, heads: int, num_classes: int, device: torch.device
) -> Accuracy | AveragePrecision:
    """Return a meter for images of one class each, or of several classes if `multi_label`."""
    return (AveragePrecision if multi_label else Accuracy)(heads, num_classes, device)


def print_average_precisions(
    classes: Sequence[str], scores: np.ndarray, labels: np.ndarray, notes: Sequence[str]
) -> dict[str, float]:
    """Print the average precision of each class and their means. Return them by name.

    Args:
        classes: names of the classes.
        scores: scores of the test images, [M, num_classes].
        labels: labels of the test images, [M, num_classes]; see `average_precisions`.
        notes: what to print after each class.
    """
    found = mean_average_precision(scores, labels)
    precisions = zip(classes, notes, *average_precisions(scores, labels), strict=True)
    for name, note, eleven, area in precisions:
        if math.isnan(eleven):
            print_rank0(f"{name:>12}  no test image shows it")
            continue
        found[f"ap_{name}"] = float(eleven)
        print_rank0(f"{name:>12}  AP {100 * eleven:.3f}  area {100 * area:.3f}  {note}".rstrip())
    print_rank0(f"* mAP {100 * found['map11']:.3f} (11 points)  {100 * found['map']:.3f} (area)")
    return found
