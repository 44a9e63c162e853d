#!/usr/bin/env python
"""Write the encoder of a checkpoint for other software: its tensors alone, with torchvision's and timm's names.

CHECKPOINT is one of this project by any method, or any other that main_lincls.py reads. OUT is loaded strictly by torchvision's
and timm's own networks without their last layer (ResNets by both, others by timm). Before it is there, that is proved: each of
these networks loads it, and must compute the features that the project's does. The Python that loads it is printed.
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

TOLERANCE = (
    1e-4  # of the largest feature; the same operations in the same order differ by nothing at all
)
READ = {  # how a file of each ending is read, from {}, and what must be imported for it
    ".pth": ("torch.load({}, weights_only=True)", "torch"),
    ".pt": ("torch.load({}, weights_only=True)", "torch"),
    ".safetensors": ("safetensors.torch.load_file({})", "safetensors.torch"),
}
HUBCONF = '''"""torch.hub.load(FOLDER, "encoder", source="local"), or from the web torch.hub.load("USER/REPOSITORY", "encoder")."""

from pathlib import Path as _Path

{imports}

dependencies = {packages!r}
about = {facts!r}


def encoder(pretrained=True):
    """A network in eval mode, from RGB images in [0, 1] that are normalized with about's mean and std to features [B, D]."""
    {lines}
    if pretrained:
        net.load_state_dict({read})
    return net.eval()
'''


def main() -> int:
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="ends in .pth, .pt or .safetensors, which says what it will be",
    )
    parser.add_argument(
        "-a", "--arch", help="of a checkpoint that does not say it (default: resnet50)"
    )
    size = "pixels of the images that a ViT or Swin is for (default: those it was pre-trained at; where unknown, 224)"
    parser.add_argument("--image-size", type=values.in_range(int, sections.POSITIVE), help=size)
    hub = "also write a hubconf.py beside OUT: torch.hub.load(FOLDER, 'encoder', source='local') needs no more than the two files"
    parser.add_argument("--hub", action="store_true", help=hub)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return tool.run(parser, export)


def export(args: argparse.Namespace) -> None:
    """Write OUT, and hubconf.py if asked for. Raises InputError where they cannot be or would load as something else."""
    outs = [args.out, *([args.out.with_name("hubconf.py")] if args.hub else [])]
    check_places(args, outs)
    found = pretrained.read(args.checkpoint, args.arch, args.image_size)
    if found.resized:
        print(
            f"interpolated to images of {found.image_size} pixels (--image-size): {', '.join(found.resized)}"
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
    }
    tensors = {name: x.clone().contiguous() for name, x in found.net.state_dict().items()}
    plain = stock_models(found.arch, found.image_size, found.stem)
    files = [packed(tensors, args.out.suffix, facts)]
    if args.hub:
        files.append(hubconf(plain[0], args.out.name, facts).encode())
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=args.out.parent) as folder:
            staged = [Path(folder, out.name) for out in outs]
            for path, data in zip(staged, files, strict=True):
                path.write_bytes(data)
            same = prove(found, plain, staged[0], args.hub)
            for data, out in zip(files, outs, strict=True):
                with creating(out, args.force) as file:
                    file.write(data)
    except OSError as error:
        raise InputError(
            f"{args.out}: cannot be written ({error.strerror}); choose another place"
        ) from None
    print(
        f"{args.out}: {len(tensors)} tensors of the {found.arch}, from {args.checkpoint}; its head stays behind"
    )
    how = f"normalized with mean {facts['mean']} and standard deviation {facts['std']}"
    print(f"images: RGB in [0, 1], {how}; {found.image_size} pixels")
    for home, words in zip(plain, same, strict=True):
        print(f"in {home.library}, {words}:\n  {'; '.join(python(home, args.out))}")
    options = f" -a {found.arch} --image-size {found.image_size}"
    for name, own, usual in (("mean", found.mean, MEAN), ("std", found.std, STD)):
        options += f" --{name} {' '.join(map(str, own))}" if tuple(own) != usual else ""
    if args.out.suffix == ".safetensors":
        options = ""  # the file has them as metadata
    print(f"in this project's scripts:\n  --pretrained {shlex.quote(str(args.out))}{options}")
    if args.hub:
        print(
            f"from torch.hub, the same:\n  torch.hub.load({str(args.out.parent)!r}, 'encoder', source='local')"
        )


def check_places(args: argparse.Namespace, outs: list[Path]) -> None:
    """Raise InputError where OUT's ending is unknown, or something would be lost."""
    if args.out.suffix not in READ:
        raise InputError(f"{args.out}: unknown kind of file; let OUT end in {', '.join(READ)}")
    if (
        args.out.suffix == ".safetensors"
        and (name := str(args.out)) != name.encode(errors="replace").decode()
    ):
        raise InputError(
            f"{args.out}: is not UTF-8, which safetensors needs; choose another name, or let OUT end in .pth"
        )
    for out in outs:
        if out.exists() and Path(args.checkpoint).exists() and out.samefile(args.checkpoint):
            raise InputError(f"{out}: is the checkpoint itself; choose another place")
        check_new(out, args.force)


def packed(tensors: dict[str, Tensor], suffix: str, facts: dict[str, object]) -> bytes:
    """The file's content; of a safetensors file `facts` are the metadata."""
    if suffix != ".safetensors":
        buffer = BytesIO()
        torch.save(tensors, buffer)
        return buffer.getvalue()
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(
            "a .safetensors file is written by safetensors: pip install safetensors, or let OUT end in .pth"
        ) from None
    words = {
        name: " ".join(map(str, fact)) if isinstance(fact, tuple) else str(fact)
        for name, fact in facts.items()
    }
    words = {name: word.encode(errors="backslashreplace").decode() for name, word in words.items()}
    return safetensors.torch.save(tensors, {"format": "pt", **words})


def hubconf(home: StockModel, name: str, facts: dict[str, object]) -> str:
    """What hubconf.py holds. The words of a checkpoint, which may be a stranger's, stand in it as strings alone."""
    modules = imports(home, Path(name).suffix)
    return HUBCONF.format(
        imports="\n".join(modules),
        packages=sorted({module.split()[1].split(".")[0] for module in modules}),
        facts=facts,
        lines="\n    ".join(home.lines),
        read=READ[Path(name).suffix][0].format(f"_Path(__file__).with_name({name!r})"),
    )


def imports(home: StockModel, suffix: str) -> list[str]:
    """What the Python that makes the network and loads such a file begins with."""
    modules = {
        READ[suffix][1],
        home.library,
        *(["torch"] if any("torch." in line for line in home.lines) else []),
    }
    return [f"import {module}" for module in sorted(modules)]


def python(home: StockModel, path: Path) -> list[str]:
    """The Python that makes the library's network, as `net`, and loads `path` into it."""
    read = READ[path.suffix][0].format(repr(str(path)))
    return [*imports(home, path.suffix), *home.lines, f"net.load_state_dict({read})", "net.eval()"]


@torch.inference_mode()
def prove(found: pretrained.Encoder, plain: list[StockModel], path: Path, hub: bool) -> list[str]:
    """What to say of each library's network, which has loaded `path` strictly. Raises InputError where its features are others."""
    images = torch.randn(
        2, 3, found.image_size, found.image_size, generator=torch.Generator().manual_seed(0)
    )
    mine = found.net(images)
    if not mine.isfinite().all():
        raise InputError(
            f"{found.arch}: its features are not finite: its training diverged; take an earlier checkpoint"
        )
    said = []
    for home in plain:
        names: dict[str, nn.Module] = {}
        exec("\n".join(python(home, path)), names)  # what will be printed, and nothing else
        said.append(compared(home.library, names["net"], images, mine))
    if hub:
        compared(
            "torch.hub", torch.hub.load(str(path.parent), "encoder", source="local"), images, mine
        )
    return said


def compared(where: str, net: nn.Module, images: Tensor, mine: Tensor) -> str:
    theirs = net(images)
    difference = float((theirs - mine).abs().max()) if theirs.shape == mine.shape else float("inf")
    if not difference <= TOLERANCE * float(mine.abs().max()):
        raise InputError(
            f"{where}'s network has other features, by up to {difference:.2g}: nothing was written; try its newest version"
        )
    return f"features differ by at most {difference:.2g} from this project's"


if __name__ == "__main__":
    sys.exit(main())
