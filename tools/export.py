#!/usr/bin/env python
"""Export the encoder of a checkpoint for other software: its tensors alone, with stock names.

CHECKPOINT is a checkpoint of any method of this project, or any other file that main_lincls.py
reads. Stock networks without their last layer load OUT strictly: those of torchvision and timm for
ResNets, and that of its own library for another network. The tool checks this before it writes OUT:
each stock network loads the tensors and must compute the same features as this project's network.
The tool prints the Python code that loads OUT.
"""

import argparse
import shlex
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch
from torch import Tensor, nn

from moco import sections
from moco.cli import tool, values
from moco.config import MEAN, STD
from moco.encoder import pretrained
from moco.encoder.stock import StockModel, stock_models
from moco.errors import InputError
from moco.files import check_new, creating

TOLERANCE = 1e-4  # relative to the largest feature; the features are usually exactly equal
READ = {  # suffix: (the expression that loads the file {}, the module that it needs)
    ".pth": ("torch.load({}, weights_only=True)", "torch"),
    ".pt": ("torch.load({}, weights_only=True)", "torch"),
    ".safetensors": ("safetensors.torch.load_file({})", "safetensors.torch"),
}
HUBCONF = '''"""Entry point of torch.hub for the encoder in this folder.

Load it with torch.hub.load(FOLDER, "encoder", source="local"), or from the web with
torch.hub.load("USER/REPOSITORY", "encoder").
"""

from pathlib import Path as _Path

{imports}

dependencies = {packages!r}
about = {facts!r}


def encoder(pretrained=True):
    """Return the network in eval mode. It maps images [B, 3, H, W] to features [B, D].

    Images are RGB in [0, 1], normalized with the mean and std in `about`.
    """
    {lines}
    if pretrained:
        net.load_state_dict({read})
    return net.eval()
'''


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="file to write; its suffix (.pth, .pt or .safetensors) selects the format",
    )
    parser.add_argument(
        "-a",
        "--arch",
        help="architecture, if the checkpoint does not name it (default: resnet50)",
    )
    size = (
        "image size in pixels of a ViT or Swin (default: that of pre-training, or 224 if unknown)"
    )
    parser.add_argument("--image-size", type=values.in_range(int, sections.POSITIVE), help=size)
    eps = "epsilons of a Swin's layer norms, if the checkpoint does not say (default: timm)"
    parser.add_argument("--norm-eps", choices=sections.NORM_EPS, help=eps)
    hub = (
        "also write a hubconf.py next to OUT; torch.hub.load(FOLDER, 'encoder', source='local') "
        "then needs only these two files"
    )
    parser.add_argument("--hub", action="store_true", help=hub)
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return tool.run(parser, export)


def export(args: argparse.Namespace) -> None:
    """Write OUT and, with --hub, hubconf.py.

    Raises InputError if they cannot be written, or if a stock network that loads OUT computes
    different features.
    """
    outs = [args.out, *([args.out.with_name("hubconf.py")] if args.hub else [])]
    check_outputs(args, outs)
    found = pretrained.read(args.checkpoint, args.arch, args.image_size, args.norm_eps)
    if found.resized:
        print(
            f"interpolated to images of {found.image_size} pixels (--image-size): "
            f"{', '.join(found.resized)}"
        )
    facts = {
        "arch": found.arch,
        "method": found.method,
        **({"epoch": found.epoch} if found.epoch else {}),
        "source": Path(args.checkpoint).name,
        "image_size": found.image_size,
        "mean": tuple(found.mean),
        "std": tuple(found.std),
        **({"stem": found.stem} if found.stem != "imagenet" else {}),
        **({"norm_eps": found.norm_eps} if found.norm_eps != "timm" else {}),
        **({"script": found.script} if found.script else {}),
    }
    tensors = {name: x.clone().contiguous() for name, x in found.net.state_dict().items()}
    plain = stock_models(found.arch, found.image_size, found.stem, found.norm_eps)
    files = [serialize(tensors, args.out.suffix, facts)]
    if args.hub:
        files.append(hubconf(plain[0], args.out.name, facts).encode())
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=args.out.parent) as folder:
            staged = [Path(folder, out.name) for out in outs]
            for path, data in zip(staged, files, strict=True):
                path.write_bytes(data)
            same = verify(found, plain, staged[0], args.hub)
            for data, out in zip(files, outs, strict=True):
                with creating(out, args.force) as file:
                    file.write(data)
    except OSError as error:
        raise InputError(
            f"{args.out}: cannot be written ({error.strerror}); choose another file"
        ) from None
    print(
        f"{args.out}: {len(tensors)} tensors of the {found.arch}, from {args.checkpoint}, "
        "without its head"
    )
    how = f"normalized with mean {facts['mean']} and standard deviation {facts['std']}"
    print(f"images: RGB in [0, 1], {how}; {found.image_size} pixels")
    for home, words in zip(plain, same, strict=True):
        print(f"in {home.library}, {words}:\n  {'; '.join(python(home, args.out))}")
    options = f" -a {found.arch} --image-size {found.image_size}"
    options += f" --norm-eps {found.norm_eps}" if found.norm_eps != "timm" else ""
    for name, own, usual in (("mean", found.mean, MEAN), ("std", found.std, STD)):
        options += f" --{name} {' '.join(map(str, own))}" if tuple(own) != usual else ""
    if args.out.suffix == ".safetensors":
        options = ""  # the file holds them as metadata
    print(f"in this project's scripts:\n  --pretrained {shlex.quote(str(args.out))}{options}")
    if args.hub:
        print(
            "the same network from torch.hub:\n"
            f"  torch.hub.load({str(args.out.parent)!r}, 'encoder', source='local')"
        )


def check_outputs(args: argparse.Namespace, outs: list[Path]) -> None:
    """Raise InputError if the suffix of OUT is unknown, or if an existing file would be lost."""
    if args.out.suffix not in READ:
        raise InputError(f"{args.out}: unknown file format; let OUT end in {', '.join(READ)}")
    if (
        args.out.suffix == ".safetensors"
        and (name := str(args.out)) != name.encode(errors="replace").decode()
    ):
        raise InputError(
            f"{args.out}: is not UTF-8, which safetensors needs; choose another name, "
            "or let OUT end in .pth"
        )
    for out in outs:
        if out.exists() and Path(args.checkpoint).exists() and out.samefile(args.checkpoint):
            raise InputError(f"{out}: is the checkpoint itself; choose another file")
        check_new(out, args.force)


def serialize(tensors: dict[str, Tensor], suffix: str, facts: dict[str, object]) -> bytes:
    """Return the content of the file. A safetensors file holds `facts` as metadata."""
    if suffix != ".safetensors":
        buffer = BytesIO()
        torch.save(tensors, buffer)
        return buffer.getvalue()
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(
            "a .safetensors file needs the package safetensors: pip install safetensors, "
            "or let OUT end in .pth"
        ) from None
    words = {
        name: " ".join(map(str, fact)) if isinstance(fact, tuple) else str(fact)
        for name, fact in facts.items()
    }
    words = {name: word.encode(errors="backslashreplace").decode() for name, word in words.items()}
    return safetensors.torch.save(tensors, {"format": "pt", **words})


def hubconf(home: StockModel, name: str, facts: dict[str, object]) -> str:
    """Return the content of hubconf.py.

    The checkpoint may be untrusted, so its texts appear there only as string literals.
    """
    modules = imports(home, Path(name).suffix)
    return HUBCONF.format(
        imports="\n".join(modules),
        packages=sorted({module.split()[1].split(".")[0] for module in modules}),
        facts=facts,
        lines="\n    ".join(home.lines),
        read=READ[Path(name).suffix][0].format(f"_Path(__file__).with_name({name!r})"),
    )


def imports(home: StockModel, suffix: str) -> list[str]:
    """Return the import lines needed to create the network and to load a file with `suffix`."""
    modules = {
        READ[suffix][1],
        home.library,
        *(["torch"] if any("torch." in line for line in home.lines) else []),
    }
    return [f"import {module}" for module in sorted(modules)]


def python(home: StockModel, path: Path) -> list[str]:
    """Return the Python lines that create the library's network as `net` and load `path`."""
    read = READ[path.suffix][0].format(repr(str(path)))
    return [*imports(home, path.suffix), *home.lines, f"net.load_state_dict({read})", "net.eval()"]


@torch.inference_mode()
def verify(found: pretrained.Encoder, plain: list[StockModel], path: Path, hub: bool) -> list[str]:
    """Load `path` strictly into each stock network, and return a line to print about each.

    Raises InputError if a stock network and this project's network compute different features.
    """
    images = torch.randn(
        2, 3, found.image_size, found.image_size, generator=torch.Generator().manual_seed(0)
    )
    mine = found.net(images)
    if not mine.isfinite().all():
        raise InputError(
            f"{found.arch}: the features contain NaN or infinity, because training diverged; "
            "take an earlier checkpoint"
        )
    said = []
    for home in plain:
        names: dict[str, nn.Module] = {}
        exec("\n".join(python(home, path)), names)  # exactly the code that will be printed
        said.append(compare_features(home.library, names["net"], images, mine))
    if hub:
        compare_features(
            "torch.hub", torch.hub.load(str(path.parent), "encoder", source="local"), images, mine
        )
    return said


def compare_features(where: str, net: nn.Module, images: Tensor, mine: Tensor) -> str:
    """Compare the features of `net` with `mine`, and return a line on their difference.

    Raises InputError if they differ by more than `TOLERANCE`.
    """
    theirs = net(images)
    difference = float((theirs - mine).abs().max()) if theirs.shape == mine.shape else float("inf")
    if not difference <= TOLERANCE * float(mine.abs().max()):
        raise InputError(
            f"the features of {where}'s network differ by up to {difference:.2g}, so nothing was "
            "written; try its newest version"
        )
    return f"features differ by at most {difference:.2g} from this project's"


if __name__ == "__main__":
    sys.exit(main())
