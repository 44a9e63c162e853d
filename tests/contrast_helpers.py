"""Slow losses of a batch in float64, and three steps of a method on one or two ranks."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from moco import distributed, sections_methods
from moco.builder import objectives
from moco.rng import Progress
from moco.sections_methods import Temperatures

B, DIM, N, T = 5, 4, 40, 0.1  # images in half a batch, features, training images, temperature


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def negatives(z, view, i):
    """The features of the other images in both views."""
    return [z[other][j] for other in (view, 1 - view) for j in range(z.shape[1]) if j != i]


def logits(z, view, i, t=T):
    """The logit of the anchor's positive, and those of its negatives."""
    anchor = z[view][i]
    others = torch.stack([anchor @ other for other in negatives(z, view, i)])
    assert len(others) == 2 * z.shape[1] - 2
    return anchor @ z[1 - view][i] / t, others / t


def slow_infonce(z, images):
    """SimCLR's NT-Xent: the mean over `images`, summed over the views."""
    loss = 0
    for view in (0, 1):
        for i in images:
            pos, neg = logits(z, view, i)
            all_logits = torch.cat([pos[None], neg])
            loss = loss + F.cross_entropy(all_logits[None], torch.tensor([0])) / len(images)
    return loss


def slow_dcl(z, images, sigma=None):
    """-w pos + log sum exp neg, the mean over `images`, summed over the views."""
    loss, m = 0, z.shape[1]
    for view in (0, 1):
        similarity = [z[view][i] @ z[1 - view][i] for i in range(m)]
        for i in images:
            w = 1
            if sigma:
                own = torch.exp(similarity[i] / sigma)
                w = 2 - own / (sum(torch.exp(s / sigma) for s in similarity) / m)
            pos, neg = logits(z, view, i)
            loss = loss + (-w * pos + neg.exp().sum().log()) / len(images)
    return loss


def slow_debiased(z, images, tau_plus, beta=0.0):
    """The authors' loss, with hard negatives, over the anchors of `images` in both views."""
    loss = 0
    for view in (0, 1):
        for i in images:
            pos, neg = (x.exp() for x in logits(z, view, i))
            count = len(neg)
            importance = neg**beta
            hard = (importance * neg).sum() / importance.mean()
            corrected = (-tau_plus * count * pos + hard) / (1 - tau_plus)
            corrected = torch.clamp(corrected, min=count * math.exp(-1 / T))
            loss = loss - torch.log(pos / (pos + corrected)) / (2 * len(images))
    return loss


# the options of each loss without moving averages, and its slow version
SLOW = {
    "simclr": ({}, slow_infonce),
    "dcl": ({}, slow_dcl),
    "dclw": ({"dclw_sigma": 0.3}, lambda z, images: slow_dcl(z, images, 0.3)),
    "debiased": ({"tau_plus": 0.05}, lambda z, images: slow_debiased(z, images, 0.05)),
    "hcl": (
        {"tau_plus": 0.02, "beta": 0.7},
        lambda z, images: slow_debiased(z, images, 0.02, 0.7),
    ),
}


# the method


def build(loss, local=False, step=None, labels=None, **settings):
    """Return the method of `--loss`, with a small encoder in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, DIM),
    )
    gather = "local" if local else "all"
    section = sections_methods.BatchLoss(loss=loss, t=T, gather_gradient=gather, **settings)
    temperatures = Temperatures(**(step or {}))
    return objectives.create_method(section, temperatures, lambda: net, N, labels).double()


def images(step, n=B):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, 3, 9, 9, generator=generator, dtype=torch.float64) for _ in range(2)]


def indices(step):
    """The joint batch of a step: images of the first 16, which come again."""
    return torch.randperm(16, generator=torch.Generator().manual_seed(step))[: 2 * B]


def part(x, rank):
    return x if rank is None else x[rank * len(x) // 2 : (rank + 1) * len(x) // 2]


def three_steps(rank, loss, settings, local=False):
    """Return the losses, gradients and state of three steps.

    They run on this rank's part of the joint batch, or (rank None) on all of it. Batch norm is over
    the full batch.
    """
    model, found = build(loss, local, **settings), []
    distributed.sync_batch_norm(model, torch.device("cpu"))
    ddp = distributed.data_parallel(model)
    for step in range(3):
        value, metrics = ddp(
            [part(view, rank) for view in images(step, 2 * B)],
            part(indices(step), rank),
            Progress(step=step),
        )
        value.backward()
        with torch.no_grad():
            gradients = [p.grad.clone() for p in model.parameters()]
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found.append(
            {
                "loss": value.detach(),
                "acc1": metrics["acc1"],
                "gradients": gradients,
                "state": state,
            }
        )
    return found


def assert_ranks_equal_joint(ranks, joint):
    """Check that two ranks find the loss, gradient and state of one with the joint batch."""
    for first, second, both in zip(*ranks, joint, strict=True):
        for name in ("loss", "acc1"):
            torch.testing.assert_close(
                (first[name] + second[name]) / 2, both[name], rtol=0, atol=1e-10, check_dtype=False
            )
        for mine, other in zip(first["gradients"], both["gradients"], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
        for name, tensor in both["state"].items():  # weights, buffers, and batch norm's statistics
            assert torch.equal(first["state"][name], second["state"][name]), name
            torch.testing.assert_close(first["state"][name], tensor, rtol=1e-10, atol=1e-10)
