"""Draw the sample of images whose features the report shows, and compare their classes."""

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
        classes = len(present(self.points))
        of = f"{classes} of {self.all_classes}" if classes < self.all_classes else f"{classes}"
        split = "val" if self.in_bank is None else "train"
        labels = f"of {of} classes" if self.points.labelled else "without labels"
        return f"{len(self.points)} {split} images {labels}"

    @property
    def neighbours_text(self) -> str:
        """Return the caption of a picture of neighbours."""
        left, other = ("val", "") if self.in_bank is None else ("training", "other ")
        text = f"Left: random {left} images. Right: for each, the nearest {other}training images "
        text += f"and their cosine similarity, out of {len(self.bank)} images"
        if not self.bank.labelled:
            return f"{text}."
        same = "share a class" if self.bank.multi_label else "the same class"
        other = "share none" if self.bank.multi_label else "another class, which is named"
        text += f" of the map's classes. ✓ and a solid frame: {same}. "
        return f"{text}✗ and a dashed frame: {other}."

    def same_class(self, query: int, indices: np.ndarray) -> np.ndarray:
        """Return whether each image of the bank shares a class with image `query` of `points`."""
        mine, others = self.points.labels[query], self.bank.labels[indices]
        if not self.points.multi_label:
            return others == mine
        return ((others == 1) & (mine == 1)).any(1)


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
    there = present(train if val is None else val)
    classes = there[np.linspace(0, len(there) - 1, min(CLASSES, len(there))).round().astype(int)]
    bank, in_bank = _some_of(train, classes, images, rng), None
    if val is None:
        in_bank = np.sort(rng.permutation(len(bank))[:POINTS])
        points = bank.subset(in_bank)
    else:
        points = _some_of(val, classes, POINTS, rng)
    return Sample(bank, points, queries(points, classes, rng), len(there), in_bank)


def present(images: Images) -> np.ndarray:
    """Return the classes that some image shows, in ascending order."""
    if images.multi_label:
        return np.flatnonzero((images.labels == 1).any(0))
    return np.unique(images.labels)


def single_class(images: Images) -> np.ndarray:
    """Return the class of each image [N]; -1 if it shows several or none."""
    if not images.multi_label:
        return images.labels
    shown = images.labels == 1
    return np.where(shown.sum(1) == 1, shown.argmax(1), -1)


def names_of_classes(images: Images, i: int) -> str:
    """Return the names of the classes that image `i` shows, or its name if it has no label."""
    if not images.labelled:
        return images.name(i)
    if not images.multi_label:
        return images.classes[images.labels[i]]
    return ", ".join(images.classes[label] for label in np.flatnonzero(images.labels[i] == 1))


def _some_of(part: Images, classes: np.ndarray, most: int, rng: np.random.Generator) -> Images:
    """Return at most `most` random images of the given classes."""
    if part.multi_label:
        wanted = (part.labels[:, classes] == 1).any(1)
    else:
        wanted = np.isin(part.labels, classes)
    indices = rng.permutation(np.flatnonzero(wanted))[:most]
    return part.subset(np.sort(indices))


def queries(points: Images, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of `QUERIES` random images, of as many classes as possible."""
    order = rng.permutation(len(points))
    labels = single_class(points)[order]
    one_each = [order[labels == label][:QUERIES] for label in rng.permutation(classes)]
    # an image of each class, then a second one of each, ..., then those of several classes
    turns = [found[turn] for turn in range(QUERIES) for found in one_each if turn < len(found)]
    return np.array([*turns, *order[labels < 0]], dtype=int)[:QUERIES]
