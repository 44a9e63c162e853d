#!/usr/bin/env python
"""Write the features of all images in a folder to one file.

  python tools/embed.py DIR --pretrained CKPT --out features.parquet
  python tools/embed.py DIR --pretrained CKPT --out features.npz --map

DIR is any folder. Its images may be nested in any way and need no labels. The file has the name of
each image, which is its path below DIR, and its features, which are not normalized. If DIR has no
image files but tar, parquet or arrow files, the images of one split in them are read: --split. If
the tool is stopped, the same command continues it. On the same CPU, the file then has the same
bits.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moco import sections
from moco.cli import tool, values
from moco.config import Evaluation, replaced
from moco.errors import InputError, ListError
from moco.evaluate import feature_tables
from moco.files import as_utf8, check_new, half_written, replacing
from moco.launch import processes
from moco.messages import counted
from moco.report import maps
from moco.sections_eval import TEST_RESIZES

if TYPE_CHECKING:
    import torch

    from moco.data.images import Images
    from moco.encoder.pretrained import Encoder
    from moco.evaluate.feature_parts import Parts

SECONDS = 60.0  # between two lines of progress
COMPUTE, INPUT = sections.Compute(), sections.Input()


def main() -> int:
    """Run the tool; return the exit status."""
    return tool.run(parser(), embed)


def parser() -> tool.OneLineParser:
    """Return the parser of the options."""
    p = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "folder",
        metavar="DIR",
        help="folder with images, at any depth, or in tar, parquet or arrow files",
    )
    p.add_argument(
        "--split",
        choices=("train", "val"),
        help="images to read from tar, parquet or arrow files (default: train, or val if there are "
        "no others)",
    )
    p.add_argument(
        "--pretrained",
        required=True,
        metavar="FILE",
        help="checkpoint of this project or of other software",
    )
    suffixes = ", ".join(feature_tables.WRITERS)
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"file to write; its suffix selects the format ({suffixes})",
    )
    p.add_argument(
        "--map",
        nargs="?",
        const="auto",
        choices=("auto", *maps.METHODS),
        help="add a map (two numbers an image); auto: pacmap or umap if installed, else tsne "
        "for up to 20000 images and pca for more",
    )
    p.add_argument(
        "-a", "--arch", help="architecture, if the checkpoint does not name it (default: resnet50)"
    )
    size = "image size in pixels (default: that of pre-training, or 224 if unknown)"
    p.add_argument("--image-size", type=values.in_range(int, sections.POSITIVE), help=size)
    eps = "epsilons of a Swin's layer norms, if the checkpoint does not say (default: timm)"
    p.add_argument("--norm-eps", choices=sections.NORM_EPS, help=eps)
    p.add_argument(
        "--test-resize",
        choices=TEST_RESIZES,
        default="scaled",
        help="resize before the center crop, as in the evaluations (default: %(default)s)",
    )
    p.add_argument(
        "-b",
        "--batch-size",
        type=values.in_range(int, "[1, 1048576]"),
        default=INPUT.batch_size,
        help="images in one pass (default: %(default)s)",
    )
    p.add_argument(
        "-j",
        "--workers",
        type=values.in_range(int, sections.PROCESSES),
        help="loader processes (default: one for each core, at most 8)",
    )
    p.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default=COMPUTE.amp,
        help="mixed precision (default: %(default)s)",
    )
    p.add_argument(
        "--device",
        choices=("auto", *sections.DEVICES),
        default="auto",
        help="device to compute on (default: the accelerator that PyTorch finds, else the CPU)",
    )
    p.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help="skip: leave out images that cannot be read, and name them (default: %(default)s)",
    )
    force = "replace an existing file, and unfinished features of another command"
    p.add_argument("--force", action="store_true", help=force)
    return p


def embed(args: argparse.Namespace) -> None:
    """Write the features. Raises InputError if the images, the checkpoint or --out do not fit."""
    from moco import devices
    from moco.encoder import networks, pretrained
    from moco.evaluate import feature_parts

    suffix = args.out.suffix.lower()
    if suffix not in feature_tables.WRITERS:
        known = ", ".join(feature_tables.WRITERS)
        raise InputError(f"--out {args.out}: unknown file format; let it end in {known}")
    feature_tables.check_package(suffix)
    check_new(args.out, args.force)
    images = find(args.folder, args.split)
    method = maps.choose(args.map, len(images)) if args.map else None
    names = [images.name(i) for i in range(len(images))]
    feature_tables.check_names(suffix, names)

    found = pretrained.read(args.pretrained, args.arch, args.image_size, args.norm_eps)
    config = settings(args, found)
    device = devices.for_process(args.device, gpu=None, local_rank=0)
    print(
        f"{counted(len(images), 'image')} at {found.image_size} pixels; features of the "
        f"{found.arch} of {args.pretrained} ({found.method}) on {device.type}"
    )
    about = {
        "arch": found.arch,
        "method": found.method,
        "epoch": found.epoch,
        "checkpoint": args.pretrained,
        "image_size": found.image_size,
        "mean": found.mean,
        "std": found.std,
        "test_resize": args.test_resize,
        "exif": found.decoding.exif,
        "white": found.decoding.white,
        "amp": config.compute.amp,
        **({"map": method.title} if method else {}),
    }
    work = args.out.with_name(f"{args.out.name}.parts")
    parts = feature_parts.Parts(work, determines(args, config, found, images, device), args.force)
    try:
        compute(found, images, config, device, parts, args.on_bad_image == "skip")
        table = table_of(parts, names, networks.num_features(found.net), method, about)
        check_new(args.out, args.force)
        with replacing(args.out) as file:
            feature_tables.WRITERS[suffix](file, table)
        for path in half_written(args.out.parent, args.out.name):
            path.unlink(missing_ok=True)  # of a program that was killed
        parts.finish()
    finally:
        parts.close()
    for reason in parts.unreadable.values():
        print(f"left out: {reason}", file=sys.stderr)
    absent = f"; {counted(len(parts.unreadable), 'image')} left out" * bool(parts.unreadable)
    print(f"{args.out}: {counted(len(table.names), 'image')}, {table.width} features each{absent}")


def find(data: str, split: str | None = None) -> "Images":
    """Return all images below a folder, or else those of a split that larger files in it hold.

    Raises InputError if there is none.
    """
    from moco.data import folders, sources

    root = Path(data)
    if not root.is_dir():
        raise InputError(f"{data}: no such folder; give a folder with images")
    if folders.has_images_below(root):
        if split:
            raise InputError(
                f"--split {split}: {data} holds image files, and all are read; leave it out, or "
                "give the folder of the split"
            )
        return folders.scan_flat(root)
    located = {name: sources.locate(root, name) for name in ("train", "val")}
    stored = [name for name, source in located.items() if source]
    if split and split not in stored:
        raise InputError(f"--split {split}: {data} has no {split} images")
    if not stored:
        return folders.scan_flat(root)  # raises the error
    chosen = split or stored[0]
    if not split and len(stored) > 1:
        folders.print_once(f"{data}: the {chosen} images are read; --split val reads the others")
    return sources.scan(root, chosen)


def settings(args: argparse.Namespace, found: "Encoder") -> Evaluation:
    """Return the settings of an evaluation with these options."""
    from moco.engine import precision

    workers = min(processes.cores(), processes.WORKERS) if args.workers is None else args.workers
    config = replaced(
        Evaluation(),
        device=args.device,
        amp=args.amp,
        batch_size=args.batch_size,
        batch_per_process=args.batch_size,
        workers=workers,
        image_size=found.image_size,
        mean=found.mean,
        std=found.std,
        test_resize=args.test_resize,
        exif=found.decoding.exif,
        white=found.decoding.white,
        shrink_on_decode=False,
    )
    return precision.disable_slow_amp(config)


def determines(
    args: argparse.Namespace,
    config: Evaluation,
    found: "Encoder",
    images: "Images",
    device: "torch.device",
) -> dict[str, object]:
    """Return what determines the bits of the features, by the name that messages show."""
    import torch

    from moco.evaluate import feature_parts

    weights, names = feature_parts.digest(found.net, images)
    return {
        "DIR": as_utf8(str(Path(args.folder).resolve())),
        "images": names,
        "weights": weights,
        "--arch": f"{found.arch}, {found.stem}, {found.norm_eps}",
        "--image-size": found.image_size,
        "--test-resize": args.test_resize,
        "mean and std": [*found.mean, *found.std],
        "--exif and --white": [found.decoding.exif, found.decoding.white],
        "--batch-size": args.batch_size,
        "--amp": config.compute.amp,
        "--device": device.type,
        "version of PyTorch": torch.__version__,
    }


def compute(
    found: "Encoder",
    images: "Images",
    config: Evaluation,
    device: "torch.device",
    parts: "Parts",
    skip: bool,
) -> None:
    """Compute the features that `parts` lacks. Show a progress bar on a terminal, else lines.

    Raises InputError, which says that the same command continues, and ListError, which does not.
    """
    import torch
    from tqdm import tqdm

    from moco.engine import precision
    from moco.evaluate import feature_parts

    if parts.done:
        print(f"continuing at image {parts.done} of {len(images)}")
    net = precision.prepare_model(found.net, device, compile=False, recompute=False)
    terminal, printed = sys.stderr.isatty(), time.monotonic()
    shown = {"total": len(images), "initial": parts.done, "unit": " images"}
    with tqdm(**shown, dynamic_ncols=True, disable=not terminal) as bar:

        def progress(done: int) -> None:
            nonlocal printed
            bar.update(done - bar.n)
            if not terminal and time.monotonic() - printed >= SECONDS:
                print(f"{done} of {counted(len(images), 'image')}", flush=True)
                printed = time.monotonic()

        try:
            feature_parts.compute(net, images, config, device, parts, skip, progress)
        except torch.OutOfMemoryError:
            raise InputError(
                f"--batch-size {config.input.batch_size}: too large for the device's memory; "
                "lower it"
            ) from None
        except ListError:  # the files of the images have changed
            raise
        except InputError as error:
            kept = f"the same command continues at image {parts.done}"
            raise InputError(f"{error}; {kept}") from None


def table_of(
    parts: "Parts",
    names: list[str],
    width: int,
    method: maps.Method | None,
    about: dict[str, object],
) -> feature_tables.Table:
    """Return the content of the file. Raises InputError if no image could be read."""
    import numpy as np

    kept = [names[i] for i in range(len(names)) if i not in parts.unreadable]
    if not kept:
        raise InputError("no image can be read")

    def blocks():
        return (rows for _, rows in parts.read() if len(rows))

    points = None
    if method:
        if len(kept) < maps.FEWEST:
            maps.choose("pca", len(kept))  # raises the error
        print(f"computing the map by {method.title}")
        points = maps.points(np.concatenate(list(blocks())), method)
    return feature_tables.Table(kept, width, blocks, points, about)


if __name__ == "__main__":
    sys.exit(main())
