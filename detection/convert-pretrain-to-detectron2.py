#!/usr/bin/env python
"""Convert the encoder of a checkpoint to detectron2's names.

IN is a checkpoint of this project, or any other file that main_lincls.py reads. With --check,
detectron2 builds its C4 model and loads OUT as in training. Then every backbone tensor is compared
bit by bit.
"""

import argparse
import hashlib
import importlib.util
import pickle
import re
import sys
from pathlib import Path
from typing import Any

from moco.cli import tool
from moco.config import MEAN, STD
from moco.encoder import archs, metadata, networks, pretrained, resnets
from moco.engine import checkpoint
from moco.errors import InputError
from moco.files import creating


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="IN", help="checkpoint of a ResNet")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="file for MODEL.WEIGHTS; must end in .pkl"
    )
    parser.add_argument(
        "-a",
        "--arch",
        help="architecture, if the checkpoint does not name it (default: resnet50)",
    )
    parser.add_argument(
        "--check", action="store_true", help="check with detectron2 that it loads every tensor"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT if it was made from another checkpoint"
    )
    return tool.run(parser, work)


def work(args: argparse.Namespace) -> None:
    """Convert the checkpoint and, with --check, check the result."""
    if args.out.suffix != ".pkl":
        raise InputError(
            f"{args.out}: detectron2 tells the format by the suffix; let OUT end in .pkl"
        )
    converted = convert(args.checkpoint, args.arch)
    write(args.out, converted, args.force)
    if args.check:
        check(args.out, converted)


def convert(file: str, arch: str | None = None) -> dict[str, Any]:
    """Return the content of OUT: `model` (arrays by detectron2's names) and their origin.

    Raises InputError if a tensor of the backbone is missing, or if there is an unexpected one.
    """
    state = checkpoint.load(file)
    facts = metadata.read_metadata(state)
    arch = arch or facts.arch or "resnet50"
    if arch == facts.arch and arch not in archs.ARCHS:
        built = "the detectors here are built on ResNets of torchvision"
        raise InputError(f"{file}: is of {arch}, but {built}")
    if facts.stem == "cifar":
        raise InputError(
            f"{file}: was trained with --stem cifar, but detectron2's ResNets start with a "
            "7x7 convolution"
        )
    net = resnets.resnet(arch, 1)
    tensors = pretrained.tensors_of(net, state)
    pretrained.load_backbone(net, tensors, file)
    prefix = pretrained.prefix(net, tensors)
    mine = net.state_dict()
    known = {prefix + name for name in mine}
    left = [
        name
        for name in tensors
        if name.startswith(prefix) and name not in known and not name.startswith(prefix + "fc.")
    ]
    if left:
        raise InputError(
            f"{file}: {len(left)} tensors are not part of a {arch}: "
            f"{pretrained.first_names(left)}; remove them from the file"
        )
    model = {}
    names = [
        name for name in networks.backbone_keys(net) if not name.endswith("num_batches_tracked")
    ]
    width = max(map(len, names)) + len(prefix)
    for name in names:
        new = renamed(name)
        model[new] = mine[name].numpy()
        print(f"{prefix + name:{width}} -> {new:32} {tuple(mine[name].shape)}")
    print(f"{len(model)} of {len(names)} tensors of the {arch} renamed, without its head")
    for key, values, usual in (("MEAN", facts.mean, MEAN), ("STD", facts.std, STD)):
        if values and tuple(values) != usual:
            own = ",".join(f"{255 * value:.3f}" for value in values)
            print(
                "pre-training used another normalization than ImageNet's: "
                f"train with MODEL.PIXEL_{key} [{own}]"
            )
    source = {
        "file": str(Path(file).resolve()),
        "sha256": sha256(file),
        "arch": arch,
        "method": facts.method,
        "epoch": facts.epoch,
    }
    return {
        "model": model,
        "__author__": f"{source['method']}, {file}",
        "matching_heuristics": True,
        "source": source,
    }


def sha256(file: str) -> str:
    """Return the SHA-256 of a file. Reads it in parts, because it may be larger than memory."""
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 24):
            found.update(part)
    return found.hexdigest()


def renamed(name: str) -> str:
    """Return detectron2's name for a tensor of a torchvision ResNet.

    For example, layer1.0.bn2.weight becomes res2.0.conv2.norm.weight.
    """
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)\.", lambda stage: f"res{int(stage[1]) + 1}.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def write(path: Path, converted: dict[str, Any], force: bool = False) -> None:
    """Write OUT, unless it already has the same content, as when a detector's run is resumed.

    Raises InputError if `path` is another file, unless `force` is True.
    """
    data = pickle.dumps(converted)
    try:
        if not (path.is_file() and path.read_bytes() == data):
            with creating(path, force) as file:
                file.write(data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another file"
        ) from None
    print(path)


def check(path: Path, converted: dict[str, Any]) -> None:
    """Load `path` into detectron2's model.

    Raises InputError if a backbone tensor is not equal to the converted one, bit by bit.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise InputError("--check needs detectron2; detection/README.md says how to install it")
    import c4
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    model = build_model(
        c4.config(
            c4.CONFIGS / "pascal_voc_R_50_C4_24k_moco.yaml", ["MODEL.WEIGHTS", str(path)], gpus=0
        )
    )
    DetectionCheckpointer(model).load(str(path))
    wrong = c4.differing_tensors(model, converted["model"])
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} tensors did not arrive in detectron2's model: "
            f"{pretrained.first_names(wrong)}"
        )
    print(
        f"{len(converted['model'])} of {len(converted['model'])} backbone tensors arrived in "
        "detectron2's model, bit by bit"
    )


if __name__ == "__main__":
    sys.exit(main())
