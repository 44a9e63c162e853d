"""Measure the retrieval of images of the same class by the similarity of features."""

import torch

from moco import devices, distributed
from moco.engine.features import Features, gather_in_order
from moco.errors import InputError
from moco.messages import print_rank0

_ENTRIES = 2**24  # similarities that are sorted at a time, to save memory


@torch.inference_mode()
def measure(database: Features, queries: Features, ks: list[int], same: bool) -> dict[str, float]:
    """Return `map` and `recall_K`, for each K of `ks`, over the queries of all ranks.

    For each query, the database is ranked by similarity; the images of the query's class are the
    positives. Equal similarities keep the order of the database. `map` is the mean over queries of
    the average precision, which is the mean of the precisions at the ranks of the positives.
    `recall_K` is the fraction of queries with a positive among the first K results (Jégou et al.,
    TPAMI 2011, and the papers of metric learning), so `recall_1` is also the mean precision of the
    first result. Queries without positives are left out; a line counts them.

    Args:
        database: this rank's features, [n, D] of norm 1, and labels, [n].
        queries: this rank's features to search, [m, D] of norm 1, and labels, [m].
        ks: numbers of results.
        same: whether the queries are the database. Each query is then left out of its own ranking.

    Every rank must call this function. Raises InputError if no query has a positive.
    """
    device = queries[1].device
    rows, classes = gather_in_order(database[0]), gather_in_order(database[1])
    own = torch.arange(len(queries[1]), device=device)
    own = own * distributed.world_size() + distributed.rank()  # in the order of the split
    exact = devices.widest_float(device)
    sums = torch.zeros(len(ks) + 2, dtype=exact, device=device)
    block = max(1, _ENTRIES // max(1, len(rows)))
    for x, y, mine in zip(*(part.split(block) for part in (*queries, own)), strict=True):
        similarity = x.to(device) @ rows.to(device).T  # [b, N]
        if same:
            similarity.scatter_(1, mine[:, None], -torch.inf)  # the last rank
        order = similarity.argsort(dim=1, descending=True, stable=True)
        hit = classes[order] == y[:, None]
        if same:
            hit &= order != mine[:, None]
        positives = hit.sum(1)
        found = hit.cumsum(1)
        ranks = torch.arange(1, len(rows) + 1, device=device)
        precision = (found.to(exact) / ranks * hit).sum(1) / positives.clamp_min(1)
        recalls = [(found[:, min(k, len(rows)) - 1] > 0).sum() for k in ks]
        sums += torch.stack([precision.sum(), *recalls, (positives > 0).sum()]).to(exact)
    precision, *recalls, counted = distributed.all_reduce_sum(sums).tolist()
    if not counted:
        raise InputError(
            "no image of val/ has another image of its class in the database, so nothing can be "
            "found; give more images of each class"
        )
    queries_of_all = len(distributed.all_gather_uneven(queries[1]))
    if left_out := queries_of_all - int(counted):
        have = "query has" if left_out == 1 else "queries have"
        print_rank0(f"{left_out} {have} no image of the same class to find; left out")
    found = {f"recall_{k}": recall / counted for k, recall in zip(ks, recalls, strict=True)}
    return {"map": precision / counted, **found}
