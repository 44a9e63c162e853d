"""Convert the words of the command line to values, and check the range of numbers."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from moco.data import catalog
from moco.errors import short
from moco.options import NATURAL

Number = TypeVar("Number", int, float)


def in_range(number_type: type[Number], interval: str) -> Callable[[str], Number]:
    """Return a function for argparse's `type` that converts a word to a number in an interval.

    Args:
        number_type: int or float.
        interval: for example "[0, 1)", which excludes 1.

    The returned function raises ArgumentTypeError for a word that is not a number, and for a number
    outside the interval.
    """
    least, most = (number_type(end) for end in interval[1:-1].split(","))

    def number(text: str) -> Number:
        try:
            value, said = number_type(text), ""
        except ValueError:
            kind = "whole number" if number_type is int else "number"
            raise argparse.ArgumentTypeError(
                f"{short(text)!r} is not a {kind}; take one in {interval}"
            ) from None
        if value != value:
            said = "not a number"
        elif value < least or (value == least and interval[0] == "("):
            said = f"{'not above' if value == least else 'below'} {least:.10g}"
        elif value > most or (value == most and interval[-1] == ")"):
            said = f"{'not below' if value == most else 'above'} {most:.10g}"
        if said:
            raise argparse.ArgumentTypeError(f"{short(text)} is {said}; take one in {interval}")
        return value

    # of a value in YAML, too; `interval` is for tests of all ranges
    number.__name__, number.interval = number_type.__name__, interval
    return number


def names(text: str) -> list[str]:
    """Return the option names in a comma-separated text, without leading dashes."""
    return [name.strip().lstrip("-").replace("_", "-") for name in text.split(",") if name.strip()]


def keep(text: str) -> int:
    """Return the number of checkpoints to keep; 0 for the word all."""
    if text == "all":
        return 0
    if not text.lstrip("+-").isdigit():
        raise argparse.ArgumentTypeError(f"{short(text)} is neither a number nor the word all")
    return in_range(int, NATURAL)(text)


def data_name(text: str) -> str:
    """Return the name in lower case. Raises ArgumentTypeError if it is not in CLASS_COUNTS."""
    if text.lower() not in catalog.CLASS_COUNTS:
        known = " or ".join(catalog.CLASS_COUNTS)
        raise argparse.ArgumentTypeError(
            f"'{text}' is not {known}; leave it out; "
            "evaluations take other data sets with --dataset"
        )
    return text.lower()


def weights(text: str) -> str:
    """Return freeze for the other spelling frozen, and finetune for finetuned."""
    return {"frozen": "freeze", "finetuned": "finetune"}.get(text, text)
