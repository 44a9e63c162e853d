"""Save, find, check and restore checkpoints.

A checkpoint is a dict with MoCo's keys and plain values. It is written atomically, so a crash never
replaces a complete file by an incomplete one.
"""

import math
import os
import re
from collections import OrderedDict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco.config import Training
from moco.encoder.metadata import CLASSIFIERS, is_count, read_metadata
from moco.encoder.pretrained import fits, is_finite
from moco.encoder.weights import read
from moco.errors import InputError, short
from moco.files import UnreadableError, half_written, replacing, unreadable
from moco.messages import print_rank0

State = dict[str, Any]


def save(path: Path, state: State) -> None:
    """Write `state` to `path` atomically.

    Raises InputError if it cannot be written. An old file at `path` then stays unchanged.
    """
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch's writer hides the system's error behind a RuntimeError
        reason = next(
            (e.strerror for e in (error, error.__context__) if isinstance(e, OSError)), None
        )
        if reason or (
            isinstance(error, RuntimeError)
            and ("StreamWriter" in str(error) or "unexpected pos" in str(error))
        ):
            last = next(iter(list_checkpoints(path.parent)), None)
            kept = f"the last checkpoint is {last}" if last else "there is none yet"
            why = f"cannot be written: {reason or 'the disk is full, or the file too large'}"
            raise InputError(
                f"{path}: {why}; {kept}; make room, and continue with --resume auto"
            ) from None
        raise


_NAME = re.compile(r"checkpoint_(\d+)(?:_(-?\d+))?\.pth\.tar")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run folder, the most advanced first.

    Files whose names do not contain an epoch come last, such as copies made by the user. Raises
    UnreadableError if the folder cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(error).at(folder) from None
    patterns = ("checkpoint*.pth.tar", "model_best*.pth.tar")
    files = (
        Path(folder, name) for name in names if any(fnmatch(name, pattern) for pattern in patterns)
    )
    return sorted(files, key=_how_far, reverse=True)


def _how_far(path: Path) -> tuple[float, int]:
    """Return (epochs done, step) according to the file name, as the key to sort checkpoints."""
    if match := _NAME.fullmatch(path.name):
        epoch, step = match.groups()  # the name has a step if its epoch is unfinished
        return (int(epoch), int(step)) if step else (int(epoch) + 1, 0)
    # a classifier's last checkpoint is checkpoint.pth.tar, and its best is model_best.pth.tar
    return (math.inf, 0) if path.name == "checkpoint.pth.tar" else (-1, 0)


def numbered(folder: Path, mid_epoch: bool) -> list[Path]:
    """Return the checkpoints that pre-training saved in `folder`, the most advanced first.

    With `mid_epoch`, return those of unfinished epochs, otherwise those of finished ones. Files
    that the user has renamed are left out. Raises UnreadableError if the folder cannot be listed.
    """
    matches = ((path, _NAME.fullmatch(path.name)) for path in list_checkpoints(folder))
    return [path for path, match in matches if match and bool(match[2]) == mid_epoch]


def epoch_of(path: Path) -> int:
    """Return the epoch, counted from 0, in the name of a numbered checkpoint."""
    return int(_NAME.fullmatch(path.name)[1])


def tidy_folder(folder: Path, resumed: str | None) -> None:
    """Remove half-written files from the run folder, and rename damaged checkpoints.

    Call it before training. Half-written files come from a start that was killed. The damaged
    checkpoints are those that `--resume auto` skipped; later starts do not read them again.

    Args:
        folder: the run folder, which this run has locked.
        resumed: the checkpoint that the run resumes from, if any.
    """
    for name in ("*.pth.tar", "*.json", "*.jsonl", "*.yaml"):
        for path in half_written(folder, name):
            path.unlink(missing_ok=True)
    start = Path(resumed) if resumed else None
    if (
        start is None
        or start.resolve().parent != folder.resolve()
        or not _NAME.fullmatch(start.name)
    ):
        return
    for path in [*numbered(folder, True), *numbered(folder, False)]:
        if _how_far(path) > _how_far(start):
            path.replace(path.with_name(f"{path.name}.damaged"))
            print_rank0(f"{path.name} is damaged: renamed to {path.name}.damaged")


def newest(folder: str) -> str | None:
    """Return the most advanced checkpoint of a run folder that is not damaged.

    Prints a line and returns None if there is no checkpoint. Raises UnreadableError if the system
    cannot read a checkpoint, because it may be intact. Raises InputError if all are damaged.
    """
    files = list_checkpoints(folder)
    if not files:
        log = Path(folder, "log.jsonl")
        logged = log.exists() and log.stat().st_size
        begins = "starts again, with a new log" if logged else "starts"
        print_rank0(f"--resume auto: no checkpoint in {folder} yet; the run {begins}")
        return None
    for path in files:
        try:
            check_resumable(load(str(path)), str(path))
            return str(path)
        except UnreadableError as error:
            raise UnreadableError(f"--resume auto: {error}") from None
        except InputError as error:
            print_rank0(f"--resume auto: skipped: {error}")
    raise InputError(
        f"--resume auto: no checkpoint in {folder} can be read; "
        "choose another --save-dir to start a new run"
    )


def load(path: str) -> State:
    """Return the content of a checkpoint file of this project or of other software.

    Raises InputError if it cannot be read; see `moco.encoder.weights.read`.
    """
    return read(path)


def check_origin(state: State, config: Training) -> None:
    """Raise InputError if the checkpoint of `--resume` does not belong to a run like this one.

    It must have the same script, architecture and method.

    Args:
        state: the content of the checkpoint.
        config: the settings of this run.
    """
    path = config.log.resume
    if origin(state) == "classifier" and config.run.method not in CLASSIFIERS:
        ours = "it is a classifier's checkpoint, and this script pre-trains"
        how = f"continue it with {_script(state)}"
        raise InputError(f"{path}: cannot be resumed here: {ours}; {how}")
    check_script(state, config)
    for name, mine in (("arch", config.network.arch), ("method", config.run.method)):
        if state.get(name) != mine:
            raise InputError(
                f"{path}: is of {name} '{short(state.get(name))}', not '{mine}'; "
                "resume with the options it was made with"
            )


def check_script(state: State, config: Training) -> None:
    """Raise InputError if another script saved the checkpoint of `--resume`.

    A checkpoint that does not name its script passes.
    """
    check_resumable(state, config.log.resume)
    if _script(state) not in (f"main_{config.run.script}.py", _UNKNOWN):
        theirs = f"is a checkpoint of {_script(state)}, which has other options"
        raise InputError(f"{config.log.resume}: {theirs}; use that script")


_UNKNOWN = "the script that saved it"


def _script(state: State) -> str:
    """Return the name of the script that saved a checkpoint, such as main_synco.py."""
    script = read_metadata(state).options.get("script")
    return f"main_{short(script)}.py" if isinstance(script, str) else _UNKNOWN


def restore(model: nn.Module, state: State, path: str, diverged: bool = False) -> None:
    """Load the weights of a checkpoint into `model`.

    Args:
        model: the module that a run trains.
        state: the content of the checkpoint, checked by `check_origin`.
        path: its file, for messages.
        diverged: whether to accept NaN and infinite weights.

    Raises InputError if names or shapes of the weights do not fit, or if a weight is NaN or
    infinite.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in state["state_dict"].items()}
    mine = model.state_dict()
    misfits = sorted(weights.keys() ^ mine.keys())
    misfits = misfits or [name for name in mine if not fits(weights[name], mine[name])]
    if misfits:
        raise InputError(
            f"{path}: does not fit this model, first at '{misfits[0]}'; "
            "resume with the options it was made with"
        )
    non_finite = [] if diverged else [n for n, tensor in weights.items() if not is_finite(tensor)]
    if non_finite:
        raise InputError(
            f"{path}: has weights that are NaN or infinite (first '{non_finite[0]}'): "
            "its training diverged; take an earlier checkpoint"
        )
    model.load_state_dict(weights)


# types of the entries that a run needs to continue
_WANTED = {"epoch": int, "args": dict, "state_dict": dict, "optimizer": dict, "progress": dict}


def check_resumable(state: State, path: str) -> None:
    """Raise InputError if a checkpoint lacks what a run needs to continue, or if it is damaged."""
    if absent := missing_keys(state):
        what = f"it lacks {', '.join(absent)}, so it is not the state of a run of these scripts"
        if path.endswith(".safetensors"):
            what = "a .safetensors file holds weights alone"
        uses = (
            "the evaluation scripts read weights with --pretrained, "
            "and pre-training cannot start from them"
        )
        raise InputError(f"{path}: cannot be resumed: {what}; {uses}")
    progress = state["progress"] if isinstance(state["progress"], dict) else {}
    strange = [
        key
        for key, needed in _WANTED.items()
        if type(state[key]) not in (needed, OrderedDict if needed is dict else needed)
    ]
    strange += [f"progress {key}" for key in ("step", "seed") if type(progress.get(key)) is not int]
    strange += [
        f"progress {key}"
        for key in ("batch", "steps_per_epoch")
        if not is_count(progress.get(key, 1))
    ]
    if "epoch" not in strange and not 0 <= state["epoch"] < 2**31:
        strange.append("epoch")
    if "state_dict" not in strange and not all(
        isinstance(name, str) and isinstance(tensor, Tensor)
        for name, tensor in state["state_dict"].items()
    ):
        strange.append("state_dict")
    if strange:
        raise InputError(
            f"{path}: cannot be resumed: its {', '.join(strange)} is damaged; "
            "take another checkpoint"
        )


def missing_keys(state: State) -> list[str]:
    """Return the keys that `state` lacks of those that a run needs to continue.

    Checkpoints of other software lack some of them.
    """
    return [key for key in _WANTED if key not in state]


def origin(state: State) -> str:
    """Return "classifier" or "pre-training", or "weights" if the file cannot be resumed."""
    if missing_keys(state):
        return "weights"
    return "classifier" if state.get("method") in CLASSIFIERS else "pre-training"
