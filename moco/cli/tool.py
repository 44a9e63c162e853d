"""Parse the command line of a tool and run it, with errors of one line and exit status 2."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from moco import user
from moco.errors import InputError, format_error, from_os_error, unknown
from moco.launch import output


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and suggest an option for an unknown one.

    Options cannot be abbreviated.
    """

    def __init__(self, *args, **more):
        super().__init__(*args, **{"allow_abbrev": False, **more})

    def error(self, message: str) -> NoReturn:
        """Print an error of argparse and exit with status 2."""
        self.refuse(InputError(message))

    def refuse(self, error: InputError) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, format_error(self.prog, error))

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the parsed command line; on a mistake, print it and exit with status 2."""
        return self._all_of(self.parse_known_args, args, namespace)

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the parsed command line. Options may stand between positional arguments."""
        return self._all_of(self.parse_known_intermixed_args, args, namespace)

    def _all_of(
        self, parse: Callable, words: Sequence[str] | None, namespace: argparse.Namespace | None
    ) -> argparse.Namespace:
        words = sys.argv[1:] if words is None else list(words)
        try:
            self.refuse_empty(words)
            found, rest = parse(words, namespace)
            if options := self.unknown(
                word.split("=")[0] for word in rest if word.startswith("--")
            ):
                raise InputError(*options)
            for word in rest:
                raise InputError(f"unexpected argument '{word}'; --help shows what is expected")
        except InputError as error:
            self.refuse(error)
        return found

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return an error line for each of `names`, which are not options of this parser."""
        return [str(unknown("option", name, self.names())) for name in dict.fromkeys(names)]

    def refuse_empty(self, words: Sequence[str]) -> None:
        """Raise InputError if a word or an option's value is empty.

        The usual cause is a shell variable that is not set.
        """
        for before, word in zip(("", *words), words, strict=False):
            if not word.strip() or re.fullmatch(r"--[\w-]+=(\s*|--)", word):
                option = word if word.strip() else before
                where = f"after {option}: " if option else ""
                raise InputError(f"{where}an empty value; is a shell variable not set?")

    def names(self) -> list[str]:
        """Return the names of this parser's options, with leading dashes."""
        return [
            name
            for action in self._actions
            for name in action.option_strings
            if name.startswith("--")
        ]


def run(parser: OneLineParser, work: Callable[[argparse.Namespace], int | None]) -> int:
    """Parse the command line, run a tool, and return its exit status; see `attempt`."""
    return attempt(parser.prog, lambda: work(parser.parse_args()))


def attempt(name: str, work: Callable[[], int | None]) -> int:
    """Run a tool, and return its exit status.

    On a user's mistake (InputError or OSError), print one line on stderr and return 2. On Ctrl-C,
    print one line and return 130.

    Args:
        name: the tool's name, with which error lines begin.
        work: returns the exit status; None stands for 0.
    """
    user.prepare()
    output.guard()
    try:
        return work() or 0
    except InputError as error:
        mistake = error
    except OSError as error:
        mistake = from_os_error(error)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    print(format_error(name, mistake), end="", file=sys.stderr)
    return 2
