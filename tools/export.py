#!/usr/bin/env python
"""Export the encoder of a checkpoint for other software, without its head.

CHECKPOINT is a checkpoint of any method of this project, or any other file that main_lincls.py
reads. Give at least one of OUT, --hf and --onnx. OUT holds the tensors alone, with stock names. The
stock network without its last layer loads it strictly: a ResNet in torchvision and in timm, another
network in its own library. --hf writes a folder for timm and transformers, --onnx an ONNX model.
Before the tool writes anything, the other software loads each result and must compute the same
features as this project's network. The tool prints the Python code that loads each result.
"""

import argparse
import contextlib
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moco import sections
from moco.cli import tool, values
from moco.config import MEAN, STD
from moco.errors import InputError
from moco.files import check_new, creating, refuse_remote, to_json
from moco.messages import counted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moco.encoder.pretrained import Encoder
    from moco.encoder.stock import StockModel

# largest differences, relative to the largest feature; the features are usually exactly equal
TOLERANCE = 1e-4
HF_TOLERANCE = 1e-5


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
        nargs="?",
        help="file to write; its suffix (.pth, .pt or .safetensors) selects the format",
    )
    folder = (
        "folder to write config.json, model.safetensors and a model card to, in Hugging Face's "
        "layout, which timm and transformers load"
    )
    parser.add_argument("--hf", type=Path, metavar="DIR", help=folder)
    model = "ONNX model to write; needs the packages onnx and onnxruntime"
    parser.add_argument("--onnx", type=Path, metavar="FILE", help=model)
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
    """Write OUT, hubconf.py (--hub), the folder of --hf and the model of --onnx.

    Raises InputError if they cannot be written, or if other software that loads them computes
    different features. Then nothing is written.
    """
    import torch

    from moco.encoder import hf_folder, pretrained
    from moco.encoder.stock import stock_models

    check_outputs(args)
    found = pretrained.read(args.checkpoint, args.arch, args.image_size, args.norm_eps)
    if args.hf:
        hf_folder.check(found)
    if found.resized:
        print(
            f"interpolated to images of {found.image_size} pixels (--image-size): "
            f"{', '.join(found.resized)}"
        )
    homes = stock_models(found.arch, found.image_size, found.stem, found.norm_eps)
    files = contents(args, found, homes)
    first = args.out or args.hf or args.onnx
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".export-", dir=first.parent)
        with temporary as folder, torch.inference_mode():
            lines = verify(args, found, homes, files, Path(folder))
        write(files, args.force)
    except OSError as error:
        raise unwritable(first, error) from None
    print(f"the encoder of {args.checkpoint}, a {found.arch}, without its head")
    how = f"normalized with mean {tuple(found.mean)} and standard deviation {tuple(found.std)}"
    print(f"images: RGB in [0, 1], {how}; {found.image_size} pixels")
    print("\n".join(lines))


def outputs(args: argparse.Namespace) -> list[Path]:
    """Return the files to write. The last one of a folder makes it loadable."""
    from moco.encoder import hf_folder

    found = [args.out] if args.out else []
    if args.hub:
        found.append(args.out.with_name("hubconf.py"))
    if args.hf:
        found += [args.hf / name for name in hf_folder.FILES]
    return [*found, *([args.onnx] if args.onnx else [])]


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError if a file to write has a wrong name, or if an existing one would be lost."""
    from moco.encoder import onnx_file
    from moco.encoder.exported import READ

    if not (args.out or args.hf or args.onnx):
        raise InputError("nothing to write; give OUT, --hf DIR or --onnx FILE")
    if args.hub and not args.out:
        raise InputError("--hub: hubconf.py loads OUT; give OUT, too")
    for path, option in ((args.out, ""), (args.hf, "--hf"), (args.onnx, "--onnx")):
        if path:
            refuse_remote(str(path), option)
    if args.out and args.out.suffix not in READ:
        raise InputError(f"{args.out}: unknown file format; let OUT end in {', '.join(READ)}")
    if args.onnx and args.onnx.suffix != ".onnx":
        raise InputError(f"--onnx {args.onnx}: is no ONNX model; let FILE end in .onnx")
    if args.out and args.out.suffix == ".safetensors" and not is_utf8(args.out):
        raise InputError(
            f"{args.out}: is not UTF-8, which safetensors needs; choose another name, "
            "or let OUT end in .pth"
        )
    if args.hf and not is_utf8(args.hf):
        raise InputError(f"--hf {args.hf}: is not UTF-8, which safetensors needs; choose another")
    if args.hf and args.hf.exists() and not args.hf.is_dir():
        raise InputError(f"--hf {args.hf}: is a file; give a folder")
    outs = outputs(args)
    for i, out in enumerate(outs):
        if out.exists() and Path(args.checkpoint).exists() and out.samefile(args.checkpoint):
            raise InputError(f"{out}: is the checkpoint itself; choose another file")
        if out.resolve() in [other.resolve() for other in outs[:i]]:
            raise InputError(f"{out}: would be written twice; choose another place for one of them")
        check_new(out, args.force)
    if args.onnx:
        onnx_file.check_packages()


def is_utf8(path: Path) -> bool:
    """Return whether the name of `path` is valid UTF-8."""
    return str(path) == str(path).encode(errors="replace").decode()


def contents(
    args: argparse.Namespace, found: "Encoder", homes: "list[StockModel]"
) -> dict[Path, bytes]:
    """Return the content of each file of `outputs`."""
    from moco.augment import crop
    from moco.encoder import hf_folder, onnx_file
    from moco.encoder.exported import as_texts, hubconf, serialize
    from moco.report.model_card import model_card

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
    files = {}
    if args.out:
        files[args.out] = serialize(tensors, args.out.suffix, facts)
    if args.hub:
        files[args.out.with_name("hubconf.py")] = hubconf(homes[0], args.out.name, facts).encode()
    if args.hf:
        kept = 1.0 if found.image_size <= crop.NATIVE else 7 / 8  # as in `crop.center_view`
        config = to_json(hf_folder.timm_config(found, kept), indent=2)
        card = model_card(found, Path(args.checkpoint))
        weights = serialize(tensors, ".safetensors", facts)
        parts = (weights, card.encode(), f"{config}\n".encode())
        files |= dict(zip((args.hf / name for name in hf_folder.FILES), parts, strict=True))
    if args.onnx:
        files[args.onnx] = onnx_file.convert(found.net, found.image_size, as_texts(facts))
    return files


def write(files: dict[Path, bytes], force: bool) -> None:
    """Write all files, or none. Raises InputError if one exists, unless `force`."""
    with contextlib.ExitStack() as stack:  # it renames the temporary files after all are written
        for out, content in reversed(files.items()):
            try:
                stack.enter_context(creating(out, force)).write(content)
            except OSError as error:
                raise unwritable(out, error) from None


def unwritable(out: Path, error: OSError) -> InputError:
    """Return the error to show if `out` cannot be written."""
    return InputError(f"{out}: cannot be written ({error.strerror}); choose another place")


def verify(
    args: argparse.Namespace,
    found: "Encoder",
    homes: "list[StockModel]",
    files: dict[Path, bytes],
    stage: Path,
) -> list[str]:
    """Load the `files` with other software; return the lines to print about them.

    Raises InputError if the features differ from those of this project's network.

    Args:
        args: the command line.
        found: the encoder.
        homes: the stock networks that load OUT.
        files: the content of each file.
        stage: an empty folder for temporary copies of the files.
    """
    import torch

    from moco.encoder import hf_folder, onnx_file
    from moco.encoder.exported import python

    images = torch.randn(
        3, 3, found.image_size, found.image_size, generator=torch.Generator().manual_seed(0)
    )
    mine = found.net(images)
    if not mine.isfinite().all():
        raise InputError(
            f"{found.arch}: the features contain NaN or infinity, because training diverged; "
            "take an earlier checkpoint"
        )
    for out, content in files.items():
        copy = stage / ("hf" if args.hf and out.parent == args.hf else "") / out.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
    lines = []
    if args.out:
        lines.append(f"{args.out}: {counted(len(found.net.state_dict()), 'tensor')}")
        for home in homes:
            names: dict[str, nn.Module] = {}
            code = python(home, stage / args.out.name)
            exec("\n".join(code), names)  # exactly the code that will be printed
            words = compare_features(f"{home.library}'s network", names["net"](images), mine)
            lines.append(f"in {home.library}, {words}:\n  {'; '.join(python(home, args.out))}")
        lines.append(f"in this project's scripts:\n  {pretrained_options(args.out, found)}")
    if args.hub:
        theirs = torch.hub.load(str(stage), "encoder", source="local")(images)
        compare_features("torch.hub's network", theirs, mine)
        lines.append(
            "the same network from torch.hub:\n"
            f"  torch.hub.load({str(args.out.parent)!r}, 'encoder', source='local')"
        )
    if args.hf:
        theirs = hf_folder.load(stage / "hf")(images)
        words = compare_features("timm's network", theirs, mine, HF_TOLERANCE)
        lines.append(f"{args.hf}: {', '.join(hf_folder.FILES)}")
        in_timm, in_transformers = hf_folder.python(args.hf)
        lines.append(f"in timm, {words}:\n  {in_timm}")
        lines.append("in transformers, features are net(images).pooler_output:")
        lines.append(f"  {in_transformers}")
    if args.onnx:
        theirs = torch.cat([onnx_file.run(files[args.onnx], x) for x in (images[:1], images[1:])])
        words = compare_features("onnxruntime", theirs, mine)
        lines.append(f"{args.onnx}: features are {onnx_file.CALL}")
        lines.append(f"in onnxruntime, {words}:\n  {onnx_file.python(args.onnx)}")
    return lines


def compare_features(where: str, theirs: "Tensor", mine: "Tensor", most: float = TOLERANCE) -> str:
    """Compare the features `theirs` with `mine`, and return a line on their difference.

    Raises InputError if they differ by more than `most` times the largest feature.
    """
    difference = float((theirs - mine).abs().max()) if theirs.shape == mine.shape else float("inf")
    if not difference <= most * float(mine.abs().max()):
        raise InputError(
            f"the features of {where} differ by up to {difference:.2g}, so nothing was "
            "written; try its newest version"
        )
    return f"features differ by at most {difference:.2g} from this project's"


def pretrained_options(out: Path, found: "Encoder") -> str:
    """Return the options with which this project's scripts read OUT."""
    words = f"--pretrained {shlex.quote(str(out))}"
    if out.suffix == ".safetensors":
        return words  # the file holds the others as metadata
    words += f" -a {found.arch} --image-size {found.image_size}"
    words += f" --norm-eps {found.norm_eps}" if found.norm_eps != "timm" else ""
    for name, own, usual in (("mean", found.mean, MEAN), ("std", found.std, STD)):
        words += f" --{name} {' '.join(map(str, own))}" if tuple(own) != usual else ""
    return words


if __name__ == "__main__":
    sys.exit(main())
