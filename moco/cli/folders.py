"""Find the run folder of --save-dir, --output and --tag."""

import os
from pathlib import Path

from moco.config import AnyConfig, Config, flat, replaced
from moco.errors import InputError, short


def resolve_output(config: AnyConfig) -> AnyConfig:
    """Return `config` with the run folder that --output and --tag name.

    An evaluation also gets the last checkpoint of that run, unless another checkpoint is given.
    Raises InputError if the run has none.
    """
    run, settings = _run_of_output(config), flat(config)
    reads = "pretrained" in settings
    given = any(settings.get(name) for name in ("pretrained", "load_features", "evaluate"))
    if reads and not given:
        from moco.engine import checkpoint  # it imports torch, which --help does not need

        saved = checkpoint.list_checkpoints(run)
        if not saved:
            raise InputError(
                f"no checkpoint_*.pth.tar in {run}; "
                "give the --output and --tag of a run that has saved a checkpoint"
            )
        config = replaced(config, pretrained=str(saved[0]))
    return replaced(config, save_dir=config.run.save_dir or str(output_folder(config)))


def output_folder(config: Config) -> Path:
    """Return the run folder that --output and --tag name.

    An evaluation has its own folder inside the run folder, named after its data set and protocol.
    """
    folder, settings = _run_of_output(config), flat(config)
    if "pretrained" not in settings:
        return folder
    data = "photos" if config.run.data == "photos" else config.input.dataset
    data = "features" if settings.get("load_features") else data
    protocol = [str(settings[name]) for name in ("weights", "train_percent") if name in settings]
    return folder / "-".join([config.run.script, data, *protocol])


def _run_of_output(config: Config) -> Path:
    """Return the folder DIR/TAG."""
    tag = config.run.tag or "default"
    if Path(tag).is_absolute() or ".." in Path(tag).parts:
        raise InputError(
            f"--tag {short(tag)}: must be a folder inside --output; give a name such as run1"
        )
    return Path(config.run.output) / tag


def check_writable(folder: str) -> None:
    """Raise InputError unless the run folder can be created and written to.

    Call it before the run, so that hours of training are not lost.
    """
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
        raise InputError(f"--save-dir {folder}: {there} is not a folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--save-dir {folder}: {there} is read-only; choose another folder")
