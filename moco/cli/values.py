"""Types of options for argparse, which convert a word and check the range of a number."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from moco.data import subsets
from moco.errors import short

Number = TypeVar("Number", int, float)


def real(interval: str) -> Callable[[str], float]:
    """Return an option's type: a float in an interval such as "[0, 1)", where 1 is excluded."""
    return _number(float, interval)


def whole(interval: str) -> Callable[[str], int]:
    """Return an option's type: an int in an interval, as in `real`."""
    return _number(int, interval)


def _number(kind: type[Number], interval: str) -> Callable[[str], Number]:
    least, most = (kind(end) for end in interval[1:-1].split(","))

    def number(text: str) -> Number:
        value, said = kind(text), ""
        if value != value:
            said = "not a number"
        elif value < least or (value == least and interval[0] == "("):
            said = f"{'not above' if value == least else 'below'} {least:.10g}"
        elif value > most or (value == most and interval[-1] == ")"):
            said = f"{'not below' if value == most else 'above'} {most:.10g}"
        if said:
            raise argparse.ArgumentTypeError(f"{short(text)} is {said}; take one in {interval}")
        return value

    # argparse prints the name if it cannot convert a word
    number.__name__, number.interval = kind.__name__, interval
    return number


# Ranges wide enough for any experiment. Values outside are mistakes, or leave float32's range.
positive, natural = whole("[1, 2147483647]"), whole("[0, 2147483647]")


processes = whole("[0, 1024]")


seed = whole("[-9223372036854775808, 9223372036854775807]")  # what torch's generators take


epochs = whole("[1, 100000]")


batch = whole("[1, 1048576]")


pixels = whole("[8, 4096]")


width = whole("[1, 1048576]")  # of features and hidden layers


layers = whole("[1, 100]")


entries = whole("[1, 268435456]")  # of a queue or bank


learning_rate = real("[0, 1000000]")


decay = real("[0, 100]")


momentum = real("[0, 1)")  # of an optimizer


mean, std = (
    real("[0, 1]"),
    real("(0, 1]"),
)  # of a colour channel; mean 0 and std 1 leave it as it is


average = real("[0, 1]")  # of an encoder that follows another one


temperature = real("[0.001, 100]")


size = real("[0, 100]")  # of a perturbation of unit vectors


def names(text: str) -> list[str]:
    """Return the option names in `text`, separated by commas, with or without leading dashes."""
    return [name.strip().lstrip("-").replace("_", "-") for name in text.split(",") if name.strip()]


def keep(text: str) -> int:
    """Return how many checkpoints to keep; 0 stands for all."""
    try:
        return 0 if text == "all" else natural(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{short(text)} is neither a number nor the word all"
        ) from None


def data_name(text: str) -> str:
    """Return the name of an ImageNet folder that `subsets.check_classes` knows."""
    if text.lower() not in subsets.CLASS_COUNTS:
        known = " or ".join(subsets.CLASS_COUNTS)
        raise argparse.ArgumentTypeError(
            f"'{text}' is not {known}; leave it out; evaluations take other data sets with --dataset"
        )
    return text.lower()
