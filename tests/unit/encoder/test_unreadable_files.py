"""Files that the system cannot read are never reported as damaged."""

import io
import json
import os
from pathlib import Path

import pytest
import safetensors
import torch
from feature_helpers import META
from run_helpers import SMALL, refused
from safetensors.torch import save_file

from moco.encoder import weights
from moco.engine import checkpoint
from moco.files import UnreadableError
from moco.report import results, runs

# reading the first byte of this file is an I/O error, also for root
FAILS = Path("/proc/self/mem")


wants_proc = pytest.mark.skipif(
    not FAILS.exists(), reason="needs a file that can be opened but not read"
)
RESUMABLE = {
    "epoch": 1,
    "args": {},
    "state_dict": {},
    "optimizer": {},
    "progress": {"step": 1, "seed": 0},
}


@wants_proc
def test_resume_auto_never_skips_an_unreadable_checkpoint(script, shared_images, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    torch.save(RESUMABLE, run / "checkpoint_0000.pth.tar")
    (run / "checkpoint_0001.pth.tar").symlink_to(FAILS)
    (run / "checkpoint_0002.pth.tar").write_bytes(b"PK\x03\x04 damaged")
    before = sorted(os.listdir(run))
    result = script("main_synco", shared_images, *SMALL, "--resume", "auto", "--save-dir", run)
    refused(result, "checkpoint_0001.pth.tar: cannot be read: Input/output error", "may be intact")
    assert "checkpoint_0002.pth.tar: not a readable" in result[1] and "damaged" not in result[2]
    assert sorted(os.listdir(run)) == before
    (run / "checkpoint_0001.pth.tar").unlink()
    assert checkpoint.newest(str(run)) == str(run / "checkpoint_0000.pth.tar")


def test_file_that_cannot_be_opened_is_unreadable(tmp_path):
    """So is a folder that cannot be listed. Links to themselves fail for root, too."""
    (tmp_path / "checkpoint_0000.pth.tar").symlink_to("checkpoint_0000.pth.tar")
    (tmp_path / "folder").symlink_to("folder")
    for read in (checkpoint.load, lambda path: checkpoint.newest(str(Path(path).parent))):
        with pytest.raises(UnreadableError, match="cannot be read: Too many levels"):
            read(str(tmp_path / "checkpoint_0000.pth.tar"))
    with pytest.raises(UnreadableError, match="cannot be read: Too many levels"):
        checkpoint.newest(str(tmp_path / "folder"))


@pytest.fixture
def file(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_read_error_inside_torch_is_not_reported_as_damage(file, monkeypatch):
    """torch.load raises the same error for both. A fault that does not recur is ignored."""
    load, calls = torch.load, []

    def fails_once(*args, **more):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("PytorchStreamReader failed reading file data/0: file read failed")
        return load(*args, **more)

    monkeypatch.setattr(torch, "load", fails_once)
    assert checkpoint.load(str(file))["x"] == 1 and len(calls) == 2

    class Stale(io.BytesIO):
        """A file whose last read fails."""

        def read(self, length):
            return super().read(length) or self.fail()

        def fail(self):
            raise OSError(116, "Stale file handle")

    def stale(path, mode):  # fails only after torch.load has failed
        return Stale(bytes(200)) if calls else open(path, mode)

    calls.clear()
    monkeypatch.setattr(weights, "open", stale, raising=False)
    with pytest.raises(UnreadableError, match="cannot be read: Stale file handle"):
        checkpoint.load(str(file))


@pytest.mark.parametrize("fault", ["python", "torch"])
def test_out_of_memory_is_not_reported_as_damage(fault, file, monkeypatch):
    def full(*_, **__):
        if fault == "python":
            raise MemoryError
        return torch.empty(1 << 55)

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(UnreadableError, match="cannot be read: not enough memory"):
        checkpoint.load(str(file))
    monkeypatch.setattr(safetensors, "safe_open", full)
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(UnreadableError, match="cannot be read: not enough memory"):
        checkpoint.load(str(file))


@wants_proc
def test_other_unreadable_files_are_not_reported_as_damage(script, tmp_path, monkeypatch):
    """No message about results, features or options says to remove the file."""
    (tmp_path / "results.json").symlink_to(FAILS)
    with pytest.raises(UnreadableError, match=r"results\.json: cannot be read: Input/output error"):
        results.collect(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").symlink_to(FAILS)
    (run / "args.yaml").symlink_to(FAILS)
    with pytest.raises(UnreadableError, match=r"args\.yaml: cannot be read: Input/output error"):
        runs.read([run])
    with pytest.raises(UnreadableError, match=r"log\.jsonl: cannot be read: Input/output error"):
        runs.read_log(run / "log.jsonl")
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "meta.json").symlink_to(FAILS)
    refused(
        script("main_knn", "--load-features", folder),
        "meta.json: cannot be read: Input/output error",
    )
    dump = ("main_knn", "photos", "-a", "resnet18", "--dump-features", folder)
    refused(script(*dump), "holds features; choose another folder")
    (folder / "meta.json").unlink()
    (folder / "meta.json").write_text(json.dumps(META))
    (folder / "train_features.npy").symlink_to(FAILS)
    refused(
        script("main_knn", "--load-features", folder),
        "train_features.npy: cannot be read: Input/output error",
    )
