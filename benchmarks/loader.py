#!/usr/bin/env python
"""Two MoCo-v2 views of one JPEG on one thread: ours beside torchvision's and lightly's transforms.

host      what our workers do: decode once, cut two uint8 crops, collate
cpu       host, and the colour work of the batch on the CPU
pil       torchvision on PIL images, as MoCo's own repository has it
v2        torchvision.transforms.v2 on tensors
lightly   lightly's MoCoV2Transform, where lightly is installed

host_over_pil is how many times the images a second of pil host makes, and so on.
"""

import io
import itertools
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import measure
import skimage.data
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from moco.augment import color
from moco.augment.recipes import MEAN, STD, recipe
from moco.data import datasets, loader

WIDTH, HEIGHT = 500, 375
BYTES = range(80_000, 110_001)
Transform = Callable[[Image.Image | Tensor], Tensor]


def main() -> None:
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32, help="in one batch")
    parser.add_argument("--size", type=int, default=224, help="pixels of a view")
    parser.add_argument("--compile", action="store_true", help="have torch.compile fuse our colour operations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compile:
        color.fuse()
    with tempfile.TemporaryDirectory() as root:
        sizes = make(Path(root) / "train" / "photo", args.images)
        folder = datasets.scan(Path(root), "train")
        paths = [folder.path(i) for i in range(len(folder))]
        candidates = {
            "host": lambda: host(folder, args.size),
            "cpu": lambda: cpu(folder, args.size),
            "pil": lambda: two_views(paths, pil_image, moco_v2(v1, args.size)),
            "v2": lambda: two_views(paths, tensor_image, moco_v2(v2, args.size)),
        }
        if theirs := lightly(args.size):
            candidates["lightly"] = lambda: stacked(theirs(pil_image(path)) for path in paths)
        times = measure.side_by_side(candidates, args.rounds, torch.device("cpu"))
    seconds = measure.medians(times)
    table = [{"pipeline": name, "ms/image": 1e3 * s / args.images, "images/s": args.images / s} for name, s in seconds.items()]
    others = [name for name in times if name not in ("host", "cpu")]
    ratios = {f"{ours}_over_{other}": measure.ratio(times[other], times[ours]) for ours in ("host", "cpu") for other in others}
    facts = {
        "images": args.images,
        "pixels": args.size,
        "compile": args.compile,
        "KB": f"{min(sizes) // 1000}-{max(sizes) // 1000}",
    }
    measure.report("loader", table, ratios, facts, args.json)


_epochs = itertools.count()  # every round draws anew, as the others do


def host(folder: datasets.ImageFolder, size: int) -> loader.Batch:
    views, epoch = loader.Views(folder, loader.RandomCrops(recipe("mocov2", size), seed=0)), next(_epochs)
    return loader.collate([views[epoch, i] for i in range(len(folder))])


def cpu(folder: datasets.ImageFolder, size: int) -> list[Tensor]:
    batch = host(folder, size)
    generator = torch.Generator().manual_seed(next(_epochs))
    return [color.augment(crops, view, generator) for crops, view in zip(batch.views, recipe("mocov2", size), strict=True)]


def two_views(paths: list[str], read: Callable[[str], Image.Image | Tensor], transform: Transform) -> list[Tensor]:
    return stacked((transform(image), transform(image)) for image in map(read, paths))


def stacked(views: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(view) for view in zip(*views, strict=True)]


def pil_image(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def tensor_image(path: str) -> Tensor:
    return decode_image(read_file(path), ImageReadMode.RGB)


def moco_v2(library, size: int) -> Transform:
    """MoCo v2's view by either of torchvision's libraries."""
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
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def lightly(size: int) -> Callable[[Image.Image], list[Tensor]] | None:
    """lightly's two views of an image, where lightly is installed."""
    try:
        from lightly.transforms import MoCoV2Transform
    except ImportError:
        return None
    return MoCoV2Transform(input_size=size)


def make(folder: Path, images: int) -> list[int]:
    """Write JPEGs of 500x375 pixels and 80 to 110 KB, cut from real photographs; returns their sizes in bytes."""
    folder.mkdir(parents=True)
    arrays = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.immunohistochemistry(), *load_sample_images().images]
    photographs = [Image.fromarray(array) for array in arrays]
    draw, sizes = random.Random(0), []
    while len(sizes) < images:
        photograph = draw.choice(photographs)
        left, top = draw.randint(0, photograph.width - WIDTH), draw.randint(0, photograph.height - HEIGHT)
        patch = photograph.crop((left, top, left + WIDTH, top + HEIGHT))
        for quality in range(98, 50, -2):
            file = io.BytesIO()
            patch.save(file, "JPEG", quality=quality)
            if file.tell() < BYTES.stop:
                break
        if file.tell() in BYTES:
            (folder / f"{len(sizes):04d}.jpg").write_bytes(file.getvalue())
            sizes.append(file.tell())
    return sizes


if __name__ == "__main__":
    main()
