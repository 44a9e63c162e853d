"""Synthetic negatives from those of the batch: MoCo v3 and SimCLR's losses against slow versions.

The slow versions make each synthetic negative as a vector, and compare each query with all of its
negatives, one query after the other.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from synthetic_helpers import explicit_negatives
from torch import nn

import main_mocov3
import main_sogclr
from moco import distributed, sections_methods
from moco.builder import objectives
from moco.builder.mocov3 import MoCoV3
from moco.builder.negatives import batch_mixture
from moco.builder.simclr import SimCLR
from moco.errors import InputError
from moco.loss.contrastive import normalize
from moco.loss.synthetic import TYPES, Synthetic, draw
from moco.rng import NEGATIVES, Progress
from moco.sections_negatives import Ramp, Schedule

B, DIM, T, SIGMA = 5, 4, 0.3, 0.4  # images of a rank, features, temperature, DCLW's sigma
CONFIG = Synthetic(n_hard=7, counts=(3, 2, 3, 2, 2, 1), sigma=0.1, delta=0.2, eta=0.3)
# The weight rises in two epochs of two steps. In the second step it is a half, in the last it is 1.
SCHEDULE = Schedule(CONFIG, first=1, last=4, ramp=Ramp(2, "linear", "weight"))
HALF, FULL = (Progress(3, 1 + step // 2, 2 + step, 0, 2, 5) for step in (1, 3))
BEFORE, AFTER = Progress(3, 0, 1, 0, 2, 5), Progress(3, 4, 8, 0, 2, 5)
LOSSES = ("mocov3", "simclr", "dcl", "dclw")


def build(name, schedule=SCHEDULE):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.BatchNorm1d(8), nn.Linear(8, DIM))
    if name == "mocov3":
        head = nn.Linear(DIM, DIM, bias=False)
        return MoCoV3(net, head, 0.9, T=T, synthetic=schedule).double()
    loss = objectives.create(sections_methods.BatchLoss(loss=name, dclw_sigma=SIGMA))
    return SimCLR(lambda: net, T, loss, synthetic=schedule).double()


def views(n):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ours(rank, name, progress, schedule=SCHEDULE):
    """Return the loss, metrics and gradients on a rank's half of the batch; None: on all of it."""
    model = build(name, schedule)
    ddp = distributed.data_parallel(distributed.sync_batch_norm(model, torch.device("cpu")))
    mine = slice(None) if rank is None else slice(B * rank, B * rank + B)
    loss, metrics = ddp([view[mine] for view in views(2 * B)], torch.arange(2 * B)[mine], progress)
    loss.backward()
    return {"loss": loss.detach(), "metrics": metrics, "gradients": gradients(model)}


def slow_logits(q, bank, own, config, progress, rank, view):
    """Return the logits of each query's negatives, a list; the last ones are synthetic.

    `own` has the indices of the entries that are no negatives, for each query.
    """
    real = [[j for j in range(len(bank)) if j not in mine] for mine in own]
    if config is None:
        return [torch.stack([q[i] @ bank[j] for j in real[i]]) / T for i in range(len(q))]
    with torch.no_grad():
        hard = [sorted(real[i], key=lambda j: -(q[i] @ bank[j])) for i in range(len(q))]
        hard = torch.tensor([order[: config.n_hard] for order in hard])
        generator = progress.generator(NEGATIVES, "cpu", rank, view)
        draws = draw(config, *q.shape, generator, q.dtype)
        vectors = explicit_negatives(q, bank.detach(), hard, config, draws)
    return [
        torch.cat(
            [
                torch.stack([q[i] @ bank[j] for j in real[i]]) / T,
                torch.stack([q[i] @ h for h in vectors[i]]) / T + math.log(config.weight),
            ]
        )
        for i in range(len(q))
    ]


def cross_entropy(positive, negatives):
    """Return the cross entropy of the positive's logit among all logits."""
    logits = torch.cat([positive[None], negatives])
    return F.cross_entropy(logits[None], torch.tensor([0]))


def slow_mocov3(model, images, config, progress, ranks):
    """Return the loss of the joint batch on so many ranks, which draw their own random numbers."""
    encoder, average = model.base_encoder, model.momentum_encoder
    q = [F.normalize(model.predictor(encoder(view)), dim=1) for view in images]
    k = [F.normalize(average(view), dim=1).detach() for view in images]
    loss, n = 0, len(q[0])
    for view in (0, 1):
        keys = k[1 - view]
        for rank, mine in enumerate(torch.arange(n).chunk(ranks)):
            own = [[i.item()] for i in mine]
            found = slow_logits(q[view][mine], keys, own, config, progress, rank, view)
            for i, negatives in zip(mine, found, strict=True):
                loss = loss + 2 * T * cross_entropy(q[view][i] @ keys[i] / T, negatives) / n
    return loss


def slow_simclr(model, images, config, progress, ranks, name):
    """Return the same of SimCLR, DCL or DCLW."""
    z = [F.normalize(model.base_encoder(view), dim=1) for view in images]
    loss, n = 0, len(z[0])
    weights = torch.exp((z[0] * z[1]).sum(1) / SIGMA)
    for view in (0, 1):
        bank = torch.cat([z[view], z[1 - view]])
        for rank, mine in enumerate(torch.arange(n).chunk(ranks)):
            own = [[i.item(), n + i.item()] for i in mine]
            found = slow_logits(z[view][mine], bank, own, config, progress, rank, view)
            for i, negatives in zip(mine, found, strict=True):
                positive = z[view][i] @ z[1 - view][i] / T
                if name == "simclr":
                    loss = loss + cross_entropy(positive, negatives) / n
                else:
                    w = 2 - weights[i] / weights.mean() if name == "dclw" else 1
                    loss = loss + (negatives.exp().sum().log() - w * positive) / n
    return loss


def slow(name, progress, config, ranks):
    """Return the loss and the gradients of the joint batch, by the slow version."""
    model = build(name)
    parts = (model, views(2 * B), config, progress, ranks)
    loss = slow_mocov3(*parts) if name == "mocov3" else slow_simclr(*parts, name)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_are(found, wanted):
    """Check the results of all ranks."""
    loss, wanted_gradients = wanted
    mean = torch.stack([one["loss"] for one in found]).mean()
    torch.testing.assert_close(mean, loss, rtol=0, atol=1e-10)
    for one in found:  # gradients are averaged over ranks
        assert one["gradients"].keys() == wanted_gradients.keys()
        for name, gradient in wanted_gradients.items():
            torch.testing.assert_close(one["gradients"][name], gradient, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    checks = {name: (ours, name, HALF) for name in LOSSES}
    return on_two_ranks(checks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients_at_half_weight_are_those_of_explicit_vectors(name, ranks, request):
    found = [ours(None, name, HALF)] if ranks == 1 else request.getfixturevalue("on_ranks")(name)
    config = SCHEDULE.at(HALF)
    assert config.weight == 0.5
    assert_are(found, slow(name, HALF, config, ranks))


@pytest.mark.parametrize("name", LOSSES)
def test_full_weight_and_epochs_without_synthetic_negatives(name):
    types = {f"hardness_{one.name}" for one in TYPES}
    for progress, config in ((FULL, CONFIG), (BEFORE, None), (AFTER, None)):
        found = ours(None, name, progress)
        assert_are([found], slow(name, progress, config, 1))
        assert types & found["metrics"].keys() == (types if config else set())
    bare = ours(None, name, FULL, Schedule())
    assert_are([bare], slow(name, FULL, None, 1))
    # the accuracy and the hardness count real negatives
    for metric in ("acc1", "acc5", "hardness"):
        assert bare["metrics"][metric] == ours(None, name, FULL)["metrics"][metric]
    values = build(name).schedules(HALF)
    assert values["n1"] == 1.5 and values["n6"] == 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_each_view_and_each_step_draws_its_own_numbers(name, monkeypatch):
    seen, method = [], "mocov3" if name == "mocov3" else "simclr"

    def recorded(*args):
        seen.append(batch_mixture(*args))
        return seen[-1]

    monkeypatch.setattr(f"moco.builder.{method}.batch_mixture", recorded)
    for step in (4, 5):
        ours(None, name, Progress(3, 2, step, 0, 2, 5))
    noises = [made.noise.flatten()[0].item() for made in seen]
    assert len(set(noises)) == 4


@pytest.mark.parametrize("seed", range(3))
def test_features_of_the_own_image_are_never_among_the_hardest(seed):
    """All other entries are, if n_hard is their number. The own ones are the nearest here."""
    torch.manual_seed(seed)
    q = normalize(torch.randn(4, 6))
    bank = torch.cat([q, normalize(torch.randn(8, 6)), q])
    own = torch.eye(4, dtype=torch.bool)
    own = torch.cat([own, torch.zeros(4, 8, dtype=torch.bool), own], 1)
    config = Synthetic(n_hard=14, counts=(100, 0, 100, 0, 0, 0))
    made = batch_mixture(config, q, bank, q @ bank.T, own, Progress(seed), 0)
    for mine, indices in zip(own, made.indices, strict=True):
        assert set(indices.tolist()) == set((~mine).nonzero().flatten().tolist())


@pytest.mark.parametrize("script", [main_sogclr, main_mocov3])
def test_the_options_set_the_schedule(script):
    words = "photos -a resnet18 --batch-size 32 --n-hard 31 --n1 4 --n6 2 --synthetic-eta 0.5"
    words += " --synthetic-last 40 --synthetic-ramp-epochs 5 --synthetic-ramp cosine"
    words += " --loss dcl" * (script is main_sogclr)
    c = script.complete(script.parser().parse(words.split()))
    config = Synthetic(31, (4, 0, 0, 0, 0, 2), eta=0.5)
    assert c.synthetic.schedule() == Schedule(config, 10, 40, Ramp(5, "cosine", "number"))
    if script is main_mocov3:
        assert script.build(c).synthetic == c.synthetic.schedule()
        again = script.parser().parse(words.replace("--synthetic-eta", "--eta").split())
        assert again.synthetic == c.synthetic


@pytest.mark.parametrize("loss", ["sogclr", "isogclr", "debiased", "hcl"])
def test_losses_that_need_real_negatives_refuse_synthetic_ones(loss):
    objectives.check_synthetic(loss, 0)
    with pytest.raises(InputError, match=f"--loss {loss}: .* 8 synthetic .* --loss simclr, dcl"):
        objectives.check_synthetic(loss, 8)
