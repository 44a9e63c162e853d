#!/usr/bin/env python
"""Measure how long it takes to list a folder's images, next to torchvision's ImageFolder."""

import tempfile
from pathlib import Path

import measure
import torch
from torchvision.datasets import ImageFolder

from moco.data import sources


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root / "train", args.files, args.classes)

        def ours() -> None:
            assert len(sources.scan(root, "train")) == args.files

        def torchvision() -> None:
            assert len(ImageFolder(str(root / "train"))) == args.files

        candidates = {"ours": ours, "torchvision": torchvision}
        times = measure.side_by_side(candidates, args.rounds, torch.device("cpu"))
    table = [{"list": name, "ms": 1e3 * value} for name, value in measure.medians(times).items()]
    ratios = {"torchvision_over_ours": measure.ratio(times["torchvision"], times["ours"])}
    measure.report(
        "startup", table, ratios, {"files": args.files, "classes": args.classes}, args.json
    )


def make(root: Path, files: int, classes: int) -> None:
    """Write empty files; listing reads only their names."""
    for i in range(files):
        folder = root / f"class{i % classes:05d}"
        if i < classes:
            folder.mkdir(parents=True)
        (folder / f"image_{i:08d}.jpg").touch()


if __name__ == "__main__":
    main()
