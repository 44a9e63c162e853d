"""The communication between two processes, over loopback."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import on_two_ranks
from rank_helpers import DIM, IMAGE, WORLD_SIZE, B, K, joint_views, part, tiny_encoder
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco import distributed
from moco.builder.moco import MoCo
from moco.encoder.recompute import recompute_blocks
from moco.encoder.resnets import resnet
from moco.rng import Progress


def permutations():
    """Return permutations; in some, a rank needs no sample of itself or of the other."""
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


# functions that run in the spawned processes


def check_shuffle(rank):
    found = []
    for permutation in permutations():
        x = numbered(len(permutation), 2, 3, 3)
        shuffled = distributed.shuffle(part(x, rank), permutation)
        found.append((shuffled, distributed.unshuffle(shuffled.flatten(1), permutation)))
    return found


def check_key_groups(rank):
    """Return, per step, the permutation and the images that each encoder has seen."""
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
        images = part(numbered(WORLD_SIZE * B, *IMAGE), rank)
        model([images, images], torch.arange(B), Progress(seed=4, step=step))
        found.append(dict(seen))
    distributed.shuffle = exchange
    return found


def check_traffic(rank):
    """Return the shapes of all tensors that one forward pass receives from other ranks."""
    torch.manual_seed(0)
    model, received = (
        MoCo(tiny_encoder, dim=DIM, K=K),
        {"all_to_all_single": [], "_all_gather_rows": []},
    )
    module = {"all_to_all_single": dist, "_all_gather_rows": distributed}
    true = {name: getattr(module[name], name) for name in received}

    def counted(name):
        def call(output, *args, **kwargs):
            received[name].append(tuple(output.shape))
            return true[name](output, *args, **kwargs)

        return call

    for name in received:
        setattr(module[name], name, counted(name))
    model([part(view, rank).float() for view in joint_views(0)], torch.arange(B), Progress())
    for name in received:
        setattr(module[name], name, true[name])
    return received


def check_warnings(rank):
    """Return the deprecation warnings of each exchange."""
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


def check_recomputing(rank):
    """Return buffers and gradients of a ResNet with SyncBN, without and with recomputed blocks."""
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


def check_gradients(rank):
    """Return gradients of a ResNet over two passes and two steps: its own, DDP's, and in bf16.

    The first pass of a step does not exchange gradients, as in training with accumulation.
    """
    torch.manual_seed(0)
    net = resnet("resnet18", 4).double()
    net.conv1.requires_grad_(False)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(2, 2, 2, 3, 32, 32, generator=generator, dtype=torch.float64)
    found = {"own": [], "off": [], "bf16": []}
    for name, gradients in found.items():
        mine = copy.deepcopy(net)
        ddp = mine if name == "own" else distributed.data_parallel(mine, name)
        for first, last in images:
            with contextlib.nullcontext() if name == "own" else ddp.no_sync():
                ddp(first).square().sum().backward()
            ddp(last).square().sum().backward()
            gradients.append([p.grad.clone() for p in mine.parameters() if p.requires_grad])
            mine.zero_grad(set_to_none=True)
    return found


CHECKS = {
    "gradients": (check_gradients,),
    "warnings": (check_warnings,),
    "recomputing": (check_recomputing,),
    "shuffle": (check_shuffle,),
    "key groups": (check_key_groups,),
    "traffic": (check_traffic,),
    "collectives": (check_collectives,),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return a function from the name of a check to the results of both ranks."""
    return on_two_ranks(CHECKS, tmp_path_factory.mktemp("ranks"))


# shuffled BN


@pytest.mark.parametrize("i", range(len(permutations())))
def test_two_ranks_shuffle_and_unshuffle_the_joint_batch(ranks, i):
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


def test_permutation_is_equal_on_the_ranks_and_new_each_step(ranks):
    one, other = ([step["permutation"] for step in found] for found in ranks("key groups"))
    for step in range(3):
        assert torch.equal(one[step], other[step])
        assert sorted(one[step].tolist()) == list(range(WORLD_SIZE * B))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[1], one[2])
    assert not torch.equal(one[0], one[2])


def test_key_groups_are_parts_of_the_shuffled_joint_batch(ranks):
    found = ranks("key groups")
    for step in range(3):
        seen = [found[rank][step] for rank in range(WORLD_SIZE)]
        for rank in range(WORLD_SIZE):
            (queries,), (keys,) = seen[rank]["q"], seen[rank]["k"]
            assert queries == list(range(rank * B, (rank + 1) * B))
            assert keys == part(seen[rank]["permutation"], rank).tolist()
            assert 0 < len(set(keys) & set(queries)) < B
        assert sorted(seen[0]["k"][0] + seen[1]["k"][0]) == list(range(WORLD_SIZE * B))


def test_key_groups_differ_from_step_to_step(ranks):
    for found in ranks("key groups"):
        groups = [frozenset(step["k"][0]) for step in found]
        assert len(set(groups)) == len(groups)


def test_each_rank_receives_as_many_images_as_it_has_and_all_keys(ranks):
    for received in ranks("traffic"):
        shapes = received["all_to_all_single"] + received["_all_gather_rows"]
        assert sum(shape[0] for shape in shapes if shape[1:] == IMAGE) == B
        assert [shape for shape in shapes if shape[1:] != IMAGE] == [(WORLD_SIZE * B, DIM)]


def test_no_exchange_is_deprecated(ranks):
    assert ranks("warnings") == [[], []]


# gathers and sums


def test_rank_and_world_size(ranks):
    assert [found["who"] for found in ranks("collectives")] == [(0, 2), (1, 2)]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_all_gather_returns_rows_in_rank_order(ranks):
    rows = torch.arange(6).view(2, 3)
    for found in ranks("collectives"):
        assert torch.equal(found["gathered"], torch.cat([rows, rows + 100]))
        assert torch.equal(found["transposed"], torch.cat([rows.T, rows.T + 100]))


def test_all_gather_uneven_keeps_every_row_and_adds_none(ranks):
    for found in ranks("collectives"):
        assert torch.equal(found["uneven"], torch.cat([numbered(3, 2), numbered(5, 2) + 100]))
        assert found["uneven labels"].tolist() == [0, 1, 2, 3, 0, 1, 2]
        assert found["some empty"].tolist() == [0, 1, 2]


def test_gradients_are_the_mean_over_ranks_in_bf16_within_rounding(ranks):
    """Each summand, and each of W - 1 sums, is rounded by at most 2^-8 of its size."""
    bound, found = WORLD_SIZE * 2**-8 * 1.01, ranks("gradients")
    largest = 0
    for step in range(2):
        for name in ("off", "bf16"):
            for one, other in zip(*(rank[name][step] for rank in found), strict=True):
                assert torch.equal(one, other)
        owns = zip(*(rank["own"][step] for rank in found), strict=True)
        for own, off, bf16 in zip(owns, found[0]["off"][step], found[0]["bf16"][step], strict=True):
            own = torch.stack(own)
            torch.testing.assert_close(off, own.mean(0), rtol=1e-9, atol=1e-12)
            error, size = (bf16 - off).abs(), own.abs().mean(0)
            assert (error <= bound * size).all()
            largest = max(largest, (error / size).nan_to_num().max())
    assert largest > 2**-10


def test_all_reduce_sum_adds_in_place(ranks):
    for found in ranks("collectives"):
        assert found["sum"].tolist() == [4.5, 30.0]
        assert torch.equal(found["returned sum"], found["sum"])


def test_broadcast_buffers_copies_rank_0s_and_leaves_parameters_alone(ranks):
    for rank, found in enumerate(ranks("collectives")):
        for name, tensor in found["buffers"].items():
            buffer = name.startswith("0.running") or name == "0.num_batches_tracked"
            assert (tensor == (5 if buffer else rank + 5)).all(), name


def test_recomputed_blocks_with_sync_bn_change_nothing(ranks):
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
