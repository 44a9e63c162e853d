"""Formulas of schedules, by the papers and the authors' code.

Each is a function of the step s, the steps n of an epoch and the epochs E of the run.
"""

import math
from collections.abc import Callable

Formula = Callable[[int, int, int], float]


def constant(value: float) -> Formula:
    return lambda s, n, E: value


# Learning rates.
def drops(lr: float, *epochs: int) -> Formula:
    """MoCo: times .1 at each of `epochs`."""
    return lambda s, n, E: lr * 0.1 ** sum(s // n >= epoch for epoch in epochs)


def cosine_by_epoch(lr: float, end: float = 0.0) -> Formula:
    """Half a cosine from `lr` to `end`, constant in each epoch e = 0 .. E - 1."""
    return lambda s, n, E: end + (lr - end) * (1 + math.cos(math.pi * (s // n) / E)) / 2


def warm_by_epoch(lr: float, warmup: int, after: Formula) -> Formula:
    """`after`, whose first epochs are replaced by a warm-up in equal steps to `lr`."""

    def formula(s: int, n: int, E: int) -> float:
        return lr * (s // n + 1) / (warmup + 1) if s // n < warmup else after(s, n, E)

    return formula


def cosine_from_epoch_1(lr: float) -> Formula:
    """MoCo's demo on CIFAR-10: the epochs are counted from 1."""
    return lambda s, n, E: lr * (1 + math.cos(math.pi * (s // n + 1) / E)) / 2


def cosine_by_step(lr: float, warmup: int, start: float = 0.0, end: float = 0.0) -> Formula:
    """SimCLR: linear from 0 to `lr` over the epochs of `warmup`, then half a cosine to 0.

    SupCon's recipe begins at `start` and ends at `end`.
    """

    def formula(s: int, n: int, E: int) -> float:
        if s < n * warmup:
            return start + (lr - start) * s / (n * warmup)
        angle = math.pi * (s - n * warmup) / (n * (E - warmup))
        return end + (lr - end) * (1 + math.cos(angle)) / 2

    return formula


def swin_style(lr: float, start: float = 5e-7, end: float = 5e-6, warmup: int = 5) -> Formula:
    """MoBY's code: the rate of step t = s - 1, with the cosine over all steps from step 0.

    The rates are those for a total batch of 512, so they need no scaling. `warmup` is in epochs.
    """

    def formula(s: int, n: int, E: int) -> float:
        t = max(0, s - 1)
        if t < n * warmup:
            return start + (lr - start) * t / (n * warmup)
        return end + (lr - end) * (1 + math.cos(math.pi * t / (n * E))) / 2

    return formula


def up_and_down(lr: float, period: int) -> Formula:
    """AdCo's --sgdr 1: a cosine over all steps, which falls for `period` epochs and rises again."""
    return lambda s, n, E: lr * (1 + math.cos(math.pi * s / (n * period))) / 2


def up_and_down_by_epoch(lr: float, period: int) -> Formula:
    """AdCo's layer on VOC07: the same, constant in each epoch."""
    return lambda s, n, E: lr * (1 + math.cos(math.pi * (s // n) / period)) / 2


# Other quantities.
def rising_momentum(m: float) -> Formula:
    """BYOL, section 3.3, with the steps that are done after step s."""
    return lambda s, n, E: 1 - (1 - m) * (1 + math.cos(math.pi * (s + 1) / (n * E))) / 2


def authors_momentum(m: float) -> Formula:
    """MoCo v3: m at the start of the run, 1 at its end, for the update before the keys of step s.

    The update after step s is that before step s + 1.
    """
    return lambda s, n, E: 1 - 0.5 * (1 + math.cos(math.pi * ((s + 1) / n) / E)) * (1 - m)


def in_epochs(first: int, last: int, *counts: int) -> dict[str, Formula]:
    """Return the number of synthetic negatives of each type, in the epochs first .. last - 1."""

    def formula(count: int) -> Formula:
        return lambda s, n, E: count if first <= s // n < last else 0

    return {f"n{i}": formula(count) for i, count in enumerate(counts, 1) if count}
