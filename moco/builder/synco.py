"""SynCo: MoCo plus six kinds of synthetic hard negatives (arXiv 2410.02401); MoCHI is two of the six."""

from torch import Tensor

from moco import distributed
from moco.builder.moco import MoCo
from moco.loss import synthetic
from moco.rng import NEGATIVES, Progress


class SynCo(MoCo):
    """MoCo whose queries also face synthetic negatives, from epoch `warmup_epochs` on.

    Args:
        kind: counts and sizes of the synthetic negatives; with all counts 0 this is MoCo.
        warmup_epochs: epochs with the queue's negatives only.
        moco: MoCo's arguments.
    """

    def __init__(self, *args, kind: synthetic.Synthetic, warmup_epochs: int = 10, **moco):
        super().__init__(*args, **moco)
        self.kind, self.warmup_epochs = kind, warmup_epochs

    def negatives(
        self, q: Tensor, similarity: Tensor, progress: Progress, direction: int = 0
    ) -> tuple[Tensor, synthetic.Mixture | None]:
        if not self.kind.total or progress.epoch < self.warmup_epochs:
            return super().negatives(q, similarity, progress, direction)
        generator = progress.generator(
            NEGATIVES, q.device, distributed.rank(), *[direction] * direction
        )
        draws = synthetic.draw(self.kind, *q.shape, generator, q.dtype)
        hard = synthetic.hardest(similarity, max(self.kind.n_hard, min(5, self.K)))
        return hard, synthetic.mix(q, self.queue, similarity, hard, self.kind, draws)
