#!/usr/bin/env python
"""How long it takes until a folder's images are known: the first start, which walks it, beside the next, which need not."""

import os
import tempfile
import time
from pathlib import Path

import measure
import torch

from moco.data import datasets


def main() -> None:
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "data", Path(folder) / "cache"
        os.environ["XDG_CACHE_HOME"] = str(cache)
        make(root / "train", args.files, args.classes)

        def first() -> None:
            for kept in cache.rglob("*.npz"):
                kept.unlink()
            assert len(datasets.scan(root, "train")) == args.files

        def second() -> None:
            assert len(datasets.scan(root, "train")) == args.files

        candidates = {"first start": first, "second start": second}
        times = measure.side_by_side(candidates, args.rounds, torch.device("cpu"))
        (root / "train" / "class00000" / "new.jpg").touch()
        assert len(datasets.scan(root, "train")) == args.files + 1, "a new file was not noticed"
    table = [{"start": name, "ms": 1e3 * value} for name, value in measure.medians(times).items()]
    ratios = {"first_over_second": measure.ratio(times["first start"], times["second start"])}
    measure.report("startup", table, ratios, {"files": args.files, "classes": args.classes}, args.json)


def make(root: Path, files: int, classes: int) -> None:
    """Empty files are enough: a start reads names only. The folders last changed an hour ago."""
    for i in range(files):
        folder = root / f"class{i % classes:05d}"
        if i < classes:
            folder.mkdir(parents=True)
        (folder / f"image_{i:08d}.jpg").touch()
    hour_ago = time.time() - 3600
    for folder in (root, *root.iterdir()):
        os.utime(folder, (hour_ago, hour_ago))


if __name__ == "__main__":
    main()
