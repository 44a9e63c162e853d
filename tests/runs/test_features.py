"""Compare k-NN with its slow definition, in blocks and over ranks, and test feature files."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shell
from run_helpers import refused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import main_knn
from moco import distributed
from moco.augment.color import normalize
from moco.augment.crop import center_view
from moco.config import MEAN, STD, replaced
from moco.data import folders
from moco.data.images import ImageArray
from moco.engine import features
from moco.evaluate import feature_files

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
KS = [1, 10, 20, 100, 200]


# k-NN


def clouds(bank=2000, queries=500, classes=12, width=24, seed=0):
    """Return normalized features and labels of a bank and of queries.

    Features lie around one direction per class; the classes overlap.
    """
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, width, generator=draw)
    splits = []
    for n in (bank, queries):
        label = torch.randint(0, classes, (n,), generator=draw)
        rows = nn.functional.normalize(
            centre[label] + 2 * torch.randn(n, width, generator=draw), dim=1
        )
        splits.append((rows, label))
    return splits


def by_hand(bank, bank_labels, queries, labels, classes, k, temperature):
    """Return the fraction of queries classified correctly in float64.

    Also return the fraction that rounding may decide.
    """
    right = unclear = 0
    for row, label in zip(queries.double().numpy(), labels.tolist(), strict=True):
        similarity = bank.double().numpy() @ row
        order = np.argsort(-similarity)
        votes = np.zeros(classes)
        for i in order[:k]:
            votes[bank_labels[i]] += np.exp(similarity[i] / temperature)
        second, first = np.sort(votes)[-2:]
        at_k = similarity[order[k - 1 : k + 1]]
        unclear += first - second < 1e-4 * first or (len(at_k) == 2 and at_k[0] - at_k[1] < 1e-6)
        right += votes.argmax() == label
    return right / len(labels), unclear / len(labels)


def agrees(found, bank, queries, classes, temperature):
    for k, top1 in found.items():
        want, unclear = by_hand(*bank, *queries, classes, k, temperature)
        assert unclear < 0.02
        assert abs(top1 - want) <= unclear + 1e-9, k


def in_blocks(monkeypatch, bank, queries=37):
    monkeypatch.setattr(features, "BANK", bank)
    monkeypatch.setattr(features, "QUERIES", queries)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(
    "rows", [64, 333, 65_536]
)  # 200 neighbours are more than a block of 64 holds
def test_knn_is_its_definition(rows, temperature, monkeypatch):
    in_blocks(monkeypatch, rows)
    bank, queries = clouds()
    found = features.knn(*bank, *queries, 12, KS, temperature)
    assert list(found) == KS and found[20] > found[1] > 0.3
    agrees(found, bank, queries, 12, temperature)


@pytest.mark.parametrize("rows", [7, 65_536])
def test_k_may_be_more_than_the_bank_has(rows, monkeypatch):
    in_blocks(monkeypatch, rows)
    bank, queries = clouds(bank=30, queries=60)
    found = features.knn(*bank, *queries, 12, [5, 30, 200], 0.07)
    agrees({5: found[5], 30: found[30]}, bank, queries, 12, 0.07)
    assert found[200] == found[30]


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_nearest_are_the_first_of_all_sorted(rows, monkeypatch):
    in_blocks(monkeypatch, rows)
    (bank, labels), (queries, _) = clouds(bank=700, queries=90)
    labels = torch.arange(len(bank))  # tells which row was found
    similarity, place = features.nearest(bank, labels, queries, 100)
    every = queries.double() @ bank.double().T
    torch.testing.assert_close(
        similarity.double(), every.sort(1, descending=True).values[:, :100], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(similarity.double(), every.gather(1, place), rtol=0, atol=1e-6)
    assert all(len(set(row)) == 100 for row in place.tolist())


def test_a_small_temperature_leaves_the_votes_finite():
    bank, queries = clouds()
    (first, *_), (one, *_) = (
        features.knn(*bank, *queries, 12, [k], t).values() for k, t in ((20, 0.001), (1, 1.0))
    )
    assert first == pytest.approx(
        one, abs=0.05
    )  # the nearest one decides, but where others are as near


class Sizes(TorchDispatchMode):
    """How many numbers each new piece of memory has room for."""

    def __init__(self):
        super().__init__()
        self.memory = {}
        self.alive = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.memory[x.untyped_storage().data_ptr()] = (
                    x.untyped_storage().nbytes() // x.element_size()
                )
                self.alive.append(x)  # its address stays its own
        return out


def test_no_more_is_kept_than_one_block_of_similarities(monkeypatch):
    in_blocks(monkeypatch, 64)
    bank, queries = clouds(width=8)
    with Sizes() as sizes:
        features.nearest(*bank, queries[0], 10)
    inputs = {x.untyped_storage().data_ptr() for x in (*bank, *queries)}
    made = [n for at, n in sizes.memory.items() if at not in inputs]
    assert (
        max(made) == 500 * 10
    )  # what is found; a block has 37 * 64, all similarities would be 500 * 2000


# Ranks: threads of this process that exchange what they hold.


def on_ranks(world_size, function, monkeypatch):
    """What `function(rank)` returns on each of several ranks."""
    local, barrier, sent = (
        threading.local(),
        threading.Barrier(world_size, timeout=60),
        [None] * world_size,
    )

    def all_gather(x):
        sent[local.rank] = x.clone()
        barrier.wait()
        assert len({(part.shape, part.dtype) for part in sent}) == 1
        out = torch.cat(sent)
        barrier.wait()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: local.rank)
        patch.setattr(distributed, "world_size", lambda: world_size)
        patch.setattr(distributed, "all_gather", all_gather)
        patch.setattr(distributed, "all_reduce_sum", lambda x: all_gather(x[None]).sum(0))
        patch.setattr(distributed, "barrier", barrier.wait)
        results = [None] * world_size

        def run(rank):
            local.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:
                barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not any(isinstance(result, Exception) for result in results), results
    return results


@pytest.mark.parametrize(("world_size", "rows"), [(2, 64), (3, 5), (2, 65_536)])
@pytest.mark.parametrize("n", [2000, 301])  # 301: of three ranks none holds 200
def test_knn_over_ranks_is_its_definition(world_size, rows, n, monkeypatch):
    in_blocks(monkeypatch, rows)
    bank, queries = clouds(bank=n, queries=101)
    share = [[x[rank::world_size] for x in (*bank, *queries)] for rank in range(world_size)]
    found = on_ranks(world_size, lambda rank: features.knn(*share[rank], 12, KS, 0.07), monkeypatch)
    assert all(one == found[0] for one in found)
    agrees(found[0], bank, queries, 12, 0.07)


@pytest.mark.parametrize(("n", "world_size"), [(15, 2), (7, 3), (1, 2), (6, 2)])
def test_shares_come_back_in_order(n, world_size, monkeypatch):
    x = torch.randn(n, 4)
    for found in on_ranks(
        world_size, lambda rank: features.gather_in_order(x[rank::world_size]), monkeypatch
    ):
        assert torch.equal(found, x)
    assert torch.equal(features.gather_in_order(x), x)


# Extraction


def pictures(n, labels=None, size=16):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    labels = np.arange(n) % 3 if labels is None else labels
    return ImageArray(Path("memory"), labels, ("a", "b", "c"), pixels)


def options(**more):
    shared = {"workers": 0, "amp": "off", "mean": MEAN, "std": STD}
    sizes = {"batch_per_process": 8, "batch_size": 8, "image_size": 16}
    return replaced(main_knn.Config(), **sizes, **shared, **more)


class Flat(nn.Sequential):
    """A network whose features are the pixels, a little less in eval mode, and its classifier."""

    def __init__(self):
        super().__init__()
        self.add_module("flat", nn.Flatten())
        self.add_module("mode", nn.Dropout(0.9))
        self.add_module("fc", nn.Linear(768, 3))


def expected(images):
    return torch.stack(
        [normalize(center_view(images.read(i), 16)[None]).flatten() for i in range(len(images))]
    )


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_features_are_those_of_each_image_in_eval_mode(unit_norm, many):
    labels = np.random.default_rng(0).integers(-1, 2, (21, 3)) if many else None
    images, net = pictures(21, labels), Flat()
    rows, found = features.extract(net, images, options(), CPU, unit_norm)
    want = expected(images)
    torch.testing.assert_close(
        rows, want / want.norm(dim=1, keepdim=True) if unit_norm else want, rtol=0, atol=1e-6
    )
    assert torch.equal(found, torch.from_numpy(images.labels)) and found.dtype == torch.int64
    assert (
        net.training
        and not features.extract(net.eval(), images, options(host_features=True), CPU)[0].is_cuda
    )
    assert not net.training


def test_features_lie_in_memory_once():
    with Sizes() as sizes:
        rows, _ = features.extract(Flat(), pictures(48), options(), CPU)
    large = [at for at, n in sizes.memory.items() if n >= rows.numel()]
    assert (
        large == [rows.untyped_storage().data_ptr()]
        and rows.untyped_storage().nbytes() == 4 * rows.numel()
    )


@pytest.mark.parametrize("n", [15, 1])
def test_ranks_extract_what_one_process_does(n, monkeypatch):
    """Of one image, the second rank has none; it still takes part in what follows."""
    images = pictures(n)

    def work(rank):
        bank = features.extract(Flat(), images, options(), CPU)
        return (*bank, features.knn(*bank, *bank, 3, [1], 0.07))

    whole = features.extract(Flat(), images, options(), CPU)
    for rank, (rows, labels, found) in enumerate(on_ranks(2, work, monkeypatch)):
        torch.testing.assert_close(rows, whole[0][rank::2], rtol=0, atol=1e-6)
        assert torch.equal(labels, whole[1][rank::2]) and found == {1: 1.0}


# Files


COMMON = ("-a", "resnet18", "--image-size", 32, "-j", 0)
TWO = ("--multiprocessing-distributed", "--nproc-per-node", 2)


def metrics_of(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


def arrays_of(folder):
    return {file.name: np.load(file) for file in folder.glob("*.npy")}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_files_hold_the_rows_in_order_and_ranks_read_their_shares(
    world_size, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_files, "_BLOCK", 4)
    origin = dict.fromkeys(feature_files._ORIGIN.values(), "x") | {
        "pretrain_epochs": None,
        "class_list": None,
        "image_size": 32,
        "seed": 0,
    }
    folders = {"dump_features": str(tmp_path), "load_features": str(tmp_path)}
    config = replaced(main_knn.Config(), **origin, **folders)
    train, val = ((torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in (29, 2))

    def work(rank):
        feature_files.dump(
            config,
            ("a", "b", "c"),
            *(tuple(x[rank::world_size] for x in split) for split in (train, val)),
        )
        return feature_files.load(config, CPU)

    for rank, (*splits, classes) in enumerate(on_ranks(world_size, work, monkeypatch)):
        assert classes == ("a", "b", "c")
        for found, split in zip(splits, (train, val), strict=True):
            assert all(
                torch.equal(one, x[rank::world_size]) for one, x in zip(found, split, strict=True)
            )
    for name, (rows, labels) in (("train", train), ("val", val)):
        assert np.array_equal(np.load(tmp_path / f"{name}_features.npy"), rows.numpy())
        assert np.array_equal(np.load(tmp_path / f"{name}_labels.npy"), labels.numpy())


def test_features_from_files_give_the_same_results_over_one_process_and_two(
    shared_images, script, tmp_path
):
    def run(name, *options, start=script):
        command = (*options, "--k", 1, 5, 20, "--save-dir", tmp_path / name)
        if start is script:
            status, _, err = script("main_knn", *command)
        else:
            status, err = (result := shell("main_knn.py", *command, *TWO)).returncode, result.stderr
        assert status == 0, err
        return metrics_of(tmp_path / name)

    one, two = tmp_path / "one", tmp_path / "two"
    options = (shared_images, *COMMON, "-b", 8, "--seed", 3, "--dump-features")
    found = run("1", *options, one)
    assert run("2", *options, two, "--host-features", start=shell) == found
    assert run("3", "--load-features", one) == found
    assert run("4", "--load-features", two, start=shell) == found
    arrays = arrays_of(one)
    assert {name: (x.shape, x.dtype.name) for name, x in arrays.items()} == {
        "train_features.npy": ((48, 512), "float32"),
        "train_labels.npy": ((48,), "int64"),
        "val_features.npy": ((15, 512), "float32"),
        "val_labels.npy": ((15,), "int64"),
    }
    for name, x in arrays_of(
        two
    ).items():  # smaller batches on fewer threads differ in the last bits
        assert np.abs(x - arrays[name]).max() < 1e-6 * (x.ndim == 2) or np.array_equal(
            x, arrays[name]
        ), name
    for split in ("train", "val"):
        assert np.array_equal(
            arrays[f"{split}_labels.npy"], folders.scan(shared_images, split).labels
        )
        assert np.allclose(np.linalg.norm(arrays[f"{split}_features.npy"], axis=1), 1, atol=1e-5)
    meta = json.loads((two / "meta.json").read_text())
    assert meta["classes"] == ["class0", "class1", "class2"]
    told = {
        "data": str(shared_images),
        "method": "random",
        "arch": "resnet18",
        "checkpoint": None,
        "seed": 3,
    }
    assert meta | told == meta
    # what the results say of the encoder is what was dumped
    first, third = (json.loads((tmp_path / name / "results.json").read_text()) for name in "13")
    del first["settings"]["batch_size"], third["settings"]["batch_size"]
    assert first == third


@pytest.fixture
def dumped(script, shared_images, tmp_path):
    """A folder of features, the command that wrote it, and its metrics."""
    folder = tmp_path / "features"
    command = (
        "main_knn",
        shared_images,
        *COMMON,
        "--dump-features",
        folder,
        "--save-dir",
        tmp_path / "run",
    )
    status, _, err = script(*command)
    assert status == 0, err
    return folder, command, metrics_of(tmp_path / "run")


def test_a_finished_dump_and_an_unfinished_one_are_not_replaced(dumped, script):
    folder, command, _ = dumped
    before = arrays_of(folder)
    for more in ((), ("--seed", 1), ("--image-size", 40)):
        refused(
            script(*command, *more),
            str(folder),
            "holds features",
            "choose another",
            "--load-features",
        )
    (folder / "meta.json").unlink()  # as of a dump that was interrupted
    refused(script(*command), "holds an unfinished dump of features")
    assert all(np.array_equal(x, before[name]) for name, x in arrays_of(folder).items())


def test_files_that_are_missing_or_damaged_are_refused(dumped, script, tmp_path):
    folder, _, metrics = dumped
    load = ("main_knn", "--load-features", folder, "--save-dir", tmp_path / "again")
    files = [f"{split}_{kind}.npy" for split in ("train", "val") for kind in ("features", "labels")]
    for name in (*files, "meta.json"):
        content = (folder / name).read_bytes()
        for damaged in (None, b"", b"\x80\x00 damaged", content[:-1], content[: len(content) // 2]):
            if name == "meta.json" and damaged == content[:-1]:
                continue  # the end of its last line
            (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
            refused(script(*load), str(folder), name)
        (folder / name).write_bytes(content)
    assert script(*load)[0] == 0 and metrics_of(tmp_path / "again") == metrics


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train_features", lambda x: x.astype(np.float64)),
        ("val_features", lambda x: x[:, :-1]),
        ("val_features", lambda x: x[:-1]),
        ("train_labels", lambda x: x[:-1]),
        ("train_labels", lambda x: x.astype(np.float32)),
        ("val_labels", lambda x: x + 1),
        ("val_labels", lambda x: x - 1),
        ("val_labels", lambda x: np.stack([x, x], 1)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name, change, dumped, script):
    folder, *_ = dumped
    np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))
    refused(script("main_knn", "--load-features", folder), f"{name.split('_')[0]}_", "finished")


@pytest.mark.parametrize("meta", [[], {"arch": "resnet18"}, {"classes": []}])
def test_a_meta_that_says_too_little_is_refused(meta, dumped, script):
    folder, *_ = dumped
    (folder / "meta.json").write_text(json.dumps(meta))
    refused(script("main_knn", "--load-features", folder), "meta.json does not describe")


def test_options_that_contradict_files_are_refused(dumped, script, tmp_path):
    folder, *_ = dumped
    load = ("main_knn", "--load-features", folder)
    refused(script(*load, "-a", "resnet34"), "resnet34", "resnet18")
    refused(script(*load, "--pretrained", "other.pth"), "--pretrained other.pth", "leave")
    refused(script(*load, "--dump-features", tmp_path / "more"), "leave one of them out")
    refused(
        script("main_knn", "--load-features", tmp_path / "nowhere"), "nowhere", "no such folder"
    )
    refused(script("main_knn"), "no data folder")
    (tmp_path / "file").write_text("")
    refused(
        script("main_knn", "photos", "-a", "resnet18", "--dump-features", tmp_path / "file" / "x"),
        "cannot be written",
    )


def test_features_that_are_no_numbers_are_refused(dumped, script):
    folder, *_ = dumped
    rows = np.load(folder / "val_features.npy")
    for wrong in (np.nan, np.inf):
        rows[2, 5] = wrong
        np.save(folder / "val_features.npy", rows)
        refused(
            script("main_knn", "--load-features", folder), str(folder), "contain NaN or infinity"
        )


def test_a_disk_without_room_for_a_dump_is_said(script, shared_images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        feature_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=48 * 512 * 4 - 1)
    )
    command = (
        "main_knn",
        shared_images,
        *COMMON,
        "--dump-features",
        tmp_path / "dump",
        "--save-dir",
        tmp_path / "run",
    )
    refused(script(*command), str(tmp_path / "dump"), "train_features.npy needs", "free")
    assert not list((tmp_path / "dump").iterdir())


def test_knn_wants_images_of_one_class_each(script, tmp_path):
    refused(script("main_knn", tmp_path, "--dataset", "voc2007"), "voc2007", "main_voc07.py")


@pytest.mark.parametrize("temperature", ["0", "-1", "nan"])
def test_a_temperature_that_is_none_is_refused(temperature, script, images):
    refused(
        script("main_knn", images, "--temperature", temperature), "--temperature", "[0.001, 100]"
    )
