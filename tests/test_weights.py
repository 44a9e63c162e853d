"""Weights are read without running code; other formats are named; failed reads are no damage."""

import argparse
import datetime
import gzip
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import types
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from conftest import ROOT, shell
from safetensors.torch import save_file
from test_cli import SMALL, refused
from torchvision import models

from moco.config import MEAN, STD
from moco.encoder import metadata, networks, pretrained, weights
from moco.engine import checkpoint
from moco.errors import InputError
from moco.files import Unreadable
from tools import collect, export, runs

# reading its first byte is an I/O error, for root too
FAILS = Path("/proc/self/mem")
wants_proc = pytest.mark.skipif(
    not FAILS.exists(), reason="needs a file that opens and cannot be read"
)
RESUMABLE = {
    "epoch": 1,
    "args": {},
    "state_dict": {},
    "optimizer": {},
    "progress": {"step": 1, "seed": 0},
}


# what is read


def test_settings_and_numbers_next_to_tensors_are_read(tmp_path, monkeypatch):
    easydict = types.ModuleType("easydict")
    easydict.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})
    monkeypatch.setitem(sys.modules, "easydict", easydict)
    counts = defaultdict(list)
    counts["a"].append(np.int64(3))
    state = {
        "args": argparse.Namespace(
            arch="resnet18", image_size=96, out=pathlib.Path("a/b"), inner=argparse.Namespace(x=1)
        ),
        "best": np.float64(0.5),
        "single": np.float32(0.25),
        "bool": np.bool_(True),
        "counts": counts,
        "when": datetime.datetime(2020, 1, 2, 3),
        "for": datetime.timedelta(seconds=3),
        "generator": np.random.default_rng(0).bit_generator.state
        | {"words": np.random.RandomState(0).get_state()},
        "settings": easydict.EasyDict(depth=18, kind=easydict.EasyDict(a=1)),
        "state_dict": {"x": torch.ones(2)},
        "epoch": 7,
    }
    for older in (False, True):
        torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=not older)
        found = checkpoint.load(str(tmp_path / "x.pth"))
        assert torch.equal(found["state_dict"]["x"], torch.ones(2))
        assert (found["best"], found["single"], found["bool"], found["counts"]) == (
            0.5,
            0.25,
            True,
            {"a": [3]},
        )
        assert found["settings"] == {"depth": 18, "kind": {"a": 1}} and found["args"].out == "a/b"
        facts = metadata.read_metadata(found)
        assert (
            facts.options["image_size"] == 96 and facts.options["inner"].x == 1 and facts.epoch == 7
        )


def test_settings_of_omegaconf_are_read(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"a": 1, "b": {"c": [1, 2.5, "x", None, True]}})
    torch.save({"cfg": config, "model": {"x": torch.ones(2)}}, tmp_path / "x.pth")
    assert torch.equal(checkpoint.load(str(tmp_path / "x.pth"))["model"]["x"], torch.ones(2))


class Counted(Counter):
    pass


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


class CodeAsNumber:
    """Code, pickled as a NumPy number, which NumPy itself would run when it unpickles it."""

    def __reduce__(self):
        return np.float64(1).__reduce__()[0], (np.dtype(object), pickle.dumps(Code(), protocol=2))


@pytest.mark.parametrize("value", [CodeAsNumber(), np.datetime64("2020")])
def test_a_number_that_is_none_stays_unread(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"best": value, "x": torch.ones(1)}, tmp_path / "x.pth")
    found = checkpoint.load(str(tmp_path / "x.pth"))
    assert type(found["best"]) is weights._Settings and found["x"] == 1
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_network_as_an_object_is_refused_with_what_to_do(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(
        InputError,
        match=r"holds a network as a Python object \(torch\.nn\.modules\.linear\.Linear\).*state_dict\(\)",
    ):
        checkpoint.load(str(tmp_path / "x.pth"))
    torch.save({"state_dict": {}, "x": Counted("aab")}, tmp_path / "x.pth")
    with pytest.raises(
        InputError,
        match=r"holds Python objects .* save its state_dict alone .*first object is a test_weights\.Counted",
    ):
        checkpoint.load(str(tmp_path / "x.pth"))
    torch.save({"state_dict": {}, "x": Code()}, tmp_path / "x.pth")
    with pytest.raises(
        InputError, match=r"holds Python objects .* save its state_dict alone .*weights_only=False"
    ):
        checkpoint.load(str(tmp_path / "x.pth"))


def test_what_a_file_holds_is_in_memory_once(tmp_path):
    """Also if the file is damaged at its end, and is read again to find out why."""
    tensors = {str(i): torch.zeros(1 << 20) for i in range(24)}  # 96 MB
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:-100])
    peak = "lambda: int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])"
    code = (
        f"import sys, contextlib; from moco.engine import checkpoint; from moco.errors import InputError; peak = {peak}\n"
        "try: checkpoint.load(sys.argv[2])\nexcept Exception: pass\n"
        "before = peak()\n"
        "with contextlib.suppress(InputError): checkpoint.load(sys.argv[1])\n"
        "print((peak() - before) / 1024)"
    )
    torch.save({"x": torch.zeros(1)}, tmp_path / "small.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "small.safetensors")
    for name, small in (
        ("x.pth", "small.pth"),
        ("x.safetensors", "small.safetensors"),
        ("cut.pth", "small.pth"),
    ):
        done = shell("-c", code, tmp_path / name, tmp_path / small)
        assert done.returncode == 0 and float(done.stdout) < 96 + 40, (
            name,
            done.stdout,
            done.stderr,
        )


# what is not


def onnx():
    return b"\x08\x08\x12\x07pytorch\x1a\x052.6.0" + bytes(50)


def npz(path):
    np.savez(path, **{"resnet/conv/kernel": np.zeros(3)})


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def zipped(path):
    shutil.make_archive(str(path), "zip", path.parent, "inside")
    os.replace(f"{path}.zip", path)


def tarred(path):
    with tarfile.open(path, "w") as file:
        file.add(path.parent / "inside")


OTHERS = {
    "model.ckpt-1.index": (
        bytes(40) + bytes.fromhex("57fb808b247547db"),
        "a TensorFlow checkpoint",
    ),
    "model.ckpt-1.data-00000-of-00001": (b"\x01\x02" * 40, "a TensorFlow checkpoint"),
    "checkpoint": (b'model_checkpoint_path: "model.ckpt-1"\n', "a TensorFlow checkpoint"),
    "saved_model.pb": (b"\x08\x01\x12\xff" + bytes(40), "a TensorFlow SavedModel"),
    "weights.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file (Keras, TensorFlow)"),
    "x.npz": (npz, "NumPy arrays (.npz)"),
    "x.npy": (b"\x93NUMPY\x01\x00" + bytes(40), "an array of NumPy"),
    "x.onnx": (onnx(), "an ONNX model"),
    "x.pkl": (
        pickle.dumps({"model": {"x": np.zeros(3)}}),
        "a pickle that torch.save did not write, such as detectron2's",
    ),
    "x.pth": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "git lfs pull",
    ),
    "page.pth": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "error.pth": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "words.pth": (b"# a page of text\nand more", "a text file that begins with '# a page of text'"),
    "x.pth.gz": (gzip.compress(b"x" * 99), "compressed; unpack it"),
    "x.zip": (zipped, "a zip archive of"),
    "x.tar": (tarred, "a tar archive; unpack it"),
    "x.pt": (
        script,
        "a TorchScript program, which loading would run; if you trust it, run torch.save(torch.jit.load(",
    ),
    "empty.pth": (b"", "empty"),
    "bytes.pth": (bytes(range(128, 256)) * 9, "neither a torch.save nor a safetensors file"),
    "zeros.pth": (bytes(999), "neither a torch.save nor a safetensors file"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_another_file_is_called_by_its_name(name, tmp_path):
    content, said = OTHERS[name]
    (tmp_path / "inside").write_text("x")
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    for other in (name, name if "data-" in name else "renamed.bin"):
        path = path.rename(tmp_path / other)
        with pytest.raises(InputError) as error:
            checkpoint.load(str(path))
        assert str(error.value).startswith(
            f"{path}: not a readable checkpoint: it is "
        ) and said in str(error.value)


def test_the_prefix_of_a_tensorflow_checkpoint(tmp_path):
    (tmp_path / "model.ckpt-1.index").write_bytes(b"x")
    with pytest.raises(InputError, match=r"model\.ckpt-1: .*a TensorFlow checkpoint"):
        checkpoint.load(str(tmp_path / "model.ckpt-1"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("config.json", "model.safetensors", "optimizer.pt"), "model.safetensors"),
        (("config.json", "pytorch_model.bin"), "pytorch_model.bin"),
        (
            ("checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar", "log.jsonl"),
            "checkpoint_0001.pth.tar",
        ),
        (("saved_model.pb", "variables"), "it holds a TensorFlow model"),
        (("notes.txt",), "it holds no checkpoint"),
    ],
)
def test_of_a_folder_the_file_to_give_is_named(names, said, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"is a folder; .*{said}"):
        checkpoint.load(str(tmp_path))


@pytest.mark.parametrize(
    ("call", "store"),
    [
        (
            ("main_lincls", "DIR", "--pretrained", "gs://a/b.pth"),
            "--pretrained gs://a/b.pth: is a URL (Google Cloud Storage)",
        ),
        (("main_synco", "DIR", "--resume", "s3://a/b"), "--resume s3://a/b: is a URL (Amazon S3)"),
        (("main_synco", "hdfs://a/b"), "hdfs://a/b: is a URL (Hadoop"),
        (("main_synco", "--data", "https://a/b"), "--data https://a/b: is a URL (the web)"),
        (("main_moby", "DIR", "--save-dir", "gs://a"), "--save-dir gs://a"),
        (("main_moby", "DIR", "--output", "gs://a"), "--output gs://a"),
        (("main_synco", "DIR", "--cfg", "http://a/b.yaml"), "--cfg http://a/b.yaml"),
        (("main_knn", "--load-features", "s3://a"), "--load-features s3://a"),
    ],
)
def test_an_address_is_no_path(call, store, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(script(*call), store, "copy it to a local disk first")
    assert not os.listdir(tmp_path)
    with pytest.raises(InputError, match="is a URL"):
        checkpoint.load(call[-1])


# safetensors


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A ResNet-18 of 32 pixels as another program has saved it, and this project's export of it."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    net = models.resnet18(num_classes=3)
    state = {
        "arch": "resnet18",
        "method": "moco",
        "epoch": 5,
        "args": {"image_size": 32},
        "state_dict": net.state_dict(),
    }
    torch.save(state, folder / "x.pth.tar")
    args = argparse.Namespace(
        checkpoint=str(folder / "x.pth.tar"),
        out=folder / "x.safetensors",
        arch=None,
        image_size=None,
        hub=False,
        force=False,
    )
    export.export(args)
    return net, folder / "x.safetensors"


def test_an_export_says_what_it_is(encoder, script, shared_images, tmp_path):
    """-a and --image-size need not be given; the format is known by the content, not the name."""
    net, file = encoder
    copy = Path(shutil.copy(file, tmp_path / "x.bin"))
    for path in (file, copy):
        facts = metadata.read_metadata(checkpoint.load(str(path)))
        assert facts[:3] == ("resnet18", "moco", 5) and facts.image_size == 32
        assert (facts.mean, facts.std) == (list(MEAN), list(STD))
        hubbed = torch.hub.load(str(ROOT), "encoder", str(path), source="local")
        assert torch.equal(hubbed.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    command = (shared_images, "--image-size", 32, "-b", 8, "-j", 0, "--k", 3, "--pretrained", copy)
    status, out, err = script("main_knn", *command, "--save-dir", tmp_path / "knn")
    assert status == 0 and "120 of 120 backbone tensors matched\n" in out, err
    results = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert (results["arch"], results["method"], results["pretrain_epochs"]) == (
        "resnet18",
        "moco",
        5,
    )


def test_safetensors_of_other_software(encoder, tmp_path):
    net, _ = encoder
    tensors = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    for header in (None, {"format": "pt"}, {"arch": "x"}):
        save_file(tensors, tmp_path / "x.safetensors", header)
        state = checkpoint.load(str(tmp_path / "x.safetensors"))
        assert metadata.read_metadata(state) == (None, "unknown", None, {}, None, None, None, None)
        mine = networks.create("resnet18", 3, 32)
        assert pretrained.load_backbone(mine, pretrained.tensors_of(mine, state), "x") == 120


def test_safetensors_that_are_cut_or_resumed(encoder, script, shared_images, tmp_path):
    _, file = encoder
    data = file.read_bytes()
    for length in (9, 2000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(InputError, match="truncated or damaged"):
            checkpoint.load(str(tmp_path / "cut.safetensors"))
    resumed = (shared_images, "--resume", file, "--save-dir", tmp_path / "run")
    refused(
        script("main_lincls", *resumed),
        "x.safetensors: cannot be resumed",
        "give it with --pretrained",
    )
    said = "x.safetensors: cannot be resumed: a .safetensors file holds weights alone"
    refused(script("main_synco", *resumed, *SMALL), said, "pre-training cannot start from them")


def test_without_the_package_it_is_named(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        checkpoint.load(str(encoder[1]))


# what the system does not hand out


@wants_proc
def test_auto_never_passes_over_a_checkpoint_that_cannot_be_read(script, shared_images, tmp_path):
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


def test_a_file_that_cannot_be_opened(tmp_path):
    """Without permission, or (for root too) a link to itself; a folder that cannot be listed."""
    (tmp_path / "checkpoint_0000.pth.tar").symlink_to("checkpoint_0000.pth.tar")
    (tmp_path / "folder").symlink_to("folder")
    for read in (checkpoint.load, lambda path: checkpoint.newest(str(Path(path).parent))):
        with pytest.raises(Unreadable, match="cannot be read: Too many levels"):
            read(str(tmp_path / "checkpoint_0000.pth.tar"))
    with pytest.raises(Unreadable, match="cannot be read: Too many levels"):
        checkpoint.newest(str(tmp_path / "folder"))


@pytest.fixture
def file(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_a_read_that_fails_inside_torch_is_not_taken_for_damage(file, monkeypatch):
    """torch.load raises the same error for both. A fault that is gone at once is ignored."""
    load, calls = torch.load, []

    def fails_once(*args, **more):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("PytorchStreamReader failed reading file data/0: file read failed")
        return load(*args, **more)

    monkeypatch.setattr(torch, "load", fails_once)
    assert checkpoint.load(str(file))["x"] == 1 and len(calls) == 2

    class Stale(io.BytesIO):
        """Ends in an error if it is read to its end."""

        def read(self, length):
            return super().read(length) or self.fail()

        def fail(self):
            raise OSError(116, "Stale file handle")

    def stale(path, mode):  # only what is read after torch
        return Stale(bytes(200)) if calls else open(path, mode)

    calls.clear()
    monkeypatch.setattr(weights, "open", stale, raising=False)
    with pytest.raises(Unreadable, match="cannot be read: Stale file handle"):
        checkpoint.load(str(file))


@pytest.mark.parametrize("fault", ["python", "torch"])
def test_memory_that_runs_out_is_not_taken_for_damage(fault, file, monkeypatch):
    def full(*_, **__):
        if fault == "python":
            raise MemoryError
        return torch.empty(1 << 55)

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(Unreadable, match="cannot be read: not enough memory"):
        checkpoint.load(str(file))
    monkeypatch.setattr(safetensors, "safe_open", full)
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(Unreadable, match="cannot be read: not enough memory"):
        checkpoint.load(str(file))


@wants_proc
def test_nor_is_any_other_file_that_cannot_be_read(script, tmp_path, monkeypatch):
    """Results, features, options of a run: no message calls them damaged or to be removed."""
    (tmp_path / "results.json").symlink_to(FAILS)
    with pytest.raises(Unreadable, match=r"results\.json: cannot be read: Input/output error"):
        collect.collect(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").symlink_to(FAILS)
    (run / "args.yaml").symlink_to(FAILS)
    with pytest.raises(Unreadable, match=r"args\.yaml: cannot be read: Input/output error"):
        runs.read([run])
    with pytest.raises(Unreadable, match=r"log\.jsonl: cannot be read: Input/output error"):
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
    meta = {
        "arch": "resnet18",
        "method": "moco",
        "checkpoint": None,
        "pretrain_epochs": 1,
        "dataset": "imagenet",
        "data": "d",
    }
    meta |= {"class_list": None, "image_size": 32, "amp": "off", "seed": 0, "classes": ["a", "b"]}
    (folder / "meta.json").unlink()
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "train_features.npy").symlink_to(FAILS)
    refused(
        script("main_knn", "--load-features", folder),
        "train_features.npy: cannot be read: Input/output error",
    )
