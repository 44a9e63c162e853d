#!/usr/bin/env python
"""One table of every evaluation below a folder: a row for each encoder, a column for each protocol and data set.

Of the runs of one encoder under one protocol, those that differ by their seed alone are averaged (mean +- standard deviation). Of
several settings the best one counts: on the images held out from train/ (--val-from-train) where every run has them, else on
val/, which a * marks.
"""

import argparse
import sys
from pathlib import Path

from moco.cli import tool
from moco.errors import InputError
from moco.files import check_new, creating
from moco.report.results import as_csv, collect, markdown


def main() -> int:
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the run folders lie, at any depth")
    files = "also write table.md and table.csv to this folder"
    parser.add_argument("--out", type=Path, metavar="DIR", help=files)
    parser.add_argument("--force", action="store_true", help="replace the tables that are there")
    return tool.run(parser, table)


def table(args: argparse.Namespace) -> None:
    """Print the table; with --out write it too.

    Raises InputError if its files exist, unless --force.
    """
    if args.force and not args.out:
        replaces = "--force replaces the tables in the folder of --out"
        raise InputError(f"{replaces}; give --out DIR, or leave it out")
    cells = collect(args.folder)
    text = markdown(cells)
    print(text)
    if not args.out:
        return
    files = {args.out / "table.md": text, args.out / "table.csv": as_csv(cells)}
    for path in files:
        check_new(path, args.force)
    for path, content in files.items():
        with creating(path, args.force) as file:
            file.write(content.encode(errors="backslashreplace"))
    print(*files, sep="  ")


if __name__ == "__main__":
    sys.exit(main())
