#!/usr/bin/env python
"""Print the schedules of a recipe: learning rates, momentum, number of synthetic negatives.

RECIPE is a file of configs/, or a run's args.yaml. Options of its script may follow. They replace
those of the recipe:

  python tools/schedule.py configs/synco_200.yaml
  python tools/schedule.py configs/synco_200.yaml --epochs 100 --plot schedule.png

Each row of the table shows the first step of an epoch; the last row shows the last step of the run.
The tool reads no data and trains nothing. For a run's args.yaml, the numbers of images and of
processes are those that the run has recorded in its folder.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moco.cli import tool, values
from moco.config import Config, Pretraining, Training, flat, replaced
from moco.errors import InputError
from moco.files import check_new, creating, read_yaml

if TYPE_CHECKING:
    from moco.report.schedules import Schedules

# Training images of each data set. ImageNet-100 counts as a tenth of ImageNet, because its classes
# are not the same in all papers.
IMAGES = {
    "imagenet": 1_281_167,
    "imagenet100": 128_117,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "places205": 2_448_873,
    "voc2007": 2_501,  # of train, on which main_voc07.py --classifier sgd trains
}
LABELLED = {1: 12_811, 10: 128_116, 100: 1_281_167}  # images of ImageNet, by --train-percent
GPUS = 8  # of the machine on which a recipe without another number runs


def parser() -> tool.OneLineParser:
    """Return the parser of the tool's own options."""
    p = tool.OneLineParser(
        prog="schedule.py",
        usage="%(prog)s RECIPE [--images N] [--processes N] [--rows N] [--plot FILE.png [--force]] "
        "[OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file of options")
    number = values.in_range(int, "[1, 2147483647]")
    p.add_argument(
        "--images",
        type=number,
        metavar="N",
        help="training images (default: those of the run, or the data set's)",
    )
    p.add_argument(
        "--processes",
        type=number,
        metavar="N",
        help="processes of all nodes (default: those of the run or of the recipe's command; "
        f"{GPUS} if it uses every GPU)",
    )
    p.add_argument(
        "--rows",
        type=values.in_range(int, "[1, 100000]"),
        default=20,
        metavar="N",
        help="evenly spaced rows of the table (default: %(default)s)",
    )
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the schedules")
    p.add_argument("--force", action="store_true", help="replace an existing FILE.png")
    return p


def main() -> int:
    """Run the tool; return the exit status."""
    return tool.attempt("schedule.py", lambda: show(*parse(sys.argv[1:])))


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the tool's own options, and the words that are options of the recipe's script."""
    p = parser()
    p.refuse_empty(words)
    return p.parse_known_args(words)


def show(args: argparse.Namespace, options: list[str]) -> None:
    """Print the table and write the picture. Raises InputError on a user's mistake."""
    if args.plot:
        if args.plot.suffix.lower() != ".png":
            raise InputError(f"--plot {args.plot}: must end with .png, because it is a PNG picture")
        check_new(args.plot, args.force)
    elif args.force:
        raise InputError("--force has no effect: it is for --plot FILE.png; leave it out")
    from moco.report import schedules

    of_run = facts_of_run(args.recipe)
    found = load(args.recipe, options, args.images, args.processes, of_run)
    print(f"{args.recipe}: {schedules.summary(found)}")
    if note := assumed(args, of_run):
        print(note)
    print(schedules.table(found, args.rows))
    if args.plot:
        with creating(args.plot, args.force) as file:
            schedules.figure(found, str(args.recipe)).savefig(file, format="png")
        print(args.plot)


class RunFacts(NamedTuple):
    """The numbers that a run has recorded; None if they are not known."""

    images: int | None = None
    processes: int | None = None  # of all nodes
    nodes: int = 1


NOT_RECORDED = RunFacts()


def load(
    recipe: Path,
    options: list[str],
    images: int | None = None,
    processes: int | None = None,
    of_run: RunFacts = NOT_RECORDED,
) -> "Schedules":
    """Return the schedules of a recipe.

    Args:
        recipe: the YAML file.
        options: words of its script's command line, which change the recipe's options.
        images: number of training images; None for that of the run, or of the data set.
        processes: number of processes; None for that of the run, or of the recipe's command.
        of_run: the numbers of the run, if the recipe is its args.yaml.

    Raises InputError if the recipe or an option is wrong.
    """
    import numpy as np
    import torch

    from moco.cli import scripts
    from moco.data.images import Images
    from moco.report import schedules

    module = scripts.load_script(scripts.script_of(recipe))
    comments, script = scripts.comments_of(recipe), module.parser()
    config = script.parse(["DIR", "--cfg", str(recipe), *options])
    settings, trains = flat(config), isinstance(config, Training)
    if not trains and settings.get("classifier") != "sgd":
        raise InputError(f"{recipe}: {module.__name__}.py trains nothing by steps")
    build = None
    if isinstance(config, Pretraining):
        config, build = scripts.completed(module, config, torch.device("cpu"))
    script.without_effect(config)
    images = images or of_run.images or images_of(config, comments)
    given = config.input
    batch_is_per_node = not (given.batch_is_per_process or given.batch_is_of_all_nodes)
    if (processes or of_run.processes) and batch_is_per_node:
        # these are processes of all nodes
        config = replaced(config, batch_size=given.batch_size * of_run.nodes)
    processes = processes or of_run.processes or processes_of(comments)
    if trains:
        labels = np.zeros(images, dtype=np.int64)
        method = build(Images(Path("DIR"), labels, ("one", "two"))) if build else None
        return schedules.of_trainer(config, images, processes, method)
    epochs, lr = settings["epochs"], settings["lr"]
    if epochs is None or lr is None:
        raise InputError(f"{recipe}: give --epochs and --lr")
    return schedules.of_voc_layer(config, images, processes, epochs, lr)


def facts_of_run(recipe: Path) -> RunFacts:
    """Return the numbers that the run with this args.yaml recorded; none for another recipe.

    Raises InputError if the file cannot be read.
    """
    from moco.engine import record

    if recipe.name != "args.yaml":
        return NOT_RECORDED
    try:
        options = read_yaml(str(recipe))
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from None
    found = record.read(recipe.parent)
    counts = (found.get("images"), found.get("processes"), options.get("nodes"))
    images, processes, nodes = (
        count if type(count) is int and count > 0 else None for count in counts
    )
    return RunFacts(images, processes, nodes or 1)


def assumed(args: argparse.Namespace, of_run: RunFacts) -> str:
    """Return a line about the numbers that are neither given nor recorded by a run, or ""."""
    if args.recipe.name != "args.yaml":
        return ""
    names = [name for name in ("images", "processes") if vars(args)[name] is None]
    names = [name for name in names if getattr(of_run, name) is None]
    if not names:
        return ""
    what, options = " and ".join(names), " and ".join(f"--{name}" for name in names)
    noun, them = ("number", "one") if len(names) == 1 else ("numbers", "them")
    return (
        f"{args.recipe}: its folder has no record of the {noun} of {what}, so the line above "
        f"assumes {them}; give {options}"
    )


def images_of(config: Config, comments: str) -> int:
    """Return the number of training images of a recipe with these settings and comments."""
    if config.labels and config.input.dataset == "imagenet":
        return LABELLED[config.labels.train_percent]
    if counted := re.search(r"DIR has (\d+) images", comments):
        return int(counted[1])
    named = re.search(r"--dataset (\w+)", comments)
    name = config.input.data_name or (named[1] if named else config.input.dataset)
    if name not in IMAGES:
        raise InputError(f"--images N is needed: the number of training images of {name}")
    return IMAGES[name]


def processes_of(comments: str) -> int:
    """Return the number of processes of the command in a recipe's comments."""
    if given := re.search(r"--nproc-per-node (\d+)", comments):
        return int(given[1])
    return GPUS if "--multiprocessing-distributed" in comments or not comments else 1


if __name__ == "__main__":
    sys.exit(main())
