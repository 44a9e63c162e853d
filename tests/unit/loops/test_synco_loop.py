"""Eight steps of MoCo, MoCHI and SynCo equal a plain loop written from the papers, in float64."""

import math

import pytest
import torch
from plain import SGD, WIDTH, Network, TinyResNet, part_of, shuffled_keys, synthetic_negatives, unit
from recorder import BATCH, EPOCHS, PROCESSES, STEPS, check, joint, permutation, recordings
from run_helpers import typed
from torch import nn

DIM, K, M, T, LR = 6, 40, 0.9, 0.2, 0.05
N_HARD, WARMUP, SIGMA, DELTA, ETA = 10, 1, 0.05, 0.02, 0.03
COUNTS = (5, 4, 3, 2, 3, 4)
MOCO = typed(f"--moco-k {K} --moco-dim {DIM} --moco-m {M} --moco-t {T} --lr {LR}")
SYNTHETIC = typed(f"--n-hard {N_HARD} --warmup-epochs {WARMUP}")
SIZES = typed(f"--sigma {SIGMA} --delta {DELTA} --eta {ETA}")
SIX = tuple(word for i, n in enumerate(COUNTS, 1) for word in (f"--n{i}", n))
VARIANTS = {
    "mocov1": ("main_synco", *MOCO, "--schedule", 1, 3),
    "mochi": ("main_synco", *MOCO, "--mlp", "--cos", *SYNTHETIC, "--n1", 5, "--n3", 3),
    "synco": ("main_synco", *MOCO, "--mlp", "--cos", "--aug-plus", *SYNTHETIC, *SIX, *SIZES),
}
OF = {"mocov1": (0,) * 6, "mochi": (5, 0, 3, 0, 0, 0), "synco": COUNTS}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recordings(VARIANTS, tmp_path_factory.mktemp("synco"))


def replay(ranks, counts, mlp, lr_of, warmup=WARMUP):
    """Return the losses and the states of all steps; see `recorder.check`."""
    processes, start = len(ranks), ranks[0]["steps"][0]["state"]
    share = BATCH // processes

    def network(prefix, fixed):
        net = TinyResNet(DIM)
        if mlp:
            net.fc = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, DIM))
        return Network(net, part_of(start, prefix), processes, fixed)

    f_q, f_k = network("encoder_q.", ()), network("encoder_k.", True)
    queue, pointer = start["queue"].clone(), 0
    sgd, found = SGD(momentum=0.9, decay=1e-4), []

    for step in range(STEPS + 1):
        # The key encoder moves before the forward pass.
        f_k.follow(f_q, M)
        states = [state(f_q, f_k, rank, queue, pointer) for rank in range(processes)]
        found.append({"states": states})
        if step == STEPS:
            return found
        now = [one["steps"][step] for one in ranks]
        views = joint(ranks, step)

        # The keys pass in groups of the shuffled joint batch, and return to their order.
        order = permutation(ranks, step)
        k = shuffled_keys(f_k, views[1], order)

        losses = []
        for rank, one in enumerate(now):
            mine = slice(rank * share, (rank + 1) * share)
            q = unit(f_q.on(rank, views[0][mine]))
            per_query = []
            for i in range(share):
                negatives = queue
                if sum(counts) and one["epoch"] >= warmup:
                    s = queue @ q[i].detach()
                    hard = queue[s.argsort(descending=True)[:N_HARD]]
                    draws = {name: x[i] for name, x in one["draws"][0].items()}
                    h = synthetic_negatives(q[i].detach(), hard, counts, draws, DELTA, ETA)
                    negatives = torch.cat([queue, h])
                logits = torch.cat([(q[i] @ k[mine][i])[None], negatives @ q[i]]) / T
                per_query.append(logits.logsumexp(0) - logits[0])
            losses.append(torch.stack(per_query).mean())
        found[-1]["losses"] = losses

        # Each process has the mean gradient of all processes.
        grads = f_q.gradients(torch.stack(losses).mean())
        sgd.step(f_q.trained, grads, lr_of(step * EPOCHS // STEPS))

        # The keys of all processes replace the oldest entries.
        queue = queue.clone()
        for key in k:
            queue[pointer] = key
            pointer = (pointer + 1) % K
        if (step + 1) % (STEPS // EPOCHS) == 0:
            f_q.share_statistics()
            f_k.share_statistics()


def state(f_q, f_k, rank, queue, pointer):
    own = {"queue": queue, "queue_ptr": torch.tensor([pointer])}
    return {**f_q.state(rank, "encoder_q."), **f_k.state(rank, "encoder_k."), **own}


def cosine(epoch):
    return LR * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))


def milestones(epoch):
    return LR * 0.1 ** ((epoch >= 1) + (epoch >= 3))


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_steps_equal_the_plain_loop(recorded, variant, processes):
    ranks = recorded(variant, processes)
    v1 = variant == "mocov1"
    mine = replay(ranks, OF[variant], not v1, milestones if v1 else cosine)
    check(ranks, mine)


def test_a_plain_loop_with_later_negatives_differs(recorded):
    ranks = recorded("synco", 1)
    with pytest.raises(AssertionError, match="loss of step 2"):
        check(ranks, replay(ranks, COUNTS, True, cosine, warmup=2))


def test_sizes_and_ranges_of_the_draws(recorded):
    """Check the recorded random draws, which the replay uses without a check."""
    (one,) = recorded("synco", 1)
    draws = [step["draws"][0] for step in one["steps"] if "draws" in step]
    assert len(draws) == STEPS - WARMUP * STEPS // EPOCHS
    noise = torch.cat([x["noise"].flatten() for x in draws])
    assert abs(noise.std() / SIGMA - 1) < 0.1
    assert abs(noise.mean()) < SIGMA / 10
    weight = torch.cat([x["weight"] for x in draws])  # of types 1, 2 and 3
    a, b, g = weight.split(COUNTS[:3], 1)
    for w, low, high in ((a, 0, 0.5), (b, 1, 1.5), (g, 0, 1)):
        assert low <= w.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < w.max() < high
    for name in ("first", "second"):
        assert torch.cat([x[name].flatten() for x in draws]).unique().tolist() == [*range(N_HARD)]
