"""Parts of an image folder."""

from dataclasses import replace

import numpy as np
import torch

from moco import rng
from moco.data.datasets import ImageFolder
from moco.errors import InputError


def hold_out(folder: ImageFolder, fraction: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """Split `folder` into the rest and a random `fraction` of each class, rounded, one image at least; the same for a seed.

    Raises InputError where a class has a single image.
    """
    order = torch.randperm(len(folder), generator=rng.generator("cpu", rng.SPLIT, seed)).numpy()
    order = order[folder.labels[order].argsort(kind="stable")]  # by class, at random within each
    starts = np.bincount(folder.labels, minlength=len(folder.classes)).cumsum()[:-1]
    held = np.zeros(len(folder), dtype=bool)
    for name, places in zip(folder.classes, np.split(order, starts), strict=True):
        if len(places) == 1:
            raise InputError(f"{folder.root / name}: has one image only, of which no part can be held out; add images")
        held[places[: min(len(places) - 1, max(1, round(fraction * len(places))))]] = True
    return _part(folder, ~held), _part(folder, held)


def _part(folder: ImageFolder, rows: np.ndarray) -> ImageFolder:
    return replace(folder, paths=folder.paths[rows], labels=folder.labels[rows])
