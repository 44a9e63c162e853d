"""Tests of the batch samplers in `moco.data.loader`."""

import pytest
from data_helpers import set_rank, train_batches

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
