"""The one exception for a user's mistake: the launcher turns it into one line on stderr and exit status 2."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Bad input: the message says what is wrong and what to do, in one line."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """An `InputError` for a `name` that is not among the `known` ones; it names the nearest of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    return InputError(f"unknown {kind} '{name}'; the nearest is '{near[0]}'" if near else f"unknown {kind} '{name}'")
