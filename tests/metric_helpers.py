"""Slow definitions of metrics, for several test modules."""

import numpy as np


def eleven_points_by_hand(label, score) -> float:
    """Return VOC07's average precision as its development kit does.

    It walks down the ranking, and takes for each recall the best precision from there on.
    """
    right = np.cumsum(label[np.argsort(-score, kind="stable")])
    precision = right / np.arange(1, len(label) + 1)
    reached = [
        [p for p, r in zip(precision, right, strict=True) if 10 * r >= tenth * label.sum()]
        for tenth in range(11)
    ]
    return sum(max(p) for p in reached) / 11
