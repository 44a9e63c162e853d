#!/usr/bin/env python
"""Convert a TensorFlow checkpoint of SimCLR (v1 or v2) or FNC to a file for --pretrained.

CKPT is the prefix of the checkpoint's files, such as model.ckpt-100 for model.ckpt-100.index and
model.ckpt-100.data-00000-of-00001. TensorFlow is not needed. OUT gets the backbone with
torchvision's names, the projection head as its last layer `fc`, and the mean 0 and standard
deviation 1 of the images, because that code does not normalize them. ResNet-50, 101 and 152 of
width 1x without selective kernels can be converted.
"""

import argparse
import shlex
import sys
from pathlib import Path

from moco import sections
from moco.cli import tool, values
from moco.errors import InputError, one_line
from moco.files import check_new, creating, refuse_remote

SUFFIXES = (".pth", ".pt", ".tar")


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, such as simclr.pth")
    method = "the method that trained it; it selects the protocol of evaluations (default: simclr)"
    parser.add_argument("--method", choices=("simclr", "fnc"), default="simclr", help=method)
    epochs = "epochs of pre-training, for the table of results"
    count = values.in_range(int, sections.POSITIVE)
    parser.add_argument("--epochs", type=count, metavar="N", help=epochs)
    size = "image size of pre-training (default: 224; 32 with a 3x3 first convolution)"
    parser.add_argument("--image-size", type=count, metavar="PIXELS", help=size)
    scope = "first part of the names of the encoder's variables (default: base_model)"
    parser.add_argument("--scope", metavar="NAME", help=scope)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    return tool.run(parser, convert)


def convert(args: argparse.Namespace) -> None:
    """Write OUT. Raises InputError if the checkpoint cannot be converted, or OUT exists."""
    import torch

    from moco.encoder import networks, pretrained, simclr_tf
    from moco.encoder.tensor_bundle import Bundle

    refuse_remote(str(args.out))
    if args.out.suffix not in SUFFIXES:
        raise InputError(f"{args.out}: let OUT end in {', '.join(SUFFIXES)}, as torch.save's files")
    check_new(args.out, args.force)
    bundle = Bundle(args.checkpoint)
    found = simclr_tf.convert(bundle, args.scope)
    size = args.image_size or (32 if found.stem == "cifar" else 224)
    net = networks.create(found.arch, 0, size, stem=found.stem)
    matched = pretrained.load_backbone(net, found.tensors, str(bundle.prefix))
    state = {
        **({"epoch": args.epochs} if args.epochs else {}),
        "arch": found.arch,
        "method": args.method,
        "args": {
            "arch": found.arch,
            "image_size": size,
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "stem": found.stem,
        },
        "state_dict": {f"module.encoder_q.{name}": x for name, x in found.tensors.items()},
    }
    try:
        with creating(args.out, args.force) as file:
            torch.save(state, file)
    except OSError as error:
        raise InputError(
            f"{args.out}: cannot be written ({error.strerror}); choose another place"
        ) from None
    head = f"a projection head of {found.layers} linear layers" if found.layers else "no head"
    print(f"{args.out}: a {found.arch} of {matched} tensors and {head}, from {bundle.prefix}")
    print("images: RGB in [0, 1], not normalized (mean 0, standard deviation 1)")
    print(f"method: {args.method} (--method)")
    left_out = [pretrained.first_names(found.left_out)] if found.left_out else []
    left_out += [f"{found.slots} variables of the optimizer"] if found.slots else []
    if left_out:
        print(one_line(f"left out: {'; '.join(left_out)}"))
    print(f"in this project's scripts:\n  --pretrained {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    sys.exit(main())
