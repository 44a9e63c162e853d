"""Tests of `moco.evaluate.feature_parts`: stopped programs continue, and nothing is mixed up."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from conftest import write_images
from feature_helpers import CPU, options

from moco.data.folders import scan_flat
from moco.encoder import networks
from moco.engine.features import extract
from moco.engine.run_folder import LockedFolder
from moco.errors import InputError
from moco.evaluate import feature_parts
from moco.evaluate.feature_parts import Parts, compute

ABOUT = {"--image-size": 16, "weights": "a"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return 34 images in nested folders."""
    return scan_flat(write_images(tmp_path_factory.mktemp("nested")))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return networks.create("resnet18", 0).eval()


class Stopped(BaseException):
    """Ctrl-C, or a signal, in the middle of the work."""


class StopsAt:
    """A hook of a network that counts its batches, and stops the program at one of them."""

    def __init__(self, batch):
        self.batch, self.seen = batch, 0

    def __call__(self, *_):
        if self.seen == self.batch:
            raise Stopped
        self.seen += 1


def run(net, images, folder, stop_at=None, skip=False, about=ABOUT, force=False):
    """Compute all features. Return the number of batches, and the parts."""
    counter = StopsAt(stop_at)
    hook = net.conv1.register_forward_pre_hook(counter)
    parts = Parts(folder, about, force)
    try:
        compute(net, images, options(test_resize="scaled"), CPU, parts, skip)
    finally:
        hook.remove()
        parts.close()
    return counter.seen, parts


def content(parts):
    """Return the indices and the features in all parts."""
    found = [part for part in parts.read() if len(part[0])]
    index = [i for part, _ in found for i in part]
    return index, np.concatenate([rows for _, rows in found])


@pytest.fixture(scope="module")
def whole(net, images, tmp_path_factory):
    """Return the features of a program that was not stopped."""
    batches, parts = run(net, images, tmp_path_factory.mktemp("whole") / "f.parts")
    assert batches == 5 and parts.done == 34
    return content(parts)


def test_features_are_those_of_the_network(whole, net, images):
    index, rows = whole
    assert index == list(range(34)) and rows.shape == (34, 512) and rows.dtype == np.float32
    expected, _ = extract(net, images, options(test_resize="scaled"), CPU, unit_norm=False)
    assert np.array_equal(rows, expected.numpy())


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
@pytest.mark.parametrize("stops", [[0], [1], [3], [2, 2], [1, 0, 1]])
def test_a_stopped_program_continues_with_the_same_bits(
    stops, seconds, whole, net, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_parts, "SECONDS", seconds)
    for stop in stops:
        with pytest.raises(Stopped):
            run(net, images, tmp_path / "f.parts", stop)
    batches, parts = run(net, images, tmp_path / "f.parts")
    assert batches == 5 - sum(stops)
    index, rows = content(parts)
    assert index == whole[0] and np.array_equal(rows, whole[1])
    parts.finish()
    assert os.listdir(tmp_path) == []


def test_a_finished_program_computes_nothing_again(net, images, tmp_path, whole):
    run(net, images, tmp_path / "f.parts")
    batches, parts = run(net, images, tmp_path / "f.parts")
    assert batches == 0 and np.array_equal(content(parts)[1], whole[1])


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "removed", "half written"])
def test_a_damaged_part_is_computed_again(
    damage, seconds, whole, net, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(feature_parts, "SECONDS", 0.0)
    run(net, images, tmp_path / "f.parts")
    files = sorted((tmp_path / "f.parts").glob("part_*"))
    assert len(files) == 5
    data = files[2].read_bytes()
    if damage == "removed":
        files[2].unlink()
    elif damage == "half written":
        (tmp_path / "f.parts" / ".part_000000000040.npz-abcdefgh").write_bytes(data[:100])
    else:
        new = {"empty": b"", "truncated": data[: len(data) // 2], "text": b"no part"}
        files[2].write_bytes(new[damage])
    capsys.readouterr()
    monkeypatch.setattr(feature_parts, "SECONDS", seconds)  # the new parts may end elsewhere
    batches, parts = run(net, images, tmp_path / "f.parts")
    assert batches == {"half written": 0}.get(damage, 3)
    assert ("is damaged" in capsys.readouterr().out) == (damage != "half written")
    index, rows = content(parts)
    assert index == whole[0] and np.array_equal(rows, whole[1])
    parts.finish()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--image-size": 32}, "other --image-size\\)"),
        ({"weights": "b", "--image-size": 1}, "other --image-size, weights\\)"),
    ],
)
def test_parts_of_another_command_are_refused(change, words, net, images, tmp_path):
    folder = tmp_path / "f.parts"
    with pytest.raises(Stopped):
        run(net, images, folder, 2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=f"{words}; repeat that command .* or give --force"):
        Parts(folder, ABOUT | change)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    batches, _ = run(net, images, folder, about=ABOUT | change, force=True)
    assert batches == 5
    assert json.loads((folder / "about.json").read_text()) == ABOUT | change


def test_force_continues_the_same_command(net, images, tmp_path):
    with pytest.raises(Stopped):
        run(net, images, tmp_path / "f.parts", 2)
    assert run(net, images, tmp_path / "f.parts", force=True)[0] == 3


@pytest.mark.parametrize("about", [None, "", "[]", "{"])
def test_a_folder_of_other_files_stays(about, tmp_path):
    folder = tmp_path / "f.parts"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if about is not None:
        (folder / "about.json").write_text(about)
    for force in (False, True):
        with pytest.raises(InputError, match=r"f\.parts: exists, and"):
            Parts(folder, ABOUT, force)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_program_that_was_killed_at_once_leaves_no_obstacle(tmp_path):
    folder = tmp_path / "f.parts"
    folder.mkdir()
    for name in (".lock", ".about.json-abcdefgh"):
        (folder / name).touch()
    Parts(folder, ABOUT).finish()
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "f.parts").write_text("a file")
    with pytest.raises(InputError, match=r"f\.parts: cannot be written: File exists"):
        Parts(tmp_path / "f.parts", ABOUT)


def test_a_second_program_is_refused(tmp_path):
    held = LockedFolder(tmp_path / "f.parts")
    with pytest.raises(InputError, match="another program is writing there"):
        Parts(tmp_path / "f.parts", ABOUT)
    held.release()
    Parts(tmp_path / "f.parts", ABOUT).finish()
    assert os.listdir(tmp_path) == []


# Unreadable images


@pytest.fixture
def damaged(tmp_path):
    """Return 34 images, three of which cannot be read. Two of them fill no batch alone."""
    root = write_images(tmp_path / "damaged")
    images = scan_flat(root)
    for i in (0, 9, 33):
        (root / images.name(i)).write_bytes(b"no image")
    return images


def test_an_unreadable_image_is_an_error_that_names_the_option(damaged, net, tmp_path):
    message = r"0.jpg: unreadable image .*, or leave it out with --on-bad-image skip$"
    with pytest.raises(InputError, match=message):
        run(net, damaged, tmp_path / "f.parts")


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
@pytest.mark.parametrize("stop", [None, 1, 2, 4])
def test_unreadable_images_are_left_out_and_named(
    stop, seconds, damaged, net, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_parts, "SECONDS", seconds)
    if stop is not None:
        with pytest.raises(Stopped):
            run(net, damaged, tmp_path / "f.parts", stop, skip=True)
    _, parts = run(net, damaged, tmp_path / "f.parts", skip=True)
    assert sorted(parts.unreadable) == [0, 9, 33]
    assert all(damaged.name(i) in reason for i, reason in parts.unreadable.items())
    index, rows = content(parts)
    readable = [i for i in range(34) if i not in parts.unreadable]
    assert index == readable and np.allclose(rows, whole[1][readable], atol=1e-5)
    with pytest.raises(InputError, match="--on-bad-image skip"):
        run(net, damaged, tmp_path / "f.parts")  # the parts lack an image that must not be lacking


def test_a_batch_without_readable_images_is_a_part_without_features(
    images, net, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_parts, "SECONDS", 0.0)
    root = write_images(tmp_path / "damaged")
    for i in range(8, 16):
        (root / images.name(i)).write_bytes(b"")
    batches, parts = run(net, scan_flat(root), tmp_path / "f.parts", skip=True)
    assert batches == 4 and sorted(parts.unreadable) == list(range(8, 16))
    assert content(parts)[0] == [*range(8), *range(16, 34)]


def test_features_that_are_not_finite_are_refused(net, images, tmp_path):
    sick = copy.deepcopy(net)
    torch.nn.init.constant_(sick.layer4[1].bn2.bias, torch.inf)
    with pytest.raises(InputError, match="NaN or infinity; the encoder diverged"):
        run(sick, images, tmp_path / "f.parts")


def test_the_digest_depends_on_weights_and_names(net, images):
    weights, names = feature_parts.digest(net, images)
    other = networks.create("resnet18", 0).eval()
    assert feature_parts.digest(other, images)[0] != weights
    assert feature_parts.digest(net, images.subset(np.arange(5)))[1] != names
    assert feature_parts.digest(net, images) == (weights, names)
