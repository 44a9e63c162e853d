"""Test images in parquet and arrow files: the layouts, reading, and files that are refused."""

import builtins
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_images
from folder_helpers import names_of
from shard_helpers import write_arrow, write_parquet

from moco.data import cache, sources, subsets, table_files, tables
from moco.data.views import CenterCrop, Views
from moco.errors import InputError, ListError
from moco.sections import Input

WRITE = pytest.mark.parametrize("write", [write_parquet, write_arrow])
BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def scan(root, split="train"):
    sources.find(str(root), (split,), labels=False)
    return sources.scan(root, split)


def one(data=b"x", path="a.jpg"):
    """Return an image as the package datasets stores it."""
    return {"bytes": data, "path": path}


def save(path, columns, metadata=None):
    """Write a parquet file of these columns (values and type, by name)."""
    schema = pa.schema([(name, type_) for name, (_, type_) in columns.items()])
    if metadata:
        schema = schema.with_metadata({"huggingface": json.dumps(metadata)})
    arrays = [pa.array(values, type_) for values, type_ in columns.values()]
    pq.write_table(pa.table(arrays, schema=schema), path)
    return path


@WRITE
def test_tables_have_the_images_and_labels_of_the_folder(shared_images, tmp_path, write):
    root = write(shared_images, tmp_path / "x")
    sources.find(str(root), ("train", "val"))
    for split in ("train", "val"):
        ours, theirs = sources.scan(root, split), sources.scan(shared_images, split)
        assert len(ours) == len(theirs) and ours.classes == theirs.classes
        assert np.array_equal(ours.labels, theirs.labels)
        order = np.random.default_rng(0).permutation(len(ours))
        assert all(np.array_equal(ours.encoded(i), theirs.encoded(i)) for i in order)
        part = pickle.loads(pickle.dumps(ours)).subset(order[:3])
        assert names_of(part) == [ours.name(i) for i in order[:3]]
        assert all(map(np.array_equal, map(part.encoded, range(3)), map(ours.encoded, order[:3])))
    assert len(set(names_of(ours))) == len(ours)


@WRITE
def test_decoded_images_stay_in_memory(shared_images, tmp_path, write):
    """Eight threads read at the same time."""
    images = scan(write(shared_images, tmp_path / "x"))
    (ours,) = cache.load(Input(cache_images="on"), images)
    (theirs,) = cache.load(Input(cache_images="on"), sources.scan(shared_images, "train"))
    assert np.array_equal(ours.pixels, theirs.pixels)


def test_names_with_the_tables_file_names_can_be_listed(shared_images, tmp_path):
    images = scan(write_parquet(shared_images, tmp_path / "x"))
    assert images.name(1) == "data/train-00000-of-00002.parquet/1/class0_1.jpg"
    (tmp_path / "list.txt").write_text("class0_1.jpg\n")
    assert names_of(subsets.select_listed(images, tmp_path / "list.txt")) == [images.name(1)]


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()])
def test_binary_columns_and_labels_without_metadata(tmp_path, type_):
    columns = {"id": ([1, 2], pa.int64()), "jpg": ([b"a", b"bb"], type_)}
    columns["cls"] = (["dog", "cat"], pa.string())
    save(tmp_path / "train.parquet", columns)
    images = scan(tmp_path)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [1, 0]
    assert [bytes(images.encoded(i)) for i in range(2)] == [b"a", b"bb"]
    assert names_of(images) == ["train.parquet/0", "train.parquet/1"]


def test_integer_labels_without_names(tmp_path):
    save(tmp_path / "x.parquet", {"img": ([one()] * 3, BYTES), "label": ([10, 2, 10], pa.int32())})
    images = scan(tmp_path)
    assert images.classes == ("2", "10") and images.labels.tolist() == [1, 0, 1]


def test_the_order_of_class_names_is_kept(tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": ["zebra", "ant"]}}
    columns = {"image": ([one()] * 2, BYTES), "label": ([1, 0], pa.int64())}
    save(tmp_path / "x.parquet", columns, {"info": {"features": features}})
    assert scan(tmp_path).classes == ("zebra", "ant") and scan(tmp_path).labels.tolist() == [1, 0]


def test_a_split_without_labels_has_minus_one(tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    columns = {"image": ([one()] * 2, BYTES), "label": ([-1, -1], pa.int64())}
    save(tmp_path / "x.parquet", columns, {"info": {"features": features}})
    assert not scan(tmp_path).labelled
    with pytest.raises(InputError, match="have no labels, and labels are needed"):
        sources.find(str(tmp_path), ("train",))


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        (
            {"text": (["x"], pa.string())},
            {},
            r"no column with the bytes of images.*text \(string\)",
        ),
        ({"image": ([[1, 2]], pa.list_(pa.int8()))}, {}, "no column with the bytes of images"),
        (
            {"a": ([b"x"], pa.binary()), "b": ([b"x"], pa.binary())},
            {},
            r"several columns may hold the images \(a, b\); name one of them image",
        ),
        (
            {
                "image": ([one()], BYTES),
                "x": ([1], pa.int64()),
                "y": ([1], pa.int64()),
            },
            {name: {"_type": "ClassLabel", "names": ["a", "b"]} for name in "xy"},
            r"several columns have labels \(x, y\)",
        ),
        (
            {"image": ([one()], BYTES), "label": ([1], pa.int64())},
            {"label": {"_type": "ClassLabel", "names": ["a", "a"]}},
            "column label: names 'a' twice",
        ),
        (
            {"image": ([one()], BYTES), "label": ([5], pa.int64())},
            {"label": {"_type": "ClassLabel", "names": ["a", "b"]}},
            "an image has the label 5, but only 2 classes have names",
        ),
        (
            {"image": ([one(), one()], BYTES), "label": ([None, 1], pa.int64())},
            {},
            "1 of 2 images have no label",
        ),
        ({"image": ([one(None, "/data/a.jpg")], BYTES)}, {}, "has the paths of images, but not t"),
        ({"image": ([], BYTES)}, {}, "files have no rows"),
    ],
)
def test_tables_that_do_not_fit_are_refused_in_one_line(tmp_path, columns, features, message):
    save(tmp_path / "x.parquet", columns, {"info": {"features": features}})
    with pytest.raises(InputError, match=message) as error:
        scan(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_hostile_metadata_is_ignored(tmp_path):
    schema = pa.schema([("image", BYTES)], metadata={"huggingface": b"[" * 100_000})
    pq.write_table(pa.table([pa.array([one()], BYTES)], schema=schema), tmp_path / "x.parquet")
    assert len(scan(tmp_path)) == 1
    save(tmp_path / "x.parquet", {"image": ([one()], BYTES)}, {"info": {"features": [1]}})
    assert len(scan(tmp_path)) == 1


def test_a_row_without_bytes_is_an_unreadable_image(tmp_path):
    save(tmp_path / "x.parquet", {"image": ([one(), one(None), one(b"")], BYTES)})
    images = scan(tmp_path)
    for i in (1, 2):
        message = rf"x.parquet/{i}/a.jpg: unreadable image \(the row has no bytes\)"
        with pytest.raises(InputError, match=message):
            images.encoded(i)


def test_files_with_other_columns_are_refused(tmp_path):
    save(tmp_path / "a.parquet", {"image": ([one()], BYTES)})
    save(tmp_path / "b.parquet", {"img": ([one()], BYTES)})
    with pytest.raises(InputError, match=r"b.parquet: has other columns or classes than a.parque"):
        scan(tmp_path)


@WRITE
def test_truncated_and_damaged_files_are_refused(shared_images, tmp_path, write):
    root = write(shared_images, tmp_path / "x", splits=("train",))
    path = next(path for path in sorted(root.rglob("*")) if path.suffix in (".parquet", ".arrow"))
    whole = path.read_bytes()
    for content in (b"", b"nothing" * 100, whole[: len(whole) // 2], whole[:-1000]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is truncated or damaged") as error:
            scan(root)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["bytes", "path"])
def test_offsets_outside_the_file_are_refused(tmp_path, field):
    """Following them would read other memory of the process."""
    sizes = {"bytes": 77, "path": 55}
    image = one(b"x" * sizes["bytes"], "y" * sizes["path"])
    table = pa.table({"image": pa.array([image], BYTES)})
    path = tmp_path / "x.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    content = b"x" if field == "bytes" else b"y"  # follows the offsets
    good, bad = (
        np.array([0, end], np.int32).tobytes() + content for end in (sizes[field], 1 << 30)
    )
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, bad))
    with pytest.raises(InputError, match=r"x.arrow: is truncated or damaged"):
        scan(tmp_path)


def test_an_arrow_file_that_is_cut_off_while_it_is_mapped_is_noticed(tmp_path):
    path, table = tmp_path / "x.arrow", pa.table({"image": pa.array([one()], BYTES)})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    images = scan(tmp_path)
    images.encoded(0)
    os.truncate(path, 1)  # reading the map would end this process
    with pytest.raises(ListError, match="has changed since it was listed; start again"):
        images.encoded(0)


def test_a_changed_file_is_noticed(tmp_path):
    path = save(tmp_path / "x.parquet", {"image": ([one()], BYTES)})
    images = scan(tmp_path)
    save(path, {"image": ([one(b"other")], BYTES)})
    os.utime(path, ns=(1, 1))
    tables._opened.cache_clear()
    with pytest.raises(ListError, match="has changed since it was listed; start again"):
        images.encoded(0)
    for skip in (False, True):  # another image cannot replace the file
        found = Views(images, CenterCrop(32), skip_unreadable=skip)[0, 0]
        assert str(found) == f"{path}: has changed since it was listed; start again"
    path.unlink()
    with pytest.raises(ListError, match=r"x.parquet: has been removed since it was listed"):
        images.encoded(0)


def test_a_link_whose_target_was_removed_ends_the_run(tmp_path):
    (tmp_path / "cache").mkdir()
    target = save(tmp_path / "cache" / "blob.parquet", {"image": ([one()], BYTES)})
    link = tmp_path / "data" / "x.parquet"  # as in Hugging Face's cache
    link.parent.mkdir()
    link.symlink_to(target)
    images = scan(link.parent)
    images.encoded(0)
    target.unlink()
    for opened in (True, False):
        if not opened:
            tables._opened.cache_clear()
        with pytest.raises(ListError, match=r"x.parquet: has been removed since it was listed"):
            images.encoded(0)
    found = Views(images, CenterCrop(32), skip_unreadable=True)[0, 0]
    assert "x.parquet: has been removed" in str(found)


def test_saved_data_sets_name_their_files(shared_images, tmp_path):
    root = write_arrow(shared_images, tmp_path / "x", splits=("train",))
    (root / "train" / "cache-0123.arrow").write_bytes(b"results of map")
    assert len(scan(root)) == 48
    (root / "train" / "state.json").unlink()
    assert len(scan(root)) == 48
    for text in ("{", '{"_data_files": [{"filename": "../x.arrow"}]}', '{"_data_files": []}'):
        (root / "train" / "state.json").write_text(text)
        with pytest.raises(InputError, match=r"state.json: does not list the files of a saved"):
            scan(root)


def test_an_arrow_file_in_the_file_format(tmp_path):
    table = pa.table({"image": pa.array([one(b"abc")], BYTES)})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert bytes(scan(tmp_path).encoded(0)) == b"abc"


def test_without_pyarrow_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    save(tmp_path / "x.parquet", {"image": ([one()], BYTES)})
    import_ = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return import_(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match="need the package pyarrow: pip install pyarrow"):
        scan(tmp_path)


def test_row_groups_stay_in_memory_up_to_a_limit(tmp_path, monkeypatch):
    schema = pa.schema([("image", BYTES)])
    table = pa.table([pa.array([one(b"x" * 1000)] * 40, BYTES)], schema=schema)
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    kept = table_files._RowGroups()
    monkeypatch.setattr(table_files, "_kept", kept)
    monkeypatch.setattr(table_files, "KEPT_BYTES", 25_000)
    images, read, read_group = scan(tmp_path), [], table_files.Parquet._read_group
    kept.groups.clear()
    monkeypatch.setattr(
        table_files.Parquet, "_read_group", lambda x, k: read.append(k) or read_group(x, k)
    )
    for i in (0, 9, 10, 5, 39, 0, 12):
        assert bytes(images.encoded(i)) == b"x" * 1000
    assert read == [0, 1, 3, 1] and len(kept.groups) == 2


def test_the_cost_of_parquet_is_printed_with_the_tool(tmp_path, monkeypatch, capsys):
    root = write_parquet(write_images(tmp_path / "images"), tmp_path / "x", group=7)
    scan(root)
    assert "reading an image takes" not in capsys.readouterr().err
    monkeypatch.setattr(tables, "KEPT_BYTES", 1000)  # otherwise all images stay in memory
    tables._note_cost.cache_clear()
    for _ in range(2):
        scan(root)
    (line,) = capsys.readouterr().err.splitlines()
    assert "ms, because parquet files are read in groups of up to 7 images" in line
    assert line.endswith(f"tar files are faster: python tools/parquet_to_tar.py {root} OUT")
