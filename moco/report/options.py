"""The settings of the page of tools/negatives.py. This file does not import torch, for --help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The images to measure negatives on, and how to draw them.

    Attributes:
        data: the data folder.
        dataset: name of its data set in the registry.
        class_list: file with the names of the classes to use, if any.
        images: maximum number of images in the bank.
        queries: maximum number of queries.
        n_hard: number of hardest negatives; by default the same fraction as in the run.
        seed: seed of the sample, the views and the synthetic negatives.
    """

    data: str
    dataset: str = "imagenet"
    class_list: str | None = None
    images: int = 4096
    queries: int = 256
    n_hard: int | None = None
    seed: int = 0
