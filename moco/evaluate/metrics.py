"""What an evaluation counts, each image once whatever the number of ranks: top-1 and top-5, mean per class, average precision."""

import numpy as np
import torch
from torch import Tensor

from moco import distributed

TITLES = {
    "acc1": "Acc@1",
    "acc5": "Acc@5",
    "mean_per_class": "mean per class",
    "map11": "mAP (11 points)",
    "map": "mAP (area)",
}


def correct(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels [B] are the first, and among the first five, of their logits [..., B, classes]: both bool [..., B]."""
    top = logits.topk(min(5, logits.shape[-1]), -1).indices == label[:, None]
    return top[..., 0], top.any(-1)


class Accuracy:
    """Accuracies of several classifiers on images of one class each.

    Args:
        heads: how many classifiers.
        classes: how many classes.
    """

    def __init__(self, heads: int, classes: int, device: torch.device):
        self.counts = torch.zeros(
            2 * heads + 1, classes, dtype=torch.long, device=device
        )  # right, right among five; images

    def add(self, logits: Tensor, label: Tensor) -> None:
        """Count logits [heads, B, classes] of images with labels [B]."""
        right = torch.cat(
            [*correct(logits, label), torch.ones_like(label, dtype=torch.bool)[None]]
        )  # [2 heads + 1, B]
        self.counts.index_add_(1, label, right.long())

    def read(self) -> list[dict[str, float]]:
        """Of each classifier, in [0, 1]: `acc1`, `acc5`, and `mean_per_class`, the mean of the top-1 of each class seen."""
        counts = distributed.all_reduce_sum(self.counts).cpu().double()
        images = counts[-1]
        top1, top5 = counts[:-1].chunk(2)
        by_class = (top1 / images)[:, images > 0].mean(1)
        shares = torch.stack([top1.sum(1) / images.sum(), top5.sum(1) / images.sum(), by_class], 1)
        return [
            dict(zip(("acc1", "acc5", "mean_per_class"), row, strict=True))
            for row in shares.tolist()
        ]


class AveragePrecision:
    """Mean average precision of several classifiers on images that can show several classes."""

    def __init__(self, heads: int, classes: int, device: torch.device):
        self.scores = [torch.empty(0, heads, classes, device=device)]
        self.labels = [torch.empty(0, classes, dtype=torch.long, device=device)]

    def add(self, logits: Tensor, label: Tensor) -> None:
        """Keep logits [heads, B, classes] of images with labels [B, classes], of which -1 is not counted."""
        self.scores.append(logits.float().transpose(0, 1))
        self.labels.append(label)

    def read(self) -> list[dict[str, float]]:
        """Of each classifier, in [0, 1]: `map11` (VOC07's eleven points), and `map` (the area)."""
        scores = distributed.all_gather_uneven(torch.cat(self.scores)).cpu().numpy()
        labels = distributed.all_gather_uneven(torch.cat(self.labels)).cpu().numpy()
        return [mean_average_precision(scores[:, head], labels) for head in range(scores.shape[1])]


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`map11` and `map` in [0, 1], means over the classes that some image shows, of `average_precisions`."""
    eleven, areas = average_precisions(scores, labels)
    shown = ~np.isnan(eleven)
    return (
        {"map11": float(eleven[shown].mean()), "map": float(areas[shown].mean())}
        if shown.any()
        else {"map11": 0.0, "map": 0.0}
    )


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`eleven_points` and `area` of each class, [2, classes]; NaN for a class that no image shows.

    Args:
        scores: [N, classes], higher for more likely.
        labels: [N, classes]: 1 shown, 0 not shown, -1 (VOC's `difficult`) not counted.
    """
    scores = np.nan_to_num(scores)  # of a classifier that diverged: every image ties
    pairs = [(scores[known, c], labels[known, c]) for c, known in enumerate((labels >= 0).T)]
    return np.array(
        [(eleven_points(y, s), area(y, s)) if y.any() else (np.nan, np.nan) for s, y in pairs]
    ).T


def area(label: np.ndarray, score: np.ndarray) -> float:
    """Average precision as scikit-learn defines it: the sum of precision times the step in recall. label [N] of 0 and 1."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(label, score))


def eleven_points(label: np.ndarray, score: np.ndarray) -> float:
    """VOC07's average precision: the mean, over recalls 0, .1 to 1, of the best precision at that recall or more.

    (Everingham et al., IJCV 2010, section 4.2.) label [N] of 0 and 1.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(label, score)
    # its last point (recall 0, precision 1) is no measurement
    precision, recall = precision[:-1], recall[:-1]
    # recall is a fraction of small integers: a point that lies on a tenth must not fall beside it by rounding
    return float(
        np.mean([precision[recall >= tenth / 10 - 1e-9].max(initial=0) for tenth in range(11)])
    )


def create_meter(
    multi_label: bool, heads: int, classes: int, device: torch.device
) -> Accuracy | AveragePrecision:
    """What counts on images of one class each, or, where `many`, of several."""
    return (AveragePrecision if multi_label else Accuracy)(heads, classes, device)
