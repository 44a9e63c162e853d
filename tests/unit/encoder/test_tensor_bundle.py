"""The reader of TensorFlow's checkpoints: files of TensorFlow, and damaged or hostile ones."""

import shutil
import zlib

import numpy as np
import pytest
import torch
from bundle_helpers import (
    block,
    entry,
    field,
    header,
    index,
    table,
    varint,
    with_trailer,
    write_bundle,
)
from conftest import ROOT

from moco.encoder.crc32c import crc32c
from moco.encoder.tensor_bundle import Bundle, _DamagedError, _entries
from moco.errors import InputError
from moco.files import UnreadableError

FILES = ROOT / "tests" / "tf_checkpoints"
ONE = FILES / "model.ckpt-7"
ARRAYS = {
    "a/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a/kernel/Momentum": np.zeros((2, 3, 4), np.float32),
    "b": np.array(2.5, np.float16),
    "step": np.array(-(2**40), np.int64),
    **{f"layer_{i}/gamma": np.full(i % 7, i, np.float64) for i in range(120)},
}


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "model.ckpt-3", ARRAYS)


# files of TensorFlow


@pytest.mark.parametrize("folder", [FILES, FILES / "sharded"])
def test_variables_of_tensorflow_have_their_values(folder):
    bundle = Bundle(folder / "model.ckpt-7")
    shapes = {
        "base_model/conv2d/kernel": (2, 3, 1, 4),
        "base_model/conv2d/kernel/Momentum": (2, 3, 1, 4),
        **{f"base_model/conv2d_{i}/kernel": (1, 1, 2, i) for i in range(1, 30)},
        "base_model/half": (5,),
        "base_model/double": (2, 2),
        "base_model/bfloat": (3,),
        "base_model/empty": (0, 3),
        "int32": (4,),
    }
    dtypes = {"half": torch.float16, "double": torch.float64, "bfloat": torch.bfloat16}
    for name, shape in shapes.items():
        found = bundle.tensor(name)
        dtype = torch.int32 if name == "int32" else dtypes.get(name[11:], torch.float32)
        count = int(np.prod(shape))
        wanted = (torch.arange(count) * 0.25 - 1).reshape(shape).to(dtype)
        assert found.dtype == dtype and torch.equal(found, wanted), name
    assert bundle.tensor("base_model/scalar") == torch.tensor(2.5)
    assert bundle.tensor("global_step") == torch.tensor(1234567890123)


def test_other_variables_are_refused_by_name():
    bundle = Bundle(ONE)
    for name, words in (
        ("words", "type 7, which is not read"),
        ("flag", "type 10, which is not read"),
        ("parts", "stored in parts"),
    ):
        with pytest.raises(InputError, match=f"the variable '{name}' .*{words}"):
            bundle.tensor(name)


@pytest.mark.parametrize("end", ["", ".index", ".data-00000-of-00001"])
def test_prefix_and_each_file_name_the_checkpoint(end):
    bundle = Bundle(f"{ONE}{end}")
    assert bundle.prefix == ONE and bundle.shards == 1


def test_folder_with_one_checkpoint_names_it(bundle, tmp_path):
    assert Bundle(tmp_path).prefix == bundle
    shutil.copy(f"{bundle}.index", tmp_path / "model.ckpt-4.index")
    with pytest.raises(InputError, match=r"holds 2 checkpoints \(model\.ckpt-3, model\.ckpt-4\)"):
        Bundle(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no TensorFlow checkpoint"):
        Bundle(tmp_path / "empty")


# files of the tests' writer


@pytest.mark.parametrize("shards", [1, 3])
def test_written_variables_are_read(shards, tmp_path):
    bundle = Bundle(write_bundle(tmp_path / "model.ckpt-3", ARRAYS, shards, per_block=7))
    assert bundle.variables.keys() == ARRAYS.keys() and bundle.shards == shards
    for name, array in ARRAYS.items():
        assert torch.equal(bundle.tensor(name), torch.from_numpy(np.array(array))), name


def test_checksum_is_crc32c():
    """The value for the digits is in the standard's (RFC 3720) and others' tables."""
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA and zlib.crc32(bytes(32)) != 0x8A9136AA
    rng = np.random.default_rng(0)
    for size in (255, 512, 513, 5000, 300_001):
        data = rng.bytes(size)
        crc = 0xFFFFFFFF
        for byte in data:  # bit by bit
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        assert crc32c(data) == crc ^ 0xFFFFFFFF, size


# damaged and hostile files


def read_all(path):
    bundle = Bundle(path)
    for name in bundle.variables:
        bundle.tensor(name)


def test_every_truncation_of_the_index_is_an_error(bundle):
    file = bundle.with_name(f"{bundle.name}.index")
    content = file.read_bytes()
    for size in [*range(0, len(content), 97), len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(InputError, match="truncated or damaged"):
            Bundle(bundle)


def test_every_damaged_byte_is_an_error(bundle):
    """All bytes but those of the footer's padding and the meta block's place have a checksum."""
    file = bundle.with_name(f"{bundle.name}.index")
    content = file.read_bytes()
    for at in [*range(0, len(content) - 48, 61), *range(len(content) - 8, len(content))]:
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        try:
            read_all(bundle)
        except InputError:
            continue
        meta = content.index(block([]))  # holds nothing, so it is not read
        assert meta <= at < meta + len(block([])), at


def test_damaged_data_is_an_error(bundle):
    file = bundle.with_name(f"{bundle.name}.data-00000-of-00001")
    content = file.read_bytes()
    file.write_bytes(content[:5] + b"\xff" + content[6:])
    with pytest.raises(InputError, match="'a/kernel' does not have its checksum"):
        read_all(bundle)
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match="is too short for its index"):
        read_all(bundle)
    file.unlink()
    with pytest.raises(InputError, match=r"data-00000-of-00001: no such file; .* has 1 data files"):
        read_all(bundle)
    file.mkdir()
    with pytest.raises(UnreadableError, match="cannot be read: Is a directory"):
        read_all(bundle)


HUGE = 1 << 62
GOOD = entry(1, (2,), 0, 0, 8, 0)
BAD_INDEXES = {
    "no header": index({b"x": GOOD}),
    "no shards": index({b"": field(3, b"")}),
    "too many shards": index({b"": header(10**6)}),
    "big-endian": index({b"": header(1, 1)}),
    "compressed": index({b"": header()}, compression=1),
    "field ends early": index({b"": header(), b"x": b"\x12\x7f"}),
    "unknown wire type": index({b"": header(), b"x": b"\x0f"}),
    "endless number": index({b"": header(), b"x": b"\x08" + b"\xff" * 12}),
    "negative shape": index({b"": header(), b"x": field(2, field(2, field(1, 2**64 - 1)))}),
    "shape that is a number": index({b"": header(), b"x": field(2, field(2, 3))}),
    "empty table": index({}),
    "magic alone": bytes(40) + bytes.fromhex("57fb808b247547db"),
    "handle outside": b"\xff\xff\xff\xff\x0f" * 8 + bytes.fromhex("57fb808b247547db"),
    "nothing": b"",
    "another file": b"PK" + bytes(100),
}
BAD_VARIABLES = {
    "size that does not fit": entry(1, (3,), 0, 0, 8, 0),
    "huge": entry(1, (HUGE,), 0, 0, 8, 0),
    "huge in all": entry(1, (HUGE // 4,), 0, 0, HUGE, 0),
    "offset outside": entry(1, (2,), 0, HUGE, 8, 0),
    "shard outside": entry(1, (2,), 7, 0, 8, 0),
    "huge shard": entry(1, (2,), 2**63, 0, 8, 0),
    "no type": entry(0, (2,), 0, 0, 8, 0),
    "parts": entry(1, (2,), 0, 0, 8, 0, field(7, b"")),
    "wrong checksum": GOOD,
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_bad_index_is_an_error(name, tmp_path):
    (tmp_path / "x.index").write_bytes(BAD_INDEXES[name])
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(8))
    advice = r"x\.index: .*(copy or download it again|save it)"
    with pytest.raises(InputError, match=advice):
        Bundle(tmp_path / "x")


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_bad_variable_is_an_error(name, tmp_path):
    (tmp_path / "x.index").write_bytes(index({b"": header(), b"x": BAD_VARIABLES[name]}))
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(InputError, match=r"(copy or download it again|which .* not read)"):
        read_all(tmp_path / "x")


def test_keys_that_share_too_much_are_an_error(tmp_path):
    content = varint(9) + varint(1) + varint(0) + b"x"  # shares 9 bytes of an empty key
    content += bytes(4) + (1).to_bytes(4, "little")
    table = index({b"": header()})
    good = block([(b"", header())])
    assert table.startswith(good)
    with pytest.raises(_DamagedError):
        list(_entries(content))
    for restarts in (b"\xff\xff\xff\xff", b"\x09\x00\x00\x00", b""):
        with pytest.raises(_DamagedError):
            list(_entries(restarts))


def test_small_index_cannot_fill_the_memory(tmp_path):
    """100 keys of a million bytes share nearly all of them: 100 MB in a file of 1 MB."""
    size = varint(10**6)
    content = varint(0) + size + varint(0) + b"k" * 10**6
    content += b"".join(size + varint(1) + varint(0) + bytes([i]) for i in range(100))
    blocks = [(b"", block([(b"", header())])), (b"z", with_trailer(content))]
    (tmp_path / "x.index").write_bytes(table(blocks))
    with pytest.raises(InputError, match="truncated or damaged"):
        Bundle(tmp_path / "x")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"model\.ckpt-1\.index: no such file; give the prefix"):
        Bundle(tmp_path / "model.ckpt-1")
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(InputError, match="the file itself is no TensorFlow checkpoint"):
        Bundle(tmp_path / "weights.pth")
    with pytest.raises(InputError, match="is a URL"):
        Bundle("gs://bucket/model.ckpt-1")
