"""Eight steps of FNC equal a plain loop written from the paper, in float64."""

import math

import pytest
import torch
from plain import LARS, WIDTH, Network, TinyResNet, part_of, unit
from recorder import BATCH, EPOCHS, PROCESSES, STEPS, check, recordings, views_by_rank
from run_helpers import typed
from torch import nn

VIEWS, DIM, MULTIPLIER, EMA, T = 3, 8, 5, 0.9, 0.1
TOPK, THRESHOLD, LR, WD = 5, 0.9, 0.03, 1e-3
OPTIONS = (
    *typed(f"--support-size {VIEWS - 2} --proj-out-dim {DIM} --temperature {T}"),
    *typed(f"--fn-topk {TOPK} --fn-threshold {THRESHOLD} --lr {LR} --wd {WD}"),
    *typed("--optimizer lars_tf --lr-warmup-epochs 1"),
)
MEMORY = ("--memory-multiplier", MULTIPLIER, "--ema", EMA)
VARIANTS = {
    "attract": ("main_fnc", *OPTIONS, *MEMORY),
    "eliminate": ("main_fnc", *OPTIONS, *MEMORY, "--fn-mode", "eliminate"),
    # one encoder, whose features are compared with those of the batch
    "no memory": ("main_fnc", *OPTIONS, "--memory-multiplier", 0),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recordings(VARIANTS, tmp_path_factory.mktemp("fnc"))


def network():
    """Return the encoder and its head, which ends with a batch norm whose bias stays 0."""
    net, layers = TinyResNet(DIM, zero_init_residual=True), []
    for _ in range(2):
        layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    net.fc = nn.Sequential(*layers, nn.Linear(WIDTH, DIM, bias=False), nn.BatchNorm1d(DIM))
    return net


def learning_rate(step):
    """Return the learning rate of a step: a rise over the first epoch, then a cosine."""
    top, epoch = LR * math.sqrt(BATCH), step * EPOCHS / STEPS
    if epoch < 1:
        return top * epoch
    return top * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (EPOCHS - 1)))


def false_negatives(bank, own):
    """Return the false negatives of an image: the most similar entries above the threshold.

    Args:
        bank: normalized entries.
        own: indices of the entries of the image's own views.
    """
    score = (bank @ bank[own].T).amax(1)
    ranked = [entry for entry in score.argsort(descending=True).tolist() if entry not in own]
    return [entry for entry in ranked[:TOPK] if score[entry] > THRESHOLD]


def anchor_loss(anchor, bank, own, view, false, mode):
    """Return the loss of one view of an image.

    Args:
        anchor: normalized feature of the view.
        bank: normalized entries.
        own: indices of the entries of the image's own views.
        view: index of this view.
        false: indices of the image's false negatives.
        mode: attract or eliminate.
    """
    logits = bank @ anchor / T
    positives = [entry for entry in own if entry != own[view]]
    compared = [entry for entry in range(len(bank)) if entry != own[view]]
    if mode == "attract":
        positives = positives + false
    else:
        compared = [entry for entry in compared if entry not in false]
    return logits[compared].logsumexp(0) - logits[positives].mean()


def replay(ranks, variant, inside=True):
    """Return the losses and the states of all steps; see `recorder.check`.

    Args:
        ranks: the record of each process.
        variant: a name in `VARIANTS`.
        inside: whether the learning rate is inside LARS' momentum.
    """
    processes, start = len(ranks), ranks[0]["steps"][0]["state"]
    share, has_memory, cancelled = BATCH // processes, variant != "no memory", 0
    mode = "eliminate" if variant == "eliminate" else "attract"
    f = Network(network(), part_of(start, "encoder_q."), processes, fixed=["fc.7.bias"])
    if has_memory:
        f_k = Network(network(), part_of(start, "encoder_k."), processes, fixed=True)
        memory, whose = start["memory"].clone(), start["memory_index"].clone()
        assert len(memory) == MULTIPLIER * BATCH
    pointer, lars, found = 0, LARS(momentum=0.9, decay=WD, inside=inside), []

    for step in range(STEPS + 1):
        own_state = [{} for _ in ranks]
        if has_memory:
            # The moving average moves before the forward pass.
            f_k.follow(f, EMA)
            own = {"memory": memory, "memory_index": whose, "memory_ptr": torch.tensor([pointer])}
            own = {name: x.clone() for name, x in own.items()}
            own_state = [{**f_k.state(rank, "encoder_k."), **own} for rank in range(processes)]
        states = [{**f.state(rank, "encoder_q."), **own_state[rank]} for rank in range(processes)]
        found.append({"states": states})
        if step == STEPS:
            # some candidates are above the threshold, but not all
            assert 0.1 * TOPK < cancelled / (STEPS * BATCH) < 0.95 * TOPK
            return found

        # Batch norm normalizes all views of all processes together.
        images = [torch.cat(views) for views in views_by_rank(ranks, step)]
        z = by_view(f.jointly(images))  # [V, joint batch, C]
        bank, entries = z.flatten(0, 1), torch.arange(VIEWS * BATCH)
        if has_memory:
            # The features of the moving average replace the oldest entries, view by view.
            with torch.no_grad():
                keys = by_view(f_k.jointly(images)).flatten(0, 1)
            index = torch.cat([one["steps"][step]["index"] for one in ranks])
            entries = (pointer + entries) % len(memory)
            memory[entries], whose[entries] = keys, index.repeat(VIEWS)
            pointer = (pointer + len(entries)) % len(memory)
            bank = memory.clone()
        entries = entries.view(VIEWS, BATCH)

        of_images = []
        for i in range(BATCH):
            own = entries[:, i].tolist()
            false = false_negatives(bank.detach(), own)
            cancelled += len(false)
            anchors = [
                anchor_loss(z[view, i], bank, own, view, false, mode) for view in range(VIEWS)
            ]
            of_images.append(sum(anchors) * 2 / VIEWS)
        losses = [part.mean() for part in torch.stack(of_images).split(share)]
        found[-1]["losses"] = losses

        # Without a memory, the gradient also passes through the features that are compared with.
        grads = f.gradients(torch.stack(losses).mean())
        lars.step(f.trained, grads, learning_rate(step))


def by_view(of_ranks):
    """Return features [V, joint batch, C], given those of each process [V B, C]."""
    return torch.cat([unit(one).view(VIEWS, -1, DIM) for one in of_ranks], 1)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_steps_equal_the_plain_loop(recorded, variant, processes):
    ranks = recorded(variant, processes)
    check(ranks, replay(ranks, variant))


def test_a_plain_loop_with_the_lr_outside_the_momentum_differs(recorded):
    """The learning rate is 0 in the first step, so the weights differ after the second."""
    ranks = recorded("attract", 1)
    with pytest.raises(AssertionError, match="before step 2"):
        check(ranks, replay(ranks, "attract", inside=False))
