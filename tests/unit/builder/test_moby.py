"""Compare MoBY, SynCo-v2 and BYOL with slow versions in float64.

The tests cover losses, gradients, queues, momentum, and two ranks.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, on_two_ranks, settings
from torch import nn

import main_moby
from moco import distributed
from moco.builder.byol import BYOL
from moco.builder.moby import MoBY
from moco.encoder.networks import projector
from moco.loss import synthetic
from moco.loss.hardest import hardest
from moco.rng import NEGATIVES, Progress
from moco.sections_negatives import Schedule

B, DIM, K, M, T, LR, STEPS, EPOCHS = 3, 4, 11, 0.9, 0.2, 0.1, 3, 4
KIND = synthetic.Synthetic(n_hard=5, counts=(2, 3, 2, 1, 2, 1), sigma=0.1)


def encoder(online):
    torch.manual_seed(0 if online else 1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8)
    )


def build(method):
    parts = (
        encoder(True),
        encoder(False),
        projector([8, 10, DIM], bias=True),
        projector([DIM, 10, DIM], bias=True),
    )
    if method == "byol":
        return BYOL(*parts, M).double()
    more = {"synthetic": Schedule(KIND, first=1, last=3)} if method == "synco" else {}
    return MoBY(*parts, M, dim=DIM, K=K, T=T, **more).double()


def at(step):
    return Progress(seed=3, epoch=step // STEPS, step=step, steps_per_epoch=STEPS, epochs=EPOCHS)


def views(step, n=B, size=9):
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)
    ]


def cross_entropy(q, k, queue, mixed):
    """Return the loss, computed query by query.

    The similarities of the synthetic negatives follow those of the queue.
    """
    losses = []
    for i in range(len(q)):
        logits = [q[i] @ k[i], *(q[i] @ key for key in queue), *mixed[i]]
        losses.append(F.cross_entropy(torch.stack(logits)[None] / T, torch.tensor([0])))
    return sum(losses) / len(losses)


def mixtures(q, queue, step, counter, method):
    if method != "synco" or not 1 <= step // STEPS < 3:
        return [[]] * len(q)
    s = q @ queue.T
    draws = synthetic.draw(
        KIND, *q.shape, at(step).generator(NEGATIVES, "cpu", 0, counter), torch.float64
    )
    return synthetic.similarities(q, queue, s, hardest(s, KIND.n_hard), KIND, draws)


@pytest.mark.parametrize("method", ["moby", "synco", "byol"])
def test_the_whole_method_is_the_slow_one(method):
    model = build(method)
    f_k, g_k = copy.deepcopy(model.encoder), copy.deepcopy(model.projector)
    queues = (
        {view: list(getattr(model, f"queue{view}").clone()) for view in (1, 2)}
        if method != "byol"
        else {}
    )
    total, mixed_steps = STEPS * EPOCHS, 0
    for step in range(total):
        f, g, h = (
            copy.deepcopy(part) for part in (model.encoder, model.projector, model.predictor)
        )
        x = views(step)
        p = [F.normalize(h(g(f(view))), dim=1) for view in x]
        with torch.no_grad():
            k = [F.normalize(g_k(f_k(view)), dim=1) for view in x]
        if method == "byol":
            slow = sum(2 - 2 * p[a][i] @ k[1 - a][i] for a in (0, 1) for i in range(B)) / (2 * B)
        else:
            slow = 0
            for a, view in (
                (0, 2),
                (1, 1),
            ):  # the first view's predictions face the second's keys, and these keys' queue
                queue = torch.stack(queues[view])
                mixed = mixtures(p[a], queue, step, a, method)
                mixed_steps += len(mixed[0]) > 0
                slow = slow + cross_entropy(p[a], k[1 - a], queue, mixed)
        slow.backward()
        loss, _ = model(x, torch.arange(B), at(step))
        loss.backward()
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        for mine, theirs in ((model.encoder, f), (model.projector, g), (model.predictor, h)):
            for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10)
        with torch.no_grad():
            for part in (model.encoder, model.projector, model.predictor):
                for parameter in part.parameters():
                    parameter -= LR * parameter.grad
                    parameter.grad = None
            m = 1 - (1 - M) * (math.cos(math.pi * (step + 1) / total) + 1) / 2
            assert model.momentum() == pytest.approx(m, abs=1e-12)
            for target, online in ((f_k, model.encoder), (g_k, model.projector)):
                for old, new in zip(target.parameters(), online.parameters(), strict=True):
                    old.copy_(m * old + (1 - m) * new)
        model.after_step()
        for mine, theirs in ((model.encoder_k, f_k), (model.projector_k, g_k)):
            for name, tensor in mine.state_dict().items():
                torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=1e-10)
        for view, queue in queues.items():  # a ring, into which each view's own keys go
            for i, key in enumerate(k[view - 1]):
                queue[(step * B + i) % K] = key
            torch.testing.assert_close(
                getattr(model, f"queue{view}"), torch.stack(queue), rtol=0, atol=1e-10
            )
    assert model.momentum() == 1.0
    assert mixed_steps == (2 * 2 * STEPS if method == "synco" else 0)
    if queues:
        assert not torch.equal(model.queue1, model.queue2) and int(model.queue_ptr) == total * B % K


def test_the_target_starts_as_the_online_network_and_gets_no_gradient():
    model = build("moby")
    for online, target in ((model.encoder, model.encoder_k), (model.projector, model.projector_k)):
        assert all(map(torch.equal, online.state_dict().values(), target.state_dict().values()))
        assert not any(p.requires_grad for p in target.parameters())
    model(views(0), torch.arange(B), at(0))[0].backward()
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert all(
        p.grad is not None for part in model.grad_norm_modules.values() for p in part.parameters()
    )


def test_byol_lies_between_0_and_4():
    model = build("byol")
    z = F.normalize(torch.randn(2, 5, DIM, dtype=torch.float64), dim=2)
    assert model.contrast([z[0], z[1]], [z[1], z[0]], at(0))[0] == pytest.approx(0, abs=1e-12)
    assert model.contrast([z[0], z[1]], [-z[1], -z[0]], at(0))[0] == pytest.approx(4)


@pytest.mark.parametrize("arch", ["vit_tiny", "swin_tiny"])
def test_only_the_online_encoder_has_stochastic_depth(arch):
    words = f"photos -a {arch} --image-size 64 --mlp-dim 10 --moco-dim 4 --queue 11"
    model = main_moby.build(main_moby.complete(main_moby.parser().parse(words.split())))
    online, target = (
        [module.drop_prob for module in encoder.modules() if "drop_prob" in vars(module)]
        for encoder in (model.encoder, model.encoder_k)
    )
    assert max(online) == pytest.approx(0.2) and set(target) <= {0.0}


# recipes


COUNTS = [f"n{i}" for i in range(1, 7)]


@pytest.mark.parametrize("arch", ["vit_small", "swin_tiny"])
@pytest.mark.parametrize(
    ("suffix", "counts", "first", "last"),
    [("", [128] * 6, 30, 100), ("_as_run", [128] * 3 + [64] * 3, 120, 300)],
)
def test_synthetic_negatives_of_the_recipes(arch, suffix, counts, first, last):
    args = settings(main_moby, ["DIR", "--cfg", ROOT / "configs" / f"synco_{arch}{suffix}.yaml"])
    assert (args.method, args.arch, args.epochs, args.amp) == ("synco", arch, 300, "off")
    assert [getattr(args, name) for name in COUNTS] == counts
    assert (args.synthetic_first, args.synthetic_last) == (first, last)
    assert (args.n_hard, args.sigma, args.delta, args.eta) == (256, 0.1, 0.01, 0.01)


def test_the_recipe_of_the_published_command_is_vit_small():
    alias, named = (
        vars(settings(main_moby, ["DIR", "--cfg", ROOT / "configs" / f"moby_vit_{size}.yaml"]))
        for size in ("tiny", "small")
    )
    assert {name for name in alias if alias[name] != named[name]} == {"cfg"}
    assert alias["arch"] == "vit_small"


# two ranks


OPTIONS = (
    "photos -a test_efficientnet --image-size 32 --mlp-dim 10 --moco-dim 4 --queue 11 --method"
).split()


def four_steps(rank, method):
    """What the script builds, on this rank's half of the joint batch, or alone on all of it."""
    config = main_moby.complete(main_moby.parser().parse([*OPTIONS, method]))
    torch.manual_seed(0)
    model, found = (
        distributed.sync_batch_norm(main_moby.build(config), torch.device("cpu")).double(),
        [],
    )
    ddp = distributed.data_parallel(model)
    mine = slice(None) if rank is None else slice(B * rank, B * rank + B)
    for step in range(4):
        loss, metrics = ddp(
            [view[mine] for view in views(step, 2 * B, 32)], torch.arange(B), at(step)
        )
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = [p.grad.clone() for p in trained]
        with torch.no_grad():
            for p in trained:
                p -= LR * p.grad
                p.grad = None
        model.after_step()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        values = {
            name: value.detach().double() for name, value in {"loss": loss, **metrics}.items()
        }
        found.append({"values": values, "gradients": gradients, "state": state})
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(
        {method: (four_steps, method) for method in ("moby", "byol")},
        tmp_path_factory.mktemp("ranks"),
    )


@pytest.mark.parametrize("method", ["moby", "byol"])
def test_two_ranks_are_one_with_the_joint_batch(ranks, method):
    for first, second, joint in zip(*ranks(method), four_steps(None, method), strict=True):
        for name in joint["values"].keys() - {
            "feature_std",
            "uniformity",
        }:  # of a rank's features among themselves
            value = joint["values"][name]
            tolerance = 1e-10 if name == "loss" else 1e-6  # accuracies are float32
            torch.testing.assert_close(
                (first["values"][name] + second["values"][name]) / 2, value, rtol=0, atol=tolerance
            )
        for mine, other, both in zip(
            first["gradients"], second["gradients"], joint["gradients"], strict=True
        ):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, both, rtol=1e-9, atol=1e-10)
        for name, tensor in joint["state"].items():  # weights, queues, and what batch norm has seen
            assert torch.equal(first["state"][name], second["state"][name])
            torch.testing.assert_close(first["state"][name], tensor, rtol=1e-10, atol=1e-10)
