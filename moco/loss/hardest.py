"""Find the negatives that are most similar to each query."""

import torch
from torch import Tensor


def hardest(similarity: Tensor, n_hard: int) -> Tensor:
    """Return the indices [N, n_hard] of the bank entries most similar to each query, hardest first.

    The result is exact. A CPU searches in two levels: the n_hard largest values lie in the n_hard
    groups with the largest maxima. There it uses NumPy, which selects faster than torch.topk if the
    processor has AVX2 or AVX-512.

    Args:
        similarity: similarity of each query to the bank, [N, K]; no gradient flows through it.
        n_hard: number of entries, in [1, K].
    """
    similarity = similarity.detach()
    n, K = similarity.shape
    # Groups of about sqrt(K / n_hard) members make both levels about equally large.
    members = 1 << ((K // n_hard).bit_length() - 1) // 2
    on_cpu = similarity.device.type == "cpu"
    has_numpy_type = similarity.dtype in (torch.float32, torch.float64)
    if not on_cpu or not has_numpy_type or members == 1 or K % members:
        return similarity.topk(n_hard, 1).indices

    # Group j has the members j, j + groups, j + 2 groups, ... The maxima of all groups are then a
    # maximum over contiguous vectors.
    groups = K // members
    grouped = similarity.view(n, members, groups)
    best = _largest(grouped.amax(1), n_hard)  # [N, n_hard] groups
    candidates = grouped.gather(2, best[:, None, :].expand(n, members, n_hard)).flatten(1)
    chosen = _largest(candidates, n_hard)
    order = torch.from_numpy(candidates.gather(1, chosen).neg_().numpy().argsort(1))
    chosen = chosen.gather(1, order)

    # Candidate i is member i // n_hard of the group best[i % n_hard].
    member = chosen.div(n_hard, rounding_mode="floor")
    return best.gather(1, chosen.sub_(member, alpha=n_hard)).add_(member, alpha=groups)


def _largest(x: Tensor, k: int) -> Tensor:
    """Return the indices [N, k] of the k largest values in each row of x [N, M], in no order."""
    return torch.from_numpy(x.numpy().argpartition(-k, 1)[:, -k:])
