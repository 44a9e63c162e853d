"""Run folders that the command line names: --save-dir, --output and --tag."""

import os
from argparse import Namespace as Options
from pathlib import Path

from moco.engine import checkpoint
from moco.errors import InputError


def output_folder(args: Options) -> Path:
    """Return the run folder that --output and --tag name.

    An evaluation has one inside it, for its data set and protocol. It evaluates the last checkpoint
    of the outer one unless it is given another: this sets `args.pretrained`.
    """
    folder = Path(args.output) / (args.tag or "default")
    if hasattr(args, "pretrained"):
        features = getattr(args, "load_features", None)
        if not (args.pretrained or features or getattr(args, "evaluate", False)):
            saved = checkpoint.found(folder)
            if not saved:
                raise InputError(
                    f"no checkpoint_*.pth.tar in {folder}: --output and --tag name no run that has saved one"
                )
            args.pretrained = str(saved[0])
        data = "features" if features else "photos" if args.data == "photos" else args.dataset
        protocol = [
            str(getattr(args, name)) for name in ("weights", "train_percent") if hasattr(args, name)
        ]
        folder /= "-".join([args.script, data, *protocol])
    return folder


def writable(folder: str) -> None:
    """Raise InputError where a run folder cannot be made, or written to, before hours are spent on what goes there."""
    if folder != folder.encode(errors="replace").decode():
        raise InputError(
            f"--save-dir {folder}: is not UTF-8, which TensorBoard needs; choose another folder"
        )
    there = next(
        place
        for place in (Path(folder), *Path(folder).absolute().parents)
        if os.path.lexists(place)
    )
    if not there.is_dir():
        raise InputError(f"--save-dir {folder}: {there} is no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--save-dir {folder}: {there} is read-only; choose another place")
