"""Read revisited Oxford and Paris, and evaluate rankings of their images.

The data sets and the evaluation are those of Radenović et al., "Revisiting Oxford and Paris"
(CVPR 2018, arXiv 1803.11285).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moco.data.images import ImageFolder
from moco.data.names import Names
from moco.errors import InputError, short
from moco.files import UnreadableError
from moco.pickles import read_pickle

_WHERE = "get the ground truth and the images from http://cmp.felk.cvut.cz/revisitop"


class Query(NamedTuple):
    """The ground truth of a query: indices of database images, and the box of the query."""

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels, from 0


# the positives and the ignored images of each setting
SETTINGS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass(frozen=True)
class Benchmark:
    """A data set: the database, the query images, and the ground truth of each query."""

    database: ImageFolder
    queries: ImageFolder
    truth: tuple[Query, ...]


def read(name: str, root: str) -> Benchmark:
    """Return the data set `name` in the folder `root`, or in a folder of that name in it.

    The ground truth is a pickle. Only plain values and arrays are read from it (see `read_pickle`),
    because it is downloaded.

    Raises InputError if the ground truth is missing, damaged or wrong, if an image is missing, or
    if a box is outside its image.
    """
    folders = [Path(root).expanduser() / name, Path(root).expanduser()]
    folder = next((one for one in folders if (one / f"gnd_{name}.pkl").is_file()), None)
    if folder is None:
        raise InputError(
            f"{root}: no gnd_{name}.pkl in it, nor in {name}/; expected {name}/gnd_{name}.pkl and "
            f"{name}/jpg/*.jpg; {_WHERE}"
        )
    file = folder / f"gnd_{name}.pkl"
    try:
        found = read_pickle(file)
    except UnreadableError as error:
        raise error.at(file) from None
    except InputError as error:
        raise InputError(f"{file}: {error}; {_WHERE}") from None
    try:
        database, queries, truth = _parse(found)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"no '{error.args[0]}'" if isinstance(error, KeyError) else short(str(error))
        raise InputError(
            f"{file}: is not the ground truth of {name} ({reason}); {_WHERE}"
        ) from None
    images = folder / "jpg"
    names = [*database, *queries]
    missing = [one for one in names if not (images / f"{one}.jpg").is_file()]
    if missing:
        raise InputError(
            f"{images}: {len(missing)} of the {len(names)} images of {name} are missing, first "
            f"{missing[0]}.jpg; {_WHERE}"
        )
    for one, query in zip(queries, truth, strict=True):
        _check_box(images / f"{one}.jpg", query.box, file)
    return Benchmark(_folder(images, database), _folder(images, queries), truth)


def _check_box(image: Path, box: tuple[float, float, float, float], file: Path) -> None:
    """Raise InputError if the box of a query does not overlap its image."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
    except OSError:
        return  # the loader says so
    left, top, right, bottom = box
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        shown = ", ".join(f"{value:g}" for value in box)
        raise InputError(
            f"{file}: the box ({shown}) of {image.name} is outside the image of {width} x {height} "
            f"pixels; {_WHERE}"
        )


def _folder(root: Path, names: Sequence[str]) -> ImageFolder:
    """Return the images with these names, which have no labels."""
    paths = Names.of([f"{name}.jpg".encode() for name in names])
    return ImageFolder(root, np.zeros(len(names), np.int64), (), paths)


def _parse(found: Any) -> tuple[list[str], list[str], tuple[Query, ...]]:
    """Return the names of the database and of the queries, and the ground truth.

    Raises KeyError, TypeError or ValueError if `found` is anything else.
    """
    if not isinstance(found, dict):
        raise TypeError("not a dict")
    database, queries = (_names(found[key], key) for key in ("imlist", "qimlist"))
    if len(found["gnd"]) != len(queries):
        raise ValueError(f"{len(found['gnd'])} entries of gnd for {len(queries)} queries")
    truth = []
    for name, one in zip(queries, found["gnd"], strict=True):
        easy, hard, junk = (_indices(one[key], len(database)) for key in ("easy", "hard", "junk"))
        every = np.concatenate([easy, hard, junk])
        if len(set(every.tolist())) < len(every):
            raise ValueError(f"an image of {name} is twice among easy, hard and junk")
        left, top, right, bottom = (float(x) for x in one["bbx"])
        if not (right > left and bottom > top and np.isfinite([left, top, right, bottom]).all()):
            raise ValueError(f"the box of {name} is empty")
        truth.append(Query(easy, hard, junk, (left, top, right, bottom)))
    return database, queries, tuple(truth)


def _names(value: Any, key: str) -> list[str]:
    names = [str(one) for one in value]
    if not names or any(not one or Path(one).name != one for one in names):
        raise ValueError(f"{key} is not a list of file names")
    return names


def _indices(value: Any, count: int) -> np.ndarray:
    indices = np.asarray(value)
    if not indices.size:
        return np.empty(0, np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError("easy, hard and junk are not lists of indices")
    if not 0 <= indices.min() <= indices.max() < count:
        raise ValueError(f"an index is not one of the {count} images")
    return indices.astype(np.int64)


def evaluate(
    ranking: np.ndarray, truth: Sequence[Query], ks: Sequence[int], formula: str = "revisited"
) -> dict[str, float]:
    """Return `map_SETTING`, and `mp_SETTING_K` for each K, in [0, 1]; see `SETTINGS`.

    A setting without any positive is left out. `mp_SETTING_K` is the mean precision at K: of the
    first K results without the ignored images, where K is at most the rank of the last positive.

    Args:
        ranking: indices of database images for each query, the most similar first, [Q, R]. Images
            that it lacks are never found.
        truth: the ground truth of the Q queries.
        ks: numbers of results.
        formula: revisited: the mean over the queries that have positives of
            `average_precision`. synco-v2: as in SynCo-v2's code, the ignored images count as wrong
            results, and queries without positives count 0.
    """
    found = {}
    for name, (wanted, ignored) in SETTINGS.items():
        precisions, at = [], []
        for order, one in zip(ranking, truth, strict=True):
            positives = np.concatenate([getattr(one, part) for part in wanted])
            left_out = np.concatenate([getattr(one, part) for part in ignored])
            ranks = np.flatnonzero(np.isin(order[~np.isin(order, left_out)], positives))
            if not len(positives):
                if formula == "synco-v2":
                    precisions.append(0.0)
                    at.append([0.0] * len(ks))
                continue
            at.append([precision_at(ranks, k) for k in ks])
            if formula == "synco-v2":
                every = np.flatnonzero(np.isin(order, positives))
                precisions.append(float(((np.arange(len(every)) + 1) / (every + 1)).sum()))
                precisions[-1] /= len(positives)
            else:
                precisions.append(average_precision(ranks, len(positives)))
        if precisions:
            found[f"map_{name}"] = float(np.mean(precisions))
            means = np.mean(at, axis=0)
            found |= {f"mp_{name}_{k}": float(x) for k, x in zip(ks, means, strict=True)}
    return found


def average_precision(ranks: np.ndarray, positives: int) -> float:
    """Return the area under the curve of precision over recall, by the trapezoidal rule.

    The precision before the j-th positive, at rank r, is j / r, or 1 if r = 0; after it, it is
    (j + 1) / (r + 1). j and r count from 0. This is the formula of the authors' code.

    Args:
        ranks: ranks of the positives that were found, from 0, in ascending order. The ignored
            images are not counted.
        positives: number of positives, found or not.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float(((before + after) / 2).sum() / positives)


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Return the precision of the first `k` results, or of those up to the last positive.

    Args:
        ranks: as in `average_precision`.
        k: number of results.
    """
    if not len(ranks):
        return 0.0
    k = min(k, int(ranks[-1]) + 1)
    return float((ranks < k).sum() / k)
