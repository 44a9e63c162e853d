"""A tiny MoCo or SynCo, its views, and its keys by hand."""

import copy

import torch
import torch.nn.functional as F
from rank_helpers import DIM, tiny_encoder

from moco.builder.moco import MoCo
from moco.loss import synthetic
from moco.rng import SHUFFLE

K = 24
ALL_SIX = synthetic.Synthetic(n_hard=10, counts=(5, 4, 3, 2, 3, 4))


def build(method=MoCo, seed=0, **options):
    torch.manual_seed(seed)
    return method(tiny_encoder, **{"dim": DIM, "K": K, "m": 0.9, "T": 0.2, **options})


def two_views(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 9, 9, generator=generator) for _ in range(2)]


def keys_by_hand(encoder, images, progress, groups):
    """Return the keys in the order of the batch.

    Each is normalised with the statistics of its group of the shuffled batch.
    """
    order = torch.randperm(len(images), generator=progress.generator(SHUFFLE, "cpu"))
    k = torch.empty(len(images), DIM)
    before, after = copy.deepcopy(encoder.state_dict()), []
    with torch.no_grad():
        for places in order.tensor_split(groups):
            encoder.load_state_dict(before)
            k[places] = F.normalize(encoder(images[places]))
            after.append(copy.deepcopy(encoder.state_dict()))
    encoder.load_state_dict(
        {
            name: torch.stack([s[name].double() for s in after]).mean(0).to(x.dtype)
            for name, x in before.items()
        }
    )
    return k
