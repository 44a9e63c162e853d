"""Compare AdCo with slow versions in float64.

The tests cover the loss, the ascent and the filling of the bank, the labels, and two ranks.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from rank_helpers import tiny_encoder

from moco import distributed
from moco.builder.adco import AdCo, Ascent
from moco.loss.adversarial import add_bank_gradient, ascend, keys_and_bank_nce
from moco.rng import Progress

B, DIM, K, T = 6, 5, 17, 0.2
ASCENT = Ascent(lr=0.7, T=0.1, momentum=0.8, weight_decay=0.01)
KINDS = {"single": {}, "sym": {"symmetric": True}, "multi": {"multi_crop": True}}
KINDS["both"] = KINDS["sym"] | KINDS["multi"]


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def bank_gradient(q, near, bank, *rest):
    """What is added to a gradient of 0, and, twice over, to one of 1."""
    gradient, again = torch.zeros_like(bank), torch.ones_like(bank)
    add_bank_gradient(gradient, q, near, bank, *rest)
    add_bank_gradient(again, q, near, bank, *rest, 2.0)
    torch.testing.assert_close(again, 1 + 2 * gradient)
    return gradient


def slow_loss(q, keys, label, W, temperature):
    """Cross entropy of each query's key among all keys and the bank, query by query."""
    total = 0
    for query, own in zip(q, label, strict=True):
        logits = [query @ key for key in keys] + [query @ w / w.norm() for w in W]
        total += F.cross_entropy(torch.stack(logits)[None] / temperature, torch.tensor([own]))
    return total / len(q)


def batch(seed, rank=0, world_size=1):
    torch.manual_seed(seed)
    q, keys = unit_rows(B, DIM).requires_grad_(), unit_rows(world_size * B, DIM)
    W = torch.randn(K, DIM, dtype=torch.float64)  # of any length
    return q, keys, [rank * B + i for i in range(B)], W


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (3, 4)])
def test_loss_and_gradients_are_the_slow_ones(seed, rank, world_size):
    q, keys, label, W = batch(seed, rank, world_size)
    length = W.norm(dim=1, keepdim=True)
    bank, label_tensor = W / length, torch.tensor(label)
    near, similarity = q @ keys.T, (q @ bank.T).detach()
    ascent = bank_gradient(q.detach(), near.detach(), bank, length, similarity, 0.07)
    loss = keys_and_bank_nce(q, near, label_tensor, bank, similarity, T)
    (of_q,) = torch.autograd.grad(loss, q)

    slow = slow_loss(q, keys, label, W, T)
    torch.testing.assert_close(loss, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(of_q, torch.autograd.grad(slow, q)[0], rtol=0, atol=1e-12)
    W.requires_grad_()
    (of_bank,) = torch.autograd.grad(-slow_loss(q, keys, label, W, 0.07), W)
    torch.testing.assert_close(ascent, of_bank, rtol=0, atol=1e-10)


def test_the_banks_gradient_is_finite_where_float32_exponentials_would_not_be():
    q, keys, _, W = (x.float() if isinstance(x, torch.Tensor) else x for x in batch(0))
    W[0] = q[0].detach() * 3  # similarity 1: exp(1 / .005) is no float32
    length = W.norm(dim=1, keepdim=True)
    bank = W / length
    assert (
        bank_gradient(q.detach(), q.detach() @ keys.T, bank, length, q.detach() @ bank.T, 0.005)
        .isfinite()
        .all()
    )


def test_ascend_is_sgd():
    torch.manual_seed(0)
    W = torch.randn(K, DIM, dtype=torch.float64)
    theirs, velocity = W.clone().requires_grad_(), torch.zeros_like(W)
    optimizer = torch.optim.SGD([theirs], lr=0.3, momentum=0.9, weight_decay=0.05)
    for _ in range(5):
        theirs.grad = torch.randn_like(W)
        ascend(W, velocity, theirs.grad, 0.3, 0.9, 0.05)
        optimizer.step()
        torch.testing.assert_close(W, theirs.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("lr", "steps"), [(3.0, 1), (0.1, 5)])
def test_the_loss_on_fixed_features_rises_with_the_banks_steps(seed, lr, steps):
    """Take one step at the published lr, or several small ones, at the published temperature."""
    torch.manual_seed(seed)
    q, keys, W = unit_rows(32, 16), unit_rows(32, 16), unit_rows(256, 16)
    label, velocity, losses = list(range(32)), torch.zeros(256, 16, dtype=torch.float64), []
    for _ in range(steps + 1):
        losses.append(slow_loss(q, keys, label, W, 0.02))
        length = W.norm(dim=1, keepdim=True)
        bank = W / length
        ascend(
            W, velocity, bank_gradient(q, q @ keys.T, bank, length, q @ bank.T, 0.02), lr, 0.9, 1e-4
        )
    assert losses == sorted(losses) and losses[-1] > losses[0] + 0.1


# the whole method


def build(kind, **options):
    torch.manual_seed(0)
    model = AdCo(
        partial(tiny_encoder, DIM),
        dim=DIM,
        K=K,
        m=0.9,
        T=T,
        ascent=ASCENT,
        **KINDS[kind],
        **{"fill": False, **options},
    ).double()
    model.bank *= torch.rand(K, 1, dtype=torch.float64) + 0.5
    return model


def views(kind, step, n=B):
    """A batch: two views of one size, and where several crops are asked for, smaller ones."""
    generator = torch.Generator().manual_seed(step)
    sizes = (9, 9, 7, 6) if KINDS[kind].get("multi_crop") else (9, 9)
    return [
        torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes
    ]


def progress_of(step):
    return Progress(seed=4, epoch=1, step=step, steps_per_epoch=5, epochs=4)


def slow_combination(kind, q, k, W, temperature):
    """What the paper asks for: views summed against one key view, both directions averaged."""

    def one(query, key):
        return slow_loss(q[query], k[key], range(len(q[query])), W, temperature)

    if kind == "single":
        return one(0, 1)
    if kind == "sym":
        return (one(0, 1) + one(1, 0)) / 2
    if kind == "multi":
        return one(1, 0) + one(2, 0) + one(3, 0)
    return (one(1, 0) + one(2, 0) + one(3, 0) + one(0, 1) + one(2, 1) + one(3, 1)) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_two_optimizers_on_autograds_gradients(kind):
    """Compare with SGD on the loss at T (encoder) and on the negated loss at mem_t (bank).

    Both gradients are those before the step.
    """
    model = build(kind)
    slow_q = copy.deepcopy(model.encoder_q)
    W = model.bank.clone().requires_grad_()
    optimizer = torch.optim.SGD(
        [W], lr=ASCENT.lr, momentum=ASCENT.momentum, weight_decay=ASCENT.weight_decay
    )
    for step in range(4):
        images = views(kind, step)
        keys = {}
        with torch.no_grad():
            for view in (0, 1):
                encoder = copy.deepcopy(model.encoder_k)  # its BN statistics must not move
                keys[view] = F.normalize(encoder(images[view]), dim=1)
        q = {view: F.normalize(slow_q(images[view]), dim=1) for view in range(len(images))}
        slow = slow_combination(kind, q, keys, W.detach(), T)
        (W.grad,) = torch.autograd.grad(
            -slow_combination(kind, q, keys, W, ASCENT.T), W, retain_graph=True
        )
        slow_gradients = torch.autograd.grad(slow, list(slow_q.parameters()))

        loss, metrics = model(images, torch.arange(B), progress_of(step))
        loss.backward()
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        assert 0 <= metrics["acc1"] <= metrics["acc5"] <= 1
        with torch.no_grad():
            for mine, other, g in zip(
                model.encoder_q.parameters(), slow_q.parameters(), slow_gradients, strict=True
            ):
                torch.testing.assert_close(mine.grad, g, rtol=0, atol=1e-10)
                mine -= 0.1 * mine.grad
                other -= 0.1 * g
                mine.grad = None
        model.after_step()
        optimizer.step()
        torch.testing.assert_close(model.bank, W.detach(), rtol=0, atol=1e-10)


def test_labels_of_rank_3_in_a_2_by_2_layout(monkeypatch):
    model = build("single")
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    torch.manual_seed(5)
    q, keys = unit_rows(B, DIM), unit_rows(4 * B, DIM)
    loss, _ = model.contrast([(q, keys)])
    torch.testing.assert_close(
        loss, slow_loss(q, keys, range(18, 24), model.bank, T), rtol=0, atol=1e-10
    )
    own = keys.clone()
    own[18:] = q  # only these count as positives
    loss, metrics = model.contrast([(q, own)])
    assert metrics["acc1"] == 1 and loss < model.contrast([(q, own.roll(B, 0))])[0]


def test_accuracy_counts_the_other_keys_and_the_bank():
    model = build("single")
    q = unit_rows(B, DIM)
    assert model.contrast([(q, q)])[1]["acc1"] == 1
    model.bank[3] = 5 * q[2]  # as similar to query 2 as its key: not above it
    shifted = q.roll(1, 0)
    shifted[2] = F.normalize(q[2] + 0.1 * unit_rows(DIM), dim=0)
    accuracy = model.contrast([(q, shifted)])[1]
    assert accuracy["acc1"] == 0 and accuracy["acc5"] >= 1 / B


def test_the_banks_rate_is_constant():
    model = build("single")
    model.ascent = Ascent(lr=0.7, T=0.1, momentum=0.0, weight_decay=0.0)
    for epoch in range(4):
        model(views("single", epoch), torch.arange(B), Progress(step=epoch, epoch=epoch, epochs=4))
        before = model.bank.clone()
        model.after_step()
        torch.testing.assert_close(
            before - model.bank, 0.7 * model.bank_velocity, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
def test_steps_before_epoch_0_fill_the_bank_with_keys_while_the_encoder_trains(kind):
    """Compare with a plain loop: view 0 is the query, the last view the key, in one direction.

    The only negatives are the entries of the bank. The key encoder starts again from the encoder.
    """
    model = build(kind, fill=True)
    assert model.images_before_epoch_0 == K and build(kind).images_before_epoch_0 == 0
    slow_q, slow_k = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
    W = model.bank.clone()
    for number, step in enumerate((-3, -2, -1)):  # 17 entries by 6
        images = views(kind, number)
        q = F.normalize(slow_q(images[0]), dim=1)
        with torch.no_grad():
            k = F.normalize(slow_k(images[-1]), dim=1)
        slow = 0
        for query, key in zip(q, k, strict=True):
            logits = [query @ key] + [query @ w / w.norm() for w in W]
            slow += F.cross_entropy(torch.stack(logits)[None] / T, torch.tensor([0])) / B
        gradients = torch.autograd.grad(slow, list(slow_q.parameters()))

        loss, metrics = model(images, torch.arange(B), Progress(epoch=-1, step=step))
        loss.backward()
        torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
        assert 0 <= metrics["acc1"] <= metrics["acc5"] <= 1
        with torch.no_grad():
            for mine, other, average, g in zip(
                model.encoder_q.parameters(),
                slow_q.parameters(),
                slow_k.parameters(),
                gradients,
                strict=True,
            ):
                torch.testing.assert_close(mine.grad, g, rtol=0, atol=1e-10)
                mine -= 0.1 * mine.grad
                mine.grad = None
                other -= 0.1 * g
                average.copy_(0.9 * average + 0.1 * other)
        model.after_step()
        W[6 * number : 6 * number + 6] = k[: K - 6 * number]
        torch.testing.assert_close(model.bank, W, rtol=0, atol=1e-10)
    assert not model.bank_velocity.any()
    for mine, other in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
        assert torch.equal(mine, other)
    model(views(kind, 0), torch.arange(B), progress_of(0))
    model.after_step()
    assert model.bank_velocity.any()


def test_a_bank_that_is_not_filled_is_standard_normal():
    torch.manual_seed(0)
    model = AdCo(partial(tiny_encoder, 64), dim=64, K=1000, ascent=ASCENT, fill=False)
    assert abs(model.bank.mean()) < 0.02 and abs(model.bank.std() - 1) < 0.02
    assert model.bank.norm(dim=1).std() > 0.3


def test_gradients_of_accumulated_passes_are_averaged():
    whole, parts = build("single"), build("single")
    for model, passes in ((whole, 1), (parts, 2)):
        for micro in range(passes):
            torch.manual_seed(7)
            model.contrast([(unit_rows(B, DIM), unit_rows(B, DIM))])
            assert model._passes == micro + 1
        model.after_step()
    torch.testing.assert_close(whole.bank, parts.bank, rtol=0, atol=1e-12)


# two ranks


def part(x, rank):
    return x[rank * len(x) // 2 : (rank + 1) * len(x) // 2]


def two_steps(rank, kind):
    """On this rank's part of the joint batch, features given: loss, gradient in q, and the bank."""
    model, found = build(kind), []
    for step in range(2):
        torch.manual_seed(step)
        q = {view: unit_rows(2 * B, DIM) for view in range(4)}
        k = {view: unit_rows(2 * B, DIM) for view in range(2)}
        mine = {
            view: (x if rank is None else part(x, rank)).requires_grad_() for view, x in q.items()
        }
        pairs = model.pairs(4 if KINDS[kind].get("multi_crop") else 2)
        loss, _ = model.contrast([(mine[query], k[key]) for query, key in pairs])
        loss.backward()
        model.after_step()
        gradients = [x.grad for x in mine.values() if x.grad is not None]
        found.append({"loss": loss.detach(), "gradients": gradients, "bank": model.bank.clone()})
    return found


def filling_step(rank):
    """Fill on this rank's part of the joint batch, features given: loss, gradient, and the bank.

    The first and the last view stand for the queries and the keys.
    """
    model = build("multi", fill=True)
    model.encoder_q, model.encoder_k = torch.nn.Identity(), torch.nn.Identity()
    model.keys = lambda k, *_: distributed.all_gather(k)
    torch.manual_seed(3)
    q, k = unit_rows(8, DIM), unit_rows(8, DIM)
    mine = (q if rank is None else part(q, rank)).requires_grad_()
    own = k if rank is None else part(k, rank)
    loss, _ = model([mine, own * torch.nan, own], torch.arange(len(own)), Progress(step=-3))
    loss.backward()
    model._fill()
    return {"loss": loss.detach(), "gradient": mine.grad, "bank": model.bank.clone()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    calls = {kind: (two_steps, kind) for kind in KINDS} | {"filling": (filling_step,)}
    return on_two_ranks(calls, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_fill_the_bank_like_one_with_the_joint_batch(ranks):
    first, second = ranks("filling")
    joint = filling_step(None)
    torch.testing.assert_close(
        (first["loss"] + second["loss"]) / 2, joint["loss"], rtol=0, atol=1e-12
    )
    both = torch.cat([first["gradient"], second["gradient"]]) / 2
    torch.testing.assert_close(both, joint["gradient"], rtol=0, atol=1e-12)
    assert torch.equal(first["bank"], second["bank"])
    torch.testing.assert_close(first["bank"], joint["bank"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_with_the_joint_batch(ranks, kind):
    for first, second, joint in zip(*ranks(kind), two_steps(None, kind), strict=True):
        torch.testing.assert_close(
            (first["loss"] + second["loss"]) / 2, joint["loss"], rtol=0, atol=1e-12
        )
        for a, b, both in zip(
            first["gradients"], second["gradients"], joint["gradients"], strict=True
        ):
            torch.testing.assert_close(torch.cat([a, b]) / 2, both, rtol=0, atol=1e-12)
        assert torch.equal(first["bank"], second["bank"])
        torch.testing.assert_close(first["bank"], joint["bank"], rtol=0, atol=1e-12)
