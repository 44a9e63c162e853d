"""SynCo: MoCo with six types of synthetic hard negatives (arXiv 2410.02401).

MoCHI (arXiv 2010.01028) uses two of the six types.
"""

from torch import Tensor

from moco.builder.moco import MoCo
from moco.builder.negatives import mixture
from moco.loss.hardest import hardest
from moco.loss.synthetic import Mixture
from moco.rng import Progress
from moco.sections_negatives import Schedule


class SynCo(MoCo):
    """MoCo with synthetic negatives.

    Args:
        synthetic: the synthetic negatives; with all counts 0 this is MoCo.
        moco: the arguments of `MoCo`.
    """

    def __init__(self, *args, synthetic: Schedule, **moco):
        super().__init__(*args, **moco)
        self.synthetic = synthetic

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the key encoder's momentum, and the numbers of synthetic negatives per query."""
        return {**super().schedules(progress), **self.synthetic.values(progress)}

    def negatives(
        self, q: Tensor, similarity: Tensor, progress: Progress, direction: int = 0
    ) -> tuple[Tensor, Mixture | None]:
        """Return the hardest queue entries and the synthetic negatives; see `MoCo.negatives`."""
        config = self.synthetic.at(progress)
        if config is None:
            return super().negatives(q, similarity, progress, direction)
        hard = hardest(similarity, max(config.n_hard, min(5, self.K)))
        counters = [direction] * direction
        return hard, mixture(config, q, self.queue, similarity, hard, progress, *counters)
