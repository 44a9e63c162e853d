"""Draw the sample of images whose features the report shows."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from moco.data import registry
from moco.data.images import Images

CLASSES, POINTS = 20, 2000  # maximum numbers of classes and images on a map
QUERIES = 8  # images whose neighbours are shown


@dataclass(frozen=True)
class Sample:
    """The sample of images that is shown for all encoders of a data set.

    Attributes:
        bank: training images.
        points: images of the map, of the same classes. They are from val/. If there are no labelled
            images there, they are from `bank`.
        queries: indices in `points` of the images whose neighbours are shown.
        all_classes: number of classes in the full split of `points`.
        in_bank: indices in `bank` of the `points`; None if these are from val/.
    """

    bank: Images
    points: Images
    queries: np.ndarray
    all_classes: int
    in_bank: np.ndarray | None

    @property
    def counts(self) -> str:
        """Return the numbers of images, as text."""
        val = f" and {len(self.points)} val" if self.in_bank is None else ""
        return f"{len(self.bank)} train{val} images"

    @property
    def map_text(self) -> str:
        """Return the caption of a map."""
        classes = len(np.unique(self.points.labels))
        of = f"{classes} of {self.all_classes}" if classes < self.all_classes else f"{classes}"
        split = "val" if self.in_bank is None else "train"
        labels = f"of {of} classes" if self.points.labelled else "without labels"
        return (
            f"{len(self.points)} {split} images {labels}, by t-SNE of their features. "
            "Distances between groups mean little."
        )

    @property
    def neighbours_text(self) -> str:
        """Return the caption of a picture of neighbours."""
        left, other = ("val", "") if self.in_bank is None else ("training", "other ")
        text = f"Left: {left} images. Right: for each, the nearest {other}training images and "
        text += f"their cosine similarity, out of {len(self.bank)} images"
        if not self.bank.labelled:
            return f"{text}."
        text += " of the map's classes. A green frame is the same class; a red frame and x, "
        return f"{text}another class."


@cache
def draw(
    dataset: str,
    data: str,
    class_list: str | None,
    file_list: str | None,
    images: int,
    seed: int,
) -> Sample:
    """Return a random sample of a data set, of at most `CLASSES` classes.

    Args:
        dataset: name of the data set in the registry.
        data: its folder.
        class_list: file with the names of the classes to use, if any.
        file_list: file with the paths of the images to use, if any.
        images: maximum number of training images. There are at most `POINTS` images on the map.
        seed: seed of the sample.

    Raises InputError if the data set cannot be read.
    """
    train, val = registry.train_images(dataset, data, class_list, file_list), None
    if registry.has_test_images(dataset, data, file_list):
        val = registry.test_images(dataset, data, class_list)
    rng = np.random.default_rng(seed)
    there = np.unique((train if val is None else val).labels)
    classes = there[np.linspace(0, len(there) - 1, min(CLASSES, len(there))).round().astype(int)]
    bank, in_bank = _some_of(train, classes, images, rng), None
    if val is None:
        in_bank = np.sort(rng.permutation(len(bank))[:POINTS])
        points = bank.subset(in_bank)
    else:
        points = _some_of(val, classes, POINTS, rng)
    return Sample(bank, points, _queries(points, classes), len(there), in_bank)


def _some_of(part: Images, classes: np.ndarray, most: int, rng: np.random.Generator) -> Images:
    """Return at most `most` random images of the given classes."""
    indices = rng.permutation(np.flatnonzero(np.isin(part.labels, classes)))[:most]
    return part.subset(np.sort(indices))


def _queries(points: Images, classes: np.ndarray) -> np.ndarray:
    """Return the indices of `QUERIES` images, of as many classes as possible."""
    if len(classes) == 1:
        return np.unique(np.linspace(0, len(points) - 1, QUERIES).round().astype(int))
    one_each = [np.flatnonzero(points.labels == label)[:QUERIES] for label in classes]
    # the first image of each class, then the second of each, ...
    turns = [found[turn] for turn in range(QUERIES) for found in one_each if turn < len(found)]
    count = min(len(turns), max(QUERIES, sum(len(found) > 0 for found in one_each)))
    chosen = np.linspace(0, count - 1, min(QUERIES, count)).round().astype(int)
    return np.array(turns)[chosen]
