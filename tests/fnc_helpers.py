"""FNC's loss and candidates, written slowly."""

import torch
import torch.nn.functional as F

T, DIM = 0.1, 4


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def slow_candidates(bank, own, image, how):
    """Return the entries found as false negatives of an image, one similarity after the other."""
    mine = own[:, image].tolist()
    score = {
        row: max(float(bank[me] @ bank[row]) for me in mine)
        for row in range(len(bank))
        if row not in mine
    }
    best = sorted(score, key=score.get, reverse=True)[: how.topk]
    return [row for row in best if score[row] > how.threshold] if how.mode != "off" else []


def of_class(same, own, image):
    """Return the entries for which `same` [n][R] is true, except the image's own."""
    mine = own[:, image].tolist()
    return [row for row, true in enumerate(same[image]) if true and row not in mine]


def slow_loss(z, bank, own, how, same=None):
    """Return the loss; with `same` [n][R], the false negatives are the entries of its class."""
    V, n, _ = z.shape
    total = 0
    for i in range(n):
        if same is None:
            false = slow_candidates(bank.detach(), own, i, how)
        else:
            false = of_class(same, own, i)
        for a in range(V):
            logit = {row: z[a, i] @ bank[row] / T for row in range(len(bank)) if row != own[a, i]}
            positives = [int(own[v, i]) for v in range(V) if v != a]
            below = list(logit)
            if how.mode == "attract":
                positives += false
            if how.mode == "eliminate":
                below = [row for row in below if row not in false]
            denominator = torch.stack([logit[row] for row in below]).exp().sum().log()
            total = (
                total + (denominator - torch.stack([logit[row] for row in positives]).mean()) / n
            )
    return total * 2 / V
