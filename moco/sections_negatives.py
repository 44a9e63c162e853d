"""The synthetic negatives of a run: their options, the epochs that have them, and their ramp.

SynCo, SynCo-v2, MoCo v3 and SimCLR have them. `moco/builder/negatives.py` makes the negatives.
"""

import math
from dataclasses import dataclass, make_dataclass, replace
from typing import TYPE_CHECKING

from moco.errors import InputError
from moco.loss.settings import TYPES, Synthetic
from moco.messages import counted
from moco.options import NATURAL, SIZE, option

if TYPE_CHECKING:
    from moco.rng import Progress


@dataclass(frozen=True)
class Ramp:
    """The epochs in which synthetic negatives gradually join the others.

    Without a ramp, all of them join in the first epoch, as in the papers.

    Attributes:
        epochs: length of the ramp, 0 for none.
        shape: linear, or cosine: half a cosine, which is flat at both ends.
        of: number: the number of negatives rises from 0, for each type. weight: all negatives are
            there, and the weight of their exponentials in the loss rises from 0 to 1.
    """

    epochs: int = 0
    shape: str = "linear"
    of: str = "number"

    def height(self, passed: float) -> float:
        """Return the height of the ramp in [0, 1] after `passed` epochs."""
        x = min(passed / self.epochs, 1.0) if self.epochs else 1.0
        return (1 - math.cos(math.pi * x)) / 2 if self.shape == "cosine" else x


@dataclass(frozen=True)
class Schedule:
    """The config of the synthetic negatives at each step of a run.

    Attributes:
        config: the config after the ramp. With all counts 0, there are no synthetic negatives.
        first: the first epoch with synthetic negatives.
        last: the first epoch without them after that; None: they stay.
        ramp: the ramp, which begins in epoch `first`.
    """

    config: Synthetic = Synthetic()
    first: int = 0
    last: int | None = None
    ramp: Ramp = Ramp()

    def at(self, progress: "Progress") -> Synthetic | None:
        """Return the config of a step, or None if it has no synthetic negatives.

        The ramp rises with each step. Its last step has the full height.
        """
        ended = self.last is not None and progress.epoch >= self.last
        if not self.config.total or progress.epoch < self.first or ended:
            return None
        passed = (progress.step + 1) / progress.steps_per_epoch - self.first
        height = self.ramp.height(passed)
        if height == 1:
            return self.config
        if self.ramp.of == "weight":
            return replace(self.config, weight=height)
        counts = tuple(round(height * count) for count in self.config.counts)
        return replace(self.config, counts=counts) if any(counts) else None

    def values(self, progress: "Progress") -> dict[str, float]:
        """Return the number of negatives per query, times their weight, for each type in use.

        The keys are the names of the options, such as n1.
        """
        now = self.at(progress)
        counts = [0] * len(COUNTS) if now is None else now.counts
        weight = 1 if now is None else now.weight
        used = zip(COUNTS, self.config.counts, counts, strict=True)
        return {name: count * weight for name, most, count in used if most}


_COUNTS = {
    f"n{i}": option(0, f"{one.name} negatives per query", range=NATURAL)
    for i, one in enumerate(TYPES, 1)
}
_RAMP = {
    "synthetic_ramp_epochs": option(
        0,
        "epochs in which the synthetic negatives gradually join the others, from the first epoch "
        "that has them; 0: all join at once, as in the papers",
        range=NATURAL,
        metavar="N",
    ),
    "synthetic_ramp": option(
        "linear", "shape of this rise; cosine is flat at both ends", choices=("linear", "cosine")
    ),
    "synthetic_ramp_of": option(
        "number",
        "quantity that rises: the number of negatives of each type, or the weight of all of them "
        "in the loss",
        choices=("number", "weight"),
    ),
}


def _section(name: str, source: str, example: int, eta: str) -> type:
    """Return a section of settings: n_hard, counts, sizes and the ramp.

    Args:
        name: name of the class.
        source: what the synthetic negatives are made from, for messages.
        example: a value of n_hard, for messages.
        eta: name of the setting for the size of the adversarial step.
    """
    hard = f"number of hardest {source} to make synthetic negatives from"
    sizes = {
        "sigma": option(0.01, "standard deviation of the noise", range=SIZE),
        "delta": option(0.01, "size of the perturbation", range=SIZE),
        eta: option(0.01, "size of the adversarial step", range=SIZE),
    }
    fields = [
        ("n_hard", int, option(0, hard, range=NATURAL)),
        *((name, int, one) for name, one in _COUNTS.items()),
        *((name, float, one) for name, one in sizes.items()),
        *((name, type(one.default), one) for name, one in _RAMP.items()),
    ]
    own = {"SOURCE": source, "EXAMPLE": example, "ETA": eta, "__module__": __name__}
    own["TITLE"] = "synthetic negatives"
    return make_dataclass(name, fields, frozen=True, namespace=own)


SyntheticNegatives = _section("SyntheticNegatives", "queue entries", 1024, "eta")
# iSogCLR, in the same script as SimCLR, already has a setting `eta`
_OfBatch = _section("_OfBatch", "negatives of the batch", 64, "synthetic_eta")
COUNTS = tuple(_COUNTS)  # n1, n2, ...


@dataclass(frozen=True)
class BatchNegatives(_OfBatch):
    """Synthetic negatives made from the negatives of the batch, and the epochs that have them."""

    synthetic_first: int = option(
        10, "first epoch with synthetic negatives", range=NATURAL, metavar="EPOCH"
    )
    synthetic_last: int | None = option(
        None,
        "first later epoch without synthetic negatives",
        range=NATURAL,
        metavar="EPOCH",
        unset="they stay",
    )

    def schedule(self) -> Schedule:
        """Return the schedule. Raises InputError if the settings contradict each other."""
        return _schedule(self, self.synthetic_first, self.synthetic_last)

    def check(self, negatives: int) -> None:
        """Raise InputError if --n-hard exceeds the number of `negatives` of a query."""
        if self.schedule().config.total and self.n_hard > negatives:
            how = "lower --n-hard, or raise --batch-size" if negatives else "raise --batch-size"
            raise InputError(
                f"--n-hard {self.n_hard}: a query has only {counted(negatives, 'negative')} in the "
                f"joint batch of a pass (--batch-size); {how}"
            )


def synthetic_schedule(
    section: SyntheticNegatives, entries: int, option: str, first: int, last: int | None = None
) -> Schedule:
    """Return the schedule of the synthetic negatives that are made from a queue.

    Args:
        section: the settings.
        entries: number of entries in the queue.
        option: name of the option that sets `entries`, for error messages.
        first: the first epoch with synthetic negatives.
        last: the first epoch without them after that, if any.

    Raises InputError if `n_hard` is larger than the queue, or if settings contradict each other.
    """
    if section.n_hard > entries:
        raise InputError(
            f"--n-hard {section.n_hard} is larger than the queue ({option} {entries}); "
            "lower --n-hard"
        )
    return _schedule(section, first, last)


def _schedule(
    section: SyntheticNegatives | BatchNegatives, first: int, last: int | None
) -> Schedule:
    """Return the schedule of the synthetic negatives of `section` from epoch `first` on.

    Raises InputError if `n_hard` is 0 although there are synthetic negatives, if negatives would be
    copies, if the last epoch is not after the first, or if the ramp is longer than the epochs with
    synthetic negatives.
    """
    counts = tuple(getattr(section, name) for name in COUNTS)
    if not any(counts):
        return Schedule()
    if not section.n_hard:
        raise InputError(
            f"synthetic negatives are made from the hardest {section.SOURCE}: "
            f"give --n-hard, as in --n-hard {section.EXAMPLE}"
        )
    _refuse_copies(section)
    if last is not None and first >= last:
        raise InputError(f"--synthetic-first {first}: must be below --synthetic-last {last}")
    eta = getattr(section, section.ETA)
    config = Synthetic(section.n_hard, counts, section.sigma, section.delta, eta)
    ramp = Ramp(section.synthetic_ramp_epochs, section.synthetic_ramp, section.synthetic_ramp_of)
    if last is not None and ramp.epochs > last - first:
        raise InputError(
            f"--synthetic-ramp-epochs {ramp.epochs}: the synthetic negatives last "
            f"{counted(last - first, 'epoch')} only; lower it"
        )
    return Schedule(config, first, last, ramp)


def _refuse_copies(section: SyntheticNegatives | BatchNegatives) -> None:
    """Raise InputError if a type of synthetic negative would only copy the hardest negatives."""
    for name, one in zip(COUNTS, TYPES, strict=True):
        count = getattr(section, name)
        size = section.ETA if one.size == "eta" else one.size
        if not count:
            continue
        copies = f"copies of {section.SOURCE} (--{name} {count})"
        if size and not getattr(section, size):
            option = f"--{size.replace('_', '-')}"
            raise InputError(
                f"{option} 0: all {one.name} negatives would be {copies}; "
                f"give a larger {option}, or --{name} 0"
            )
        if one.second and section.n_hard == 1:
            raise InputError(
                f"--n-hard 1: all {one.name} negatives would be {copies}, because each mixes two "
                f"of the hardest {section.SOURCE}; give a larger --n-hard, or --{name} 0"
            )


def notes(schedule: Schedule, option: str, without: str, epochs: int) -> list[str]:
    """Return lines to print about the synthetic negatives of a run; none if it has none.

    Args:
        schedule: the schedule of the synthetic negatives.
        option: name of the option that sets their first epoch.
        without: name of the method without synthetic negatives.
        epochs: number of epochs in the run.
    """
    if not schedule.config.total:
        return []
    length = counted(epochs, "epoch")
    first, last, ramp = schedule.first, schedule.last, schedule.ramp
    total = counted(schedule.config.total, "synthetic negative")
    line = f"{total} per query from epoch {first} on ({option})"
    lines = [line if last is None else f"{line}, none from epoch {last} on (--synthetic-last)"]
    if first >= epochs:
        why = f"the run ends after {length}, before the first synthetic negatives"
        return [*lines, f"{why}: this is {without}"]
    if ramp.epochs:
        end = first + ramp.epochs
        after = "" if end <= epochs else f"; the run ends earlier, after {length}"
        lines.append(
            f"their {ramp.of} rises ({ramp.shape}) and is full after epoch {end - 1} "
            f"(--synthetic-ramp-epochs){after}"
        )
    return lines
