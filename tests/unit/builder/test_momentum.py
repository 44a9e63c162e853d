import copy

import pytest
import torch
import torch.nn.functional as F
from momentum_helpers import ALL_SIX, DIM, K, build, keys_by_hand, two_views
from torch import nn

from moco.builder.moco import MoCo
from moco.builder.synco import SynCo
from moco.encoder.resnets import resnet
from moco.loss import synthetic
from moco.loss.hardest import hardest
from moco.rng import NEGATIVES, Progress
from moco.sections_negatives import Schedule


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(model, steps, batch=20, epoch=0, lr=0.5):
    """Losses, gradients and metrics of a few SGD steps."""
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=lr)
    record = []
    for step in range(steps):
        optimizer.zero_grad()
        loss, metrics = model(
            two_views(batch, step), torch.arange(batch), Progress(seed=3, epoch=epoch, step=step)
        )
        loss.backward()
        record.append(
            (loss.detach(), {name: g.clone() for name, g in gradients(model).items()}, metrics)
        )
        optimizer.step()
        model.after_step()
    return record


def assert_same_run(one, other):
    for (loss, gradient, _), (loss2, gradient2, _) in zip(one, other, strict=True):
        assert torch.equal(loss, loss2)
        assert gradient and gradient.keys() == gradient2.keys()
        for name in gradient:
            assert torch.equal(gradient[name], gradient2[name]), name


def assert_same_state(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


# SynCo beside MoCo
@pytest.mark.parametrize("epoch", [0, 50])
def test_without_synthetic_negatives_synco_is_moco_bit_for_bit(epoch):
    moco, synco = build(), build(SynCo, synthetic=Schedule())
    assert_same_run(run(moco, 4, epoch=epoch), run(synco, 4, epoch=epoch))
    assert_same_state(moco, synco)


def test_before_warmup_epochs_synco_is_moco_bit_for_bit():
    moco, synco = build(), build(SynCo, synthetic=Schedule(ALL_SIX, first=3))
    for epoch in range(3):
        assert_same_run(run(moco, 2, epoch=epoch), run(synco, 2, epoch=epoch))
    assert_same_state(moco, synco)


@pytest.mark.parametrize("warmup_epochs", [0, 3])
def test_from_warmup_epochs_on_synco_has_a_greater_loss_and_other_gradients(warmup_epochs):
    for epoch in (warmup_epochs, warmup_epochs + 7):
        ((loss, gradient, _),) = run(build(), 1, epoch=epoch)
        ((loss2, gradient2, _),) = run(
            build(SynCo, synthetic=Schedule(ALL_SIX, first=warmup_epochs)), 1, epoch=epoch
        )
        assert loss2 > loss + 1e-3  # more negatives
        assert not torch.allclose(
            gradient["encoder_q.5.weight"], gradient2["encoder_q.5.weight"], atol=1e-5
        )


def test_metrics_are_those_of_the_queue_with_and_without_synthetic_negatives():
    ((_, _, moco),) = run(build(T=0.07), 1)
    ((_, _, synco),) = run(build(SynCo, synthetic=Schedule(ALL_SIX), T=0.07), 1)
    assert {name: m.item() for name, m in moco.items()} == {
        name: m.item() for name, m in synco.items() if name in moco
    }
    assert synco.keys() - moco.keys() == {f"hardness_{one.name}" for one in synthetic.TYPES}
    assert 0 < moco["acc5"] <= 1 and moco["acc1"] <= moco["acc5"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_synco_loss_is_moco_cross_entropy_with_the_synthetic_columns_added(dtype):
    model = build(SynCo, synthetic=Schedule(ALL_SIX)).to(dtype)
    views = [view.to(dtype) for view in two_views(8, 1)]
    progress = Progress(seed=5, epoch=1, step=9)
    q = F.normalize(copy.deepcopy(model.encoder_q)(views[0]))
    k = F.normalize(copy.deepcopy(model.encoder_k)(views[1]))
    s = q @ model.queue.T
    draws = synthetic.draw(ALL_SIX, 8, DIM, progress.generator(NEGATIVES, "cpu", 0), dtype)
    extra = synthetic.similarities(q, model.queue, s, hardest(s, 10), ALL_SIX, draws)
    logits = torch.cat([(q * k).sum(1, keepdim=True), s, extra], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))

    loss, _ = model(views, torch.arange(8), progress)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected)


def test_synthetic_draws_are_fresh_each_step_and_the_same_for_the_same_step():
    model = build(SynCo, synthetic=Schedule(ALL_SIX))
    q = F.normalize(torch.randn(8, DIM, generator=torch.Generator().manual_seed(0)))

    def made(**where):
        _, metrics = model.contrast(q, q, Progress(**where))
        return torch.stack([x for name, x in metrics.items() if name.startswith("hardness_")])

    first = made(step=0)
    assert torch.equal(first, made(step=0))
    for where in ({"step": 1}, {"step": 0, "micro": 1}, {"step": 0, "seed": 1}):
        assert not torch.allclose(first, made(**where), atol=1e-4)


# the queue
def test_queue_starts_with_unit_rows_and_pointer_0():
    model = build()
    assert model.queue.shape == (K, DIM)
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(K))
    assert torch.linalg.matrix_rank(model.queue) == DIM
    assert model.queue_ptr.tolist() == [0]


@pytest.mark.parametrize(
    "sizes", [[8] * 5, [7] * 9, [1, 23, 24, 5], [60], [5, 49, 3], [24, 24], [25, 1, 48, 2]]
)
def test_enqueue_overwrites_the_oldest_rows_for_any_batch_size(sizes):
    model = build()
    expected, total = model.queue.clone(), 0
    for n in sizes:
        keys = F.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(total)))
        model.enqueue(keys)
        for key in keys:
            expected[total % K] = key
            total += 1
        assert torch.equal(model.queue, expected)
        assert model.queue_ptr.tolist() == [total % K]


@pytest.mark.parametrize(("batch", "groups"), [(8, 1), (20, 2), (30, 3)])
def test_queue_and_losses_are_those_of_a_loop_by_hand(batch, groups):
    m, lr, temperature = 0.9, 0.5, 0.2
    model = build()
    f_q, f_k = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
    queue, total = model.queue.clone(), 0
    losses = [loss for loss, _, _ in run(model, 5, batch, lr=lr)]
    for step in range(5):
        query_view, key_view = two_views(batch, step)
        q = F.normalize(f_q(query_view))
        k = keys_by_hand(f_k, key_view, Progress(seed=3, step=step), groups)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.long))
        torch.testing.assert_close(losses[step], loss)
        step_gradients = torch.autograd.grad(loss, list(f_q.parameters()))
        with torch.no_grad():
            for p, g in zip(f_q.parameters(), step_gradients, strict=True):
                p -= lr * g
            for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
                p_k.copy_(m * p_k + (1 - m) * p_q)
        for key in k:
            queue[total % K] = key
            total += 1
    torch.testing.assert_close(model.queue, queue, rtol=1e-4, atol=1e-5)
    assert model.queue_ptr.tolist() == [5 * batch % K]
    for name, p in f_k.state_dict().items():
        torch.testing.assert_close(
            model.encoder_k.state_dict()[name], p, rtol=1e-4, atol=1e-5, msg=name
        )


def test_keys_enter_the_queue_in_after_step_and_not_before():
    model = build()
    before = model.queue.clone()
    views = two_views(5, 0)
    model(views, torch.arange(5), Progress())[0].backward()
    assert torch.equal(model.queue, before) and model.queue_ptr.item() == 0
    model.after_step()
    assert not torch.isclose(model.queue[:5], before[:5]).all(1).any()
    assert torch.equal(model.queue[5:], before[5:])
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(K))
    model.after_step()
    assert model.queue_ptr.item() == 5  # nothing enters twice


def test_all_passes_of_one_step_enter_the_queue_in_order():
    model = build().eval()
    views = [two_views(4, seed) for seed in (0, 1)]
    k = [F.normalize(model.encoder_k(v[1])) for v in views]
    for micro, v in enumerate(views):
        model(v, torch.arange(4), Progress(micro=micro))
    model.after_step()
    torch.testing.assert_close(model.queue[:8], torch.cat(k))
    assert model.queue_ptr.item() == 8


# what a step moves
@pytest.mark.parametrize("method", [MoCo, SynCo])
def test_no_gradient_reaches_the_key_encoder_or_the_queue(method):
    model = build(method, **({"synthetic": Schedule(ALL_SIX)} if method is SynCo else {}))
    loss, metrics = model(two_views(20, 0), torch.arange(20), Progress())
    loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.encoder_k.parameters())
    assert not model.queue.requires_grad and model.queue.grad is None
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder_q[5].parameters()
    )
    assert not any(value.requires_grad for value in metrics.values())
    assert not any(keys.requires_grad for keys in model._new_keys)


def test_encoders_start_equal_and_apart():
    model = build()
    for (name, p_q), p_k in zip(
        model.encoder_q.named_parameters(), model.encoder_k.parameters(), strict=True
    ):
        assert torch.equal(p_q, p_k), name
        assert p_q.data_ptr() != p_k.data_ptr(), name
    assert model.encoder is model.encoder_q


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999, 1.0])
def test_key_encoder_follows_in_after_step_and_not_before(m):
    model = build(m=m)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=1.0)
    start = {name: p.clone() for name, p in model.encoder_k.named_parameters()}
    model(two_views(8, 0), torch.arange(8), Progress())[0].backward()
    optimizer.step()
    for name, p in model.encoder_k.named_parameters():
        assert torch.equal(p, start[name]), name
    trained = {name: p.detach().clone() for name, p in model.encoder_q.named_parameters()}
    assert not torch.allclose(trained["5.weight"], start["5.weight"], atol=1e-3)
    model.after_step()
    for name, p in model.encoder_k.named_parameters():
        torch.testing.assert_close(
            p, m * start[name] + (1 - m) * trained[name], rtol=1e-5, atol=1e-7, msg=name
        )
        assert not p.requires_grad
    for name, p in model.encoder_q.named_parameters():
        assert torch.equal(p, trained[name]), name


# names that checkpoints carry
def test_state_dict_has_mocos_names_with_a_resnet_and_its_mlp_head():
    torch.manual_seed(0)
    model = MoCo(lambda: resnet("resnet18", 128, mlp=True), dim=128, K=32)
    state = model.state_dict()
    assert state["queue"].shape == (32, 128)
    assert state["queue_ptr"].shape == (1,) and state["queue_ptr"].dtype == torch.long
    for side in ("encoder_q", "encoder_k"):
        assert state[f"{side}.conv1.weight"].shape == (64, 3, 7, 7)
        assert state[f"{side}.layer4.1.bn2.running_var"].shape == (512,)
        assert state[f"{side}.fc.0.weight"].shape == (512, 512)
        assert state[f"{side}.fc.2.weight"].shape == (128, 512)
        assert {name for name in state if name.startswith(f"{side}.fc.")} == {
            f"{side}.fc.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
        }
    assert {name.split(".")[0] for name in state} == {
        "encoder_q",
        "encoder_k",
        "queue",
        "queue_ptr",
    }
    assert isinstance(model.encoder_q.fc[1], nn.ReLU)
    with torch.no_grad():
        assert model.eval().encoder_q(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
