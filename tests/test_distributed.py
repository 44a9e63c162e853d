"""The exchange between ranks, on two processes that meet over loopback; one spawned job runs all the checks."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import on_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco import distributed
from moco.builder.moco import MoCo
from moco.builder.synco import SynCo
from moco.encoder.recompute import recompute_blocks
from moco.encoder.resnets import resnet
from moco.loss import synthetic
from moco.rng import NEGATIVES, SHUFFLE, Progress

WORLD, B, DIM, K, M, T, LR, STEPS = 2, 8, 6, 20, 0.9, 0.2, 0.5, 3
KIND = synthetic.Synthetic(n_hard=10, counts=(5, 4, 3, 2, 3, 4))
NO_KIND = synthetic.Synthetic()
IMAGE = (3, 9, 9)


# what both the spawned processes and the calculation by hand are made of


def tiny_encoder():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, DIM),
    )


def build(kind):
    torch.manual_seed(0)
    return SynCo(tiny_encoder, dim=DIM, K=K, m=M, T=T, kind=kind, warmup_epochs=1).double()


def progress_of(step):
    return Progress(seed=4, epoch=1, step=step, steps_per_epoch=STEPS, epochs=2)


def joint_views(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(WORLD * B, *IMAGE, generator=generator, dtype=torch.float64) for _ in range(2)
    ]


def part(x, rank):
    return x[rank * len(x) // WORLD : (rank + 1) * len(x) // WORLD]


def permutations():
    """Permutations of joint batches of several sizes; in some, a rank asks nothing of itself or of the other."""
    drawn = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (2, 6, 16, 34)]
    return [
        *drawn,
        torch.arange(10),
        torch.arange(10).roll(5),
        torch.arange(10).flip(0),
        torch.tensor([1, 0]),
    ]


def numbered(n, *shape):
    return torch.arange(float(n)).view(n, *[1] * len(shape)).expand(n, *shape).contiguous()


def numbers(images):
    return images[:, 0, 0, 0].int().tolist()


# what the spawned processes do


def check_shuffle(rank):
    found = []
    for permutation in permutations():
        x = numbered(len(permutation), 2, 3, 3)
        shuffled = distributed.shuffle(part(x, rank), permutation)
        found.append((shuffled, distributed.unshuffle(shuffled.flatten(1), permutation)))
    return found


def check_key_groups(rank):
    """Per step: the permutation, the query encoder's images and the key encoder's."""
    torch.manual_seed(0)
    model, found, exchange = MoCo(tiny_encoder, dim=DIM, K=K, bn_splits=8), [], distributed.shuffle
    seen = {}

    def recorded(x, permutation):
        seen["permutation"] = permutation
        return exchange(x, permutation)

    distributed.shuffle = recorded
    model.encoder_q.register_forward_hook(
        lambda _, inputs, output: seen.setdefault("q", []).append(numbers(inputs[0]))
    )
    model.encoder_k.register_forward_hook(
        lambda _, inputs, output: seen.setdefault("k", []).append(numbers(inputs[0]))
    )
    for step in range(3):
        seen.clear()
        images = part(numbered(WORLD * B, *IMAGE), rank)
        model([images, images], torch.arange(B), Progress(seed=4, step=step))
        found.append(dict(seen))
    distributed.shuffle = exchange
    return found


def check_traffic(rank):
    """Shapes of everything that one forward pass receives from the exchange."""
    torch.manual_seed(0)
    model, received = (
        MoCo(tiny_encoder, dim=DIM, K=K),
        {"all_to_all_single": [], "_all_gather_rows": []},
    )
    place = {"all_to_all_single": dist, "_all_gather_rows": distributed}
    true = {name: getattr(place[name], name) for name in received}

    def counted(name):
        def call(output, *args, **kwargs):
            received[name].append(tuple(output.shape))
            return true[name](output, *args, **kwargs)

        return call

    for name in received:
        setattr(place[name], name, counted(name))
    model([part(view, rank).float() for view in joint_views(0)], torch.arange(B), Progress())
    for name in received:
        setattr(place[name], name, true[name])
    return received


def check_silence(rank):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert distributed.all_gather(torch.full((1,), rank)).tolist() == [0, 1]
        net = distributed.data_parallel(
            distributed.sync_batch_norm(nn.Linear(2, 2), torch.device("cpu"))
        )
        net(torch.ones(1, 2)).sum().backward()
        distributed.broadcast_buffers(net)
    return [
        str(one.message)
        for one in told
        if issubclass(one.category, FutureWarning | DeprecationWarning)
    ]


def check_collectives(rank):
    rows = torch.arange(6).view(2, 3) + 100 * rank
    bn = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    for tensor in bn.state_dict().values():
        tensor.fill_(rank + 5)
    distributed.broadcast_buffers(bn)
    summed = torch.tensor([1.5, 10.0]) * (rank + 1)
    distributed.barrier()
    return {
        "who": (distributed.rank(), distributed.world_size()),
        "gathered": distributed.all_gather(rows),
        "transposed": distributed.all_gather(rows.T),
        "uneven": distributed.all_gather_uneven(numbered(3 + 2 * rank, 2) + 100 * rank),
        "uneven labels": distributed.all_gather_uneven(torch.arange(4 - rank)),
        "some empty": distributed.all_gather_uneven(torch.arange(3 * rank)),
        "returned sum": distributed.all_reduce_sum(summed).clone(),
        "sum": summed,
        "buffers": bn.state_dict(),
    }


def check_training(rank, kind):
    """A few steps as the training loop takes them; after each: loss, gradients, queue and key encoder."""
    model = build(kind)
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


def check_recomputing(rank):
    """Gradient, and what batch norm has seen, of residual blocks with batch norm over both ranks, kept and computed again."""
    torch.manual_seed(0)
    net = distributed.sync_batch_norm(resnet("resnet18", 4).double(), torch.device("cpu"))
    images = torch.randn(
        2, 3, 32, 32, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
    )
    found = []
    for again in (False, True):
        mine = copy.deepcopy(net)
        if again:
            recompute_blocks(mine)
        ddp = DistributedDataParallel(mine, broadcast_buffers=False)
        (ddp(images).square().sum() + ddp(images.flip(0)).abs().sum()).backward()
        found.append([*mine.buffers(), *(p.grad for p in mine.parameters())])
    return found


CHECKS = {
    "silence": (check_silence,),
    "recomputing": (check_recomputing,),
    "shuffle": (check_shuffle,),
    "key groups": (check_key_groups,),
    "traffic": (check_traffic,),
    "collectives": (check_collectives,),
    "moco": (check_training, NO_KIND),
    "synco": (check_training, KIND),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The two ranks' findings, by check."""
    return on_two_ranks(CHECKS, tmp_path_factory.mktemp("ranks"))


# shuffled BN


@pytest.mark.parametrize("i", range(len(permutations())))
def test_two_ranks_shuffle_the_joint_batch_and_unshuffle_it(ranks, i):
    permutation = permutations()[i]
    x = numbered(len(permutation), 2, 3, 3)
    (first, restored), (second, restored_too) = (found[i] for found in ranks("shuffle"))
    assert first.shape == second.shape == (len(permutation) // 2, 2, 3, 3)
    assert torch.equal(torch.cat([first, second]), x[permutation])
    assert torch.equal(restored, x.flatten(1))
    assert torch.equal(restored_too, x.flatten(1))


@pytest.mark.parametrize("i", range(len(permutations())))
def test_one_process_shuffles_and_unshuffles(i):
    permutation = permutations()[i]
    x = numbered(len(permutation), 2, 3, 3)
    shuffled = distributed.shuffle(x, permutation)
    assert torch.equal(shuffled, x[permutation])
    assert torch.equal(distributed.unshuffle(shuffled.flatten(1), permutation), x.flatten(1))


def test_permutation_is_shared_by_the_ranks_and_fresh_each_step(ranks):
    one, other = ([step["permutation"] for step in found] for found in ranks("key groups"))
    for step in range(3):
        assert torch.equal(one[step], other[step])
        assert sorted(one[step].tolist()) == list(range(WORLD * B))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[1], one[2])
    assert not torch.equal(one[0], one[2])


def test_key_groups_are_parts_of_the_shuffled_joint_batch_and_not_the_query_groups(ranks):
    found = ranks("key groups")
    for step in range(3):
        seen = [found[rank][step] for rank in range(WORLD)]
        for rank in range(WORLD):
            (queries,), (keys,) = seen[rank]["q"], seen[rank]["k"]
            assert queries == list(range(rank * B, (rank + 1) * B))
            assert keys == part(seen[rank]["permutation"], rank).tolist()
            assert 0 < len(set(keys) & set(queries)) < B
        assert sorted(seen[0]["k"][0] + seen[1]["k"][0]) == list(range(WORLD * B))


def test_key_groups_differ_from_step_to_step(ranks):
    for found in ranks("key groups"):
        groups = [frozenset(step["k"][0]) for step in found]
        assert len(set(groups)) == len(groups)


def test_each_rank_receives_its_own_share_of_images_and_all_keys(ranks):
    for received in ranks("traffic"):
        shapes = received["all_to_all_single"] + received["_all_gather_rows"]
        assert sum(shape[0] for shape in shapes if shape[1:] == IMAGE) == B
        assert [shape for shape in shapes if shape[1:] != IMAGE] == [(WORLD * B, DIM)]


def test_no_exchange_uses_a_name_that_torch_will_drop(ranks):
    assert ranks("silence") == [[], []]


# gathers and sums


def test_rank_and_world(ranks):
    assert [found["who"] for found in ranks("collectives")] == [(0, 2), (1, 2)]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_all_gather_puts_the_rows_in_rank_order(ranks):
    rows = torch.arange(6).view(2, 3)
    for found in ranks("collectives"):
        assert torch.equal(found["gathered"], torch.cat([rows, rows + 100]))
        assert torch.equal(found["transposed"], torch.cat([rows.T, rows.T + 100]))


def test_all_gather_uneven_keeps_every_row_and_adds_none(ranks):
    for found in ranks("collectives"):
        assert torch.equal(found["uneven"], torch.cat([numbered(3, 2), numbered(5, 2) + 100]))
        assert found["uneven labels"].tolist() == [0, 1, 2, 3, 0, 1, 2]
        assert found["some empty"].tolist() == [0, 1, 2]


def test_all_reduce_sum_adds_in_place(ranks):
    for found in ranks("collectives"):
        assert found["sum"].tolist() == [4.5, 30.0]
        assert torch.equal(found["returned sum"], found["sum"])


def test_broadcast_buffers_shares_rank_0s_and_leaves_parameters_alone(ranks):
    for rank, found in enumerate(ranks("collectives")):
        for name, tensor in found["buffers"].items():
            buffer = name.startswith("0.running") or name == "0.num_batches_tracked"
            assert (tensor == (5 if buffer else rank + 5)).all(), name


def test_blocks_computed_again_exchange_the_same(ranks):
    for kept, again in ranks("recomputing"):
        assert len(kept) == len(again) == 122 and all(map(torch.equal, kept, again))


def test_one_process_exchanges_with_itself():
    x = torch.arange(6.0).view(2, 3)
    bn = nn.BatchNorm1d(2)
    distributed.broadcast_buffers(bn)
    distributed.barrier()
    assert torch.equal(distributed.all_gather(x), torch.arange(6.0).view(2, 3))
    assert torch.equal(distributed.all_gather_uneven(x), torch.arange(6.0).view(2, 3))
    assert torch.equal(distributed.all_reduce_sum(x), torch.arange(6.0).view(2, 3))
    assert torch.equal(bn.running_var, torch.ones(2))


# training on two ranks beside the same global batch in one process


def steps_by_hand(kind, shuffled=True):
    """The global batch in one process: queries normalised in the ranks' groups, keys in groups of the shuffled batch."""
    model = build(kind)
    f_q, f_k, queue, total, found = (
        model.encoder_q,
        copy.deepcopy(model.encoder_k),
        model.queue.clone(),
        0,
        [],
    )
    for step in range(STEPS):
        query_view, key_view = joint_views(step)
        order = torch.arange(WORLD * B)
        if shuffled:
            order = torch.randperm(WORLD * B, generator=progress_of(step).generator(SHUFFLE, "cpu"))
        k = torch.empty(WORLD * B, DIM, dtype=torch.float64)
        with torch.no_grad():
            for rank in range(WORLD):
                k[part(order, rank)] = F.normalize(f_k(key_view[part(order, rank)]))
        losses = []
        for rank in range(WORLD):
            q = F.normalize(f_q(part(query_view, rank)))
            s = q @ queue.T
            columns = [(q * part(k, rank)).sum(1, keepdim=True), s]
            if kind.total:
                generator = progress_of(step).generator(NEGATIVES, "cpu", rank)
                draws = synthetic.draw(kind, B, DIM, generator, torch.float64)
                columns.append(
                    synthetic.similarities(
                        q, queue, s, synthetic.hardest(s, kind.n_hard), kind, draws
                    )
                )
            losses.append(
                F.cross_entropy(torch.cat(columns, 1) / T, torch.zeros(B, dtype=torch.long))
            )
        loss = sum(losses) / WORLD
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
    """The ranks' findings and those of the calculation by hand, with and without synthetic negatives."""
    return ranks(request.param), steps_by_hand({"moco": NO_KIND, "synco": KIND}[request.param])


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_losses_of_the_ranks_are_those_of_the_global_batch(training):
    found, by_hand = training
    for step in range(STEPS):
        for rank in range(WORLD):
            near(found[rank][step]["loss"], by_hand[step]["losses"][rank].detach())
        assert (
            abs(found[0][step]["loss"] - found[1][step]["loss"]) > 1e-4
        )  # each has its own images and draws


def test_gradients_are_those_of_the_mean_loss_of_the_global_batch(training):
    found, by_hand = training
    for step in range(STEPS):
        for name, expected in by_hand[step]["gradients"].items():
            for rank in range(WORLD):
                near(found[rank][step]["gradients"][name], expected)
        assert by_hand[step]["gradients"]["5.weight"].abs().max() > 1e-3


def test_queue_is_the_same_on_the_ranks_and_holds_the_joint_keys_in_order(training):
    found, by_hand = training
    for step in range(STEPS):
        one, other = (found[rank][step]["state"] for rank in range(WORLD))
        assert torch.equal(one["queue"], other["queue"])
        assert one["queue_ptr"].tolist() == other["queue_ptr"].tolist() == [by_hand[step]["ptr"]]
        near(one["queue"], by_hand[step]["queue"])


def test_key_encoder_is_the_same_on_the_ranks_and_follows_the_query_encoder(training):
    found, by_hand = training
    for step in range(STEPS):
        for name, expected in by_hand[step]["f_k"].items():
            one, other = (found[rank][step]["state"][f"encoder_k.{name}"] for rank in range(WORLD))
            assert torch.equal(one, other)
            near(one, expected)


def test_the_comparison_sees_whether_keys_are_shuffled(ranks):
    unshuffled = steps_by_hand(NO_KIND, shuffled=False)
    loss = ranks("moco")[0][0]["loss"]
    assert abs(loss - unshuffled[0]["losses"][0]) > 1e-4
