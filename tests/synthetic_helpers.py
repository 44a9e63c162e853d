"""Synthetic negatives as explicit vectors."""

import torch

from moco.loss import synthetic


def explicit_negatives(q, bank, hard, config, draws, seventh=None):
    """Return the vectors of the papers' definitions, made one at a time: [N, total, C].

    `seventh` makes the vector of a type after the six, from q, n, n', w and e.
    """
    q = q.detach()
    has_weight = [type_.weight is not None for type_ in synthetic.TYPES]
    weights = draws.weight.split(
        [n * has for n, has in zip(config.counts, has_weight, strict=True)], 1
    )
    everything = []
    for i, query in enumerate(q):
        index, noise = iter(draws.first[i].tolist()), iter(draws.noise[i])
        second = iter(draws.second[i].tolist())

        def entry(index, i=i):
            return bank[hard[i, next(index)]]

        vectors = []
        for a in weights[0][i]:
            vectors.append(a * query + (1 - a) * entry(index))
        for b in weights[1][i]:
            vectors.append(query + b * (entry(index) - query))
        for g in weights[2][i]:
            vectors.append(g * entry(index) + (1 - g) * entry(second))
        for _ in range(config.counts[3]):
            vectors.append(entry(index) + next(noise))
        for _ in range(config.counts[4]):
            vectors.append(entry(index) + config.delta * query)
        for _ in range(config.counts[5]):
            vectors.append(entry(index) + config.eta * torch.sign(query))
        for m in range(sum(config.counts[6:])):
            w = weights[6][i, m] if has_weight[6] else None
            other = entry(second) if synthetic.TYPES[6].second else None
            e = next(noise) if synthetic.TYPES[6].noise else None
            vectors.append(seventh(query, entry(index), other, w, e))
        for left in (index, second, noise):
            assert next(left, None) is None
        everything.append(torch.stack([v / v.norm() for v in vectors]))
    return torch.stack(everything)
