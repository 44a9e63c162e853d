#!/usr/bin/env python
"""Print a table of the runs in and below folders: how far they are, and how they ended.

States: running; silent (the process exists, but has not logged for long); finished; stopped (by a
signal); failed (an error that the user can fix); diverged (the loss is NaN or infinite); crashed;
killed (ended without recording why); unfinished (a run of an older version, which records no end).
"""

import argparse
import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moco.cli import tool
from moco.errors import InputError
from moco.files import to_json

if TYPE_CHECKING:
    from moco.report.status import Status


def main() -> int:
    """Run the tool; return the exit status."""
    parser = tool.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUNS", help="run folders, or folders above them"
    )
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="print the table again every so many seconds, until Ctrl-C",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON: a list with an object per run"
    )
    return tool.run(parser, show)


def show(args: argparse.Namespace) -> int:
    """Print the table once, or again and again with --watch.

    Raises InputError if a folder does not exist, or if no run is below the folders.
    """
    if args.watch is None:
        runs = _read(args.folders)
        if not runs:
            folders = ", ".join(map(str, args.folders))
            raise InputError(
                f"{folders}: no run in or below; give a folder that a script has written to"
            )
        _print(runs, args.json)
        return 0
    if not 0.1 <= args.watch <= 86400:
        raise InputError(f"--watch {args.watch:g}: must be a number of seconds from 0.1 to 86400")
    try:
        while True:
            runs = _read(args.folders)
            if sys.stdout.isatty() and not args.json:
                print("\033[H\033[2J", end="")  # clear the terminal
            _print(runs, args.json)
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 0


def _read(folders: list[Path]) -> "list[Status]":
    from moco.report import status

    return [status.read(folder) for folder in status.find(folders)]


def _print(runs: "list[Status]", as_json: bool) -> None:
    from moco.report import status_table

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    text = to_json(status_table.as_dicts(runs)) + "\n"
    print(text if as_json else status_table.table(runs, time.time(), width), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
