#!/usr/bin/env python
"""Time two MoCo-v2 views of a JPEG on one thread, next to torchvision's and lightly's transforms.

host      what our workers do: decode once, take two uint8 crops, collate
cpu       host, plus the color operations of the batch on the CPU
pil       torchvision on PIL images, as in MoCo's own repository
v2        torchvision.transforms.v2 on tensors
lightly   lightly's MoCoV2Transform, if lightly is installed

The ratio host_over_pil is the images per second of host, divided by those of pil. The other ratios
are named in the same way. Two are different: host_over_decode_and_resize is the time of a loader
process per image, with reading, batching and the transfer to the main process, divided by the time
of decoding and resizing alone. colors_over_kornia is the time of kornia's color operations, divided
by that of ours. The rows below the pipelines are stages; see loader_stages.py. Times are of the
processor, but `one worker` and `decode and resize` are wall-clock times.

With --small, the script measures an epoch of two views of 32-pixel images in memory, as in MoCo's
demo on CIFAR-10. "ours" and "pil" each use two processes with one thread each.

ours      one worker crops; the main process does the color operations and normalization
pil       torchvision on PIL images, DataLoader with two workers
crops     ours without the color operations
colors    the color operations alone, in the main process

With --large, the script measures host with JPEGs of 4000x3000 pixels, without and with
--shrink-on-decode, and each installed decoder alone. The ratio on_over_off is the images per second
with the option, divided by those without it.

With --shards, the script measures reading from tar, arrow and parquet files; see loader_shards.py.
"""

import argparse
import itertools
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import loader_images
import loader_shards
import loader_stages
import measure
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from moco.augment import color
from moco.augment.recipes import recipe
from moco.config import MEAN, STD
from moco.data import jpeg, loader, sources
from moco.data.decoding import DEFAULT, Decoding
from moco.data.images import ImageArray, ImageFolder
from moco.errors import InputError
from moco.sections import Input

Transform = Callable[[Image.Image | Tensor], Tensor]


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--small", action="store_true", help="measure an epoch of 32-pixel images")
    large_ = "measure JPEGs of 4000x3000 pixels, without and with --shrink-on-decode"
    what.add_argument("--large", action="store_true", help=large_)
    shards = "compare reading from tar, arrow and parquet files with reading image files"
    what.add_argument("--shards", action="store_true", help=shards)
    own = "with --small: a folder with train/CLASS/*.jpg, all of one size, instead of patches"
    parser.add_argument("--data", type=Path, help=own)
    count = (
        "images in one batch (default: 32); with --small: in an epoch (default: 50,000); with "
        "--large and --shards: in all (default: 4 and 4000)"
    )
    parser.add_argument("--images", type=measure.at_least(1), help=count)
    batch = "with --small: images in one batch (default: 512)"
    parser.add_argument("--batch", type=measure.at_least(1), help=batch)
    size = "pixels of a view (default: 224); --small has 32"
    parser.add_argument("--size", type=measure.pixels, help=size)
    parser.add_argument(
        "--compile", action="store_true", help="have torch.compile fuse our color operations"
    )
    args = parser.parse_args()
    for name, given, useful in (
        ("--data", args.data, args.small),
        ("--batch", args.batch, args.small),
        ("--size", args.size, not args.small),
        ("--compile", args.compile, not (args.large or args.shards)),
    ):
        if given and not useful:
            parser.error(f"{name} has no effect here; leave it out")
    args.batch, args.size = args.batch or 512, args.size or 224
    torch.set_num_threads(1)
    if args.compile:
        color.compile_operations()
    if args.small or args.large:
        (small if args.small else large)(args)
        return
    if args.shards:
        loader_shards.run(args)
        return
    args.images, args.rounds = args.images or 32, args.rounds or 9
    with tempfile.TemporaryDirectory() as root:
        sizes = loader_images.make(Path(root) / "train" / "photo", args.images)
        folder = sources.scan(Path(root), "train")
        paths = [folder.path(i) for i in range(len(folder))]
        candidates = {
            "host": lambda: host(folder, args.size),
            "cpu": lambda: cpu(folder, args.size),
            "pil": lambda: two_views(paths, pil_image, moco_v2(v1, args.size)),
            "v2": lambda: two_views(paths, tensor_image, moco_v2(v2, args.size)),
        }
        if theirs := lightly(args.size):
            candidates["lightly"] = lambda: stacked(theirs(pil_image(path)) for path in paths)
        stages, apart = loader_stages.candidates(folder, recipe("mocov2", args.size))
        turns = {name: loader_stages.turn(run) for name, run in (candidates | stages).items()}
        times = measure.side_by_side(turns, args.rounds, torch.device("cpu"))
        times |= measure.side_by_side(apart, args.rounds, torch.device("cpu"))
    seconds = measure.medians(times)
    table = [
        {"pipeline": name, "ms/image": 1e3 * s / args.images, "images/s": args.images / s}
        for name, s in seconds.items()
    ]
    ratios = {
        f"{ours}_over_{other}": measure.ratio(times[other], times[ours])
        for ours in ("host", "cpu")
        for other in candidates
        if other not in ("host", "cpu")
    }
    alone = times["decode and resize"]
    ratios["host_over_decode_and_resize"] = measure.ratio(times["one worker"], alone)
    if "kornia" in times:
        ratios["colors_over_kornia"] = measure.ratio(times["kornia"], times["colors"])
    facts = {
        "images": args.images,
        "pixels": args.size,
        "compile": args.compile,
        "KB": f"{min(sizes) // 1000}-{max(sizes) // 1000}",
        "decoder": jpeg.decoder()[0],
        **measure.versions(
            "torchvision", "pillow", "torchcodec", "lightly", "kornia", "simplejpeg"
        ),
    }
    measure.report("loader", table, ratios, facts, args.json, TARGETS)


TARGETS = {
    "host_over_pil": measure.Target(6, least=True),
    "cpu_over_pil": measure.Target(3, least=True),
    "host_over_decode_and_resize": measure.Target(1.25),
}


# Large images.


def large(args: argparse.Namespace) -> None:
    """Measure two views of --images large JPEGs, and the decoders of the full image."""
    args.images, args.rounds = args.images or 4, args.rounds or 5
    with tempfile.TemporaryDirectory() as root:
        folder = loader_images.make_large(Path(root), args.images)
        data = [folder.encoded(i) for i in range(len(folder))]
        headers = [jpeg.header(memoryview(one)) for one in data]
        candidates = {
            "off": lambda: host(folder, args.size),
            "on": lambda: host(folder, args.size, Decoding(shrink_on_decode=True)),
        }
        for name, decode in jpeg.working():
            candidates[name] = lambda decode=decode: list(map(decode, data, headers))
        times = measure.side_by_side(candidates, args.rounds, torch.device("cpu"))
    table = [
        {"pipeline": name, "ms/image": 1e3 * s / args.images, "images/s": args.images / s}
        for name, s in measure.medians(times).items()
    ]
    facts = {"images": args.images, "pixels": args.size, "KB": len(data[0]) // 1000}
    ratios = {"on_over_off": measure.ratio(times["off"], times["on"])}
    measure.report("loader_large", table, ratios, facts, args.json)


# Small images.


SMALL = recipe("small", 32)


def small(args: argparse.Namespace) -> None:
    """Measure an epoch of --images small images in each pipeline."""
    images = loader_images.in_memory(args.data, args.images or 50_000)
    if len(images) < args.batch:
        raise InputError(f"{len(images)} images do not fill a batch; lower --batch {args.batch}")
    ready = next(batches(images, args.batch))
    steps = len(images) // args.batch
    theirs = DataLoader(Pil(images), args.batch, shuffle=True, num_workers=2, drop_last=True)
    candidates = {
        "ours": lambda: sum(len(coloured(batch)) for batch in batches(images, args.batch)),
        "pil": lambda: sum(len(batch) for batch in theirs),
        "crops": lambda: sum(len(batch) for batch in batches(images, args.batch)),
        "colors": lambda: sum(len(coloured(ready)) for _ in range(steps)),
    }
    times = measure.side_by_side(candidates, args.rounds or 3, torch.device("cpu"), warm=0)
    n = steps * args.batch
    table = [
        {"pipeline": name, "s/epoch": s, "us/view": 1e6 * s / (2 * n), "images/s": n / s}
        for name, s in measure.medians(times).items()
    ]
    facts = {"images": n, "batch": args.batch, "compile": args.compile}
    ratios = {"ours_over_pil": measure.ratio(times["pil"], times["ours"])}
    measure.report("loader_small", table, ratios, facts, args.json)


def batches(images: ImageArray, batch: int) -> Iterator[loader.Batch]:
    """Yield the batches of the next epoch, read as a training run on a CPU reads them."""
    epoch = next(_epochs)
    options = Input(workers=1, batch_size=batch, batch_per_process=batch)
    order = loader.TrainBatchSampler(len(images), batch, 1, seed=0)
    order.start, order.stop = epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch
    cut = loader.RandomCrops(SMALL, seed=0)
    return loader.batches(images, cut, order, options, torch.device("cpu"))


def coloured(batch: loader.Batch) -> list[Tensor]:
    """Return the views of a batch after the color operations and normalization."""
    generator = torch.Generator().manual_seed(next(_epochs))
    return [
        color.augment(crops, view, generator)
        for crops, view in zip(batch.views, SMALL, strict=True)
    ]


class Pil(Dataset):
    """A data set with two views of each image, by torchvision on PIL images as in MoCo's demo."""

    def __init__(self, images: ImageArray):
        self.pixels = np.ascontiguousarray(images.pixels.transpose(0, 2, 3, 1))  # [N, H, W, 3]
        self.transform = v1.Compose(
            [
                v1.RandomResizedCrop(32),
                v1.RandomHorizontalFlip(),
                v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v1.RandomGrayscale(p=0.2),
                v1.ToTensor(),
                v1.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.pixels[i])
        return self.transform(image), self.transform(image)


# JPEGs of ImageNet's usual size.


_epochs = itertools.count()  # every round uses new random numbers, as the other pipelines do


def host(folder: ImageFolder, size: int, settings: Decoding = DEFAULT) -> loader.Batch:
    """Return the crops of all images, as our workers make them."""
    crops, epoch = loader.RandomCrops(recipe("mocov2", size), seed=0), next(_epochs)
    views = loader.Views(folder, crops, settings=settings)
    return views.__getitems__([(epoch, i) for i in range(len(folder))])


def cpu(folder: ImageFolder, size: int) -> list[Tensor]:
    """Return the views of all images, with the color operations on the CPU."""
    batch = host(folder, size)
    generator = torch.Generator().manual_seed(next(_epochs))
    return [
        color.augment(crops, view, generator)
        for crops, view in zip(batch.views, recipe("mocov2", size), strict=True)
    ]


def two_views(
    paths: list[str], read: Callable[[str], Image.Image | Tensor], transform: Transform
) -> list[Tensor]:
    """Return two views of all images, by a transform of another library."""
    return stacked((transform(image), transform(image)) for image in map(read, paths))


def stacked(views: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Stack each view over the images."""
    return [torch.stack(view) for view in zip(*views, strict=True)]


def pil_image(path: str) -> Image.Image:
    """Read an image with PIL."""
    return Image.open(path).convert("RGB")


def tensor_image(path: str) -> Tensor:
    """Read an image with torchvision."""
    return decode_image(read_file(path), ImageReadMode.RGB)


def moco_v2(library, size: int) -> Transform:
    """Return MoCo v2's view as a transform of `library`, one of torchvision's two."""
    to_float = [v1.ToTensor()] if library is v1 else [v2.ToDtype(torch.float32, scale=True)]
    blur = v1.Lambda(pil_blur) if library is v1 else v2.GaussianBlur(13, (0.1, 2.0))
    return library.Compose(
        [
            library.RandomResizedCrop(size, (0.2, 1.0)),
            library.RandomApply([library.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            library.RandomGrayscale(p=0.2),
            library.RandomApply([blur], p=0.5),
            library.RandomHorizontalFlip(),
            *to_float,
            library.Normalize(MEAN, STD),
        ]
    )


def pil_blur(image: Image.Image) -> Image.Image:
    """Blur an image as MoCo v2 does."""
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def lightly(size: int) -> Callable[[Image.Image], list[Tensor]] | None:
    """Return lightly's transform to two views; None if lightly is not installed."""
    try:
        from lightly.transforms import MoCoV2Transform
    except ImportError:
        print("lightly is not installed: its transform is left out")
        return None
    return MoCoV2Transform(input_size=size)


if __name__ == "__main__":
    measure.main(main)
