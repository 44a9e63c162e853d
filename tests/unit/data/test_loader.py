"""Tests of `moco.data.loader`: what a run sees does not depend on the number of workers."""

import errno
import multiprocessing.synchronize
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from data_helpers import (
    BAD,
    CPU,
    RECIPE,
    read,
    some_photographs,
    train_batches,
    write_jpeg,
    write_large_photograph,
)

from moco.augment import crop
from moco.augment.recipes import recipe
from moco.data import loader
from moco.data.decoding import Decoding
from moco.data.loader import CenterCrop, EvalBatchSampler, RandomCrops, batches
from moco.data.sources import scan
from moco.errors import InputError
from moco.sections import Input


@pytest.fixture(scope="module")
def photographs():
    return some_photographs()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_large_photograph(tmp_path_factory.mktemp("large"))


def read_epochs(folder, workers=0, crop_seed=0, order_seed=0, start=0, epochs=1):
    """Return all batches of 38 images of the epochs from `start` up to `epochs`."""
    sampler = train_batches(len(folder), 38, 1, start, epochs, order_seed)
    return read(folder, sampler, RandomCrops(RECIPE, crop_seed), workers)


def views_by_index(read_batches):
    """Return the views [2, 3, 32, 32] of each image by its index."""
    return {
        int(i): torch.stack(views)
        for b in read_batches
        for i, *views in zip(b.index, *b.views, strict=True)
    }


def fraction_of_equal_views(a, b):
    """Return the fraction of views that are equal in two lists of batches."""
    a, b = views_by_index(a), views_by_index(b)
    common = sorted(a.keys() & b.keys())
    assert len(common) == 190
    return sum(torch.equal(a[i][v], b[i][v]) for i in common for v in range(2)) / (2 * len(common))


def test_views_do_not_depend_on_the_number_of_workers(photographs):
    alone = read_epochs(photographs, workers=0, epochs=2)
    assert len(alone) == 10
    for workers in (1, 3):
        for ours, theirs in zip(alone, read_epochs(photographs, workers, epochs=2), strict=True):
            assert torch.equal(ours.index, theirs.index) and torch.equal(ours.label, theirs.label)
            assert len(ours.views) == len(theirs.views) == 2
            assert all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views, strict=True))


def test_batches_hold_bytes_with_their_index_and_label(photographs):
    for batch in read_epochs(photographs):
        assert all(
            view.dtype == torch.uint8 and view.shape == (38, 3, 32, 32) for view in batch.views
        )
        assert batch.index.dtype == batch.label.dtype == torch.int64
        assert batch.label.tolist() == photographs.labels[batch.index].tolist()


def test_views_depend_on_the_seed_the_epoch_and_the_index_only(photographs):
    first = read_epochs(photographs)
    assert fraction_of_equal_views(first, read_epochs(photographs, order_seed=1)) == 1
    assert fraction_of_equal_views(first, read_epochs(photographs, crop_seed=1)) < 0.05
    assert fraction_of_equal_views(first, read_epochs(photographs, start=1, epochs=2)) < 0.05


def test_the_two_views_of_an_image_differ(photographs):
    views = views_by_index(read_epochs(photographs)).values()
    assert sum(torch.equal(a, b) for a, b in views) < 0.05 * len(views)


def test_evaluation_reads_every_image_in_order(photographs):
    read_batches = read(
        photographs, EvalBatchSampler(len(photographs), 38), CenterCrop(32), workers=2
    )
    assert torch.cat([b.index for b in read_batches]).tolist() == list(range(len(photographs)))
    assert torch.cat([b.label for b in read_batches]).tolist() == photographs.labels.tolist()
    assert torch.equal(read_batches[0].views[0][7], CenterCrop(32)(photographs.read(7), (0, 7))[0])


@pytest.mark.parametrize(
    ("workers", "batch_per_process", "processes"),
    [(0, 64, 256), (3, 64, 256), (4, 64, 256), (5, 64, 64), (9, 64, 256)],
)
def test_the_workers_of_a_node_are_divided_among_its_processes(
    monkeypatch, photographs, workers, batch_per_process, processes
):
    asked = []
    monkeypatch.setattr(
        loader, "DataLoader", lambda *_, num_workers, **__: asked.append(num_workers) or []
    )
    args = Input(workers=workers, batch_per_process=batch_per_process, batch_size=processes)
    assert list(batches(photographs, CenterCrop(32), EvalBatchSampler(10, 5), args, CPU)) == []
    assert asked == [{0: 0, 3: 1, 4: 1, 5: 5, 9: 3}[workers]]


def test_more_workers_than_cores_give_no_warning(photographs, recwarn):
    workers = os.cpu_count() + 1
    assert len(read(photographs, EvalBatchSampler(38, 38), CenterCrop(32), workers)) == 1
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_a_full_dev_shm_is_one_line(photographs, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    with pytest.raises(InputError, match="/dev/shm is full, so 2 loader processes cannot start; "):
        read(photographs, EvalBatchSampler(38, 38), CenterCrop(32), 2)
    assert len(read(photographs, EvalBatchSampler(38, 38), CenterCrop(32), 0)) == 1


def test_a_program_that_leaves_batches_unread_can_exit():
    """At exit, Python would send its workers a SIGTERM, which they survive, and wait for them."""
    program = """if True:
        import torch
        from moco.sections import Input
        from moco.data import sources, loader
        images = sources.scan(sources.find("photos", ("train", "val")), "train")
        args = Input(workers=2, batch_per_process=8, batch_size=8)
        sampler, device = loader.EvalBatchSampler(len(images), 8), torch.device("cpu")
        left = loader.batches(images, loader.CenterCrop(32), sampler, args, device)
        print(next(left).label.tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 0, 0, 0, 0, 0, 0, 0]\n", "")


@BAD
@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_names_the_file_that_a_worker_cannot_read(tmp_path, write_bad, workers):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for i in range(7):
        write_jpeg(tmp_path / "train" / "cat" / f"{i}.jpg")
    bad = tmp_path / "train" / "cat" / "5.jpg"
    write_bad(bad)
    folder = scan(tmp_path, "train")
    reader = batches(
        folder,
        CenterCrop(32),
        EvalBatchSampler(7, 2),
        Input(workers=workers, batch_per_process=2, batch_size=2),
        CPU,
    )
    assert [next(reader).index.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(InputError) as error:
        next(reader)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(375, 500), (1400, 1600), (4000, 500)])
@pytest.mark.parametrize("pixels", [224, 96])
def test_reduction_is_the_largest_that_leaves_every_crop_twice_as_large_as_its_view(size, pixels):
    crops, found = RandomCrops(recipe("byol", pixels), seed=3), set()
    for index in range(60):
        factor = crops.reduction(*size, (0, index))
        boxes = crop.random_boxes(*size, crops.recipe, loader.rng.CROP, 3, 0, index)
        least = min(side for _, _, *sides in boxes for side in sides)
        assert factor == 1 or least >= 2 * factor * pixels
        assert factor == 8 or least < 4 * factor * pixels
        found.add(factor)
    assert len(found) > 1 or min(size) < 1000
    assert CenterCrop(pixels).reduction(*size, (0, 0)) == 1


def test_views_of_a_shrunk_image_equal_those_of_the_full_one(large):
    crops, factors = RandomCrops(recipe("mocov2", 64), seed=1), set()
    full = large.read(0)
    for epoch in range(20):
        sample = (epoch, 0)
        factors.add(crops.reduction(1400, 1600, sample))
        views, *_ = loader.Views(large, crops, settings=Decoding(shrink_on_decode=True))[sample]
        for ours, expected in zip(views, crops(full, sample), strict=True):
            assert ours.shape == (3, 64, 64)
            assert (ours.float() - expected.float()).abs().mean() < 4
    assert factors >= {4, 8}
