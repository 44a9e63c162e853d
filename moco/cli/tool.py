"""The command line of scripts and tools: an error is one line on stderr, and exit status 2."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from moco import user
from moco.errors import InputError, format_error, from_os_error, unknown
from moco.launch import output


class OneLineParser(argparse.ArgumentParser):
    """argparse, whose errors are one line, and name the nearest to an unknown option. No option is abbreviated."""

    def __init__(self, *args, **more):
        super().__init__(*args, **{"allow_abbrev": False, **more})

    def error(self, message: str) -> NoReturn:
        self.refuse(InputError(message))

    def refuse(self, error: InputError) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, format_error(self.prog, error))

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        return self._all_of(self.parse_known_args, args, namespace)

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
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
        """Return a line for each of `names`, which this parser lacks."""
        return [str(unknown("option", name, self.names())) for name in dict.fromkeys(names)]

    def refuse_empty(self, words: Sequence[str]) -> None:
        """Raise InputError for an option or a word that is empty, as where a shell's variable is not set."""
        for before, word in zip(("", *words), words, strict=False):
            if not word.strip() or re.fullmatch(r"--[\w-]+=(\s*|--)", word):
                option = word if word.strip() else before
                raise InputError(
                    f"{f'after {option}: ' if option else ''}an empty value; is a variable of the shell not set?"
                )

    def names(self) -> list[str]:
        """Its options."""
        return [
            name
            for action in self._actions
            for name in action.option_strings
            if name.startswith("--")
        ]


def run(parser: OneLineParser, work: Callable[[argparse.Namespace], int | None]) -> int:
    """Parse the command line and do a tool's work; see `attempt`."""
    return attempt(parser.prog, lambda: work(parser.parse_args()))


def attempt(name: str, work: Callable[[], int | None]) -> int:
    """Do a tool's work; returns its exit status. A user's mistake is one line on stderr, and 2; Ctrl-C is one too, and 130."""
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
