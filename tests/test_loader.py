"""Orders, decoding and reading: what a run sees depends on its seed and never on how many processes read it."""

import os
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, on_two_ranks
from PIL import Image

from moco import distributed
from moco.augment import crop
from moco.augment.recipes import recipe
from moco.data import cache, images, loader, photos
from moco.data.folders import find, scan
from moco.data.images import CachedFolder, ImageArray, decode
from moco.data.loader import CenterCrop, EvalBatchSampler, RandomCrops, TrainBatchSampler, batches
from moco.errors import InputError

CPU = torch.device("cpu")
RECIPE = recipe("mocov2", 32)


def set_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


@pytest.fixture(scope="module")
def photographs():
    """Every sixth of the built-in training images, 190 of 19 classes."""
    train = scan(find("photos", ("train", "val")), "train")
    return replace(train, paths=train.paths[::6], labels=train.labels[::6])


def read(folder, order, cut, workers=0, batch=38):
    return list(
        batches(
            folder,
            cut,
            order,
            Namespace(workers=workers, batch_per_process=batch, batch_size=batch),
            CPU,
        )
    )


def train_order(n, batch, accumulation, start, epochs, seed):
    """The order of whole epochs."""
    order = TrainBatchSampler(n, batch, accumulation, seed)
    order.start, order.stop = order.steps_per_epoch * start, order.steps_per_epoch * epochs
    return order


def read_epochs(folder, workers=0, crop_seed=0, order_seed=0, start=0, epochs=1):
    order = train_order(len(folder), 38, 1, start, epochs, order_seed)
    return read(folder, order, RandomCrops(RECIPE, crop_seed), workers)


def views_by_index(read_batches):
    """[views, 3, 32, 32] for each index."""
    return {
        int(i): torch.stack(views)
        for b in read_batches
        for i, *views in zip(b.index, *b.views, strict=True)
    }


def share_of_equal_views(a, b):
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


def test_views_are_those_of_the_seed_the_epoch_and_the_index(photographs):
    first = read_epochs(photographs)
    assert share_of_equal_views(first, read_epochs(photographs, order_seed=1)) == 1
    assert share_of_equal_views(first, read_epochs(photographs, crop_seed=1)) < 0.05
    assert share_of_equal_views(first, read_epochs(photographs, start=1, epochs=2)) < 0.05


def test_the_two_views_of_an_image_differ(photographs):
    views = views_by_index(read_epochs(photographs)).values()
    assert sum(torch.equal(a, b) for a, b in views) < 0.05 * len(views)


def test_evaluation_reads_every_image_in_order(photographs):
    read_batches = read(photographs, EvalBatchSampler(len(photographs), 38), CenterCrop(32), workers=2)
    assert torch.cat([b.index for b in read_batches]).tolist() == list(range(len(photographs)))
    assert torch.cat([b.label for b in read_batches]).tolist() == photographs.labels.tolist()
    assert torch.equal(
        read_batches[0].views[0][7], CenterCrop(32)(decode(photographs.path(7)), (0, 7))[0]
    )


@pytest.mark.parametrize(
    ("workers", "batch_per_process", "processes"),
    [(0, 64, 256), (3, 64, 256), (4, 64, 256), (5, 64, 64), (9, 64, 256)],
)
def test_each_process_takes_its_share_of_the_workers(
    monkeypatch, photographs, workers, batch_per_process, processes
):
    asked = []
    monkeypatch.setattr(
        loader, "DataLoader", lambda *_, num_workers, **__: asked.append(num_workers) or []
    )
    args = Namespace(workers=workers, batch_per_process=batch_per_process, batch_size=processes)
    assert list(batches(photographs, CenterCrop(32), EvalBatchSampler(10, 5), args, CPU)) == []
    assert asked == [{0: 0, 3: 1, 4: 1, 5: 5, 9: 3}[workers]]


def test_more_workers_than_cores_bring_no_warning(photographs, recwarn):
    workers = os.cpu_count() + 1
    assert len(read(photographs, EvalBatchSampler(38, 38), CenterCrop(32), workers)) == 1
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_a_program_that_leaves_batches_unread_ends():
    """Python holds what is global until its end, and would wait for loader processes then, which outlast its SIGTERM."""
    program = """if True:
        from argparse import Namespace
        import torch
        from moco.data import folders, loader
        images = folders.scan(folders.find("photos", ("train", "val")), "train")
        args = Namespace(workers=2, batch_per_process=8, batch_size=8)
        left = loader.batches(images, loader.CenterCrop(32), loader.EvalBatchSampler(len(images), 8), args, torch.device("cpu"))
        print(next(left).label.tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 0, 0, 0, 0, 0, 0, 0]\n", "")


def indices(order_batches):
    return [i for batch in order_batches for _, i in batch]


def test_an_epoch_shows_no_image_twice():
    order = train_order(103, 8, 1, 0, 3, seed=0)
    all_batches = list(order)
    assert len(all_batches) == len(order) == 36
    assert {len(batch) for batch in all_batches} == {8}
    epochs = [all_batches[i : i + 12] for i in (0, 12, 24)]
    for number, epoch in enumerate(epochs):
        assert {e for batch in epoch for e, _ in batch} == {number}
        assert len(set(indices(epoch))) == 96 and set(indices(epoch)) <= set(range(103))
    assert indices(epochs[0]) != indices(epochs[1]) != indices(epochs[2])
    assert len(set(range(103)).difference(*(indices(epoch) for epoch in epochs))) == 0


def test_another_seed_gives_another_order():
    assert list(train_order(64, 8, 1, 0, 1, seed=0)) == list(train_order(64, 8, 1, 0, 1, seed=0))
    assert list(train_order(64, 8, 1, 0, 1, seed=0)) != list(train_order(64, 8, 1, 0, 1, seed=1))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_ranks_share_the_batches_of_one_process(monkeypatch, accumulation):
    alone = list(train_order(103, 8, accumulation, 0, 2, seed=4))
    for world_size in (1, 2, 4):
        parts = []
        for rank in range(world_size):
            set_rank(monkeypatch, rank, world_size)
            parts.append(list(train_order(103, 8 // world_size, accumulation, 0, 2, seed=4)))
        for whole, *shares in zip(alone, *parts, strict=True):
            together = [place for share in shares for place in share]
            assert {len(share) for share in shares} == {8 // world_size}
            assert len(set(together)) == 8
            assert set(together) == set(whole)


def test_a_later_start_goes_on_with_the_same_order(monkeypatch):
    for rank, world_size in ((0, 1), (1, 2)):
        set_rank(monkeypatch, rank, world_size)
        whole, later = (train_order(50, 8, 1, start, 5, seed=1) for start in (0, 2))
        assert list(later) == list(whole)[2 * len(whole) // 5 :]
        assert len(later) == len(list(later)) == 3 * len(whole) // 5


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_before_epoch_0_are_the_last_of_the_epochs_before_it(accumulation):
    order = TrainBatchSampler(50, 4, accumulation, seed=2, start=-13, stop=2)
    batches = list(order)
    assert len(batches) == len(order) == 15 * accumulation
    per_epoch = 12 // accumulation
    for step, first in zip(range(-13, 2), range(0, len(batches), accumulation), strict=True):
        for batch in batches[first : first + accumulation]:
            assert {epoch for epoch, _ in batch} == {step // per_epoch}
    assert batches[-2 * accumulation :] == list(TrainBatchSampler(50, 4, accumulation, seed=2, stop=2))
    of_one_epoch = [i for batch in batches for epoch, i in batch if epoch == -1]
    assert len(set(of_one_epoch)) == len(of_one_epoch) == 48


@pytest.mark.parametrize(
    ("n", "accumulation", "world_size", "expected"),
    [(103, 1, 1, 12), (103, 5, 1, 10), (103, 2, 2, 6), (103, 3, 4, 3), (30, 4, 1, 0)],
)
def test_what_does_not_fill_an_accumulated_step_is_left_out(
    monkeypatch, n, accumulation, world_size, expected
):
    set_rank(monkeypatch, 0, world_size)
    order = train_order(n, 8, accumulation, 0, 2, seed=0)
    all_batches = list(order)
    assert len(order) == len(all_batches) == 2 * expected
    assert all(len(batch) == 8 for batch in all_batches)
    assert [sum(e == epoch for batch in all_batches for e, _ in batch) for epoch in (0, 1)] == [
        8 * expected
    ] * 2


@pytest.mark.parametrize("n", [0, 1, 10, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_covers_each_index_once_over_the_ranks(monkeypatch, n, world_size):
    seen = []
    for rank in range(world_size):
        set_rank(monkeypatch, rank, world_size)
        order = EvalBatchSampler(n, 3)
        assert len(list(order)) == len(order)
        assert all(1 <= len(batch) <= 3 for batch in order)
        seen += indices(order)
    assert sorted(seen) == list(range(n))


def smooth_rgb(height=40, width=56):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 6, 255 - x * 2 - y], axis=2).clip(0, 255).astype(np.uint8)


def write_png16(path, pixels):
    """A PNG of 16 bits a channel from uint16 [H, W, 3], which Pillow cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def assert_decodes_to(path, pixels, tolerance=0):
    image = decode(str(path))
    assert image.dtype == torch.uint8 and image.shape == (3, *pixels.shape[:2])
    expected = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    assert (image.int() - expected.int()).abs().max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.ppm", "a.tif", "a.PNG"])
def test_decode_reads_lossless_files_exactly(tmp_path, name):
    Image.fromarray(smooth_rgb()).save(tmp_path / name)
    assert_decodes_to(tmp_path / name, smooth_rgb())


@pytest.mark.parametrize(("name", "tolerance"), [("a.jpg", 4), ("a.webp", 12)])
def test_decode_reads_lossy_files(tmp_path, name, tolerance):
    Image.fromarray(smooth_rgb()).save(tmp_path / name, quality=95, subsampling=0)
    assert_decodes_to(tmp_path / name, smooth_rgb(), tolerance)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.png", 0), ("a.jpg", 3), ("a.bmp", 0), ("a.gif", 0)]
)
def test_decode_repeats_a_gray_image_in_three_channels(tmp_path, name, tolerance):
    gray = smooth_rgb()[:, :, 0]
    Image.fromarray(gray).save(tmp_path / name, quality=95)
    assert_decodes_to(tmp_path / name, np.stack([gray] * 3, axis=2), tolerance)


def test_decode_drops_alpha(tmp_path):
    alpha = np.full((40, 56, 1), 128, np.uint8)
    Image.fromarray(np.concatenate([smooth_rgb(), alpha], axis=2)).save(tmp_path / "rgba.png")
    assert_decodes_to(tmp_path / "rgba.png", smooth_rgb())


def test_decode_does_not_pass_on_warnings(tmp_path, recwarn):
    paletted = Image.fromarray(smooth_rgb()).quantize(32)
    paletted.save(tmp_path / "palette.png", transparency=bytes(range(32)))  # Pillow warns of it
    decode(str(tmp_path / "palette.png"))
    assert not [warning for warning in recwarn if "Palette" in str(warning.message)]
    Image.open(tmp_path / "palette.png").convert("RGB")
    assert [warning for warning in recwarn if "Palette" in str(warning.message)]


def test_decode_reads_palettes(tmp_path):
    paletted = Image.fromarray(smooth_rgb()).quantize(32)
    paletted.save(tmp_path / "palette.png")
    assert_decodes_to(tmp_path / "palette.png", np.asarray(paletted.convert("RGB")))


def test_decode_reads_pngs_of_16_bits_a_channel(tmp_path):
    write_png16(tmp_path / "rgb16.png", smooth_rgb().astype(np.uint16) * 256 + 77)
    assert_decodes_to(tmp_path / "rgb16.png", smooth_rgb(), tolerance=1)
    gray = smooth_rgb()[:, :, 1]
    Image.fromarray(gray.astype(np.uint16) * 256 + 77).save(tmp_path / "gray16.png")
    assert_decodes_to(tmp_path / "gray16.png", np.stack([gray] * 3, axis=2), tolerance=1)


def test_decode_reads_cmyk_jpegs(tmp_path):
    Image.fromarray(smooth_rgb()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert_decodes_to(tmp_path / "cmyk.jpg", smooth_rgb(), tolerance=10)


def test_decode_takes_the_first_frame_of_an_animation(tmp_path):
    frames = [
        Image.fromarray(np.full((30, 20, 3), color, np.uint8))
        for color in ((250, 20, 20), (20, 250, 20), (20, 20, 250))
    ]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "moves.gif") as gif:
        assert gif.n_frames == 3
    assert_decodes_to(tmp_path / "moves.gif", np.asarray(frames[0]), tolerance=4)


def whole_jpeg(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=90)
    return path


def write_empty(path):
    path.write_bytes(b"")


def write_truncated(path):
    data = whole_jpeg(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_text(path):
    path.write_text("This is not an image.\n" * 20)


BAD = pytest.mark.parametrize("write_bad", [write_empty, write_truncated, write_text])


@BAD
def test_decode_names_the_file_that_it_cannot_read(tmp_path, write_bad):
    write_bad(tmp_path / "broken 7.jpg")
    with pytest.raises(InputError) as error:
        decode(str(tmp_path / "broken 7.jpg"))
    assert str(tmp_path / "broken 7.jpg") in str(error.value)
    assert "\n" not in str(error.value)


def test_decode_names_the_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError) as error:
        decode(str(tmp_path / "gone.jpg"))
    assert str(tmp_path / "gone.jpg") in str(error.value)


@BAD
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_name_the_file_that_they_cannot_read(tmp_path, write_bad, workers):
    (tmp_path / "train" / "kind").mkdir(parents=True)
    for i in range(7):
        whole_jpeg(tmp_path / "train" / "kind" / f"{i}.jpg")
    bad = tmp_path / "train" / "kind" / "5.jpg"
    write_bad(bad)
    folder = scan(tmp_path, "train")
    reader = batches(
        folder,
        CenterCrop(32),
        EvalBatchSampler(7, 2),
        Namespace(workers=workers, batch_per_process=2, batch_size=2),
        CPU,
    )
    assert [next(reader).index.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(InputError) as error:
        next(reader)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with one large photograph."""
    path = tmp_path_factory.mktemp("large") / "train" / "a" / "0.jpg"
    path.parent.mkdir(parents=True)
    photos._photograph("hubble_deep_field").resize((1600, 1400), 3).save(path, quality=95)
    assert path.stat().st_size > images._LARGE
    return scan(path.parents[2], "train")


@pytest.mark.parametrize("size", [(375, 500), (1400, 1600), (4000, 500)])
@pytest.mark.parametrize("pixels", [224, 96])
def test_reduction_leaves_every_crop_twice_as_large_as_its_view_and_is_the_largest_that_does(
    size, pixels
):
    cut, found = RandomCrops(recipe("byol", pixels), seed=3), set()
    for index in range(60):
        factor = cut.reduction(*size, (0, index))
        boxes = crop.random_boxes(*size, cut.recipe, loader.rng.CROP, 3, 0, index)
        least = min(side for _, _, *sides in boxes for side in sides)
        assert factor == 1 or least >= 2 * factor * pixels
        assert factor == 8 or least < 4 * factor * pixels
        found.add(factor)
    assert len(found) > 1 or min(size) < 1000
    assert CenterCrop(pixels).reduction(*size, (0, 0)) == 1


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_decode_shrinks_a_large_jpeg(large, factor):
    full, shrunk = decode(large.path(0)), decode(large.path(0), lambda height, width: factor)
    assert full.shape == (3, 1400, 1600) and shrunk.shape == (3, 1400 // factor, 1600 // factor)
    means = torch.nn.functional.avg_pool2d(full.float(), factor)
    assert (shrunk.float() - means).abs().mean() < 1


def test_decode_looks_at_the_size_of_large_jpegs_only(large, photographs):
    assert torch.equal(
        decode(photographs.path(0), lambda height, width: 8), decode(photographs.path(0))
    )
    asked = []
    assert torch.equal(
        decode(large.path(0), lambda height, width: asked.append((height, width)) or 1),
        decode(large.path(0)),
    )
    assert asked == [(1400, 1600)]


def test_views_of_a_shrunk_image_are_those_of_the_whole_one(large):
    cut, factors = RandomCrops(recipe("mocov2", 64), seed=1), set()
    full = decode(large.path(0))
    for epoch in range(20):
        place = (epoch, 0)
        factors.add(cut.reduction(1400, 1600, place))
        views, *_ = loader.Views(large, cut)[place]
        for ours, whole in zip(views, cut(full, place), strict=True):
            assert ours.shape == (3, 64, 64)
            assert (ours.float() - whole.float()).abs().mean() < 4
    assert factors >= {4, 8}


# Images in memory


SMALL = recipe("byol", 32)


def cached(*folders, mode="on"):
    """Return `folders` with their images in memory."""
    return cache.load(Namespace(cache_images=mode, nodes=1), *folders)


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


def one_by_one(monkeypatch):
    """Make the loader cut views image by image."""
    monkeypatch.setattr(
        loader.Views, "__getitems__", lambda self, places: [self[place] for place in places]
    )


@pytest.fixture
def mixed(tmp_path):
    """Write a folder of 20 images of many sizes and formats."""
    (tmp_path / "train" / "kind").mkdir(parents=True)
    for i in range(20):
        name = f"{i:02}.{('jpg', 'png', 'jpg', 'bmp')[i % 4]}"
        Image.fromarray(smooth_rgb(30 + 3 * i, 90 - 2 * i)).save(tmp_path / "train" / "kind" / name)
    return scan(tmp_path, "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_give_the_same_views_bit_for_bit(mixed, workers):
    (held,) = cached(mixed)
    assert isinstance(held, CachedFolder) and (held.starts >= 0).all()
    for folder in (mixed, held.subset(np.arange(20))):
        for cut in (RandomCrops(RECIPE, 3), CenterCrop(32)):
            ours, theirs = (read(one, EvalBatchSampler(20, 8), cut, workers) for one in (held, folder))
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.index, b.index) and all(map(torch.equal, a.views, b.views))


def test_images_of_one_size_in_memory_are_cropped_a_batch_at_once(monkeypatch, tmp_path):
    (tmp_path / "train" / "kind").mkdir(parents=True)
    for i in range(70):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "kind" / f"{i:02}.jpg")
    folder = scan(tmp_path, "train")
    (held,) = cached(folder)
    cut, calls = RandomCrops(SMALL, 3), []
    at_once = crop.random_views_at_once
    with monkeypatch.context() as patch:
        patch.setattr(crop, "random_views_at_once", lambda *args: calls.append(1) or at_once(*args))
        ours = read(held, train_order(70, 16, 1, 2, 4, seed=1), cut)
        assert len(calls) == len(ours) == 8
    assert_same(ours, read(folder, train_order(70, 16, 1, 2, 4, seed=1), cut))
    assert_same(*(read(one, EvalBatchSampler(70, 16), CenterCrop(32)) for one in (held, folder)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("multi_label", [False, True])
def test_an_array_of_images_gives_the_same_batches_at_once_and_one_by_one(
    monkeypatch, workers, multi_label
):
    draw = np.random.default_rng(0)
    labels = draw.integers(-1, 2, (50, 4)) if multi_label else draw.integers(0, 4, 50)
    pixels = draw.integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    array = ImageArray(ROOT, labels, tuple("abcd"), pixels).subset(draw.permutation(50)[:48])
    cuts = (
        RandomCrops(SMALL, 3),
        CenterCrop(32),
        CenterCrop(28),
        RandomCrops(recipe("fnc", 32, views=2), 1),
    )

    def all_batches():
        return [
            one
            for cut in cuts
            for one in read(array, train_order(48, 12, 1, 0, 2, seed=1), cut, workers)
        ]

    at_once = all_batches()
    one_by_one(monkeypatch)
    assert_same(at_once, all_batches())


@BAD
@pytest.mark.parametrize("skips", [False, True])
def test_an_unreadable_image_gives_the_same_error_with_images_in_memory(tmp_path, write_bad, skips):
    (tmp_path / "train" / "kind").mkdir(parents=True)
    for i in range(7):
        whole_jpeg(tmp_path / "train" / "kind" / f"{i}.jpg")
    write_bad(tmp_path / "train" / "kind" / "5.jpg")
    folder = scan(tmp_path, "train")
    (held,) = cached(folder)
    assert (held.starts < 0).tolist() == [False] * 5 + [True, False]

    def outcome(folder):
        args, found = Namespace(workers=0, batch_per_process=2, batch_size=2), []
        try:
            for batch in batches(folder, RandomCrops(RECIPE, 0), EvalBatchSampler(7, 2), args, CPU, skips):
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
    assert len(outcome(held)) == (4 if skips else 3)


def test_large_jpegs_stay_on_disk_because_they_are_decoded_smaller(large, capsys):
    (held,) = cached(large)
    assert held is large  # nothing is left to hold
    assert "decoded at a reduced size" in capsys.readouterr().out
    folder = replace(large, paths=np.array([*large.paths, b"a/1.jpg"]), labels=np.zeros(2, int))
    whole_jpeg(large.root / "a" / "1.jpg")
    (held,) = cached(folder)
    assert (held.starts < 0).tolist() == [True, False]
    ours, theirs = (read(one, EvalBatchSampler(2, 2), RandomCrops(RECIPE, 0)) for one in (held, folder))
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
        assert isinstance(held[0], CachedFolder) == fits
    assert "read from their files in every epoch: about" in capsys.readouterr().out


def test_images_that_do_not_fit_stay_on_disk_or_are_refused(mixed, monkeypatch, capsys):
    size = cached(mixed)[0].pixels.numel()
    monkeypatch.setattr(cache, "free_memory", lambda: size)
    assert isinstance(cached(mixed)[0], CachedFolder)
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
    assert isinstance(cached(mixed, mode="auto")[0], CachedFolder)


def decide(rank, folder, free):
    """Return whether this rank holds the images, given free memory as a multiple of their size."""
    needed = sum(3 * decode(folder.path(i))[0].numel() for i in range(20))
    cache.free_memory = lambda: round(free[rank] * needed)
    held, _ = cache.load(Namespace(cache_images="auto", nodes=1), folder, None)
    return isinstance(held, CachedFolder)


def test_all_ranks_decide_by_the_least_free_memory_of_any_rank(mixed, tmp_path):
    free = {"enough": (8.1, 9), "little": (9, 7.9), "little first": (7.9, 9)}
    checks = {name: (decide, mixed, ratios) for name, ratios in free.items()}
    of = on_two_ranks(checks, tmp_path)
    assert {name: of(name) for name in free} == {
        "enough": [True] * 2,
        "little": [False] * 2,
        "little first": [False] * 2,
    }


def test_images_stay_on_disk_if_the_estimated_memory_is_full(mixed, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK", 4)
    (held,) = cached(mixed)
    half = replace(held, pixels=held.pixels[: held.pixels.numel() // 2])
    with cache.ThreadPoolExecutor(2) as pool:
        some = cache._decoded(mixed, half.pixels.numel(), pool)
    assert 0 < (some.starts >= 0).sum() < 20 and some.pixels.numel() <= half.pixels.numel()
    ours, theirs = (read(one, EvalBatchSampler(20, 8), RandomCrops(RECIPE, 3)) for one in (some, mixed))
    assert all(
        torch.equal(x, y)
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a.views, b.views, strict=True)
    )


def test_the_total_size_is_estimated_from_some_headers(mixed, monkeypatch):
    exact = sum(3 * decode(mixed.path(i))[0].numel() for i in range(20))
    asked = []
    size = cache.decoded_size
    monkeypatch.setattr(cache, "decoded_size", lambda path: asked.append(path) or size(path))
    with cache.ThreadPoolExecutor(2) as pool:
        assert cache._estimate(mixed, pool) == exact and len(asked) == 20
        monkeypatch.setattr(cache, "_SAMPLE", 5)
        assert abs(cache._estimate(mixed, pool) / exact - 1) < 0.1 and len(asked) == 25


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_the_least_of_the_machine_and_its_control_groups(
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
