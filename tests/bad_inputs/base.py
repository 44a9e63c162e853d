"""A bad input, and the words of a small command around it."""

from pathlib import Path
from typing import NamedTuple

from moco.methods import METHODS

PRETRAIN = tuple(dict.fromkeys(method.script for method in METHODS.values()))
EVALUATE = ("main_lincls", "main_semisup", "main_knn", "main_voc07")


class Case(NamedTuple):
    """A command that must be refused, and words that its one line must hold."""

    program: str
    words: tuple
    said: tuple[str, ...] = ()


class Place(NamedTuple):
    """The folders in which a case finds good data and puts its bad files."""

    data: Path  # 3 classes x 16 images
    good: Path  # a run folder with a good checkpoint
    own: Path  # empty, of this case alone


def accepted(*_: object) -> None:
    raise AssertionError("a bad input was accepted: training would begin")
