"""Write the images of a folder as tar shards, parquet files and arrow files."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moco.data.sources import scan


def add(tar, name, content, **facts):
    """Add a member to an open tar file. `facts` are attributes of its TarInfo."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in facts.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content) if content else None)


def write_tar(path, *members, **options):
    """Write a tar file with (name, content) members and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            add(tar, name, content)
    return path


def samples(root, split):
    """Return the key, the bytes and the class name of each image of a folder, in its order."""
    images = scan(Path(root), split)
    return [
        (
            images.name(i).rsplit(".", 1)[0],
            images.encoded(i).tobytes(),
            images.classes[images.labels[i]],
        )
        for i in range(len(images))
    ]


def write_tars(root, out, shards=3, splits=("train", "val")):
    """Write the splits of an image folder to out/SPLIT-N.tar and return `out`."""
    for split in splits:
        found = samples(root, split)
        size = -(-len(found) // shards)
        for k in range(shards):
            members = []
            for key, data, label in found[k * size : (k + 1) * size]:
                members += [(f"{key}.jpg", data), (f"{key}.cls", label.encode())]
            write_tar(out / f"{split}-{k:05d}.tar", *members)
    return out


def write_parquet(root, out, files=2, group=5, splits=("train", "val"), class_label=True):
    """Write the splits of an image folder to out/data/SPLIT-*.parquet, as the Hugging Face hub."""
    for split in splits:
        table = _table(root, split, class_label)
        size = -(-len(table) // files)
        name = "validation" if split == "val" else split
        (out / "data").mkdir(parents=True, exist_ok=True)
        for k in range(files):
            path = out / "data" / f"{name}-{k:05d}-of-{files:05d}.parquet"
            pq.write_table(table.slice(k * size, size), path, row_group_size=group)
    return out


def write_arrow(root, out, files=2, batch=5, splits=("train", "val")):
    """Write the splits of an image folder to out/SPLIT/*.arrow, as `save_to_disk` does."""
    for split in splits:
        table = _table(root, split, True)
        size = -(-len(table) // files)
        folder = out / ("validation" if split == "val" else split)
        folder.mkdir(parents=True)
        names = [f"data-{k:05d}-of-{files:05d}.arrow" for k in range(files)]
        for k, name in enumerate(names):
            with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
                writer.write_table(table.slice(k * size, size), max_chunksize=batch)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (folder / "state.json").write_text(json.dumps(state))
    return out


def _table(root, split, class_label):
    """Return a table as the package datasets writes it for an Image and a ClassLabel."""
    found = samples(root, split)
    classes = sorted({label for _, _, label in found})
    labels = [classes.index(label) for _, _, label in found]
    images = [{"bytes": data, "path": f"{key.replace('/', '_')}.jpg"} for key, data, _ in found]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}}
    features["label"] = {"_type": "ClassLabel", "names": classes}
    about = {"huggingface": json.dumps({"info": {"features": features}})} if class_label else {}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=about)
    return pa.table([pa.array(images, image), pa.array(labels)], schema=schema)
