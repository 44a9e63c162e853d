"""Compare steps of AdCo with slow versions in float64, on one rank and on several.

tests/unit/loss/test_adversarial.py tests the loss and the ascent of the bank alone.
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import on_ranks
from rank_helpers import tiny_encoder

from moco import distributed
from moco.builder.adco import AdCo, Ascent
from moco.errors import InputError
from moco.rng import Progress

B, DIM, K, T = 6, 5, 17, 0.2
ASCENT = Ascent(lr=0.7, T=0.1, momentum=0.8, weight_decay=0.01)
KINDS = {"single": {}, "sym": {"symmetric": True}, "multi": {"multi_crop": True}}
KINDS["both"] = KINDS["sym"] | KINDS["multi"]


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def slow_loss(q, keys, label, W, temperature):
    """Cross entropy of each query's key among all keys and the bank, query by query."""
    total = 0
    for query, own in zip(q, label, strict=True):
        logits = [query @ key for key in keys] + [query @ w / w.norm() for w in W]
        total += F.cross_entropy(torch.stack(logits)[None] / temperature, torch.tensor([own]))
    return total / len(q)


# the whole method


def build(kind, **options):
    torch.manual_seed(0)
    model = AdCo(
        partial(tiny_encoder, DIM),
        dim=DIM,
        m=0.9,
        T=T,
        ascent=ASCENT,
        **KINDS[kind],
        **{"K": K, "fill": False, **options},
    ).double()
    model.bank *= torch.rand(model.K, 1, dtype=torch.float64) + 0.5
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
    model.ascent = Ascent(lr=0.7, T=0.1, momentum=0.5, weight_decay=0.0)
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


@pytest.mark.parametrize("dim", [DIM, 2 * B])
def test_gradients_of_accumulated_passes_are_averaged(dim):
    """With the larger features, the similarities of a step's only pass are kept."""
    passes = [[(unit_rows(B, dim), unit_rows(B, dim))] for _ in range(2)]
    models = [
        AdCo(partial(tiny_encoder, dim), dim, K, ascent=ASCENT, fill=False).double()
        for _ in range(4)
    ]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    *single, both, twice = models
    start = both.bank.clone()
    for model, pairs in ((single[0], passes[:1]), (single[1], passes[1:]), (both, passes)):
        for one in pairs:
            model.contrast(one)
        assert (model._similarity is not None) == (dim > B and len(pairs) == 1)
        model.after_step()
        assert not model._passes and model._similarity is None
    mean = (single[0].bank + single[1].bank) / 2
    torch.testing.assert_close(both.bank, mean, rtol=0, atol=1e-12)
    for _ in range(2):
        twice.contrast(passes[0])
    twice.after_step()
    torch.testing.assert_close(twice.bank, single[0].bank, rtol=0, atol=1e-12)
    assert (both.bank - start).abs().max() > 0.01


# several ranks


def part(x, rank):
    W = distributed.world_size()
    return x[rank * len(x) // W : (rank + 1) * len(x) // W]


def two_steps(rank, kind, accumulation=1):
    """Return the loss and metrics, the gradient of q, and the state of two steps, given features.

    Each rank has its part of the joint batch.
    """
    model, found = build(kind), []
    for step in range(2):
        torch.manual_seed(step)
        one = {"gradients": []}
        for _ in range(accumulation):
            q = {view: unit_rows(4 * B, DIM) for view in range(4)}
            k = {view: unit_rows(4 * B, DIM) for view in range(2)}
            q[0][0] = k[1][0]  # the first query of the joint batch is its key
            mine = {
                view: (x if rank is None else part(x, rank)).requires_grad_()
                for view, x in q.items()
            }
            pairs = model.pairs(4 if KINDS[kind].get("multi_crop") else 2)
            loss, metrics = model.contrast([(mine[query], k[key]) for query, key in pairs])
            loss.backward()
            one |= {"loss": loss.detach(), **{name: metrics[name] for name in JOINT_METRICS}}
            one["gradients"] += [x.grad for x in mine.values() if x.grad is not None]
        model.after_step()
        model.gather_state()
        one["state"] = {name: x.clone() for name, x in model.state_dict().items() if "bank" in name}
        found.append(one)
    return found


# metrics whose mean over ranks is that of the joint batch
JOINT_METRICS = ("acc1", "acc5", "alignment", "hardness")


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


def traffic(rank):
    """Return the sizes of all tensors that a step exchanges after the keys."""
    model, sizes = build("single"), []
    exchanged = ("all_reduce", "broadcast", "reduce_scatter_tensor", "all_to_all_single")
    true = {name: getattr(dist, name) for name in exchanged} | {"": distributed._all_gather_rows}

    def counted(call):
        def counting(x, *args, **kwargs):
            sizes.append(x.numel())
            return call(x, *args, **kwargs)

        return counting

    for name in exchanged:
        setattr(dist, name, counted(true[name]))
    distributed._all_gather_rows = counted(true[""])
    model.contrast([(unit_rows(B, DIM).requires_grad_(), unit_rows(4 * B, DIM))])[0].backward()
    model.after_step()
    for name in exchanged:
        setattr(dist, name, true[name])
    distributed._all_gather_rows = true[""]
    return sizes


def reading_too_early(rank):
    """Return the errors of reading a bank before `gather_state`, and of making one too small."""
    model = build("single")
    model.contrast([(unit_rows(B, DIM), unit_rows(4 * B, DIM))])
    model.after_step()
    errors = []
    for read in (model.state_dict, lambda: model.learned_negatives, lambda: build("single", K=3)):
        try:
            read()
        except (RuntimeError, InputError) as error:
            errors.append(str(error))
    return errors


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """Return a function from the name of a check to the results of all ranks.

    With 4 ranks, the 17 entries of the bank are in shards of 4 and 5, one of which is padded.
    """
    calls = {kind: (two_steps, kind) for kind in KINDS}
    calls |= {"passes": (two_steps, "both", 2), "filling": (filling_step,)}
    calls |= {"traffic": (traffic,), "early": (reading_too_early,)}
    return on_ranks(request.param, calls, tmp_path_factory.mktemp("ranks"))


def mean(x):
    return torch.stack(x).mean(0)


def test_ranks_fill_the_bank_like_one_with_the_joint_batch(ranks):
    found, joint = ranks("filling"), filling_step(None)
    torch.testing.assert_close(mean([x["loss"] for x in found]), joint["loss"], rtol=0, atol=1e-12)
    gradient = torch.cat([x["gradient"] for x in found]) / len(found)
    torch.testing.assert_close(gradient, joint["gradient"], rtol=0, atol=1e-12)
    for one in found:
        torch.testing.assert_close(one["bank"], joint["bank"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("check", [*KINDS, "passes"])
def test_ranks_are_one_with_the_joint_batch(ranks, check):
    """Compare losses, metrics, gradients, the bank and its velocity. Labels are global indices."""
    args = ("both", 2) if check == "passes" else (check,)
    for *found, joint in zip(*ranks(check), two_steps(None, *args), strict=True):
        for name in JOINT_METRICS:
            each = mean([one[name] for one in found])
            torch.testing.assert_close(each, joint[name], rtol=0, atol=1e-6)
        losses = mean([one["loss"] for one in found])
        torch.testing.assert_close(losses, joint["loss"], rtol=0, atol=1e-12)
        gradients = zip(*[one["gradients"] for one in found], strict=True)
        for parts, whole in zip(gradients, joint["gradients"], strict=True):
            torch.testing.assert_close(torch.cat(parts) / len(parts), whole, rtol=0, atol=1e-12)
        for one in found:
            for name, expected in joint["state"].items():
                assert torch.equal(one["state"][name], found[0]["state"][name])
                torch.testing.assert_close(one["state"][name], expected, rtol=0, atol=1e-12)
        assert joint["acc1"] > 0 and joint["state"]["bank_velocity"].any()


def test_ranks_exchange_neither_the_bank_nor_its_gradient(ranks):
    """They exchange the queries and their gradients, and a few numbers for each query."""
    N = len(ranks("traffic")) * B
    for sizes in ranks("traffic"):
        forward, backward = [N * (DIM + 1), 3 * N, N, N], [N, N * (DIM + 1)]
        assert sizes == forward + backward


def test_a_bank_with_old_shards_cannot_be_read(ranks):
    W = len(ranks("early"))
    for errors in ranks("early"):
        assert [error.split(":")[0] for error in errors] == ["AdCo", "AdCo", "--cluster 3"][
            : 2 + (W > 3)
        ]
