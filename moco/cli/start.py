"""Start a run from its parsed options: complete the settings, and launch the processes."""

import functools
import time
from collections.abc import Callable

import torch

from moco.augment import recipes
from moco.cli import folders
from moco.cli.parser import Parser
from moco.config import AnyConfig, replaced
from moco.encoder.networks import canonical
from moco.engine import precision, resume, run_folder, tracking
from moco.launch import interrupt, launch, processes
from moco.messages import print_rank0

Complete = Callable[[AnyConfig], AnyConfig]


def start(parser: Parser, config: AnyConfig, complete: Complete, worker: launch.Worker) -> None:
    """Complete the settings, and run the worker in every process; see `entry.main`.

    Raises InputError or OSError for a user's mistake.

    Args:
        parser: the script's options.
        config: the settings that it has parsed.
        complete: returns the settings with those that depend on others.
        worker: the work of one process.
    """
    try:
        config, continues = _completed(config, complete)
        named = bool(config.run.save_dir)
        notes = parser.without_effect(config)
        config = _with_defaults(config)
        if named:
            folders.check_writable(config.run.save_dir)
            if not continues and not config.EVALUATES:
                run_folder.check_free(config.run.save_dir)
        for note in notes:
            print_rank0(note)
        with run_folder.recorded(config, continues, named) as began:
            own = functools.partial(_in_own_folder, worker, continues, named, began)
            launch.launch(own, config)
    except launch.LostRankError as lost:
        parser.exit(1, f"{parser.prog}: error: {lost}\n")
    except interrupt.Interrupted as end:
        parser.exit(interrupt.STATUS, f"{parser.prog}: {end}\n")


def _completed(config: AnyConfig, complete: Complete) -> tuple[AnyConfig, bool]:
    """Return the completed settings, and whether the run continues an earlier one."""
    config = precision.disable_slow_amp(config)
    if config.network.arch:
        config = replaced(config, arch=canonical(config.network.arch))
    if config.views.recipe:
        recipes.check_name(config.views.recipe)
    tracking.check(config)
    run = config.run
    own_test = config.only_tests and run.output
    in_output = own_test and run.save_dir == str(folders.output_folder(config))
    config, continues = resume.resolve(config)
    if not config.EVALUATES:
        config = resume.inherit(config)
    config = complete(config)
    if in_output:  # the folder's name depends on the classifier's settings, which are known now
        config = replaced(config, save_dir=str(folders.output_folder(config)))
    if config.views.recipe:
        recipes.from_settings(config.views)
    return config, continues


def _with_defaults(config: AnyConfig) -> AnyConfig:
    """Return `config` with a number of loader processes and a run folder, unless they are given."""
    workers = config.input.workers
    if workers is None:
        workers = processes.default_workers(processes.plan(config.launch), config.input)
    arch = str(config.network.arch).replace(":", "-")  # Windows has no colons in names
    unnamed = f"runs/{config.run.script}-{arch}-%Y%m%d-%H%M%S"
    save_dir = config.run.save_dir or time.strftime(unnamed)
    return replaced(config, workers=workers, save_dir=save_dir)


def _in_own_folder(
    worker: launch.Worker,
    continues: bool,
    named: bool,
    start: str,
    config: AnyConfig,
    device: torch.device,
) -> None:
    """Run the worker while the run holds the lock on its folder. Track it, if `--track` asks to."""
    with (
        run_folder.claim(config, continues, named, start) as config,
        tracking.tracked(config, continues),
    ):
        worker(config, device)
