"""Turn the labels that are stored next to images, integers or names, into classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco.errors import InputError, short
from moco.files import read_text
from moco.messages import counted

CLASSES_FILE = "classes.txt"  # line k names the class of the integer label k, counted from 0


class Labels(NamedTuple):
    """The labels of images, as their files have them.

    Attributes:
        texts: The different labels. An integer is in decimal digits.
        codes: int64 [N], the index in `texts` of each image's label; -1 if it has none.
    """

    texts: Sequence[str]
    codes: np.ndarray


def classes(labels: Labels, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the classes of `labels`; an empty tuple if there are no labels.

    The names of integers are in the order of the integers. An integer without `names` is its own
    name. Labels that are names are sorted.

    Args:
        labels: the labels.
        names: the names of the classes 0, 1, 2, ..., if labels are integers.

    Raises InputError if some images have no label, if labels are integers and names, or if an
    integer has no name. The message does not name the images.
    """
    return _in_order(_names_of(labels, names), names)


def indices(
    labels: Labels, names: Sequence[str] = (), among: tuple[str, ...] = ()
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the index of each image's class in the classes, int64 [N], and the classes.

    Args:
        labels: the labels.
        names: see `classes`.
        among: the classes; by default those of `labels`.

    Raises InputError as `classes` does, or if `among` lacks a class.
    """
    own = _names_of(labels, names)
    found = among or _in_order(own, names)
    if not own:
        return np.zeros(len(labels.codes), np.int64), ()
    index = {name: i for i, name in enumerate(found)}
    if lacking := [name for name in own if name not in index]:
        raise InputError(
            f"{counted(len(lacking), 'class is', 'classes are')} not among those of the training "
            f"images, first '{short(lacking[0])}'; use the same names in both splits"
        )
    return np.array([index[name] for name in own], np.int64)[labels.codes], found


def _in_order(own: list[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the class names `own` in the order of `classes`."""
    if all(map(_is_integer, own)) and not names:
        return tuple(sorted(set(own), key=int))
    order = {name: i for i, name in enumerate(names)}
    return tuple(sorted(set(own), key=lambda name: (order.get(name, 0), name)))


def _is_integer(text: str) -> bool:
    """Return whether `text` is an integer without leading zeros."""
    return re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", text) is not None


def _names_of(labels: Labels, names: Sequence[str]) -> list[str]:
    """Return the class name of each of `labels.texts`; an empty list if no image has a label.

    Hugging Face's data sets have the label -1 if a split has no labels.
    """
    texts, there = list(labels.texts), labels.codes >= 0
    if not there.any() or set(texts) == {"-1"}:
        return []
    if not there.all():
        raise InputError(
            f"{(~there).sum()} of {len(there)} images have no label; give all images labels, or "
            "none"
        )
    integers = [text for text in texts if _is_integer(text)]
    others = [text for text in texts if not text.isdecimal() and text not in integers]
    if integers and others:
        raise InputError(
            f"some labels are integers ({short(integers[0])}), others are names "
            f"({short(others[0])}); label all images in one way"
        )
    if len(integers) < len(texts):  # names, such as n01440764 or 007
        return texts
    if negative := next((text for text in texts if int(text) < 0), None):
        raise InputError(f"the label {negative} is negative; classes are counted from 0")
    if not names:
        return texts
    largest = max(map(int, texts))
    if largest >= len(names):
        raise InputError(
            f"an image has the label {largest}, but only "
            f"{counted(len(names), 'class has a name', 'classes have names')}; complete the names"
        )
    return [names[int(text)] for text in texts]


def read_classes_file(*folders: Path) -> tuple[str, ...]:
    """Return the names in the first classes.txt of these `folders`; an empty tuple without one.

    Raises InputError if the file cannot be read, or if a name is empty or given twice.
    """
    for folder in folders:
        file = folder / CLASSES_FILE
        if file.is_file():
            try:
                names = [line.strip() for line in read_text(file).splitlines()]
            except InputError as error:
                raise InputError(f"{file}: cannot be read ({error})") from None
            check_names(file, names)
            return tuple(names)
    return ()


def check_names(source: object, names: Sequence[str]) -> None:
    """Raise InputError, which begins with `source`, if a class name is unusable or given twice."""
    seen: set[str] = set()
    for i, name in enumerate(names):
        if not name or not name.isprintable():
            raise InputError(f"{source}: has no usable name for class {i}; give it one")
        if name in seen:
            raise InputError(
                f"{source}: names '{short(name)}' twice; give each class a name of its own"
            )
        seen.add(name)
