#!/usr/bin/env python
"""Print one table of all evaluations below a folder.

The table has a row for each encoder and a column for each protocol and data set. Random encoders
come first; the others show their gain over the random one. Runs that differ only in their seed, of
the evaluation or of the pre-training, are averaged (mean +- standard deviation). If there are
several settings, or several classifiers in one run, the table shows the best one. It is chosen on
the images held out from train/ (--val-from-train) if every run has them; otherwise on val/, marked
with *.
"""

import argparse
import sys
from pathlib import Path

from moco.cli import tool
from moco.errors import InputError
from moco.files import check_new, creating

SUFFIXES = {"markdown": "md", "csv": "csv", "latex": "tex"}  # of each format


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="folder that contains the run folders, at any depth"
    )
    parser.add_argument(
        "--format", choices=SUFFIXES, default="markdown", help="format to print (default: markdown)"
    )
    files = "also write table.md, table.csv and table.tex to this folder"
    parser.add_argument("--out", type=Path, metavar="DIR", help=files)
    parser.add_argument("--force", action="store_true", help="replace existing tables")
    return tool.run(parser, table)


def table(args: argparse.Namespace) -> None:
    """Print the table. With --out, also write it.

    Raises InputError if the files exist, unless --force is given.
    """
    from moco.report import tables
    from moco.report.results import collect

    if args.force and not args.out:
        replaces = "--force replaces the tables in the folder of --out"
        raise InputError(f"{replaces}; give --out DIR, or leave --force out")
    cells = collect(args.folder)
    makers = {"markdown": tables.markdown, "csv": tables.as_csv, "latex": tables.latex}
    # a table in Markdown ends with an empty line, to set it apart from what follows
    print(makers[args.format](cells), end="\n" if args.format == "markdown" else "")
    if not args.out:
        return
    files = {args.out / f"table.{SUFFIXES[name]}": make(cells) for name, make in makers.items()}
    for path in files:
        check_new(path, args.force)
    for path, content in files.items():
        with creating(path, args.force) as file:
            file.write(content.encode(errors="backslashreplace"))
    print(*files, sep="  ", file=sys.stdout if args.format == "markdown" else sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
