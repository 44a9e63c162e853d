"""`InputError`, the exception for a user's mistake, and the texts of its messages.

The programs print it as one line on stderr and exit with status 2.
"""

import difflib
import os
from collections.abc import Iterable

# The lowest similarity, from 0 to 1, at which a name is suggested. At this value, 9 of 10 typos of
# one letter in options are corrected; the others are in short names. 17 of 110 options of other
# repositories get a suggestion, mostly the right one. At .65, 41 would get one.
CLOSE = 0.75
FEW = 30  # a message lists all known names if there are at most this many


class InputError(Exception):
    """A mistake in the user's input.

    Each of its `lines` describes one mistake: what is wrong, and what to do.
    """

    def __init__(self, *lines: str):
        """Take one line for each mistake."""
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        """Return all lines as one."""
        return "; ".join(self.lines)


class ListError(InputError):
    """Raised if a list of images cannot be read, or if a listed file has changed or been removed.

    The file is a list of images, or it contains many images. The error is never skipped, because
    the recorded positions of all images in the file may be wrong.
    """


class DivergedError(InputError):
    """The end of a run whose loss or weights are NaN or infinite."""


def from_os_error(error: OSError) -> InputError:
    """Return an `InputError` with the file or folder that `error` names, and the system's reason.

    Raises `error` itself if it names no file: then it is not the user's mistake.
    """
    if not error.filename:
        raise error
    return InputError(f"{os.fsdecode(error.filename)}: {error.strerror}")


def changed(path: object) -> ListError:
    """Return the error for a file that has been written to since its images were listed."""
    return ListError(f"{path}: has changed since it was listed; start again")


def unknown(noun: str, name: object, known: Iterable[str]) -> InputError:
    """Return an `InputError` for a `name` that is not among the `known` ones.

    `noun` says what kind of name it is, such as "option". The message suggests the nearest known
    name if one is close. Otherwise it lists the known names if they are few.
    """
    known, message = list(known), f"unknown {noun} '{short(name)}'"
    if near := nearest(str(name), known):
        return InputError(f"{message}; the nearest is '{near}'")
    return InputError(
        f"{message}; known: {', '.join(known)}"
        if 0 < len(known) <= FEW
        else f"{message}; none is similar, --help lists them"
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` probably misspells, or None if no known name is close.

    The comparison ignores case, `-`, `_` and `.`.
    """
    by_letters = {_letters(one): one for one in reversed(list(known))}
    found = difflib.get_close_matches(_letters(name[:100]), by_letters, n=1, cutoff=CLOSE)
    return by_letters[found[0]] if found else None


def _letters(name: str) -> str:
    """Return `name` in lower case without `-`, `_` and `.`."""
    return name.lower().translate({ord(c): None for c in "-_."})


def short(text: object, max_chars: int = 200) -> str:
    """Return `text`, with dots in place of its middle if it exceeds `max_chars` characters."""
    text, half = str(text), (max_chars - 5) // 2
    return text if len(text) <= max_chars else f"{text[:half]} ... {text[-half:]}"


def format_error(name: str, error: InputError) -> str:
    """Return the text that the program `name` prints for an error: a line for each mistake."""
    return "".join(f"{one_line(f'{name}: error: {line}')}\n" for line in error.lines)


def one_line(message: str) -> str:
    """Return `message` as one line, with control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message.strip())
