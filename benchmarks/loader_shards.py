"""Compare reading images from tar, arrow and parquet files with reading image files.

`benchmarks/loader.py --shards` runs it. Each image is read once in random order, on one thread.

read      the bytes of the image alone
views     the bytes, decoding, and two crops, as our workers do

Each is measured with a warm cache, and with a cold one: the system is told to forget the content of
the files first. A ratio such as tar_over_files_read_cold compares images per second. Parquet files
are read for a small part of the images, because reading one image means reading its row group.
"""

import argparse
import functools
import io
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import loader_images
import measure
import numpy as np
import torch

from moco.augment.recipes import recipe
from moco.data import loader, sources, table_files, tars
from moco.data.images import EncodedImages
from moco.errors import InputError

SHARD, GROUP = 1000, 100  # images in a tar file, and in a row group
PART = 20  # one in so many images is read from parquet files
DIFFERENT = 64  # images; the others are copies, because making them takes long


def run(args: argparse.Namespace) -> None:
    """Measure all forms."""
    args.images, args.rounds = args.images or 4000, args.rounds or 5
    if args.images < PART:
        raise InputError(f"--images {args.images}: one in {PART} is read from parquet; give more")
    with tempfile.TemporaryDirectory() as root:
        sizes = loader_images.make(Path(root, "made"), min(args.images, DIFFERENT))
        forms = write(Path(root), args.images)
        candidates, images = {}, {}
        for form, folder in forms.items():
            found = sources.scan(folder, "train")
            part = PART if form == "parquet" else 1
            for what in ("read", "views"):
                for cache in ("warm", "cold"):
                    name = f"{form} {what} {cache}"
                    candidates[name] = functools.partial(
                        seconds, found, folder, part, args.size if what == "views" else 0, cache
                    )
                    images[name] = len(found) // part
        times = measure.side_by_side(candidates, args.rounds, torch.device("cpu"), warm=1)
    rates = {name: images[name] / value for name, value in measure.medians(times).items()}
    table = [
        {"form": form, "what": what, "cache": cache, "ms/image": 1e3 / rate, "images/s": rate}
        for (form, what, cache), rate in ((name.split(), rate) for name, rate in rates.items())
    ]
    ratios = {}
    for name in times:
        form, what, cache = name.split()
        base = "tar" if form == "parquet" else "files"
        if form != "files":
            scale = images[name] / images[f"{base} {what} {cache}"]
            ratio = measure.ratio(times[f"{base} {what} {cache}"], times[name])
            ratios[f"{form}_over_{base}_{what}_{cache}"] = ratio * scale
    facts = {"images": args.images, "pixels": args.size, "shard": SHARD, "row group": GROUP}
    facts["KB"] = f"{min(sizes) // 1000}-{max(sizes) // 1000}"
    measure.report("loader_shards", table, ratios, facts, args.json)


_draw = np.random.default_rng(0)


def seconds(images: EncodedImages, folder: Path, part: int, size: int, cache: str) -> float:
    """Return the time to read `images` in random order. If `size`, also take crops of that size."""
    order = _draw.permutation(len(images))[: len(images) // part]
    views = loader.Views(images, loader.RandomCrops(recipe("mocov2", size or 224), seed=0))
    tars._opened.cache_clear()
    table_files._kept.groups.clear()
    for path in folder.rglob("*.*"):
        if path.is_file():
            set_cache(path, cache)
    began = time.perf_counter()
    for i in order.tolist():
        if size:
            views[0, i]
        else:
            images.encoded(i)
    return time.perf_counter() - began


def set_cache(path: Path, cache: str) -> None:
    """Let the system forget the content of a file, or read it so that it is remembered."""
    with open(path, "rb") as file:
        if cache == "warm":
            while file.read(1 << 20):
                pass
        else:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(root: Path, count: int) -> dict[str, Path]:
    """Write `count` images in each form. Return the data folder of each."""
    made = [path.read_bytes() for path in sorted((root / "made").iterdir())]
    shutil.rmtree(root / "made")
    images = [made[i % len(made)] for i in range(count)]
    forms = {name: root / name for name in ("files", "tar")}
    folder = forms["files"] / "train" / "photo"
    folder.mkdir(parents=True)
    for i, data in enumerate(images):
        (folder / f"{i:06d}.jpg").write_bytes(data)
    forms["tar"].mkdir()
    for k in range(0, count, SHARD):
        with tarfile.open(forms["tar"] / f"train-{k // SHARD:05d}.tar", "w") as tar:
            for i, data in enumerate(images[k : k + SHARD], k):
                for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.cls", b"photo")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return forms | write_tables(root, images)


def write_tables(root: Path, images: list[bytes]) -> dict[str, Path]:
    """Write the images as an arrow and a parquet file. Do nothing if pyarrow is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return {}
    table = pa.table({"image": pa.array(images, pa.large_binary())})
    (root / "arrow").mkdir()
    (root / "parquet").mkdir()
    with pa.ipc.new_stream(str(root / "arrow" / "train.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=GROUP)
    pq.write_table(table, root / "parquet" / "train.parquet", row_group_size=GROUP)
    return {"arrow": root / "arrow", "parquet": root / "parquet"}
