"""The one exception for a user's mistake: the launcher turns it into one line on stderr and exit status 2."""

import difflib
from collections.abc import Iterable

# Least similarity of a suggestion, from 0 to 1. Over one-letter typos of all options it finds 9 of 10 (short names are the
# others); of 110 options of other repositories it suggests 17, most of them rightly, and .65 would suggest 41.
CLOSE = 0.75
FEW = 30  # names that a message may list


class InputError(Exception):
    """Bad input. The message says what is wrong and what to do, in one line; several mistakes are several `lines`."""

    def __init__(self, *lines: str):
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "; ".join(self.lines)


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Return an `InputError` for a `name` that is not among the `known` ones.

    It suggests the nearest known name if that is close, and else lists the known ones if they are few.
    """
    known, said = list(known), f"unknown {kind} '{short(name)}'"
    if near := nearest(str(name), known):
        return InputError(f"{said}; the nearest is '{near}'")
    return InputError(
        f"{said}; known: {', '.join(known)}" if 0 < len(known) <= FEW else f"{said}; none is similar, --help lists them"
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` is probably a misspelling of; None if no known name is close.

    Case, `-`, `_` and `.` do not count.
    """
    plain = {_plain(one): one for one in reversed(list(known))}
    found = difflib.get_close_matches(_plain(name[:100]), plain, n=1, cutoff=CLOSE)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().translate({ord(c): None for c in "-_."})


def short(text: object, most: int = 200) -> str:
    """Return what a message quotes of a file: `text`, without its middle if it is longer than `most` characters."""
    text, half = str(text), (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"
