"""Declare options as dataclass fields, and define the ranges of numbers that options share."""

from dataclasses import dataclass, field
from typing import Any

# Intervals wide enough for any experiment; "[0, 1)" excludes 1. Values outside are mistakes, or
# overflow float32.
POSITIVE, NATURAL = "[1, 2147483647]", "[0, 2147483647]"
PROCESSES = "[0, 1024]"
EPOCHS = "[1, 100000]"
PIXELS = "[8, 4096]"
WIDTH = "[1, 1048576]"  # of features and hidden layers
LAYERS = "[1, 100]"
ENTRIES = "[1, 268435456]"  # of a queue or bank
LEARNING_RATE = "[0, 1000000]"
WEIGHT_DECAY = "[0, 100]"
MOMENTUM = "[0, 1)"  # of an optimizer
PROBABILITY = "[0, 1]"
AVERAGE = "[0, 1]"  # momentum of an encoder that follows another one
TEMPERATURE = "[0.001, 100]"
SIZE = "[0, 100]"  # of a perturbation of unit vectors


@dataclass(frozen=True)
class Option:
    """The command-line option of a field."""

    help: str
    names: tuple[str, ...] = ()  # further names, such as -b
    range: str = ""  # of a number, for example "[0, 1)", which excludes 1
    choices: tuple[str | int, ...] = ()
    metavar: str | tuple[str, ...] | None = None
    nargs: int | str | None = None
    switch: bool = True  # for a bool: whether --no-NAME and --NAME 0 also exist
    max_level: int = 1  # largest value of a switch
    unset: str = ""  # text that --help shows instead of a default of None
    hidden: bool = False  # whether --help leaves it out


def option(default: Any, help: str, *names: str, **more: Any) -> Any:
    """Return a dataclass field that is also a command-line option.

    Args:
        default: the field's default.
        help: the help text.
        names: further names of the option, such as -b.
        more: further fields of `Option`.
    """
    return field(default=default, metadata={"option": Option(help, names, **more)})
