"""Load the settings and the methods of scripts, without starting a run."""

import contextlib
import importlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import nn

from moco.config import Config, Pretraining, replaced
from moco.data.images import Images
from moco.engine import pretrain
from moco.errors import InputError
from moco.files import read_text, read_yaml
from moco.launch import processes

Build = Callable[[Images], nn.Module]

ONE_PROCESS = processes.Plan("single", 1, 1, 0, 1, 0, "")

# a command in the comments of a recipe, and the name of its script
_COMMAND = re.compile(r"^# (?:python|torchrun .*?) (main_\w+)\.py ", re.MULTILINE)


def script_of(recipe: Path) -> str:
    """Return the name of the script of a recipe, or of a run's args.yaml: main_synco, for example.

    Raises InputError if the file cannot be read, or does not name a script.
    """
    try:
        run = read_yaml(recipe).get("script")
        if run is not None:
            return f"main_{run}"
        if command := _COMMAND.search(read_text(recipe)):
            return command[1]
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from None
    raise InputError(
        f"{recipe}: no comment names its script; add a line such as "
        f"# python main_synco.py --cfg {recipe} DIR"
    )


def comments_of(recipe: Path) -> str:
    """Return the lines of a recipe that are comments."""
    return "\n".join(line for line in read_text(recipe).splitlines() if line.startswith("#"))


def load_script(name: str) -> ModuleType:
    """Return the module of a script. Raises InputError if there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise InputError(f"{name}.py: no such script") from None


def config_and_builder(
    script: str, options: Sequence[object], device: torch.device
) -> tuple[Pretraining, Build]:
    """Return a script's completed settings, and the `build` that it passes to `pretrain.train`."""
    module = load_script(script)
    return completed(module, module.parser().parse(["DIR", *map(str, options)]), device)


def completed(
    module: ModuleType, config: Config, device: torch.device
) -> tuple[Pretraining, Build]:
    """Return the completed settings of a pre-training script, and the `build` of its method.

    Args:
        module: the script.
        config: the settings that its parser has returned.
        device: the device that its worker gets.
    """
    # as for a run that does not resume
    config = replaced(config, stem=config.network.stem or "imagenet")
    found: list[Build] = []
    with (
        mock.patch.object(pretrain, "train", lambda config, device, build: found.append(build)),
        # this would search for the data
        mock.patch.object(pretrain, "complete", lambda config, *_: config),
        # this would search for the devices of the run, which another machine may have
        mock.patch.object(processes, "plan", lambda _: ONE_PROCESS),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        config = module.complete(config)
        batch, workers = config.input.batch_size, config.input.workers or 0
        config = replaced(config, batch_per_process=batch, nodes=1, workers=workers)
        module.worker(config, device)
    return config, found[0]
