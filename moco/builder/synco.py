"""SynCo: MoCo with six types of synthetic hard negatives (arXiv 2410.02401).

MoCHI (arXiv 2010.01028) uses two of the six types.
"""

from moco.builder.moco import MoCo
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
