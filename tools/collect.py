#!/usr/bin/env python
"""Print one table of all evaluations below a folder.

The table has a row for each encoder and a column for each protocol and data set. Runs of one
encoder and protocol that differ only in their seed are averaged (mean +- standard deviation). If
there are runs with several settings, the table shows the best setting. It is chosen on the images
held out from train/ (--val-from-train) if every run has them; otherwise on val/, marked with *.
"""

import argparse
import sys
from pathlib import Path

from moco.cli import tool
from moco.errors import InputError
from moco.files import check_new, creating
from moco.report.results import as_csv, collect, markdown


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="folder that contains the run folders, at any depth"
    )
    files = "also write table.md and table.csv to this folder"
    parser.add_argument("--out", type=Path, metavar="DIR", help=files)
    parser.add_argument("--force", action="store_true", help="replace existing tables")
    return tool.run(parser, table)


def table(args: argparse.Namespace) -> None:
    """Print the table. With --out, also write it.

    Raises InputError if the files exist, unless --force is given.
    """
    if args.force and not args.out:
        replaces = "--force replaces the tables in the folder of --out"
        raise InputError(f"{replaces}; give --out DIR, or leave --force out")
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
