"""Eight steps of AdCo equal a plain loop written from the paper, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from plain import SGD, WIDTH, Network, TinyResNet, gradients, part_of, shuffled_keys, unit
from recorder import BATCH, EPOCHS, PROCESSES, STEPS, check, joint, permutation, recordings
from run_helpers import typed
from torch import nn

DIM, K, M, T, LR, FINAL = 6, 40, 0.9, 0.12, 0.05, 0.006
MEM_LR, MEM_T, MEM_WD, MEM_MOMENTUM = 0.3, 0.05, 1e-3, 0.8
ADCO = (
    *typed(f"--cluster {K} --moco-dim {DIM} --moco-m {M} --moco-t {T}"),
    *typed(f"--lr {LR} --lr-final {FINAL} --wd 1e-4 --memory-lr {MEM_LR} --mem-t {MEM_T}"),
    *typed(f"--mem-wd {MEM_WD} --mem-momentum {MEM_MOMENTUM}"),
)
VARIANTS = {
    "one direction": ("main_adco", *ADCO, "--no-ad-init"),
    "symmetric": ("main_adco", *ADCO, "--no-ad-init", "--sym", 1),
    "multi-crop": ("main_adco", *ADCO, "--no-ad-init", "--multi-crop", 1),
    # the bank is filled with keys before the first of the eight steps
    "symmetric, filled": ("main_adco", *ADCO, "--sym", 1),
    "multi-crop, filled": ("main_adco", *ADCO, "--multi-crop", 1),
}
# pairs of a query view and a key view
ONE, BOTH, CROPS = [(0, 1)], [(0, 1), (1, 0)], [(query, 0) for query in range(1, 6)]
PAIRS = dict(zip(VARIANTS, (ONE, BOTH, CROPS, BOTH, CROPS), strict=True))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recordings(VARIANTS, tmp_path_factory.mktemp("adco"))


def replay(ranks, pairs, mem_t=MEM_T):
    """Return the losses and the states of all steps; see `recorder.check`."""
    filling, directions = len(ranks[0]["steps"]) - STEPS, 1 + (pairs == BOTH)
    processes, start = len(ranks), ranks[0]["steps"][0]["state"]
    share = BATCH // processes

    def network(prefix, fixed):
        net = TinyResNet(DIM)
        net.fc = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, DIM))
        return Network(net, part_of(start, prefix), processes, fixed)

    f_q, f_k = network("encoder_q.", ()), network("encoder_k.", True)
    bank, velocity = start["bank"].clone(), torch.zeros(K, DIM, dtype=torch.float64)
    sgd, found = SGD(momentum=0.9, decay=1e-4), []

    for step in range(-filling, STEPS + 1):
        # The key encoder moves before the forward pass.
        f_k.follow(f_q, M)
        own = {"bank": bank.clone(), "bank_velocity": velocity.clone()}
        states = [
            {**f_q.state(rank, "encoder_q."), **f_k.state(rank, "encoder_k."), **own}
            for rank in range(processes)
        ]
        found.append({"states": states})
        if step == STEPS:
            return found

        views = joint(ranks, filling + step)
        shares = [slice(rank * share, (rank + 1) * share) for rank in range(processes)]
        if step < 0:
            # The first view is compared with the last, and with the bank alone.
            k = shuffled_keys(f_k, views[-1], permutation(ranks, filling + step))
            q = [unit(f_q.on(rank, views[0][mine])) for rank, mine in enumerate(shares)]
            losses = [
                torch.stack([nce(q[i], k[mine][i], bank) for i in range(share)]).mean()
                for q, mine in zip(q, shares, strict=True)
            ]
            found[-1]["losses"] = losses
            sgd.step(f_q.trained, f_q.gradients(torch.stack(losses).mean()), LR)
            for entry, key in enumerate(k, (filling + step) * BATCH):
                if entry < K:
                    bank[entry] = key
            if step == -1:
                f_k.follow(f_q, 0)
            continue

        key_views = sorted({key for _, key in pairs})
        k = {
            view: shuffled_keys(f_k, views[view], permutation(ranks, filling + step, number))
            for number, view in enumerate(key_views)
        }

        # The loss of the encoder, and that of the bank, which has another temperature.
        bank.requires_grad_()
        losses, bank_losses = [], []
        for rank, mine in enumerate(shares):
            label = torch.arange(BATCH)[mine]  # the own key among the keys of all processes
            queries = sorted({query for query, _ in pairs})
            q = {view: unit(f_q.on(rank, views[view][mine])) for view in queries}
            loss, bank_loss = 0, 0
            for query, key in pairs:
                loss += batch_nce(q[query], k[key], bank.detach(), label, T) / directions
                bank_loss += batch_nce(q[query].detach(), k[key], bank, label, mem_t) / directions
            losses.append(loss)
            bank_losses.append(bank_loss)
        found[-1]["losses"] = losses

        # First the encoder descends, then the bank ascends from the same features.
        grads = f_q.gradients(torch.stack(losses).mean())
        to_bank = gradients(torch.stack(bank_losses).mean(), {"bank": bank})["bank"]
        epoch = step * EPOCHS // STEPS
        cosine = 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        sgd.step(f_q.trained, grads, FINAL + (LR - FINAL) * cosine)
        bank = bank.detach()
        velocity = MEM_MOMENTUM * velocity - to_bank + MEM_WD * bank
        bank = bank - MEM_LR * velocity
        if (step + 1) % (STEPS // EPOCHS) == 0:
            f_q.share_statistics()
            f_k.share_statistics()


def nce(q, k, bank):
    """Return the loss of one query, its key and the bank."""
    logits = torch.cat([(q @ k)[None], unit(bank) @ q]) / T
    return logits.logsumexp(0) - logits[0]


def batch_nce(q, k, bank, label, temperature):
    """Return the loss of queries, the keys of the joint batch, and the bank."""
    logits = torch.cat([q @ k.T, q @ unit(bank).T], 1)
    return F.cross_entropy(logits / temperature, label)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_steps_equal_the_plain_loop(recorded, variant, processes):
    ranks = recorded(variant, processes)
    filling = -(-K // BATCH) if "filled" in variant else 0
    assert len(ranks[0]["steps"]) == filling + STEPS
    check(ranks, replay(ranks, PAIRS[variant]))


def test_a_plain_loop_with_one_temperature_differs(recorded):
    ranks = recorded("one direction", 1)
    with pytest.raises(AssertionError, match="bank before step 1"):
        check(ranks, replay(ranks, ONE, mem_t=T))
