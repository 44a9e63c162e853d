"""Tests of `moco.data.cache`: images in memory (`--cache-images`) and the limit of their size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, on_two_ranks
from data_helpers import (
    BAD,
    CPU,
    RECIPE,
    read,
    set_rank,
    smooth_rgb,
    train_batches,
    write_jpeg,
    write_large_photograph,
)
from PIL import Image

from moco.augment import crop
from moco.augment.recipes import recipe
from moco.data import cache
from moco.data.images import CachedImages, ImageArray
from moco.data.loader import CenterCrop, EvalBatchSampler, RandomCrops, batches
from moco.data.names import Names
from moco.data.sources import scan
from moco.errors import InputError
from moco.sections import Input


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_large_photograph(tmp_path_factory.mktemp("large"))


SMALL = recipe("byol", 32)


def cached(*folders, mode="on", **more):
    """Return `folders` with their images in memory."""
    return cache.load(Input(cache_images=mode, **more), *folders)


def assert_same(ours, theirs):
    """Assert that batches are equal, except for one grey level in pixels."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (
            torch.equal(a.index, b.index)
            and torch.equal(a.label, b.label)
            and a.label.dtype == b.label.dtype
        )
        assert a.unreadable == b.unreadable and len(a.views) == len(b.views)
        for x, y in zip(a.views, b.views, strict=True):
            assert (
                x.dtype == torch.uint8
                and x.shape == y.shape
                and (x.int() - y.int()).abs().max() <= 1
            )


def crop_one_by_one(monkeypatch):
    """Make the loader crop image by image, not a batch at once."""
    for transform in (RandomCrops, CenterCrop):
        monkeypatch.setattr(transform, "accepts", lambda *_: False)


@pytest.fixture
def mixed(tmp_path):
    """Return a folder of 20 images of many sizes and formats."""
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for i in range(20):
        name = f"{i:02}.{('jpg', 'png', 'jpg', 'bmp')[i % 4]}"
        Image.fromarray(smooth_rgb(30 + 3 * i, 90 - 2 * i)).save(tmp_path / "train" / "cat" / name)
    return scan(tmp_path, "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_give_bit_identical_views(mixed, workers):
    (held,) = cached(mixed)
    assert isinstance(held, CachedImages) and (held.starts >= 0).all()
    for folder in (mixed, held.subset(np.arange(20))):
        for transform in (RandomCrops(RECIPE, 3), CenterCrop(32)):
            ours, theirs = (
                read(one, EvalBatchSampler(20, 8), transform, workers) for one in (held, folder)
            )
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.index, b.index) and all(map(torch.equal, a.views, b.views))


def test_images_of_one_size_in_memory_are_cropped_a_batch_at_once(monkeypatch, tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for i in range(70):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "cat" / f"{i:02}.jpg")
    folder = scan(tmp_path, "train")
    (held,) = cached(folder)
    crops, calls = RandomCrops(SMALL, 3), []
    at_once = crop.random_views_at_once
    with monkeypatch.context() as patch:
        patch.setattr(
            crop,
            "random_views_at_once",
            lambda *args, **out: calls.append(1) or at_once(*args, **out),
        )
        ours = read(held, train_batches(70, 16, 1, 2, 4, seed=1), crops)
        assert len(calls) == len(ours) == 8
    assert_same(ours, read(folder, train_batches(70, 16, 1, 2, 4, seed=1), crops))
    assert_same(*(read(one, EvalBatchSampler(70, 16), CenterCrop(32)) for one in (held, folder)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("multi_label", [False, True])
def test_cropping_a_batch_at_once_equals_cropping_one_by_one(monkeypatch, workers, multi_label):
    draw = np.random.default_rng(0)
    labels = draw.integers(-1, 2, (50, 4)) if multi_label else draw.integers(0, 4, 50)
    pixels = draw.integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    array = ImageArray(ROOT, labels, tuple("abcd"), pixels).subset(draw.permutation(50)[:48])
    transforms = (
        RandomCrops(SMALL, 3),
        CenterCrop(32),
        CenterCrop(28),
        RandomCrops(recipe("fnc", 32, views=2), 1),
    )

    def all_batches():
        return [
            one
            for transform in transforms
            for one in read(array, train_batches(48, 12, 1, 0, 2, seed=1), transform, workers)
        ]

    at_once = all_batches()
    crop_one_by_one(monkeypatch)
    assert_same(at_once, all_batches())


@BAD
@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_an_unreadable_image_gives_the_same_error_with_and_without_the_cache(
    tmp_path, write_bad, skip_unreadable
):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for i in range(7):
        write_jpeg(tmp_path / "train" / "cat" / f"{i}.jpg")
    write_bad(tmp_path / "train" / "cat" / "5.jpg")
    folder = scan(tmp_path, "train")
    (held,) = cached(folder, shrink_on_decode=True)
    assert (held.starts < 0).tolist() == [False] * 5 + [True, False]

    def outcome(folder):
        args, found = Input(workers=0, batch_per_process=2, batch_size=2), []
        try:
            for batch in batches(
                folder, RandomCrops(RECIPE, 0), EvalBatchSampler(7, 2), args, CPU, skip_unreadable
            ):
                found.append(
                    (
                        batch.index.tolist(),
                        batch.unreadable,
                        [view.tolist() for view in batch.views],
                    )
                )
        except InputError as error:
            found.append(str(error))
        return found

    assert outcome(held) == outcome(folder)
    assert len(outcome(held)) == (4 if skip_unreadable else 3)


def test_large_jpegs_are_held_like_other_images(large):
    (held,) = cached(large)
    assert isinstance(held, CachedImages)
    ours, theirs = (
        read(one, EvalBatchSampler(1, 1), RandomCrops(RECIPE, 0)) for one in (held, large)
    )
    assert all(map(torch.equal, ours[0].views, theirs[0].views))


def test_large_jpegs_that_are_shrunk_stay_on_disk(large, capsys):
    (held,) = cached(large, shrink_on_decode=True)
    assert held is large  # nothing is left to hold
    assert "decoded at a reduced size" in capsys.readouterr().out
    folder = replace(large, paths=Names.of([*large.paths, b"a/1.jpg"]), labels=np.zeros(2, int))
    write_jpeg(large.root / "a" / "1.jpg")
    (held,) = cached(folder, shrink_on_decode=True)
    assert (held.starts < 0).tolist() == [True, False]
    ours, theirs = (
        read(one, EvalBatchSampler(2, 2), RandomCrops(RECIPE, 0)) for one in (held, folder)
    )
    assert all(map(torch.equal, ours[0].views, theirs[0].views))


def test_several_sets_share_the_limit_and_cached_sets_are_kept(mixed, monkeypatch, capsys):
    array = ImageArray(ROOT, np.zeros(2, int), ("a",), np.zeros((2, 3, 8, 8), np.uint8))
    first, none, second, third = cached(mixed, None, mixed.subset(np.arange(5)), array, mode="auto")
    assert none is None and third is array and len(first) == 20 and len(second) == 5
    assert capsys.readouterr().out.count("images stay in memory") == 1
    assert cached(first, second) == [first, second] and cached(mixed, mode="off") == [mixed]
    assert capsys.readouterr().out == ""
    needed = first.pixels.numel() + second.pixels.numel()
    for free, fits in ((4 * needed, True), (4 * needed - 4, False)):
        monkeypatch.setattr(cache, "free_memory", lambda free=free: free)
        held = cached(mixed, second.subset(np.arange(0)), mixed.subset(np.arange(5)), mode="auto")
        assert isinstance(held[0], CachedImages) == fits
    assert "read from their files in every epoch: about" in capsys.readouterr().out


def test_images_that_do_not_fit_stay_on_disk_or_are_refused(mixed, monkeypatch, capsys):
    size = cached(mixed)[0].pixels.numel()
    monkeypatch.setattr(cache, "free_memory", lambda: size)
    assert isinstance(cached(mixed)[0], CachedImages)
    assert cached(mixed, mode="auto") == [mixed]
    assert "(a quarter of the free" in capsys.readouterr().out
    set_rank(monkeypatch, 0, 2)  # two ranks hold a copy each
    monkeypatch.setattr(cache, "_agreed", lambda needed, free: (needed, free))
    with pytest.raises(
        InputError, match=r"--cache-images on: the images take about .* each process may use"
    ):
        cached(mixed)
    monkeypatch.setattr(cache, "AUTO_MAX", 2 * size - 2)
    monkeypatch.setattr(cache, "free_memory", lambda: 100 * size)
    assert cached(mixed, mode="auto") == [mixed]
    assert "divided among 2 processes" in capsys.readouterr().out
    monkeypatch.setattr(cache, "AUTO_MAX", 2 * size)
    assert isinstance(cached(mixed, mode="auto")[0], CachedImages)


def decide(rank, folder, free):
    """Return whether this rank holds the images, given free memory as a multiple of their size."""
    needed = sum(3 * folder.read(i)[0].numel() for i in range(20))
    cache.free_memory = lambda: round(free[rank] * needed)
    held, _ = cache.load(Input(cache_images="auto"), folder, None)
    return isinstance(held, CachedImages)


def test_all_ranks_decide_by_the_smallest_free_memory_of_any_rank(mixed, tmp_path):
    free = {"enough": (8.1, 9), "little": (9, 7.9), "little first": (7.9, 9)}
    checks = {name: (decide, mixed, ratios) for name, ratios in free.items()}
    of = on_two_ranks(checks, tmp_path)
    assert {name: of(name) for name in free} == {
        "enough": [True] * 2,
        "little": [False] * 2,
        "little first": [False] * 2,
    }


def test_images_beyond_the_estimated_memory_stay_on_disk(mixed, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK", 4)
    (held,) = cached(mixed)
    half = replace(held, pixels=held.pixels[: held.pixels.numel() // 2])
    with cache.ThreadPoolExecutor(2) as pool:
        some = cache._decoded(mixed, Input(), half.pixels.numel(), pool)
    assert 0 < (some.starts >= 0).sum() < 20 and some.pixels.numel() <= half.pixels.numel()
    ours, theirs = (
        read(one, EvalBatchSampler(20, 8), RandomCrops(RECIPE, 3)) for one in (some, mixed)
    )
    assert all(
        torch.equal(x, y)
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a.views, b.views, strict=True)
    )


def test_the_total_size_is_estimated_from_some_headers(mixed, monkeypatch):
    exact = sum(3 * mixed.read(i)[0].numel() for i in range(20))
    asked = []
    size = cache.decoded_size
    monkeypatch.setattr(cache, "decoded_size", lambda *args: asked.append(0) or size(*args))
    with cache.ThreadPoolExecutor(2) as pool:
        assert cache._estimate(mixed, Input(), pool) == exact and len(asked) == 20
        monkeypatch.setattr(cache, "_SAMPLE", 5)
        assert abs(cache._estimate(mixed, Input(), pool) / exact - 1) < 0.1 and len(asked) == 25


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_the_smallest_of_the_machine_and_its_control_groups(
    tmp_path, monkeypatch, version
):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal:  9000 kB\nMemAvailable:  5000 kB\nActive(anon):  7 kB\n"
    )
    monkeypatch.setattr(cache, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cache, "CGROUPS", tmp_path / "groups")
    assert cache.free_memory() == 5000 * 1024
    name, most, used, stat = [
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("", "memory.max", "memory.current", "inactive_file"),
    ][version - 1]
    (tmp_path / "proc" / "self" / "cgroup").write_text(
        "0::/job/step\n" if version == 2 else "3:cpu:/\n4:memory:/job/step\n"
    )
    assert cache.free_memory() == 5000 * 1024
    job = tmp_path / "groups" / name / "job"
    (job / "step").mkdir(parents=True)
    for folder, limit in (
        (job, "100000"),
        (job / "step", "max" if version == 2 else str(2**63 - 4096)),
    ):
        (folder / most).write_text(limit)
        (folder / used).write_text("30000")
        (folder / "memory.stat").write_text(f"cache 1\n{stat} 5000\n")
    assert cache.free_memory() == 75_000
    (job / used).write_text("200000")
    assert cache.free_memory() == 0
    monkeypatch.setattr(cache, "PROC", tmp_path / "none")
    assert cache.free_memory() > 0
