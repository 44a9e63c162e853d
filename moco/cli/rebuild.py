"""Rebuild the method of a pre-training checkpoint: its networks with all their heads."""

import contextlib
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from moco.builder.base import Method
from moco.cli import scripts
from moco.config import Pretraining, replaced, sections
from moco.data.images import Images
from moco.encoder.metadata import read_metadata
from moco.encoder.pretrained import fits, is_finite
from moco.engine import checkpoint
from moco.errors import InputError, short
from moco.methods import METHODS

_SCRIPTS = {method.script for method in METHODS.values()}


class Rebuilt(NamedTuple):
    """A method with the weights of a checkpoint, in eval mode and on the CPU.

    Attributes:
        method: the method.
        config: the settings of its run.
        epoch: the number of epochs that it was trained for; it may be a fraction.
    """

    method: Method
    config: Pretraining
    epoch: float


def rebuild(path: Path) -> Rebuilt:
    """Return the method of the checkpoint in `path`.

    Raises InputError if it is not a checkpoint of a pre-training script of this project.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give its checkpoints: {path}/checkpoint_*.pth.tar")
    state = checkpoint.load(str(path))
    name, config = _settings(path, state)
    if batch := state["progress"].get("batch"):  # of all nodes, which the options need not count
        config = replaced(config, batch_size=batch // config.optimizer.accumulation_steps)
    module = scripts.load_script(name)
    try:
        config, build = scripts.completed(module, config, torch.device("cpu"))
        # The number of images determines the shape of buffers that are not loaded. Methods that
        # train on labels need two classes.
        method = build(Images(path, np.arange(2), ("a", "b")))
    except InputError as error:
        raise InputError(f"{path}: its options do not fit {name}.py: {error}") from None
    _load(method, state["state_dict"], path)
    return Rebuilt(method.eval(), config, _epochs(state))


def _settings(path: Path, state: checkpoint.State) -> tuple[str, Pretraining]:
    """Return the name of the script of a checkpoint, and the settings of its run.

    Raises InputError if it does not come from pre-training, or if its options are not valid.
    """
    origin = checkpoint.origin(state)
    if origin == "classifier":
        raise InputError(
            f"{path}: is a classifier's checkpoint, which has no projection head; give a "
            "checkpoint of a pre-training run"
        )
    if origin == "weights":
        lacking = ", ".join(checkpoint.missing_keys(state))
        raise InputError(
            f"{path}: lacks {lacking}, so the method cannot be rebuilt from it; give a checkpoint "
            "that a pre-training script of this project has saved"
        )
    checkpoint.check_resumable(state, str(path))
    facts = read_metadata(state)
    name = f"main_{facts.script}"
    if name not in _SCRIPTS:
        raise InputError(
            f"{path}: does not name a pre-training script ({short(str(facts.script))}); give a "
            "checkpoint of one of this project's scripts"
        )
    # The file is untrusted: check its options as those of a recipe.
    parser = scripts.load_script(name).parser()
    kept = {"script", "method"}
    for section, values in sections(parser.config):
        if section not in _LEFT_OUT:
            kept |= vars(values).keys()
    options = {key: value for key, value in facts.options.items() if key in kept}
    try:
        with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            recipe = Path(folder, "args.yaml")
            recipe.write_text(yaml.safe_dump(options), encoding="utf-8")
            config = parser.parse(["DIR", "--cfg", str(recipe)])
    except (InputError, yaml.YAMLError) as error:
        reason = " ".join(str(error).replace(f"--cfg {recipe}: ", "").split())
        raise InputError(f"{path}: its options are not valid: {short(reason)}") from None
    return name, replaced(config, script=facts.script)


# the sections of settings that do not determine the networks or the views
_LEFT_OUT = set("run log launch tracking listed start retention monitor".split())


def _load(method: Method, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a checkpoint's networks into a new `method`, and the buffers that fit.

    A buffer of the method itself, such as a queue, may have another shape: that of SogCLR depends
    on the number of training images.

    Raises InputError if a tensor of a network is missing, does not fit, or is not finite.
    """
    found = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    mine = method.state_dict()
    of_networks = {name for name in {*found, *mine} if "." in name}
    wrong = [
        name
        for name in sorted(of_networks)
        if name not in found or name not in mine or not fits(found[name], mine[name])
    ]
    if wrong:
        raise InputError(
            f"{path}: '{short(wrong[0])}' does not fit the network that its options describe; "
            "give a checkpoint that a pre-training script of this project has saved"
        )
    loaded = {
        name: tensor
        for name, tensor in found.items()
        if name in of_networks or (name in mine and fits(tensor, mine[name]))
    }
    if bad := [name for name, tensor in loaded.items() if not is_finite(tensor)]:
        raise InputError(
            f"{path}: has weights that are NaN or infinite (first '{short(bad[0])}'): its training "
            "diverged; take an earlier checkpoint"
        )
    method.load_state_dict(loaded, strict=False)


def _epochs(state: checkpoint.State) -> float:
    """Return the number of epochs that a checkpoint's run had trained for."""
    progress = state["progress"]
    per_epoch = progress.get("steps_per_epoch")
    return progress["step"] / per_epoch if per_epoch else float(state["epoch"])
