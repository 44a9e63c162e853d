"""Checkpoints are read without running code; messages name other formats."""

import argparse
import datetime
import gzip
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import types
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import shell
from run_helpers import refused
from safetensors.torch import save_file

from moco.encoder import metadata, weights
from moco.engine import checkpoint
from moco.errors import InputError


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
    """Code that is pickled as a NumPy number, and that NumPy would run when unpickling it."""

    def __reduce__(self):
        return np.float64(1).__reduce__()[0], (np.dtype(object), pickle.dumps(Code(), protocol=2))


@pytest.mark.parametrize("value", [CodeAsNumber(), np.datetime64("2020")])
def test_invalid_numpy_number_is_not_unpickled(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"best": value, "x": torch.ones(1)}, tmp_path / "x.pth")
    found = checkpoint.load(str(tmp_path / "x.pth"))
    assert type(found["best"]) is weights._Settings and found["x"] == 1
    assert os.listdir(tmp_path) == ["x.pth"]


def test_error_about_python_objects_says_what_to_do(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(
        InputError,
        match=r"holds a network as a Python object "
        r"\(torch\.nn\.modules\.linear\.Linear\).*state_dict\(\)",
    ):
        checkpoint.load(str(tmp_path / "x.pth"))
    torch.save({"state_dict": {}, "x": Counted("aab")}, tmp_path / "x.pth")
    with pytest.raises(
        InputError,
        match=r"holds Python objects .* save its state_dict alone "
        r".*first object is a test_weights\.Counted",
    ):
        checkpoint.load(str(tmp_path / "x.pth"))
    torch.save({"state_dict": {}, "x": Code()}, tmp_path / "x.pth")
    with pytest.raises(
        InputError, match=r"holds Python objects .* save its state_dict alone .*weights_only=False"
    ):
        checkpoint.load(str(tmp_path / "x.pth"))


def test_file_content_is_in_memory_only_once(tmp_path):
    """Also if the end of the file is damaged, and the file is read again to find out why."""
    tensors = {str(i): torch.zeros(1 << 20) for i in range(24)}  # 96 MB
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:-100])
    line = "next(x for x in open('/proc/self/status') if x.startswith('VmHWM'))"
    peak = f"lambda: int({line}.split()[1])"
    code = (
        "import sys, contextlib\n"
        "from moco.engine import checkpoint\nfrom moco.errors import InputError\n"
        f"peak = {peak}\n"
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
        "a TorchScript program, which loading would run; "
        "if you trust it, run torch.save(torch.jit.load(",
    ),
    "empty.pth": (b"", "empty"),
    "bytes.pth": (bytes(range(128, 256)) * 9, "neither a torch.save nor a safetensors file"),
    "zeros.pth": (bytes(999), "neither a torch.save nor a safetensors file"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_error_names_the_format_of_another_file(name, tmp_path):
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


def test_error_names_tensorflow_for_the_prefix_of_its_checkpoint(tmp_path):
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
def test_error_about_a_folder_names_the_file_to_give(names, said, tmp_path):
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
def test_url_is_refused_as_a_path(call, store, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(script(*call), store, "copy it to a local disk first")
    assert not os.listdir(tmp_path)
    with pytest.raises(InputError, match="is a URL"):
        checkpoint.load(call[-1])
