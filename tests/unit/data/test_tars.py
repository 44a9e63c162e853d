"""Test images in tar files: the layouts, reading in any order, and everything else on top."""

import gc
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import write_images
from data_helpers import RECIPE, read, train_batches
from folder_helpers import names_of
from shard_helpers import write_tar, write_tars

from moco.data import cache, registry, sources, subsets, tars
from moco.data.loader import RandomCrops
from moco.data.views import CenterCrop, Views
from moco.errors import InputError, ListError
from moco.sections import Input


@pytest.fixture
def shards(shared_images, tmp_path):
    return write_tars(shared_images, tmp_path / "shards")


def same_images(ours, theirs):
    assert len(ours) == len(theirs) > 0 and ours.classes == theirs.classes
    assert np.array_equal(ours.labels, theirs.labels)
    for i in range(len(ours)):
        assert np.array_equal(ours.encoded(i), theirs.encoded(i))


def scan(root, split, classes=()):
    sources.find(str(root), (split,), labels=False)
    return sources.scan(root, split, classes)


def test_tar_files_have_the_images_and_labels_of_the_folder(shards, shared_images):
    sources.find(str(shards), ("train", "val"))
    for split in ("train", "val"):
        same_images(scan(shards, split), sources.scan(shared_images, split))
    names = names_of(scan(shards, "train"))
    assert names[:2] == ["train-00000.tar/class0/0.jpg", "train-00000.tar/class0/1.jpg"]
    assert len(set(names)) == 48


def test_split_folders_hold_tar_files_too(shards, shared_images, tmp_path):
    for split, name in (("train", "train"), ("val", "test")):
        (tmp_path / "root" / name).mkdir(parents=True)
        for path in shards.glob(f"{split}*.tar"):
            path.rename(tmp_path / "root" / name / path.name)
    for split in ("train", "val"):
        same_images(scan(tmp_path / "root", split), sources.scan(shared_images, split))


def test_class_folders_win_over_tar_files(tmp_path):
    root = write_images(tmp_path / "root")
    write_tar(root / "train" / "class0.tar", ("x.jpg", b"x"))
    assert names_of(scan(root, "train"))[0] == "class0/0.jpg"


def test_tar_files_win_over_loose_images_and_a_line_says_so(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", ("x.jpg", b"x"), ("x.txt", b"x"))
    (tmp_path / "preview.jpg").write_bytes(b"x")
    assert names_of(scan(tmp_path, "train")) == ["0.tar/x.jpg"]
    line = "left out: 1 member of tar files (.txt 1); 1 image next to the tar files"
    assert line in capsys.readouterr().err


def test_compressed_tar_files_are_refused(tmp_path):
    (tmp_path / "train-0.tar.gz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"train-0.tar.gz: is compressed, .*; decompress it"):
        scan(tmp_path, "train")
    write_tar(tmp_path / "train-1.tar", ("x.jpg", b"x"))
    with pytest.raises(InputError, match=r"train-0.tar.gz: is compressed"):
        scan(tmp_path, "train")


def test_a_compressed_tar_file_next_to_images_does_no_harm(tmp_path):
    (tmp_path / "backup.tgz").write_bytes(b"x")
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert names_of(scan(tmp_path, "train")) == ["a.jpg"]


def test_integer_labels_are_classes_sorted_by_value_or_named_by_a_file(tmp_path):
    members = [(f"{i}.jpg", b"x") for i in (10, 2)] + [(f"{i}.cls", b"%d" % i) for i in (10, 2)]
    write_tar(tmp_path / "train-0.tar", *members)
    assert scan(tmp_path, "train").classes == ("2", "10")
    (tmp_path / "classes.txt").write_text("".join(f"name{i}\n" for i in range(11)))
    images = scan(tmp_path, "train")
    assert images.classes == ("name2", "name10") and images.labels.tolist() == [1, 0]


def test_images_without_labels_pretrain_and_are_refused_where_labels_are_needed(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", ("a.jpg", b"x"), ("b.jpg", b"x"))
    images = scan(tmp_path, "train")
    assert not images.labelled and not images.labels.any()
    with pytest.raises(InputError, match="its train images have no labels, and labels are needed"):
        sources.find(str(tmp_path), ("train", "val"))


def test_evaluations_say_that_labels_are_missing_and_not_that_imagenet_is(tmp_path):
    write_tar(tmp_path / "train-0.tar", ("a.jpg", b"x"))
    write_tar(tmp_path / "val-0.tar", ("a.jpg", b"x"))
    with pytest.raises(InputError, match=r"docs/data.md says how files store them$"):
        registry.check("imagenet", str(tmp_path), download=False)


def test_some_missing_labels_are_refused_with_the_first_image(tmp_path):
    write_tar(tmp_path / "train-0.tar", ("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x"))
    message = r"1 of 2 images have no label; .* \(first: train-0.tar/b.jpg\)"
    with pytest.raises(InputError, match=message):
        scan(tmp_path, "train")


def test_a_class_that_train_lacks_is_refused(tmp_path):
    for split, classes in (("train", "ab"), ("val", "ac")):
        members = [(f"{c}{ending}", c.encode()) for c in classes for ending in (".jpg", ".cls")]
        write_tar(tmp_path / f"{split}-0.tar", *members)
    with pytest.raises(InputError, match=r"1 class is not among train's, first 'c'"):
        sources.find(str(tmp_path), ("train", "val"))


def test_a_missing_split_is_refused(tmp_path, shards):
    for path in shards.glob("val*"):
        path.unlink()
    with pytest.raises(InputError, match=r"has no val/ folder.*val-\*.tar"):
        sources.find(str(shards), ("train", "val"))
    assert sources.locate(shards, "val") is None


# reading


def test_a_member_that_cannot_be_read_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", ("empty.jpg", b""), ("a.jpg", b"a" * 600))
    images = scan(tmp_path, "train")
    with pytest.raises(InputError, match=r"x.tar/empty.jpg: unreadable image \(the member is empt"):
        images.encoded(0)
    assert bytes(images.encoded(1)) == b"a" * 600
    facts = path.stat()
    os.truncate(path, 1600)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(ListError, match=r"x.tar: has changed since it was listed; start again"):
        images.encoded(1)  # through the open descriptor
    tars._opened.cache_clear()
    with pytest.raises(ListError, match=r"x.tar: has changed since it was listed; start again"):
        images.encoded(1)
    path.unlink()
    with pytest.raises(ListError, match=r"x.tar: has been removed since it was listed; restore it"):
        images.encoded(1)


def test_a_file_that_is_overwritten_while_it_is_open_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar", ("a.jpg", b"a" * 600))
    images = scan(tmp_path, "train")
    images.encoded(0)
    other = write_tar(tmp_path / "other" / "x.tar", ("a.jpg", b"b" * 600)).read_bytes()
    path.write_bytes(other)  # the same size, and the same file for whoever has it open
    os.utime(path, ns=(1, 1))
    with pytest.raises(ListError, match="has changed since it was listed; start again"):
        images.encoded(0)
    for skip in (False, True):  # another image cannot replace the tar file
        found = Views(images, CenterCrop(32), skip_unreadable=skip)[0, 0]
        assert str(found) == f"{path}: has changed since it was listed; start again"


def test_a_file_that_is_cut_off_while_it_is_open_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar", ("a.jpg", b"a" * 600))
    images = scan(tmp_path, "train")
    images.encoded(0)
    os.truncate(path, 600)
    with pytest.raises(ListError, match=r"x.tar: has changed since it was listed; start again"):
        images.encoded(0)


def test_a_replaced_file_is_noticed(tmp_path):
    write_tar(tmp_path / "x.tar", ("a.jpg", b"a"))
    images = scan(tmp_path, "train")
    write_tar(tmp_path / "x.tar", ("a.jpg", b"bb"))
    with pytest.raises(ListError, match="has changed since it was listed"):
        images.encoded(0)


def test_a_link_whose_target_was_removed_ends_the_run(tmp_path):
    target = write_tar(tmp_path / "cache" / "blob.tar", ("a.jpg", b"a"))
    link = tmp_path / "data" / "x.tar"
    link.parent.mkdir()
    link.symlink_to(target)
    images = scan(link.parent, "train")
    target.unlink()
    tars._opened.cache_clear()
    with pytest.raises(ListError, match=r"x.tar: has been removed since it was listed"):
        images.encoded(0)
    found = Views(images, CenterCrop(32), skip_unreadable=True)[0, 0]
    assert "x.tar: has been removed" in str(found)


def test_few_files_stay_open(tmp_path, monkeypatch):
    for k in range(2 * tars._OPEN_FILES):
        write_tar(tmp_path / f"{k:04d}.tar", ("a.jpg", b"%d" % k))
    images = scan(tmp_path, "train")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for i in range(len(images)):
        assert bytes(images.encoded(i)) == b"%d" % i
    assert len(os.listdir("/proc/self/fd")) <= before + tars._OPEN_FILES + 1
    tars._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_read_at_the_same_time_do_not_disturb_each_other(shards, method):
    images = scan(shards, "train")
    expected = [bytes(images.encoded(i)) for i in range(len(images))]  # files are open before fork
    context = multiprocessing.get_context(method)
    results = context.Queue()
    orders = [np.random.default_rng(seed).permutation(len(images)) for seed in range(2)]
    processes = [
        context.Process(target=_read_and_compare, args=(images, order, expected, results))
        for order in orders
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=300) for _ in processes] == [True, True]
    for process in processes:
        process.join(20)


def _read_and_compare(images, order, expected, results):
    results.put(all(bytes(images.encoded(i)) == expected[i] for _ in range(20) for i in order))


def test_pickled_images_are_equal(shards):
    images = scan(shards, "train").subset(np.array([3, 40]))
    same_images(pickle.loads(pickle.dumps(images)), images)


# on top


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_yields_the_same_batches(shards, shared_images, workers):
    found = [
        read(
            sources.scan(root, "train"),
            train_batches(48, 8, 1, 0, 2, seed=3),
            RandomCrops(RECIPE, seed=3),
            workers,
            8,
        )
        for root in (shards, shared_images)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.label, theirs.label)
        assert all(map(torch.equal, ours.views, theirs.views))


def test_decoded_images_stay_in_memory(shards, shared_images):
    (held,) = cache.load(Input(cache_images="on"), scan(shards, "train"))
    (theirs,) = cache.load(Input(cache_images="on"), sources.scan(shared_images, "train"))
    assert torch.equal(held.pixels, theirs.pixels)
    assert held.name(1) == "train-00000.tar/class0/1.jpg" and "class0/1" in held.listed_names(1)


@pytest.mark.parametrize(
    "line", ["train-00000.tar/class0/5.jpg", "class0/5.jpg", "class0/5", "class0/5.JPEG"]
)
def test_lists_name_members_keys_or_imagenets_files(shards, tmp_path, line):
    (tmp_path / "list.txt").write_text(f"{line}\nclass2/1\n")
    images = subsets.select_listed(scan(shards, "train"), tmp_path / "list.txt")
    assert names_of(images) == ["train-00000.tar/class0/5.jpg", "train-00002.tar/class2/1.jpg"]
    subsets.write_names(images, tmp_path / "again.txt")
    again = subsets.select_listed(scan(shards, "train"), tmp_path / "again.txt")
    assert names_of(again) == names_of(images)


def test_a_key_of_several_tar_files_is_refused_in_lists(shards, tmp_path):
    (tmp_path / "list.txt").write_text("5\n")
    message = r"several images are named '5': train-00000.tar/class0/5.jpg, train-00001.tar/class1"
    with pytest.raises(InputError, match=message):
        subsets.select_listed(scan(shards, "train"), tmp_path / "list.txt")


def test_classes_can_be_chosen_and_images_held_out(shards, shared_images, tmp_path):
    (tmp_path / "classes.txt").write_text("class2\nclass0\n")
    parts = []
    for root in (shards, shared_images):
        images = subsets.keep_classes(sources.scan(root, "train"), str(tmp_path / "classes.txt"))
        parts.append(subsets.hold_out(images, 0.25, seed=1))
    for ours, theirs in zip(*parts, strict=True):
        same_images(ours, theirs)


def test_different_images_have_different_content(tmp_path):
    found = []
    for k, content in enumerate((b"x", b"xyz")):
        write_tar(tmp_path / str(k) / "0.tar", ("a.jpg", content), ("b.jpg", b"x"))
        found.append(scan(tmp_path / str(k), "train").content())
    assert found[0] != found[1]
