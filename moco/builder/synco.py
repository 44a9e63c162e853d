"""SynCo: MoCo with six types of synthetic hard negatives (arXiv 2410.02401).

MoCHI (arXiv 2010.01028) uses two of the six types.
"""

from dataclasses import make_dataclass

from torch import Tensor

from moco import distributed
from moco.builder.moco import MoCo
from moco.errors import InputError
from moco.loss import synthetic
from moco.options import NATURAL, SIZE, option
from moco.rng import NEGATIVES, Progress


class SynCo(MoCo):
    """MoCo with synthetic negatives, from epoch `warmup_epochs` on.

    Args:
        config: config of the synthetic negatives; with all counts 0 this is MoCo.
        warmup_epochs: number of epochs before the first synthetic negatives.
        moco: the arguments of `MoCo`.
    """

    def __init__(self, *args, config: synthetic.Synthetic, warmup_epochs: int = 10, **moco):
        super().__init__(*args, **moco)
        self.config, self.warmup_epochs = config, warmup_epochs

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the key encoder's momentum, and the numbers of synthetic negatives per query."""
        return {
            **super().schedules(progress),
            **counts_by_type(self.config, self.has_synthetic(progress)),
        }

    def has_synthetic(self, progress: Progress) -> bool:
        """Return whether there are synthetic negatives at `progress`."""
        return self.config.total > 0 and progress.epoch >= self.warmup_epochs

    def negatives(
        self, q: Tensor, similarity: Tensor, progress: Progress, direction: int = 0
    ) -> tuple[Tensor, synthetic.Mixture | None]:
        """Return the hardest queue entries and the synthetic negatives; see `MoCo.negatives`."""
        if not self.has_synthetic(progress):
            return super().negatives(q, similarity, progress, direction)
        generator = progress.generator(
            NEGATIVES, q.device, distributed.rank(), *[direction] * direction
        )
        draws = synthetic.draw(self.config, *q.shape, generator, q.dtype)
        hard = synthetic.hardest(similarity, max(self.config.n_hard, min(5, self.K)))
        return hard, synthetic.mix(q, self.queue, similarity, hard, self.config, draws)


_HARD = option(0, "number of hardest queue entries to make synthetic negatives from", range=NATURAL)
_COUNTS = {
    f"n{i}": option(0, f"{one.name} negatives per query", range=NATURAL)
    for i, one in enumerate(synthetic.TYPES, 1)
}
_SIZES = {
    "sigma": option(0.01, "standard deviation of the noise", range=SIZE),
    "delta": option(0.01, "size of the perturbation", range=SIZE),
    "eta": option(0.01, "size of the adversarial step", range=SIZE),
}

# settings of the synthetic negatives: n_hard, a count for each of `synthetic.TYPES`, and the sizes
SyntheticNegatives = make_dataclass(
    "SyntheticNegatives",
    [
        ("n_hard", int, _HARD),
        *((name, int, one) for name, one in _COUNTS.items()),
        *((name, float, one) for name, one in _SIZES.items()),
    ],
    frozen=True,
    namespace={"TITLE": "synthetic negatives", "__module__": __name__},
)
COUNTS = tuple(_COUNTS)  # n1, n2, ...


def counts_by_type(config: synthetic.Synthetic, active: bool) -> dict[str, float]:
    """Return the number of synthetic negatives per query for each type in use, by option name.

    The numbers are 0 unless the epoch has synthetic negatives (`active`).
    """
    counts = zip(COUNTS, config.counts, strict=True)
    return {name: count * active for name, count in counts if count}


def synthetic_config(section: SyntheticNegatives, entries: int, option: str) -> synthetic.Synthetic:
    """Return the config of the synthetic negatives.

    Args:
        section: the settings.
        entries: number of entries in the queue.
        option: name of the option that sets `entries`, for error messages.

    Raises InputError if `n_hard` is larger than the queue, or 0 although there are negatives.
    """
    counts = tuple(getattr(section, name) for name in COUNTS)
    if section.n_hard > entries:
        raise InputError(
            f"--n-hard {section.n_hard} is larger than the queue ({option} {entries}); "
            "lower --n-hard"
        )
    if any(counts) and not section.n_hard:
        raise InputError(
            "synthetic negatives are made from the hardest queue entries: "
            "give --n-hard, as in --n-hard 1024"
        )
    return synthetic.Synthetic(section.n_hard, counts, section.sigma, section.delta, section.eta)
