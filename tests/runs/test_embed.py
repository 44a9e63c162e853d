"""tools/embed.py: files of features, killed programs that continue, and one line for mistakes."""

import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, own_lines, shell, write_images
from PIL import Image
from run_helpers import refused
from shard_helpers import write_parquet, write_tars

import moco
import tools.embed
from moco.data import tars
from moco.data.folders import scan_flat
from moco.engine.run_folder import LockedFolder
from moco.evaluate import feature_parts, feature_tables


@pytest.fixture
def folder(tmp_path):
    """Return a folder with 34 images in subfolders and one outside them, and another file."""
    root = write_images(tmp_path / "pictures")
    Image.new("RGB", (50, 40), (200, 30, 60)).save(root / "one.png")
    (root / "notes.txt").write_text("35 images")
    return root


@pytest.fixture
def checkpoint(pretraining):
    return pretraining / "checkpoint_0000.pth.tar"


@pytest.fixture
def embed(call, folder, checkpoint, tmp_path):
    def run(out="features.npz", *words, data=folder, pretrained=checkpoint):
        options = ("--pretrained", pretrained, "--out", tmp_path / out, "-b", 8, "-j", 0)
        return call("tools.embed", data, *options, *words)

    return run


def test_the_file_has_the_features_that_load_encoder_returns(embed, folder, checkpoint, tmp_path):
    status, out, err = embed()
    assert status == 0, err
    assert "35 images at 32 pixels; features of the resnet18" in out and "(moco) on " in out
    assert out.endswith("features.npz: 35 images, 512 features each\n")
    assert "1 file with other endings (.txt 1)" in err
    found = np.load(tmp_path / "features.npz")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*.[jp][pn]g")]
    assert found["names"].tolist() == sorted(names) and "map" not in found
    encoder = moco.load_encoder(checkpoint)
    images = [Image.open(folder / name) for name in sorted(names)]
    with torch.inference_mode():
        expected = encoder(torch.stack([encoder.transform(image) for image in images])).numpy()
    assert np.abs(found["features"] - expected).max() < 1e-5 * np.abs(expected).max()
    assert sorted(os.listdir(tmp_path)) == ["features.npz", "pictures"]


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_images_in_larger_files_are_those_of_one_split(embed, images, tmp_path, write):
    shards = write(images, tmp_path / "shards")
    counts = {}
    for out, split, words in (
        ("default.npz", "train", ()),
        ("train.npz", "train", ("--split", "train")),
        ("val.npz", "val", ("--split", "val")),
    ):
        status, _, err = embed(out, *words, data=shards)
        assert status == 0, err
        assert ("--split val reads the others" in err) == (not words)
        counts[out] = len(np.load(tmp_path / out)["names"])
        assert counts[out] == len(scan_flat(images / split))
    files = np.load(tmp_path / "val.npz")["names"].tolist()
    assert len(set(files)) == counts["val.npz"]
    refused(embed("no.npz", "--split", "val", data=images), "holds image files, and all are read")


@pytest.mark.parametrize("out", ["new/folder/f.CSV", "f.parquet"])
def test_other_formats_have_the_same_features_and_a_map(out, embed, tmp_path):
    assert embed("f.npz")[0] == 0
    assert embed("mapped.npz", "--map", "pca")[0] == 0
    status, said, err = embed(out, "--map", "pca")
    assert status == 0 and "computing the map by principal components" in said, err
    features, points = (np.load(tmp_path / "mapped.npz")[name] for name in ("features", "map"))
    assert np.array_equal(features, np.load(tmp_path / "f.npz")["features"])
    assert points.shape == (35, 2)
    if out == "f.parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(tmp_path / out)
        assert np.array_equal(np.stack(table["features"].to_numpy()), features)
        found = np.stack([table[name].to_numpy() for name in "xy"], 1)
    else:
        rows = np.loadtxt(tmp_path / out, delimiter=",", skiprows=1, usecols=range(1, 515))
        assert np.array_equal(rows[:, 2:].astype(np.float32), features)
        found = rows[:, :2].astype(np.float32)
    assert np.array_equal(found, points)


def test_an_interrupted_tool_continues_with_the_same_bits(embed, tmp_path, monkeypatch):
    assert embed("whole.npz")[0] == 0
    batches = feature_parts.indexed_batches

    def interrupted(*args):
        for i, batch in enumerate(batches(*args)):
            if i == 2:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(feature_parts, "indexed_batches", interrupted)
        status, _, err = embed()
    assert (status, own_lines(err)[-1]) == (130, "embed.py: interrupted")
    assert sorted(os.listdir(tmp_path)) == ["features.npz.parts", "pictures", "whole.npz"]
    status, out, _ = embed()
    assert status == 0 and "continuing at image 16 of 35\n" in out
    assert (tmp_path / "features.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["features.npz", "pictures", "whole.npz"]


KILLED = """
import time
from moco.evaluate import feature_parts, feature_tables
feature_parts.SECONDS = 0.0
features = feature_parts._features
def slowly(*args):
    time.sleep(0.3)
    return features(*args)
feature_parts._features = slowly
from tools import embed
raise SystemExit(embed.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_a_killed_tool_continues_with_the_same_bits(suffix, folder, checkpoint, tmp_path):
    def words(name):
        out = tmp_path / f"{name}.{suffix}"
        return (folder, "--pretrained", checkpoint, "--out", out, "-b", 4, "-j", 2, "--map", "pca")

    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    parts = tmp_path / f"f.{suffix}.parts"
    for wanted in (2, 5):
        process = shell(program, *words("f"), wait=False)
        while len(list(parts.glob("part_*"))) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = shell(ROOT / "tools/embed.py", *words("f"))
    assert result.returncode == 0 and "continuing at image" in result.stdout, result.stderr
    assert shell(ROOT / "tools/embed.py", *words("whole")).returncode == 0
    found, whole = (tmp_path / f"{name}.{suffix}" for name in ("f", "whole"))
    assert found.read_bytes() == whole.read_bytes()
    assert not parts.exists() and not list(tmp_path.glob(".*"))


def test_features_of_other_things_are_not_mixed(embed, folder, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(feature_parts.Parts, "finish", lambda parts: parts.close())
        assert embed()[0] == 0
    (tmp_path / "features.npz").unlink()
    state = torch.load(run / "checkpoint_0000.pth.tar", weights_only=True)
    state["state_dict"]["module.encoder_q.conv1.weight"] += 1
    torch.save(state, run / "other.pth.tar")
    other = write_images(tmp_path / "other")
    Image.new("RGB", (50, 40)).save(other / "one.png")
    refused(embed(pretrained=run / "other.pth.tar"), "other weights)", "--force")
    refused(embed(data=other), "(other DIR)", lines=1)
    refused(embed("features.npz", "--image-size", 40, "--amp", "off"), "(other --image-size)")
    refused(embed("features.npz", "--test-resize", "stretched"), "(other --test-resize)")
    refused(embed("features.npz", "-b", 4), "(other --batch-size)")
    (folder / "notes.txt").unlink()
    (folder / "one.png").rename(folder / "two.png")
    refused(embed(), "(other images)")
    status, out, _ = embed("features.npz", "--force")
    assert status == 0 and "deleted the parts of another command (--force)" in out
    assert "two.png" in np.load(tmp_path / "features.npz")["names"].tolist()


def test_unreadable_images_are_named(embed, folder, tmp_path):
    bad = scan_flat(folder).name(20)
    good = (folder / bad).read_bytes()
    (folder / bad).write_bytes(good[:50])
    result = embed()
    refused(result, bad, "or leave it out with --on-bad-image skip", lines=2)
    assert "the same command continues at image 16" in result[2]
    status, out, err = embed("skipped.npz", "--on-bad-image", "skip")
    assert status == 0 and "34 images, 512 features each; 1 image left out" in out
    assert f"left out: {folder / bad}: unreadable image" in err
    assert bad not in np.load(tmp_path / "skipped.npz")["names"].tolist()
    (folder / bad).write_bytes(good)  # repaired
    status, out, _ = embed()
    assert status == 0 and "continuing at image 16 of 35" in out
    assert len(np.load(tmp_path / "features.npz")["names"]) == 35


def test_a_tar_file_that_changes_is_not_skipped(embed, images, tmp_path, monkeypatch):
    data, read = write_tars(images, tmp_path / "shards"), tars.TarImages.encoded

    def encoded(self, i):
        if i == 20:
            for file in self.files:
                os.utime(self.root / file.name, ns=(1, 1))
        return read(self, i)

    monkeypatch.setattr(tars.TarImages, "encoded", encoded)
    result = embed("features.npz", "--on-bad-image", "skip", data=data)
    refused(result, ".tar: has changed since it was listed; start again\n", lines=3)


def test_a_folder_of_unreadable_images_is_refused(embed, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(b"")
    refused(embed("f.npz", "--on-bad-image", "skip", data=folder), "0.jpg", "cannot be read")
    assert not (tmp_path / "f.npz").exists()


def test_existing_files_stay_unless_forced(embed, tmp_path):
    (tmp_path / "features.npz").write_text("precious")
    refused(embed(), "features.npz: exists; give --force to replace it")
    assert (tmp_path / "features.npz").read_text() == "precious"
    assert embed("features.npz", "--force")[0] == 0
    assert len(np.load(tmp_path / "features.npz")["names"]) == 35


def test_mistakes_are_one_line_before_any_work(embed, folder, tmp_path, monkeypatch):
    for names in ("empty", "texts"):
        (tmp_path / names).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    (folder / "notes.txt").unlink()
    few = tmp_path / "few"
    few.mkdir()
    (folder / "one.png").rename(few / "one.png")
    for result, words in (
        (embed(data=tmp_path / "none"), "none: no such folder"),
        (embed(data=few / "one.png"), "one.png: no such folder"),
        (embed(data=tmp_path / "empty"), "holds no image"),
        (embed(data=tmp_path / "texts"), "holds no image"),
        (embed("features.json"), "unknown file format; let it end in .npz, .parquet, .csv"),
        (embed("features"), "unknown file format"),
        (embed("f.npz", "--map", data=few), "1 image is too few for a map"),
        (embed(pretrained=tmp_path / "none.pth"), "none.pth: no such checkpoint"),
        (embed("f.npz", "-a", "resnet50"), "contains resnet18, not resnet50"),
        (embed("f.npz", "-b", 0), "0 is below 1"),
        (embed("f.npz", "--amp", "fp8"), "invalid choice: 'fp8'"),
        (embed("f.npz", "--map", "som"), "invalid choice: 'som'"),
        (embed("pictures"), "unknown file format"),
        (embed("few/one.png/f.npz"), "Not a directory"),
    ):
        refused(result, words)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        refused(embed("f.parquet"), "needs the package pyarrow", "pip install pyarrow")
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes((few / "one.png").read_bytes())
    refused(embed("f.parquet"), "is not UTF-8, which parquet needs")
    held = LockedFolder(tmp_path / "f.npz.parts")
    refused(embed("f.npz"), "another program is writing there")
    held.release()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".npz", ".parts")]


def test_progress_is_lines_in_a_file_and_a_bar_on_a_terminal(embed, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.embed, "SECONDS", 0.0)
    status, out, _ = embed()
    lines = [line for line in out.splitlines() if line.endswith(" of 35 images")]
    assert status == 0 and lines == [f"{n} of 35 images" for n in (8, 16, 24, 32, 35)]
    monkeypatch.setattr(sys.stderr.__class__, "isatty", lambda file: True)
    status, out, err = embed("again.npz")
    assert status == 0 and " of 35 images" not in out and "35/35" in err


def test_too_little_memory_is_one_line(embed, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(feature_parts, "_features", fail)
        refused(embed(), "--batch-size 8: too large for the device's memory; lower it", lines=2)
    assert embed("features.npz", "-b", 4)[0] == 0  # no part hinders another batch size


def test_a_disk_that_fails_is_one_line_and_the_work_is_kept(embed, tmp_path, monkeypatch):
    def full(file, table):
        raise OSError(28, "No space left on device", str(tmp_path / "features.npz"))

    with monkeypatch.context() as patch:
        patch.setitem(feature_tables.WRITERS, ".npz", full)
        refused(embed(), "No space left on device", lines=2)
    assert not (tmp_path / "features.npz").exists()
    status, out, _ = embed()
    assert status == 0 and "continuing at image 35 of 35" in out
