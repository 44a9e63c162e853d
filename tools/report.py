#!/usr/bin/env python
"""Write one HTML page that compares pre-training runs.

The page shows the logged metrics, the views of the images, and the features of the encoders. It
contains its pictures and needs no network. Metrics that no run has logged are left out.
"""

import argparse
import sys
from pathlib import Path

from moco.cli import tool


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="run folder of pre-training (with args.yaml and log.jsonl)",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write")
    parser.add_argument(
        "--pretrained",
        type=Path,
        metavar="FILE",
        help="checkpoint whose encoder to show, instead of the run's last one",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        metavar="N",
        help="number of train images searched for nearest neighbours",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of images")
    parser.add_argument("--force", action="store_true", help="replace an existing page")
    return tool.run(parser, report)


def report(args: argparse.Namespace) -> None:
    """Write the page that the options ask for. Raises InputError."""
    from moco.report import plots
    from moco.report.page import write

    write(args.runs, args.out, args.pretrained, args.images, args.seed, args.force)
    print(plots.printable(args.out))


if __name__ == "__main__":
    sys.exit(main())
