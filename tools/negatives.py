#!/usr/bin/env python
"""Write an HTML page about the negatives of pre-training: their hardness, and the false ones.

  python tools/negatives.py runs/synco/checkpoint_*.pth.tar DIR --out negatives.html

DIR is a data folder, or the word photos. The page shows how similar negatives are to their queries,
which of them are false (of the same class), and the hardest ones as pictures. It compares the six
types of synthetic negatives, and the checkpoints of one run or of several. The page contains its
pictures and needs no network.
"""

import argparse
import sys
from pathlib import Path

from moco import sections
from moco.cli import tool, values
from moco.data import catalog
from moco.errors import InputError
from moco.files import refuse_remote
from moco.report.options import Options

DEFAULT = Options(data="")


def main() -> int:
    """Run the tool; return the exit status."""
    return tool.run(parser(), show)


def parser() -> tool.OneLineParser:
    """Return the parser of the options."""
    p = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        type=Path,
        help="checkpoints that pre-training scripts have saved, of one run or of several",
    )
    p.add_argument("data", metavar="DIR", help="data folder (with train/), or the word photos")
    p.add_argument(
        "--dataset",
        type=catalog.canonical,
        choices=catalog.NAMES,
        default=DEFAULT.dataset,
        metavar="NAME",
        help=f"data set in DIR: {', '.join(catalog.NAMES)} (default: %(default)s, image folders)",
    )
    p.add_argument("--class-list", metavar="FILE", help="names of the classes to use, one a line")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("negatives.html"),
        help="file to write (default: %(default)s)",
    )
    p.add_argument(
        "--images",
        type=values.in_range(int, "[2, 1048576]"),
        default=DEFAULT.images,
        metavar="N",
        help="training images whose keys are the negatives (default: %(default)s, or all)",
    )
    p.add_argument(
        "--queries",
        type=values.in_range(int, "[1, 65536]"),
        default=DEFAULT.queries,
        metavar="N",
        help="how many of these images are also queries (default: %(default)s)",
    )
    p.add_argument(
        "--n-hard",
        type=values.in_range(int, sections.POSITIVE),
        metavar="N",
        help="number of hardest negatives to make synthetic ones from (default: the same fraction "
        "as in the run; 1/64 if the run has no synthetic negatives, as in SynCo's paper)",
    )
    p.add_argument(
        "--seed",
        type=values.in_range(int, "[0, 9223372036854775807]"),
        default=DEFAULT.seed,
        help="seed of the images, views and synthetic negatives (default: %(default)s)",
    )
    p.add_argument("--force", action="store_true", help="replace an existing page")
    return p


def show(args: argparse.Namespace) -> None:
    """Write the page that the options ask for. Raises InputError."""
    from moco.report import negatives, plots

    for path in (args.data, args.class_list, *args.checkpoints):
        refuse_remote(str(path or ""))
    dataset = "photos" if args.data == "photos" else args.dataset
    if args.data == "photos" and args.dataset not in (DEFAULT.dataset, "photos"):
        raise InputError(
            f"--dataset {args.dataset}: the word photos names the images; leave it out"
        )
    options = Options(
        args.data, dataset, args.class_list, args.images, args.queries, args.n_hard, args.seed
    )
    negatives.write(args.checkpoints, args.out, options, args.force)
    print(plots.printable(args.out))


if __name__ == "__main__":
    sys.exit(main())
