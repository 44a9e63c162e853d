"""Tests of `moco.data.batch`: loader processes reuse memory only when nothing needs it any more."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT
from data_helpers import CPU, RECIPE, read

from moco.data import batch, loader
from moco.data.images import ImageArray
from moco.data.loader import EvalBatchSampler, RandomCrops, batches
from moco.sections import Input


@pytest.fixture
def images():
    """Return 80 images of 160x170 pixels, which are cropped one by one."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (80, 3, 160, 170), dtype=np.uint8)
    return ImageArray(ROOT, draw.integers(-1, 2, (80, 5)), tuple("abcde"), pixels)


@pytest.fixture
def reserved(monkeypatch):
    """Return a list to which the slots of each loader are added."""
    found = []
    monkeypatch.setattr(
        loader, "reserve", lambda *args: found.append(batch.reserve(*args)) or found[-1]
    )
    return found


def start(images, workers=1, size=4):
    options = Input(workers=workers, batch_per_process=4, batch_size=4)
    return batches(images, RandomCrops(RECIPE, 3), EvalBatchSampler(80, size), options, CPU)


def assert_equal(a, b):
    assert all(map(torch.equal, (*a.views, a.index, a.label), (*b.views, b.index, b.label)))
    assert a.views[0].stride() == b.views[0].stride() and a.unreadable == b.unreadable


def test_batches_are_in_few_slots_which_are_free_in_the_end(images, reserved):
    expected, starts = read(images, EvalBatchSampler(80, 4), RandomCrops(RECIPE, 3), batch=4), set()
    for ours, theirs in zip(start(images), expected, strict=True):
        assert_equal(ours, theirs)
        starts.add(ours.views[0].data_ptr())
        assert ours.views[1].data_ptr() == ours.views[0].data_ptr() + ours.views[0].numel()
    del ours
    slots = reserved[-1]
    first = slots._memory.ctypes.data
    assert starts <= {first + i * slots._memory.shape[1] for i in range(len(slots._used))}
    assert len(expected) == 20 and 1 < len(starts) <= len(slots._used) == 6
    assert not slots._used.any()


def test_a_part_of_a_view_keeps_its_memory(images, reserved):
    reader = start(images, workers=2)
    part = next(reader).views[1][2:3, 0]
    held, before = part.data_ptr(), part.clone()
    others = [(b.views[0].data_ptr(), b.views[1].data_ptr()) for b in reader]
    assert torch.equal(part, before) and len(others) == 19
    slots = reserved[-1]
    slot = (held - slots._memory.ctypes.data) // slots._memory.shape[1]
    assert slots._used.nonzero()[0].tolist() == [slot]
    del part
    assert not slots._used.any()


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_without_a_free_slot_are_equal(images, reserved, workers):
    ours = list(start(images, workers))
    assert reserved[0]._used.all()
    for a, b in zip(ours, start(images, workers=0), strict=True):
        assert_equal(a, b)


def test_batches_larger_than_a_slot_are_equal(images, reserved):
    for a, b in zip(start(images, size=9), start(images, workers=0, size=9), strict=True):
        assert_equal(a, b)
    assert not reserved[0]._used.any() and reserved[1] is None


def test_nothing_is_reserved_for_workers_that_do_not_inherit_memory(monkeypatch):
    assert batch.reserve(1, 2, 3) and not batch.reserve(0, 2, 3) and not batch.reserve(1, 2, 0)
    monkeypatch.setattr(mp, "get_start_method", lambda: "spawn")
    assert batch.reserve(1, 2, 3) is None
