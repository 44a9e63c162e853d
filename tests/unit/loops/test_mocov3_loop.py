"""Eight steps of MoCo v3, a ResNet and a ViT, equal a plain loop in the order of its authors' code.

Both are in float64.
"""

import math
from itertools import pairwise

import pytest
import timm
import torch
from plain import LARS, WIDTH, AdamW, Network, TinyResNet, part_of, unit
from recorder import BATCH, EPOCHS, PROCESSES, STEPS, check, recordings, views_by_rank
from run_helpers import typed
from torch import nn

DIM, HIDDEN, M, WARMUP = 6, 20, 0.9, 1
RESNET = {"lr": 0.6, "wd": 1e-3, "T": 1.0}  # LARS, rising momentum
VIT = {"lr": 0.02, "wd": 0.1, "T": 0.2}  # AdamW, constant momentum, frozen patch projection


def words(settings):
    options = f"--moco-dim {DIM} --moco-mlp-dim {HIDDEN} --moco-m {M} --warmup-epochs {WARMUP}"
    options += f" --lr {settings['lr']} --wd {settings['wd']} --moco-t {settings['T']}"
    return typed(options)


VARIANTS = {
    "resnet": ("main_mocov3", *words(RESNET), "--moco-m-cos"),
    "vit": (
        "main_mocov3",
        *words(VIT),
        *typed("-a test_vit --image-size 32 --optimizer adamw --stop-grad-conv1"),
    ),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recordings(VARIANTS, tmp_path_factory.mktemp("mocov3"))


def mlp(*widths):
    """Return linear layers without bias, with batch norm and ReLU between them."""
    layers = []
    for width, out in pairwise(widths):
        layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU()]
    return layers[:-2]


def last_norm():
    return nn.BatchNorm1d(DIM, affine=False)


def resnet():
    net = TinyResNet(DIM, zero_init_residual=True)
    net.fc = nn.Sequential(*mlp(WIDTH, HIDDEN, DIM), last_norm())
    return net


def vit():
    net = timm.create_model("test_vit", num_classes=DIM, img_size=32)
    net.head = nn.Sequential(*mlp(net.num_features, HIDDEN, HIDDEN, DIM), last_norm())
    return net


def learning_rate(step, lr):
    """Return the learning rate of a step: a rise over the first epoch, then a cosine to 0."""
    top, epoch = lr * BATCH / 256, step * EPOCHS / STEPS
    if epoch < WARMUP:
        return top * epoch / WARMUP
    return top * 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP) / (EPOCHS - WARMUP)))


def rising(step):
    """Return the momentum of the update in a step: m at step 0, 1 after the last step."""
    return 1 - 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (1 - M)


def constant(_):
    return M


def replay(ranks, variant, momentum):
    """Return the losses and the states of all steps; see `recorder.check`."""
    processes, start = len(ranks), ranks[0]["steps"][0]["state"]
    share, is_vit = BATCH // processes, variant == "vit"
    settings = VIT if is_vit else RESNET
    make, T = vit if is_vit else resnet, settings["T"]
    frozen = ("patch_embed.proj.weight", "patch_embed.proj.bias") if is_vit else ()
    head = nn.Sequential(*mlp(DIM, HIDDEN, DIM), *([last_norm()] if is_vit else []))
    networks = {
        "base_encoder.": Network(make(), part_of(start, "base_encoder."), processes, frozen),
        "momentum_encoder.": Network(make(), part_of(start, "momentum_encoder."), processes, True),
        "predictor.": Network(head, part_of(start, "predictor."), processes),
    }
    encoder, average, predictor = networks.values()
    trained = {f"{of}{name}": w for of, f in networks.items() for name, w in f.trained.items()}
    adamw = AdamW(settings["wd"], decays_all=True)
    optimizer = adamw if is_vit else LARS(momentum=0.9, decay=settings["wd"])
    found = []

    for step in range(STEPS + 1):
        # The authors' code moves the average after the queries. They do not depend on it.
        average.follow(encoder, momentum(step))
        states = [
            {name: x for of, f in networks.items() for name, x in f.state(rank, of).items()}
            for rank in range(processes)
        ]
        found.append({"states": states})
        if step == STEPS:
            return found

        # Batch norm is synchronized over the processes, and each view passes alone.
        parts, q, k = views_by_rank(ranks, step), [], []
        for view in range(2):
            q.append(predictor.jointly(encoder.jointly([views[view] for views in parts])))
        for view in range(2):
            with torch.no_grad():
                keys = average.jointly([views[view] for views in parts])
            k.append(unit(torch.cat(keys)))

        losses = []
        for rank in range(processes):
            loss = 0
            for view in range(2):
                for i, query in enumerate(unit(q[view][rank])):
                    logits = k[1 - view] @ query / T
                    own = logits[rank * share + i]
                    loss += 2 * T * (logits.logsumexp(0) - own) / share
            losses.append(loss)
        found[-1]["losses"] = losses

        loss = torch.stack(losses).mean()
        grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        optimizer.step(trained, grads, learning_rate(step, settings["lr"]))


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_steps_equal_the_plain_loop(recorded, variant, processes):
    ranks = recorded(variant, processes)
    check(ranks, replay(ranks, variant, constant if variant == "vit" else rising))


def test_a_plain_loop_with_an_earlier_momentum_differs(recorded):
    ranks = recorded("resnet", 1)
    with pytest.raises(AssertionError, match=r"momentum_encoder.* before step"):
        check(ranks, replay(ranks, "resnet", lambda step: rising(max(0, step - 1))))
