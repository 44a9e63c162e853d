"""Tests of the batch samplers in `moco.data.loader`."""

import pytest
import torch
from data_helpers import set_rank, train_batches

from moco import rng
from moco.data.loader import EvalBatchSampler, TrainBatchSampler


def indices(batches):
    """Return the indices of the images in all batches."""
    return [i for batch in batches for _, i in batch]


def test_an_epoch_shows_no_image_twice():
    sampler = train_batches(103, 8, 1, 0, 3, seed=0)
    all_batches = list(sampler)
    assert len(all_batches) == len(sampler) == 36
    assert {len(batch) for batch in all_batches} == {8}
    epochs = [all_batches[i : i + 12] for i in (0, 12, 24)]
    for number, epoch in enumerate(epochs):
        assert {e for batch in epoch for e, _ in batch} == {number}
        assert len(set(indices(epoch))) == 96 and set(indices(epoch)) <= set(range(103))
    assert indices(epochs[0]) != indices(epochs[1]) != indices(epochs[2])
    assert len(set(range(103)).difference(*(indices(epoch) for epoch in epochs))) == 0


@pytest.mark.parametrize("n", [1, 2, 1000, 100_003])
def test_the_order_is_that_of_64_bit_numbers(n):
    """Earlier versions shuffled int64 numbers, and their runs must resume with the same order."""
    order = torch.randperm(n, generator=rng.generator("cpu", rng.ORDER, 3, 5))
    batches = list(train_batches(n, 1, 1, 5, 6, seed=3))
    assert batches == [[(5, i)] for i in order.tolist()]


def test_another_seed_gives_another_order():
    first, again, other = (list(train_batches(64, 8, 1, 0, 1, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_batches_of_all_ranks_together_are_those_of_one_process(monkeypatch, accumulation):
    alone = list(train_batches(103, 8, accumulation, 0, 2, seed=4))
    for world_size in (1, 2, 4):
        ranks = []
        for rank in range(world_size):
            set_rank(monkeypatch, rank, world_size)
            ranks.append(list(train_batches(103, 8 // world_size, accumulation, 0, 2, seed=4)))
        for expected, *batches in zip(alone, *ranks, strict=True):
            joined = [sample for batch in batches for sample in batch]
            assert {len(batch) for batch in batches} == {8 // world_size}
            assert len(set(joined)) == 8
            assert set(joined) == set(expected)


def test_a_later_start_continues_the_same_order(monkeypatch):
    for rank, world_size in ((0, 1), (1, 2)):
        set_rank(monkeypatch, rank, world_size)
        full, later = (train_batches(50, 8, 1, start, 5, seed=1) for start in (0, 2))
        assert list(later) == list(full)[2 * len(full) // 5 :]
        assert len(later) == len(list(later)) == 3 * len(full) // 5


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_before_epoch_0_take_the_first_images_of_epoch_0_and_the_next(accumulation):
    sampler = TrainBatchSampler(50, 4, accumulation, seed=2, start=-13, stop=13, before=13)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 26 * accumulation
    before, after = batches[: 13 * accumulation], batches[13 * accumulation :]
    assert after == list(TrainBatchSampler(50, 4, accumulation, seed=2, stop=13))
    # the same images, cropped differently: the epoch -1 shows those of epoch 0
    assert before == [[(-1 - epoch, i) for epoch, i in batch] for batch in after]
    assert len({sample for batch in before for sample in batch}) == 4 * len(before)


def test_a_later_start_before_epoch_0_continues_the_same_order():
    full, later = (
        list(TrainBatchSampler(50, 4, 1, seed=2, start=start, stop=2, before=13))
        for start in (-13, -5)
    )
    assert later == full[8:]


@pytest.mark.parametrize(
    ("n", "accumulation", "world_size", "expected"),
    [(103, 1, 1, 12), (103, 5, 1, 10), (103, 2, 2, 6), (103, 3, 4, 3), (30, 4, 1, 0)],
)
def test_images_that_do_not_fill_an_accumulated_step_are_left_out(
    monkeypatch, n, accumulation, world_size, expected
):
    set_rank(monkeypatch, 0, world_size)
    sampler = train_batches(n, 8, accumulation, 0, 2, seed=0)
    all_batches = list(sampler)
    assert len(sampler) == len(all_batches) == 2 * expected
    assert all(len(batch) == 8 for batch in all_batches)
    assert [sum(e == epoch for batch in all_batches for e, _ in batch) for epoch in (0, 1)] == [
        8 * expected
    ] * 2


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 12, 13, 23, 24, 36, 37, 103])
@pytest.mark.parametrize("least", [1, 2])
def test_a_kept_last_step_has_the_images_that_are_left(
    monkeypatch, least, n, world_size, accumulation
):
    """Write out an epoch as one list: full steps as without the last one, then what is left."""
    batch = 12 // world_size
    ranks = []
    for rank in range(world_size):
        set_rank(monkeypatch, rank, world_size)
        full = TrainBatchSampler(n, batch, accumulation, seed=3)
        kept = TrainBatchSampler(n, batch, accumulation, seed=3, keep_last=least)
        full.stop, kept.stop = full.steps_per_epoch, 2 * kept.steps_per_epoch
        batches = list(kept)
        assert len(kept) == len(batches)
        assert batches[: len(full)] == list(full)
        sizes = [size for step in range(kept.stop) for size in kept.sizes(step)]
        assert [len(one) for one in batches] == sizes
        for steps in range(kept.stop + 1):
            read = sum(sum(kept.sizes(step)) for step in range(steps))
            assert kept.images(steps) == read
        ranks.append(batches)
    assert kept.steps_per_epoch == -(-n // (12 * accumulation))
    assert all([len(one) for one in batches] == sizes for batches in ranks)
    assert all(least <= size <= batch for size in sizes)
    for epoch in (0, 1):
        seen = [i for batches in ranks for one in batches for e, i in one if e == epoch]
        assert set(seen) == set(range(n))  # none is left out
        assert len(seen) - n == kept.repeated < max(2, least * world_size)
    # the same images in the last pass as on one process, apart from the repeated ones
    set_rank(monkeypatch, 0, 1)
    alone = TrainBatchSampler(n, 12, accumulation, seed=3, keep_last=1)
    alone.stop = alone.steps_per_epoch
    for i, one in enumerate(alone):
        joined = {sample for batches in ranks for sample in batches[i]}
        assert joined == set(one) if len(one) == 12 else joined >= set(one)


def test_the_last_step_of_one_percent_of_imagenet(monkeypatch):
    """12,811 images at batch 1024 are 13 steps: 12 of 1024 images and one of 523."""
    set_rank(monkeypatch, 5, 8)
    sampler = TrainBatchSampler(12811, 128, 1, seed=0, keep_last=2)
    sampler.stop = sampler.steps_per_epoch
    sizes = [len(batch) for batch in sampler]
    assert sizes == [128] * 12 + [66]
    assert sampler.repeated == 66 * 8 - 523


def test_a_start_inside_an_epoch_continues_with_the_kept_last_step(monkeypatch):
    for rank, world_size in ((0, 1), (1, 2)):
        set_rank(monkeypatch, rank, world_size)
        full = TrainBatchSampler(50, 4, 3, seed=1, stop=15, keep_last=2)
        batches = list(full)
        skipped = 0
        for start in range(15):
            later = TrainBatchSampler(50, 4, 3, seed=1, start=start, stop=15, keep_last=2)
            assert list(later) == batches[skipped:]
            assert len(later) == len(batches) - skipped
            skipped += len(full.sizes(start))


@pytest.mark.parametrize("n", [0, 1, 10, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_reads_each_image_once_over_all_ranks(monkeypatch, n, world_size):
    seen = []
    for rank in range(world_size):
        set_rank(monkeypatch, rank, world_size)
        sampler = EvalBatchSampler(n, 3)
        assert len(list(sampler)) == len(sampler)
        assert all(1 <= len(batch) <= 3 for batch in sampler)
        seen += indices(sampler)
    assert sorted(seen) == list(range(n))
