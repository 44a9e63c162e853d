"""The one exception for a user's mistake: the launcher turns it into one line on stderr and exit status 2."""

import difflib
import os
from collections.abc import Iterable

# Lowest similarity, from 0 to 1, at which a name is suggested. It corrects 9 of 10 one-letter typos
# of all options (it misses short names). Of 110 options of other repositories it suggests a name for
# 17, mostly the right one; .65 would suggest one for 41.
CLOSE = 0.75
FEW = 30  # a message lists the known names if there are no more than this


class InputError(Exception):
    """A mistake in the user's input.

    Each of `lines` says what is wrong and what to do; several mistakes have a line each.
    """

    def __init__(self, *lines: str):
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "; ".join(self.lines)


def of_file(error: OSError) -> InputError:
    """Return the mistake behind an error about a file or folder that somebody has named.

    Raises `error` itself if it names none, because then the fault is in the program.
    """
    if not error.filename:
        raise error
    return InputError(f"{os.fsdecode(error.filename)}: {error.strerror}")


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Return an `InputError` for a `name` that is not among the `known` ones.

    The message suggests the nearest known name if it is close. Otherwise it lists the known names
    if they are few.
    """
    known, said = list(known), f"unknown {kind} '{short(name)}'"
    if near := nearest(str(name), known):
        return InputError(f"{said}; the nearest is '{near}'")
    return InputError(
        f"{said}; known: {', '.join(known)}"
        if 0 < len(known) <= FEW
        else f"{said}; none is similar, --help lists them"
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` is probably a misspelling of; None if no known name is close.

    Ignores case, `-`, `_` and `.`.
    """
    plain = {_plain(one): one for one in reversed(list(known))}
    found = difflib.get_close_matches(_plain(name[:100]), plain, n=1, cutoff=CLOSE)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().translate({ord(c): None for c in "-_."})


def short(text: object, most: int = 200) -> str:
    """Return `text` for a message, without its middle if it is longer than `most` characters."""
    text, half = str(text), (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def printed(name: str, error: InputError) -> str:
    """Return what program `name` prints for an error: its lines, control characters escaped."""
    return "".join(f"{one_line(f'{name}: error: {line}')}\n" for line in error.lines)


def one_line(message: str) -> str:
    """Return `message` as one line with control characters escaped. It is never shortened here."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message.strip())
