#!/usr/bin/env python
"""One HTML page that compares pre-training runs: what they logged, what they saw, and what their encoders make of images.

The page holds all of its pictures and needs no network. What the log of no run has is left out.
"""

import argparse
import sys
from pathlib import Path

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)
from moco.cli import tool
from moco.report import plots
from moco.report.page import write


def main() -> int:
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="run folder of a pre-training (args.yaml, log.jsonl)",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="where the page goes")
    parser.add_argument(
        "--pretrained",
        type=Path,
        metavar="FILE",
        help="encoder to look at, in place of the run's last checkpoint",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        metavar="N",
        help="train images among which neighbours are looked for",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample of images")
    parser.add_argument("--force", action="store_true", help="replace the page that is there")
    return tool.run(parser, report)


def report(args: argparse.Namespace) -> None:
    """Write the page that the options ask for. Raises InputError."""
    write(args.runs, args.out, args.pretrained, args.images, args.seed, args.force)
    print(plots.printable(args.out))


if __name__ == "__main__":
    sys.exit(main())
