"""Start a script: parse and check the options, launch the processes, and print errors in one line."""

import functools
import time
from collections.abc import Callable

import torch

from moco import user
from moco.augment import recipes
from moco.cli.folders import output_folder, writable
from moco.cli.parser import Options, Parser
from moco.distributed import print_rank0
from moco.encoder.networks import check_arch
from moco.engine import precision, resume, run_folder
from moco.errors import InputError, of_file
from moco.launch import interrupt, launch, output, processes


def _in_own_folder(
    worker: launch.Worker, continues: bool, named: bool, args: Options, device: torch.device
) -> None:
    """Run the worker while the run holds the lock of its folder."""
    with run_folder.claim(args, continues, named):
        worker(args, device)


def main(parser: Parser, check: Callable[[Options], None], worker: launch.Worker) -> None:
    """Parse, check, and run `worker(args, device)` in every process of the launch.

    `check` completes and refuses options before any process starts. An InputError becomes one line on stderr and exit
    status 2; a run that a signal has ended, after it has saved, exits with status 75, and one that has lost a process with 1.
    """
    user.prepare()
    output.guard()
    try:
        args = parser.parse()
        precision.choose(args)
        if args.arch:
            check_arch(args.arch)
        if args.recipe:
            recipes.check_name(args.recipe)
        tests = getattr(args, "evaluate", False)
        of_output = tests and args.output and args.save_dir == str(output_folder(args))
        continues = resume.start(args)
        if not hasattr(args, "pretrained"):
            resume.inherit(args)
        check(args)
        if of_output:  # named by the classifier's options, which `check` has read
            args.save_dir = str(output_folder(args))
        if args.recipe:
            recipes.of_options(args)
        notes = parser.without_effect(args)
        if args.workers is None:
            args.workers = processes.workers(processes.plan(args), args)
        named = bool(args.save_dir)
        if named:
            writable(args.save_dir)
            if not continues and not hasattr(args, "pretrained"):
                run_folder.check_free(args.save_dir)
        args.save_dir = args.save_dir or time.strftime(
            f"runs/{args.script}-{args.arch}-%Y%m%d-%H%M%S"
        )
        for note in notes:
            print_rank0(note)
        launch.launch(functools.partial(_in_own_folder, worker, continues, named), args)
    except InputError as error:
        parser.refuse(error)
    except OSError as error:
        parser.refuse(of_file(error))
    except launch.LostRankError as lost:
        parser.exit(1, f"{parser.prog}: error: {lost}\n")
    except interrupt.Interrupted as end:
        parser.exit(interrupt.STATUS, f"{parser.prog}: {end}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
