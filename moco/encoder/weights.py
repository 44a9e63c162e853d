"""Read a checkpoint of any origin without running code, or name the other format of the file.

pretrained.py turns the content into an encoder.
"""

import argparse
import codecs
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from moco.errors import InputError
from moco.files import refuse_remote, unreadable
from moco.messages import counted

State = dict[str, Any]

_CHUNK = 1 << 24  # bytes read at a time
_LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors


def read(path: str) -> State:
    """Return the content of the checkpoint in `path`: tensors on the CPU, and plain values.

    Reads files of torch.save, always with `weights_only=True`, and .safetensors files.

    Raises InputError if the file has another format, and its subclass UnreadableError if the system
    cannot read the file.
    """
    refuse_remote(path)
    try:
        with open(path, "rb") as file:
            if _is_safetensors(file.read(9)):
                return _safetensors(path, file)
            if what := _foreign(Path(path), file):
                raise InputError(f"{path}: not a readable checkpoint: it is {what}")
        state = _torch(path)
    except FileNotFoundError:
        if Path(f"{path}.index").exists():
            raise InputError(f"{path}: not a readable checkpoint: it is {_TENSORFLOW}") from None
        raise InputError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; {_file_of(Path(path))}") from None
    except (OSError, MemoryError) as error:
        raise unreadable(error).at(path) from None
    if not isinstance(state, dict):
        dicts = "give a file with a dict of tensors by name"
        raise InputError(f"{path}: not a checkpoint: it holds a {type(state).__name__}; {dicts}")
    return state


# Files of torch.save


def _torch(path: str) -> State:
    """Return the content of a file of torch.save. Raises InputError, OSError or MemoryError."""
    try:
        return _unpickled(path)
    except Exception:
        # A damaged file and a failed disk cause the same error. Reading the full file raises
        # OSError if the disk fails. Otherwise a second failure means that the file is damaged.
        with open(path, "rb") as file:
            while file.read(_CHUNK):
                pass
    try:
        return _unpickled(path)
    except pickle.UnpicklingError as error:
        if refused := re.search(_REFUSED, str(error)):
            raise InputError(f"{path}: {_refusal(path, refused[1] or '')}") from None
        other = "it is damaged or of another format"
        raise InputError(f"{path}: not a readable checkpoint; {other}") from None
    except Exception as error:  # damaged files cause errors of many types
        _check_memory(error)
        damaged = "it is truncated or damaged, take an earlier one"
        raise InputError(f"{path}: not a readable checkpoint; {damaged}") from None


def _check_memory(error: Exception) -> None:
    """Raise MemoryError if `error`, of torch or safetensors, says that memory ran out."""
    said = str(error).lower()
    if isinstance(error, MemoryError) or "allocate memory" in said or "not enough memory" in said:
        raise MemoryError from None


def _unpickled(path: str) -> State:
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(path, map_location="cpu", weights_only=True)


# matches torch.load's errors about objects that it refuses to create
_REFUSED = (
    r"GLOBAL (\S+) (?:was not an allowed|whose module)"
    r"|Unsupported class|unrecognized function|Can only"
)


def _refusal(path: str, name: str) -> str:
    """Return the error for a file with an object of class `name`, which is "" if unknown."""
    trusted = f"if you trust the file, load it with torch.load({path!r}, weights_only=False)"
    if re.match(r"(torch\.nn|torchvision|timm)\.", name):
        network = f"holds a network as a Python object ({name}) and is not read"
        return f"{network}; {trusted}, and save its state_dict()"
    holds = "holds Python objects next to tensors and is not read; save its state_dict alone"
    return f"{holds} ({name and f'the first object is a {name}; '}{trusted})"


class _Settings:
    """A stand-in for an object of a settings class, which is neither imported nor run."""

    def __new__(cls, *_: object, **__: object) -> "_Settings":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _DType(_Settings):
    """A stand-in for numpy.dtype that keeps its code and byte order."""

    def __init__(self, code: object = "", *_: object):
        self.code, self.order = str(code), "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]


def _number(dtype: object, data: object) -> object:
    """Return a pickled NumPy number as a Python number; a stand-in for anything else."""
    known = isinstance(dtype, _DType) and re.fullmatch("[biufc][0-9]+", dtype.code)
    if known and isinstance(data, bytes):
        return np.frombuffer(data, np.dtype(dtype.order + dtype.code), 1)[0].item()
    return _Settings()


def _path(*parts: object) -> str:
    return os.path.join(*map(str, parts)) if parts else "."


def _table(*_: object) -> dict:
    return {}


_PATHS = """
    pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath pathlib.PureWindowsPath
    pathlib._local.PosixPath pathlib._local.WindowsPath
"""
_DICTS = """
    yacs.config.CfgNode easydict.EasyDict addict.dict.Dict
    mmcv.utils.config.ConfigDict mmengine.config.config.ConfigDict
    pytorch_lightning.utilities.parsing.AttributeDict
    lightning_fabric.utilities.data.AttributeDict lightning.fabric.utilities.data.AttributeDict
"""
_OBJECTS = """
    builtins.bool builtins.dict builtins.float builtins.int builtins.list builtins.str
    builtins.tuple typing.Any
    datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone
    numpy.ndarray numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer
    omegaconf.base.ContainerMetadata omegaconf.base.Metadata
    omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
    omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode omegaconf.nodes.FloatNode
    omegaconf.nodes.IntegerNode omegaconf.nodes.StringNode
    mmengine.logging.history_buffer.HistoryBuffer
"""
# classes of objects that published files hold next to tensors; stand-ins replace all but Namespace
_HARMLESS = [
    argparse.Namespace,
    (_table, "collections.defaultdict"),
    (_DType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    *((_path, name) for name in _PATHS.split()),
    *((OrderedDict, name) for name in _DICTS.split()),
    *((_Settings, name) for name in _OBJECTS.split()),
]


# .safetensors files


def _is_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")  # of the JSON header
    return head[8:] == b"{" and length <= _LONGEST_HEADER


def _safetensors(path: str, file: BinaryIO) -> State:
    """Return the tensors by name, and the metadata if tools/export.py wrote the file."""
    try:
        import safetensors
    except ImportError:
        needed = "reading a .safetensors file needs the package safetensors"
        raise InputError(f"{path}: {needed}: pip install safetensors") from None
    # A failed read raises OSError here. In the package's memory map it would kill the process.
    while file.read(_CHUNK):
        pass
    try:
        with safetensors.safe_open(path, "pt") as opened:
            facts = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # damaged files cause errors of many types
        _check_memory(error)
        again = "it is truncated or damaged; export or download it again"
        raise InputError(f"{path}: not a readable checkpoint; {again}") from None
    return {**_facts(facts), **tensors}


def _facts(metadata: dict[str, str]) -> State:
    """Return the metadata that tools/export.py wrote, under the keys of a checkpoint."""
    if not {"arch", "method", "image_size"} <= metadata.keys():
        return {}
    size, epoch = (metadata.get(name, "") for name in ("image_size", "epoch"))
    channels = {name: _numbers(metadata[name]) for name in ("mean", "std") if name in metadata}
    return {
        "arch": metadata["arch"],
        "method": metadata["method"],
        "epoch": int(epoch) if epoch.isdecimal() else None,
        "args": {
            **({"image_size": int(size)} if size.isdecimal() else {}),
            **{name: metadata[name] for name in ("norm_eps", "script") if name in metadata},
            **channels,
        },
    }


def _numbers(text: str) -> list[float]:
    """Return the numbers in `text`, which spaces separate; [] if any word is not a number."""
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        return []


# Other files

_CONVERT = "convert its tensors to PyTorch first, under the names of torchvision or timm"
_TENSORFLOW = (
    "a TensorFlow checkpoint, which is not read; convert SimCLR's and FNC's with "
    "tools/convert_tf.py, and other tensors to the names of torchvision or timm"
)
_COMPRESSED = "compressed; unpack it, and give the checkpoint inside"
_MAGIC = {
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself: git lfs pull",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file (Keras, TensorFlow), which is not read; {_CONVERT}",
    b"\x93NUMPY": f"an array of NumPy (.npy), which is not read; {_CONVERT}",
    b"model_checkpoint_path:": _TENSORFLOW,
    b"\x08\x01\x12": f"a TensorFlow SavedModel, which is not read; {_CONVERT}",
    b"\x1f\x8b": _COMPRESSED,
    b"\xfd7zXZ\0": _COMPRESSED,
    b"BZh": _COMPRESSED,
    b"\x28\xb5\x2f\xfd": _COMPRESSED,
    b"7z\xbc\xaf\x27\x1c": _COMPRESSED,
    b"Rar!": _COMPRESSED,
}
_ONNX = "an ONNX model, which is not read; give the PyTorch checkpoint that it was exported from"
_TABLE = bytes.fromhex("57fb808b247547db")  # how TensorFlow's .index files end
# how files of torch.save's older format begin, pickled in binary or as text
_TORCH = (b"l\xfc\x9cF\xf9 j\xa8P\x19", b"119547037146038801333356")


def _foreign(path: Path, file: BinaryIO) -> str | None:
    """Return the format of the file, and what to do with it. Raises OSError.

    Returns None if torch.save may have written it.
    """
    file.seek(0)
    head = file.read(1024)
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - 8))
    end = file.read(8)
    if not size:
        return "empty; take an earlier one, or copy or download it again"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    if end == _TABLE or re.search(r"\.data-\d{5}-of-\d{5}$", path.name):
        return _TENSORFLOW
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        return _ONNX
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it, and give the checkpoint inside"
    if head.startswith(b"PK"):
        return _zip(path, file)
    if any(number in head[:64] for number in _TORCH):
        return None
    if re.match(rb"\x80[\x00-\x05]", head):
        return f"a pickle that torch.save did not write, such as detectron2's; {_CONVERT}"
    if re.match(rb"\s*<(!doctype|html|\?xml|error)", head, re.I):
        return "a web page instead of the file; download the file again"
    return _text(head) or "neither a torch.save nor a safetensors file; give a PyTorch checkpoint"


def _text(head: bytes) -> str | None:
    """Return a message with the first line of a text file; None for other files."""
    if re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", head):
        return None
    try:
        # incremental, because `head` may end inside a character
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    line = text.strip().split("\n")[0][:40]
    return f"of another format, a text file that begins with '{line}'; give a checkpoint"


def _zip(path: Path, file: BinaryIO) -> str | None:
    """Return the format of a zip archive; None for a checkpoint or damaged file. Raises OSError."""
    try:
        names = zipfile.ZipFile(file).namelist()
    except OSError:
        raise
    except Exception:  # truncated or damaged
        return None
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        weights = f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        run = f"if you trust it, run {weights}, and give weights.pth"
        return f"a TorchScript program, which loading would run; {run}"
    if "data.pkl" in last or not names:
        return None
    if all(name.endswith(".npy") for name in names):
        return f"a file of NumPy arrays (.npz), such as JAX's; {_CONVERT}"
    inside = f"{counted(len(names), 'file')}, first '{names[0]}'"
    return f"a zip archive of {inside}; unpack it, and give the checkpoint inside"


def _file_of(folder: Path) -> str:
    """Return advice on which file in `folder` to give."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"it cannot be listed: {error.strerror}; give a checkpoint file"
    if "saved_model.pb" in names or any(name.endswith(".index") for name in names):
        return f"it holds a TensorFlow model, which is not read; {_CONVERT}"
    usual = [name for name in ("model.safetensors", "pytorch_model.bin") if name in names]
    others = [name for name in names if re.search(r"\.(pth|pt|tar|ckpt|safetensors|bin)$", name)]
    if not usual and not others:
        return "it holds no checkpoint; give a checkpoint file"
    return f"give a checkpoint file, such as {folder / (usual or others[-1:])[0]}"
