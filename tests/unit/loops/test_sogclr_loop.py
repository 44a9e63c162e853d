"""Eight steps of SogCLR and SimCLR equal a plain loop written from the papers, in float64."""

import math

import pytest
import torch
from plain import LARS, WIDTH, Network, TinyResNet, part_of, unit
from recorder import BATCH, EPOCHS, IMAGES, PROCESSES, STEPS, check, recordings, views_by_rank
from run_helpers import typed
from torch import nn

DIM, HIDDEN, T, GAMMA, LR, WD = 6, 20, 0.1, 0.7, 0.1, 1e-3
OPTIONS = (
    *typed(f"--dim {DIM} --mlp-dim {HIDDEN} --t {T} --lr {LR} --wd {WD}"),
    *typed("--optimizer lars --learning-rate-scaling sqrt --lr-warmup-epochs 1"),
)
VARIANTS = {
    "sogclr": ("main_sogclr", *OPTIONS, "--gamma", GAMMA),
    "simclr": ("main_sogclr", *OPTIONS, "--loss-type", "simclr"),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recordings(VARIANTS, tmp_path_factory.mktemp("sogclr"))


def network():
    """Return the encoder and its head, whose last batch norm has no weights."""
    net = TinyResNet(DIM, zero_init_residual=True)
    net.fc = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=False),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, DIM, bias=False),
        nn.BatchNorm1d(DIM, affine=False),
    )
    return net


def learning_rate(step):
    """Return the learning rate of a step: a rise over the first epoch, then a cosine."""
    top, epoch = LR * math.sqrt(BATCH), step * EPOCHS / STEPS
    if epoch < 1:
        return top * epoch
    return top * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (EPOCHS - 1)))


def replay(ranks, average, gamma=GAMMA):
    """Return the losses and the states of all steps; see `recorder.check`.

    Args:
        ranks: the record of each process.
        average: whether each image has a moving average u, as in SogCLR.
        gamma: the weight of a new value in it.
    """
    processes, start = len(ranks), ranks[0]["steps"][0]["state"]
    share = BATCH // processes
    f = Network(network(), part_of(start, "base_encoder."), processes)
    u = torch.zeros(IMAGES, dtype=torch.float64)
    lars, found = LARS(momentum=0.9, decay=WD), []

    for step in range(STEPS + 1):
        own = {"u": u.clone()} if average else {}
        states = [{**f.state(rank, "base_encoder."), **own} for rank in range(processes)]
        found.append({"states": states})
        if step == STEPS:
            return found

        # Batch norm is synchronized over the processes, and each view passes alone.
        parts = views_by_rank(ranks, step)
        z = [unit(torch.cat(f.jointly([views[view] for views in parts]))) for view in range(2)]
        index = torch.cat([one["steps"][step]["index"] for one in ranks])

        of_anchors, new = [], u.clone()
        for i in range(BATCH):
            loss, means = 0, []
            for view in range(2):
                anchor, positive = z[view][i], z[1 - view][i]
                # the other images of all processes, in both views
                others = torch.cat([z[v][torch.arange(BATCH) != i] for v in (view, 1 - view)])
                s, s_positive = others @ anchor, positive @ anchor
                if not average:
                    logits = torch.cat([s_positive[None], s]) / T
                    loss += logits.logsumexp(0) - logits[0]
                    continue
                e = (s.detach() / T).exp()
                old = u[index[i]]
                means.append(e.mean() if old == 0 else (1 - gamma) * old + gamma * e.mean())
                loss += (e / means[-1] * s).mean() - s_positive
            of_anchors.append(loss)
            if average:
                new[index[i]] = torch.stack(means).mean()
        u = new
        losses = [part.mean() for part in torch.stack(of_anchors).split(share)]
        found[-1]["losses"] = losses

        # The gradient passes through the features of all processes.
        grads = f.gradients(torch.stack(losses).mean())
        lars.step(f.trained, grads, learning_rate(step))


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_steps_equal_the_plain_loop(recorded, variant, processes):
    ranks = recorded(variant, processes)
    check(ranks, replay(ranks, variant == "sogclr"))


def test_a_plain_loop_with_another_gamma_differs(recorded):
    ranks = recorded("sogclr", 1)
    second_epoch = STEPS // EPOCHS  # the first visits set u
    with pytest.raises(AssertionError, match=f"loss of step {second_epoch}"):
        check(ranks, replay(ranks, True, gamma=0.69))
