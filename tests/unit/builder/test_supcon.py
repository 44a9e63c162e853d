"""Compare SupCon with a slow version in float64: loss, gradient, metrics, one and two ranks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from contrast_helpers import (
    B,
    N,
    T,
    assert_ranks_equal_joint,
    build,
    images,
    indices,
    part,
    slow_infonce,
    three_steps,
    unit_rows,
)

from moco import distributed
from moco.data.images import Images
from moco.engine import pretrain
from moco.errors import InputError
from moco.loss.global_contrastive import compare
from moco.loss.supervised_contrastive import supervised_losses
from moco.rng import Progress

# the class of each training image; with "own", only an anchor's other view is its positive
LABELS = {
    "few": torch.arange(N) % 3,
    "own": torch.arange(N),
    "one": torch.zeros(N, dtype=torch.long),
    "some alone": torch.where(torch.arange(N) < 6, 0, torch.arange(N)),
}


def slow_supcon(z, labels):
    """Return the mean over all 2m anchors of L_out, equation 2, one pair after the other."""
    rows = [(view, i) for view in (0, 1) for i in range(z.shape[1])]
    losses = []
    for a in rows:
        others = [other for other in rows if other != a]
        total = sum(torch.exp(z[a] @ z[other] / T) for other in others)
        positives = [p for p in others if labels[p[1]] == labels[a[1]]]
        terms = [torch.log(torch.exp(z[a] @ z[p] / T) / total) for p in positives]
        losses.append(-sum(terms) / len(terms))
    return sum(losses) / len(losses)


def assert_same_gradients(ours, slow, of):
    found = (torch.autograd.grad(value, of, retain_graph=True) for value in (ours, slow))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LABELS)
def test_the_loss_and_its_gradient_are_the_slow_ones(name, seed):
    torch.manual_seed(seed)
    features = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    z, labels = F.normalize(features, dim=2), LABELS[name][torch.randperm(16)[:7]]
    losses = supervised_losses(compare(z, z, 0), labels[:, None] == labels, T)
    slow = slow_supcon(z, labels)
    assert losses.shape == (2, 7)
    torch.testing.assert_close(losses.mean(), slow, rtol=0, atol=1e-10)
    assert_same_gradients(losses.mean(), slow, [features])


def test_with_a_class_for_each_image_it_is_half_of_simclr():
    """SimCLR's loss here adds both views."""
    z = unit_rows(2, B, 6)
    loss = supervised_losses(compare(z, z, 0), torch.eye(B, dtype=torch.bool), T).mean()
    torch.testing.assert_close(2 * loss, slow_infonce(z, range(B)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LABELS)
def test_the_method_trains_with_the_slow_loss_and_reports_other_classes(name):
    model, labels = build("supcon", labels=LABELS[name]), LABELS[name].tolist()
    for step in range(3):
        index = indices(step)[:B]
        mine = [labels[i] for i in index.tolist()]
        before = copy.deepcopy(model)
        z = torch.stack([F.normalize(before.base_encoder(view), dim=1) for view in images(step)])
        slow = slow_supcon(z, mine)
        loss, metrics = model(images(step), index, Progress(step=step))
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        theirs = torch.autograd.grad(slow, list(before.parameters()))
        ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
        z = z.detach()
        # the similarities of each anchor to the images of other classes
        other = {
            (a, i): [
                float(z[a, i] @ z[b, j]) for b in (0, 1) for j in range(B) if mine[j] != mine[i]
            ]
            for a in (0, 1)
            for i in range(B)
        }
        first = [float(z[0, i] @ z[1, i]) > max(row, default=-2) for (_, i), row in other.items()]
        assert float(metrics["acc1"]) == pytest.approx(sum(first) / len(first))
        hardest = [max(row) for (a, _), row in other.items() if a == 0 and row]
        assert tuple(map(float, metrics["hardness"])) == pytest.approx(
            (sum(hardest), len(hardest)), abs=1e-12
        )
        positives = [2 * mine.count(one) - 1 for one in mine]
        assert float(metrics["positives"]) == pytest.approx(sum(positives) / B)
        with torch.no_grad():
            for p, gradient in zip(model.parameters(), ours, strict=True):
                p -= 0.1 * gradient
    assert not any("labels" in key for key in model.state_dict())


def slow_step(rank, name):
    """Return the loss and gradient of this rank's step, and of a slow step of the joint batch."""
    labels = LABELS[name]
    model = build("supcon", labels=labels)
    net = copy.deepcopy(model.base_encoder)
    distributed.sync_batch_norm(model, torch.device("cpu"))
    ddp = distributed.data_parallel(model)
    views, index = images(0, 2 * B), indices(0)
    loss, _ = ddp([part(view, rank) for view in views], part(index, rank), Progress())
    loss.backward()
    z = torch.stack([F.normalize(net(view), dim=1) for view in views])
    slow = slow_supcon(z, labels[index].tolist())
    slow.backward()
    found = [[p.grad for p in one.parameters()] for one in (model, net)]
    return {"loss": loss.detach(), "slow": slow.detach(), "gradients": found}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    checks = {name: (slow_step, name) for name in LABELS}
    checks["three steps"] = (three_steps, "supcon", {"labels": LABELS["few"]})
    return on_two_ranks(checks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", LABELS)
def test_two_ranks_find_the_slow_loss_of_the_joint_batch(ranks, name):
    first, second = ranks(name)
    mean = (first["loss"] + second["loss"]) / 2
    torch.testing.assert_close(mean, first["slow"], rtol=0, atol=1e-10)
    for found in (first, second):
        for mine, slow in zip(*found["gradients"], strict=True):
            torch.testing.assert_close(mine, slow, rtol=0, atol=1e-10)


def test_two_ranks_train_as_one_with_the_joint_batch(ranks):
    joint = three_steps(None, "supcon", {"labels": LABELS["few"]})
    assert_ranks_equal_joint(ranks("three steps"), joint)


@pytest.mark.parametrize("name", ["few", "one"])
def test_the_loss_is_finite_in_float32_at_the_least_temperature(name):
    one = F.normalize(torch.ones(2, 4, 4), dim=-1)
    labels = LABELS[name][:4]
    for z in (one, one * torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None]):
        z = z.clone().requires_grad_()
        losses = supervised_losses(compare(z, z, 0), labels[:, None] == labels, 0.02)
        assert losses.isfinite().all()
        assert torch.autograd.grad(losses.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (torch.zeros(4), ()),
        (torch.zeros(4), ("one",)),
        (torch.ones(4, 2), ("one", "two")),
    ],
    ids=["none", "one class", "several labels"],
)
def test_images_without_one_label_each_are_refused(labels, classes, tmp_path):
    found = Images(tmp_path, labels.long().numpy(), classes)
    assert found.single_labels is None
    pretrain.require_labels(found, "")
    with pytest.raises(InputError, match=r"--loss supcon: trains on labels.*train/CLASS/"):
        pretrain.require_labels(found, "--loss supcon")
