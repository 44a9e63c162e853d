"""Eight steps of the linear probe equal a plain loop written from the papers, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from plain import SGD, WIDTH, TinyResNet, clipped
from recorder import BATCH, CLASSES, EPOCHS, PROCESSES, STEPS, check, recordings
from run_helpers import typed
from torch import nn

LRS, DECAYS, CLIP = (2.0, 0.5), (0.0, 0.01), 0.17
VARIANTS = {
    # MoCo's protocol, with several classifiers
    "steps": ("main_lincls", "--lr", *LRS, "--wd", *DECAYS, "--schedule", 1, 3),
    # that of MoBY
    "cosine": (
        *("main_lincls", "--lr", *LRS, "--cos", "--nesterov", "--clip-grad", CLIP),
        *typed("--lr-by step --lr-warmup-epochs 1 --learning-rate-scaling linear"),
    ),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recordings(VARIANTS, tmp_path_factory.mktemp("probe"))


def factor(variant, step):
    """Return the factor of each learning rate in a step."""
    epoch = step * EPOCHS / STEPS
    if variant == "steps":
        return 0.1 ** ((epoch >= 1) + (epoch >= 3))
    if epoch < 1:
        return BATCH / 256 * epoch
    return BATCH / 256 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (EPOCHS - 1)))


def replay(ranks, variant, decays):
    """Return the losses and the states of all steps; see `recorder.check`.

    The features are taken from the record. They were computed in float32;
    `test_features_are_those_of_the_frozen_network_in_eval_mode` checks them.
    """
    start = ranks[0]["steps"][0]["state"]
    settings = [(lr, decay) for lr in LRS for decay in decays]
    nesterov = variant == "cosine"
    heads = [
        {name: start[f"fc.{i}.{name}"].clone().requires_grad_() for name in ("weight", "bias")}
        for i in range(len(settings))
    ]
    optimizers = [SGD(0.9, decay, nesterov) for _, decay in settings]
    frozen = {name: x for name, x in start.items() if not name.startswith("fc.")}
    found, clips = [], 0

    for step in range(STEPS + 1):
        new = {
            f"fc.{i}.{name}": x.detach().clone()
            for i, head in enumerate(heads)
            for name, x in head.items()
        }
        found.append({"states": [{**frozen, **new}] * len(ranks)})
        if step == STEPS:
            # some gradients are clipped, others are not
            assert not nesterov or 0 < clips < STEPS * len(heads)
            return found
        now = [one["steps"][step] for one in ranks]
        features = torch.cat([one["inputs"] for one in now])
        label = torch.cat([one["label"] for one in now])

        losses = 0
        for head, (lr, _), sgd in zip(heads, settings, optimizers, strict=True):
            logits = features @ head["weight"].T + head["bias"]
            of_images = F.cross_entropy(logits, label, reduction="none")
            losses = losses + torch.stack([x.mean() for x in of_images.tensor_split(len(ranks))])

            # Each classifier has its own gradient norm, learning rate and momentum.
            grads = torch.autograd.grad(of_images.mean(), list(head.values()))
            grads = dict(zip(head, grads, strict=True))
            if nesterov:
                clips += torch.cat([g.flatten() for g in grads.values()]).norm() > CLIP
                grads = clipped(grads, CLIP)
            sgd.step(head, grads, lr * factor(variant, step))
        found[-1]["losses"] = list(losses)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_steps_equal_the_plain_loop(recorded, variant, processes):
    ranks = recorded(variant, processes)
    check(ranks, replay(ranks, variant, DECAYS if variant == "steps" else [0.0]))


@pytest.mark.parametrize("processes", PROCESSES)
def test_features_are_those_of_the_frozen_network_in_eval_mode(recorded, processes):
    net = TinyResNet(CLASSES)
    net.fc = nn.Identity()
    for one in recorded("steps", processes):
        first = one["steps"][0]["state"]
        net.load_state_dict({name: x for name, x in first.items() if not name.startswith("fc.")})
        for step in one["steps"]:
            (view,) = step["views"]
            features = net.eval()(view)
            assert features.shape == (BATCH // processes, WIDTH)
            torch.testing.assert_close(step["inputs"].float(), features, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                of_training = TinyResNet.forward(net.train(), view)
            net.load_state_dict({n: x for n, x in first.items() if not n.startswith("fc.")})
            assert (of_training - features).abs().max() > 0.1


def test_classifiers_start_alike_and_learn_differently(recorded):
    (one,) = recorded("steps", 1)
    first, last = one["steps"][0]["state"], one["final"]
    assert first["fc.0.weight"].shape == (CLASSES, WIDTH)
    assert 0.008 < first["fc.0.weight"].std() < 0.012
    for i in range(4):
        assert torch.equal(first[f"fc.{i}.weight"], first["fc.0.weight"])
        assert not first[f"fc.{i}.bias"].any()
        for other in range(i):
            assert not torch.equal(last[f"fc.{i}.weight"], last[f"fc.{other}.weight"])
