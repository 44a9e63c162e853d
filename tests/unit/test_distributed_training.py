"""Training on two ranks equals training on their joint batch in one process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks
from rank_helpers import DIM, LR, STEPS, WORLD_SIZE, B, K, M, T, joint_views, part, tiny_encoder
from torch.nn.parallel import DistributedDataParallel

from moco.builder.synco import SynCo
from moco.loss import synthetic
from moco.loss.hardest import hardest
from moco.rng import NEGATIVES, SHUFFLE, Progress
from moco.sections_negatives import Schedule

SYNTHETIC = synthetic.Synthetic(n_hard=10, counts=(5, 4, 3, 2, 3, 4))


NO_SYNTHETIC = synthetic.Synthetic()


def build(config):
    torch.manual_seed(0)
    return SynCo(tiny_encoder, dim=DIM, K=K, m=M, T=T, synthetic=Schedule(config, first=1)).double()


def progress_of(step):
    return Progress(seed=4, epoch=1, step=step, steps_per_epoch=STEPS, epochs=2)


def check_training(rank, config):
    """Train a few steps; return the loss, the gradients and the state after each."""
    model = build(config)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    found = []
    for step in range(STEPS):
        loss, _ = ddp(
            [part(view, rank) for view in joint_views(step)], torch.arange(B), progress_of(step)
        )
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.encoder_q.named_parameters()}
        with torch.no_grad():
            for p in model.encoder_q.parameters():
                p -= LR * p.grad
                p.grad = None
        model.after_step()
        state = {name: t.clone() for name, t in model.state_dict().items()}
        found.append({"loss": loss.detach(), "gradients": gradients, "state": state})
    return found


CHECKS = {"moco": (check_training, NO_SYNTHETIC), "synco": (check_training, SYNTHETIC)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return a function from the name of a method to the steps of both ranks."""
    return on_two_ranks(CHECKS, tmp_path_factory.mktemp("ranks"))


def reference_steps(config, shuffled=True):
    """Return the same steps on the joint batch in one process, from the definition of MoCo.

    Batch norm of queries sees each rank's batch; that of keys, groups of the shuffled joint batch.
    """
    model = build(config)
    f_q, f_k, queue, total, found = (
        model.encoder_q,
        copy.deepcopy(model.encoder_k),
        model.queue.clone(),
        0,
        [],
    )
    for step in range(STEPS):
        query_view, key_view = joint_views(step)
        order = torch.arange(WORLD_SIZE * B)
        if shuffled:
            order = torch.randperm(
                WORLD_SIZE * B, generator=progress_of(step).generator(SHUFFLE, "cpu")
            )
        k = torch.empty(WORLD_SIZE * B, DIM, dtype=torch.float64)
        with torch.no_grad():
            for rank in range(WORLD_SIZE):
                k[part(order, rank)] = F.normalize(f_k(key_view[part(order, rank)]))
        losses = []
        for rank in range(WORLD_SIZE):
            q = F.normalize(f_q(part(query_view, rank)))
            s = q @ queue.T
            columns = [(q * part(k, rank)).sum(1, keepdim=True), s]
            if config.total:
                generator = progress_of(step).generator(NEGATIVES, "cpu", rank)
                draws = synthetic.draw(config, B, DIM, generator, torch.float64)
                columns.append(
                    synthetic.similarities(q, queue, s, hardest(s, config.n_hard), config, draws)
                )
            losses.append(
                F.cross_entropy(torch.cat(columns, 1) / T, torch.zeros(B, dtype=torch.long))
            )
        loss = sum(losses) / WORLD_SIZE
        names, parameters = zip(*f_q.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        with torch.no_grad():
            for name, p in f_q.named_parameters():
                p -= LR * gradients[name]
            for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
                p_k.copy_(M * p_k + (1 - M) * p_q)
        for key in k:
            queue[total % K] = key
            total += 1
        keys = {name: p.detach().clone() for name, p in f_k.named_parameters()}
        found.append(
            {
                "losses": losses,
                "gradients": gradients,
                "queue": queue.clone(),
                "ptr": total % K,
                "f_k": keys,
            }
        )
    return found


@pytest.fixture(scope="module", params=["moco", "synco"])
def training(request, ranks):
    """Return the steps of the ranks and the reference, without and with synthetic negatives."""
    return ranks(request.param), reference_steps(
        {"moco": NO_SYNTHETIC, "synco": SYNTHETIC}[request.param]
    )


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_losses_equal_those_of_the_joint_batch(training):
    found, reference = training
    for step in range(STEPS):
        for rank in range(WORLD_SIZE):
            near(found[rank][step]["loss"], reference[step]["losses"][rank].detach())
        # each rank has its own images and random draws
        assert abs(found[0][step]["loss"] - found[1][step]["loss"]) > 1e-4


def test_gradients_equal_those_of_the_mean_loss_of_the_joint_batch(training):
    found, reference = training
    for step in range(STEPS):
        for name, expected in reference[step]["gradients"].items():
            for rank in range(WORLD_SIZE):
                near(found[rank][step]["gradients"][name], expected)
        assert reference[step]["gradients"]["5.weight"].abs().max() > 1e-3


def test_queue_is_equal_on_the_ranks_and_contains_the_joint_keys_in_order(training):
    found, reference = training
    for step in range(STEPS):
        one, other = (found[rank][step]["state"] for rank in range(WORLD_SIZE))
        assert torch.equal(one["queue"], other["queue"])
        assert one["queue_ptr"].tolist() == other["queue_ptr"].tolist() == [reference[step]["ptr"]]
        near(one["queue"], reference[step]["queue"])


def test_key_encoder_is_equal_on_the_ranks_and_follows_the_query_encoder(training):
    found, reference = training
    for step in range(STEPS):
        for name, expected in reference[step]["f_k"].items():
            one, other = (
                found[rank][step]["state"][f"encoder_k.{name}"] for rank in range(WORLD_SIZE)
            )
            assert torch.equal(one, other)
            near(one, expected)


def test_reference_without_shuffling_differs(ranks):
    unshuffled = reference_steps(NO_SYNTHETIC, shuffled=False)
    loss = ranks("moco")[0][0]["loss"]
    assert abs(loss - unshuffled[0]["losses"][0]) > 1e-4
