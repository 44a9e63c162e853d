"""Eight steps of MoBY, SynCo-v2 and BYOL equal a plain loop written from the papers, in float64."""

import math

import pytest
import timm
import torch
from plain import AdamW, Network, clipped, part_of, synthetic_negatives, unit
from recorder import BATCH, EPOCHS, PROCESSES, STEPS, check, recordings
from run_helpers import typed
from torch import nn

DIM, HIDDEN, K, M, T, DROP = 6, 20, 40, 0.9, 0.2, 0.3
LR, LR_FROM, LR_FINAL, WARMUP, WD, CLIP = 0.08, 0.008, 0.004, 1, 0.05, 0.5
COUNTS, N_HARD, FIRST, LAST, DELTA, ETA = (5, 4, 3, 2, 3, 4), 10, 1, 3, 0.02, 0.03
BOTH = (
    *typed(f"-a test_vit --image-size 32 --mlp-dim {HIDDEN} --moco-dim {DIM} --moco-m {M}"),
    *typed(f"--online-drop-path {DROP} --lr {LR} --lr-final {LR_FINAL} --wd {WD}"),
    *typed(f"--lr-warmup-epochs {WARMUP} --clip-grad {CLIP}"),
)
AUTHORS = typed(f"--lr-by previous-step --lr-warmup-from {LR_FROM}")
QUEUE = typed(f"--queue {K} --moco-t {T}")
SIX = tuple(word for i, n in enumerate(COUNTS, 1) for word in (f"--n{i}", n))
SYNTHETIC = (
    *typed(f"--n-hard {N_HARD} --synthetic-first {FIRST} --synthetic-last {LAST}"),
    *typed(f"--sigma 0.05 --delta {DELTA} --eta {ETA}"),
)
VARIANTS = {
    "moby": ("main_moby", *BOTH, *QUEUE, *AUTHORS),
    "synco": ("main_moby", "--method", "synco", *BOTH, *QUEUE, *AUTHORS, *SYNTHETIC, *SIX),
    "byol": ("main_moby", "--method", "byol", *BOTH, *typed("--lr-by step --lr-warmup-from 0")),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recordings(VARIANTS, tmp_path_factory.mktemp("moby"))


def head(width):
    return nn.Sequential(
        nn.Linear(width, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)
    )


def learning_rate(step, authors):
    """Return the learning rate of a step.

    It rises over the first epoch, and then falls along a cosine. In the authors' code, the cosine
    spans all steps, and each step has the learning rate of the step before it.
    """
    top, start, final = (lr * BATCH / 256 for lr in (LR, LR_FROM if authors else 0, LR_FINAL))
    step = max(0, step - 1) if authors else step
    rise, first = WARMUP * STEPS / EPOCHS, 0 if authors else WARMUP * STEPS / EPOCHS
    if step < rise:
        return start + (top - start) * step / rise
    passed = (step - first) / (STEPS - first)
    return final + (top - final) * 0.5 * (1 + math.cos(math.pi * passed))


def momentum(step):
    """Return the momentum of the target's update after so many steps."""
    return 1 - (1 - M) * (1 + math.cos(math.pi * step / STEPS)) / 2


def direction(p, k, queue, draws):
    """Return MoBY's loss of the predictions of one view and the target features of the other.

    With `draws`, each query has synthetic negatives, too.
    """
    losses = []
    for i in range(len(p)):
        negatives = queue
        if draws:
            s = queue @ p[i].detach()
            hard = queue[s.argsort(descending=True)[:N_HARD]]
            mine = {name: x[i] for name, x in draws.items()}
            h = synthetic_negatives(p[i].detach(), hard, COUNTS, mine, DELTA, ETA)
            negatives = torch.cat([queue, h])
        logits = torch.cat([(p[i] @ k[i])[None], negatives @ p[i]]) / T
        losses.append(logits.logsumexp(0) - logits[0])
    return torch.stack(losses).mean()


def replay(ranks, method, momentum=momentum):
    """Return the losses and the states of all steps; see `recorder.check`."""
    processes, start = len(ranks), ranks[0]["steps"][0]["state"]

    def network(net, name, fixed=()):
        return Network(net, part_of(start, f"{name}."), processes, fixed)

    vit = {"num_classes": 0, "img_size": 32}
    online = timm.create_model("test_vit", drop_path_rate=DROP, **vit)
    target = timm.create_model("test_vit", **vit)
    width = online.num_features
    encoder, encoder_k = network(online, "encoder"), network(target, "encoder_k", True)
    projector = network(head(width), "projector")
    projector_k = network(head(width), "projector_k", True)
    predictor = network(head(DIM), "predictor")
    networks = {
        "encoder.": encoder,
        "projector.": projector,
        "predictor.": predictor,
        "encoder_k.": encoder_k,
        "projector_k.": projector_k,
    }
    trained = {f"{of}{name}": w for of, f in networks.items() for name, w in f.trained.items()}
    queues, pointer = [], 0
    if method != "byol":
        queues = [start[f"queue{view}"].clone() for view in (1, 2)]
    adam, found = AdamW(WD), []

    for step in range(STEPS + 1):
        # The target moves before the forward pass. Before the first, both are equal.
        encoder_k.follow(encoder, momentum(step))
        projector_k.follow(projector, momentum(step))
        own = {f"queue{view}": queue.clone() for view, queue in enumerate(queues, 1)}
        own |= {"queue_ptr": torch.tensor([pointer])} if queues else {}
        states = [
            own | {name: x for of, f in networks.items() for name, x in f.state(rank, of).items()}
            for rank in range(processes)
        ]
        found.append({"states": states})
        if step == STEPS:
            return found
        now = [one["steps"][step] for one in ranks]

        # Stochastic depth draws from the global generator of each process, view after view.
        features = []
        for rank, one in enumerate(now):
            torch.set_rng_state(one["random"])
            features.append([encoder.on(rank, view) for view in one["inputs"]])
        p, k = [], []
        for view in range(2):
            # Batch norm of the heads is synchronized over the processes.
            z = projector.jointly([of_views[view] for of_views in features])
            p.append([unit(one) for one in predictor.jointly(z)])
            with torch.no_grad():
                z_k = [encoder_k.on(rank, one["inputs"][view]) for rank, one in enumerate(now)]
                k.append([unit(one) for one in projector_k.jointly(z_k)])

        losses = []
        for rank, one in enumerate(now):
            draws = [None, None]
            if method == "synco" and FIRST <= one["epoch"] < LAST:
                draws = one["draws"]
            if method == "byol":
                cosines = [(p[view][rank] * k[1 - view][rank]).sum(1) for view in range(2)]
                losses.append(sum((2 - 2 * cosine).mean() for cosine in cosines) / 2)
                continue
            of_view_1 = direction(p[0][rank], k[1][rank], queues[1], draws[0])
            of_view_2 = direction(p[1][rank], k[0][rank], queues[0], draws[1])
            losses.append(of_view_1 + of_view_2)
        found[-1]["losses"] = losses

        # The norm of the mean gradient is clipped.
        loss = torch.stack(losses).mean()
        grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        assert norm > CLIP or method == "byol"
        adam.step(trained, clipped(grads, CLIP), learning_rate(step, method != "byol"))

        # The target features of each view replace the oldest of its queue.
        keys = [torch.cat(of_ranks) for of_ranks in k]
        indices = (pointer + torch.arange(BATCH)) % K
        if queues:
            for queue, of_view in zip(queues, keys, strict=True):
                queue[indices] = of_view
            pointer = (pointer + BATCH) % K


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("method", VARIANTS)
def test_eight_steps_equal_the_plain_loop(recorded, method, processes):
    ranks = recorded(method, processes)
    check(ranks, replay(ranks, method))


def test_a_plain_loop_with_an_earlier_momentum_differs(recorded):
    ranks = recorded("moby", 1)
    with pytest.raises(AssertionError, match=r"encoder_k.* before step 1"):
        check(ranks, replay(ranks, "moby", momentum=lambda step: momentum(max(0, step - 1))))
