"""The names of the data sets, and the facts about them that options need.

This file does not import torch, so that options are read quickly. `registry` loads the data sets.
"""

NAMES = (
    "imagenet",
    "photos",
    "cifar10",
    "cifar100",
    "stl10",
    "tiny_imagenet",
    "imagenette",
    "flowers",
    "pets",
    "food101",
    "cars",
    "caltech101",
    "dtd",
    "aircraft",
    "sun397",
    "voc2007",
    "places365",
    "places205",
)
IN_MEMORY = ("cifar10", "cifar100", "stl10")  # whose images are arrays of pixels, not image files
BY_HAND = ("imagenet", "photos", "cars", "places205")  # which --download cannot get
REVISITED = ("roxford5k", "rparis6k")  # of main_retrieval.py

# The metric that papers report for each data set: top-1 accuracy (acc1), its mean over the classes,
# or the mean over the classes of the 11-point average precision (map11).
METRIC = dict.fromkeys(NAMES, "acc1") | dict.fromkeys(
    ("flowers", "pets", "caltech101", "aircraft"), "mean_per_class"
)
METRIC["voc2007"] = "map11"

# The number of classes of each data set that --data-name accepts.
CLASS_COUNTS = {"imagenet100": 100, "imagenet1000": 1000}

# names in AdCo's and FNC's commands, and the folder of Tiny ImageNet
_ALIASES = {"place205": "places205", "imagenet2012": "imagenet"}
_ALIASES |= dict.fromkeys(("tiny-imagenet", "tiny-imagenet-200"), "tiny_imagenet")


def canonical(name: str) -> str:
    """Return a data set's name as in `NAMES`: in lower case, with papers' other names replaced."""
    return _ALIASES.get(name.lower(), name.lower())


def is_downloadable(name: str) -> bool:
    """Return whether `--download` can get the data set `name`."""
    return name in NAMES and name not in BY_HAND
