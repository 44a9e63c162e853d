"""Make the synthetic negatives of a step. The formulas are in `moco/loss/synthetic.py`.

SynCo, SynCo-v2, MoCo v3 and SimCLR use this file. `moco/sections_negatives.py` has the options.
"""

import torch
from torch import Tensor

from moco import distributed
from moco.loss import synthetic
from moco.loss.hardest import hardest
from moco.loss.synthetic import Mixture, Synthetic
from moco.rng import NEGATIVES, Progress


def mixture(
    config: Synthetic,
    q: Tensor,
    bank: Tensor,
    similarity: Tensor,
    hard: Tensor,
    progress: Progress,
    *counters: int,
) -> Mixture:
    """Return the synthetic negatives of this rank's queries.

    Args:
        config: the number of negatives of each type, and their sizes.
        q: normalized queries [N, C].
        bank: normalized entries [K, C].
        similarity: q @ bank.T, [N, K].
        hard: indices of the hardest entries of each query, [N, H] with H >= `config.n_hard`.
        progress: position in the run; with the rank and `counters`, it seeds the random draws.
        counters: numbers that tell several calls in a step apart.
    """
    generator = progress.generator(NEGATIVES, q.device, distributed.rank(), *counters)
    draws = synthetic.draw(config, *q.shape, generator, q.dtype)
    return synthetic.mix(q, bank, similarity, hard, config, draws)


@torch.no_grad()
def batch_mixture(
    config: Synthetic,
    q: Tensor,
    bank: Tensor,
    similarity: Tensor,
    own: Tensor,
    progress: Progress,
    counter: int,
) -> Mixture:
    """Return synthetic negatives that are made from the negatives of the batch.

    Args:
        config: the number of negatives of each type, and their sizes.
        q: normalized queries [N, C].
        bank: normalized features of the joint batch [K, C].
        similarity: q @ bank.T, [N, K].
        own: True for features of the query's own image, which are not its negatives, [N, K]. Each
            query must have at least `config.n_hard` negatives.
        progress: position in the run; seeds the random draws.
        counter: index of the view, so that each draws its own random numbers.
    """
    similarity = similarity.masked_fill(own, -torch.inf)
    hard = hardest(similarity, config.n_hard)
    return mixture(config, q, bank, similarity, hard, progress, counter)
