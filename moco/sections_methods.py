"""The sections of settings of some methods only: their losses, and networks of FNC and MoBY.

Like moco/sections.py, this file does not import torch, so that options are read quickly.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco.errors import InputError
from moco.loss.settings import ANNEAL_STEPS, LEAST_T, MODES, SOURCES
from moco.options import (
    AVERAGE,
    ENTRIES,
    LAYERS,
    LEARNING_RATE,
    NATURAL,
    POSITIVE,
    TEMPERATURE,
    WIDTH,
    option,
)
from moco.sections_negatives import SyntheticNegatives

# the losses that depend on the negatives only through the log-sum-exp of their logits
LOSSES = ("infonce", "dcl", "dclw", "debiased", "hcl")
# for each setting, the losses that use it
USED_BY = {
    "tau_plus": ("debiased", "hcl"),
    "beta": ("hcl",),
    "anneal": ("hcl",),
    "dclw_sigma": ("dclw",),
}

AVERAGES = ("sogclr", "isogclr")  # losses with --gamma
GAMMA, GAMMA_ISOGCLR = 0.9, 0.8  # the authors' values


@dataclass(frozen=True)
class Loss:
    """The loss, and the settings of those losses that have any."""

    TITLE: ClassVar[str] = "loss"
    loss: str = option(
        "infonce",
        "infonce: MoCo's loss; dcl, dclw: without the positive in the denominator; debiased, hcl: "
        "corrected for false negatives, hcl with hard negatives",
        choices=LOSSES,
    )
    tau_plus: float = option(
        0.1,
        "debiased, hcl: assumed probability that a negative has the class of its anchor",
        range="[0, 1)",
    )
    beta: float = option(
        1.0, "hcl: concentration on hard negatives; 0: as debiased", range="[0, 100]"
    )
    anneal: str | None = option(
        None,
        f"hcl; down: --beta falls to 0 during the run, in {ANNEAL_STEPS} steps",
        choices=("down",),
        unset="--beta is constant",
    )
    dclw_sigma: float = option(
        0.5, "dclw: temperature of the positives' weights", range="[0.02, 100]"
    )


@dataclass(frozen=True)
class BatchLoss(Loss):
    """The loss of a batch, and its settings: those of main_sogclr.py."""

    TITLE: ClassVar[str] = "SimCLR, SogCLR and other losses of a batch"
    loss: str = option(
        "sogclr",
        "sogclr: with a moving average for each image; isogclr: also with a temperature for each; "
        "simclr: NT-Xent; dcl, dclw: without the positive in the denominator; debiased, hcl: "
        "corrected for false negatives, hcl with more weight on hard ones; supcon: uses labels",
        choices=("sogclr", "isogclr", "simclr", *LOSSES[1:], "supcon"),
    )
    gamma: float | None = option(
        None,
        "sogclr, isogclr: weight of an image's new value in its moving average",
        range="(0, 1]",
        unset=f"{GAMMA}; {GAMMA_ISOGCLR} with isogclr",
    )
    t: float = option(
        0.1,
        "softmax temperature; with isogclr, every image's temperature at the start",
        range=f"[{LEAST_T}, 100]",
    )
    gather_gradient: str = option(
        "all",
        "all: a feature gets the gradient of the losses of all processes, which is exact; local: "
        "that of its own process's loss only, as in SogCLR's PyTorch code",
        choices=("all", "local"),
    )

    @property
    def own_gamma(self) -> float:
        """Return `gamma`, or the default of the loss."""
        return self.gamma or (GAMMA_ISOGCLR if self.loss == "isogclr" else GAMMA)

    @property
    def uses_labels(self) -> str:
        """Return the option that makes the loss use labels; "" if it uses none."""
        return "--loss supcon" if self.loss == "supcon" else ""


@dataclass(frozen=True)
class Temperatures:
    """The steps of the temperatures; the defaults are those of the authors' README."""

    TITLE: ClassVar[str] = "temperatures of iSogCLR"
    rho: float = option(0.4, "the larger, the lower the temperatures", range="[0, 100]")
    eta: float = option(0.03, "learning rate of the temperatures", range=LEARNING_RATE)
    beta_u: float = option(
        0.5,
        "weight of a temperature's new gradient in its moving average",
        range="(0, 1]",
    )
    t_range: tuple[float, ...] = option(
        (0.05, 1.0),
        "least and largest temperature",
        range=f"[{LEAST_T}, 100]",
        nargs=2,
        metavar=("LEAST", "MOST"),
    )
    t_clip: float = option(
        3.0,
        "largest magnitude of a temperature's gradient; 0: no limit",
        range="[0, 1000000]",
        metavar="SIZE",
    )
    set_first: bool = option(
        False,
        "the first visit of an image sets its moving average, as in SogCLR, instead of blending "
        "it with 0",
    )


@dataclass(frozen=True)
class FalseNegatives:
    """The settings of FNC: its views, its memory, and how false negatives are found."""

    TITLE: ClassVar[str] = "FNC"
    support_size: int = option(
        8,
        "extra views per image, used to find false negatives",
        range="[0, 100]",
        metavar="N",
    )
    fn_mode: str = option(
        "attract",
        "attract false negatives, eliminate them from the loss, or off: do not search them",
        choices=MODES,
    )
    fn_from: str = option(
        "similarity",
        "similarity: the most similar entries are false negatives; labels: all entries of the "
        "image's class are, as an upper bound",
        choices=SOURCES,
    )
    fn_topk: int = option(
        10, "maximum number of false negatives per image", range=NATURAL, metavar="K"
    )
    fn_threshold: float = option(
        0.7, "minimum cosine similarity of a false negative", range="[-1, 1]", metavar="COS"
    )
    memory_multiplier: int = option(
        16,
        "size of the memory, in total batches; 0: no memory, compare images with the batch",
        range="[0, 100000]",
        metavar="N",
    )
    ema: float = option(0.999, "momentum of the encoder that fills the memory", range=AVERAGE)
    temperature: float = option(0.1, "softmax temperature", range=TEMPERATURE, metavar="T")
    num_proj_layers: int = option(3, "linear layers of the projection head", range=LAYERS)
    proj_out_dim: int = option(128, "feature size", range=WIDTH)
    loss_chunk: int = option(
        256,
        "images compared at a time; fewer need less memory",
        range=POSITIVE,
        metavar="IMAGES",
    )

    @property
    def uses_labels(self) -> str:
        """Return the option that makes the loss use labels; "" if it uses none."""
        return "--fn-from labels" if self.fn_mode != "off" and self.fn_from == "labels" else ""

    def check(self) -> None:
        """Raise InputError if --fn-topk contradicts --fn-from."""
        if self.uses_labels and not self.fn_topk:
            raise InputError(
                "--fn-topk 0: there are no false negatives, but --fn-from labels takes all entries "
                "of the image's class as such; leave out one of them"
            )

    def note(self, views: int, entries: int) -> str:
        """Return a line about the views, the false negatives and the memory of `entries`."""
        found = f"up to {self.fn_topk} per image, with a similarity above {self.fn_threshold:g}"
        if self.uses_labels:
            found = "by the labels: an upper bound, not a self-supervised method"
        found = "not searched" if self.fn_mode == "off" else found
        memory = f"a memory of {entries} entries" if entries else "no memory"
        return f"{views} views; false negatives: {self.fn_mode}, {found}; {memory}"


# The papers' momentum, learning rate and weight decay. The papers scale the learning rate by
# total batch / 512, and this code by total batch / 256.
MOBY = {
    "moby": {"moco_m": 0.99, "lr": 0.0005, "wd": 0.05},
    "synco": {"moco_m": 0.99, "lr": 0.0005, "wd": 0.05},
    "byol": {"moco_m": 0.996, "lr": 0.0001, "wd": 0.03},
}


MOBY_DEFAULTS = "; ".join(
    f"{name} {', '.join(f'{value:g}' for value in values.values())}"
    for name, values in MOBY.items()
)


@dataclass(frozen=True)
class MobyNetworks:
    """The online and the target network."""

    TITLE: ClassVar[str] = "online and target network"
    moco_m: float | None = option(
        None,
        "momentum of the target at the start; it rises to 1 after the last step",
        range=AVERAGE,
        unset="see --method",
    )
    online_drop_path: float | None = option(
        None,
        "stochastic depth of the online encoder",
        range="[0, 1)",
        metavar="P",
        unset="0.2 for a ViT or Swin with a short name, else 0",
    )
    target_drop_path: float = option(
        0.0, "stochastic depth of the target encoder", range="[0, 1)", metavar="P"
    )
    stop_grad_conv1: bool = option(False, "do not train the patch projection")
    proj_layers: int = option(2, "linear layers of the projector", range=LAYERS)
    pred_layers: int = option(2, "linear layers of the predictor", range=LAYERS)
    mlp_dim: int = option(4096, "hidden width of projector and predictor", range=WIDTH)
    moco_dim: int = option(256, "feature size", range=WIDTH)


@dataclass(frozen=True)
class MobyContrast:
    """The queues of negatives, and the temperature, of MoBY and SynCo-v2."""

    TITLE: ClassVar[str] = "contrast (moby, synco)"
    queue: int = option(4096, "entries in each view's queue", range=ENTRIES, metavar="K")
    moco_t: float = option(0.2, "softmax temperature", range=TEMPERATURE, metavar="T")


@dataclass(frozen=True)
class MobyNegatives(SyntheticNegatives):
    """The synthetic negatives, and the epochs that use them."""

    TITLE: ClassVar[str] = "synthetic negatives (synco)"
    synthetic_first: int = option(
        30, "first epoch with synthetic negatives", range=NATURAL, metavar="EPOCH"
    )
    synthetic_last: int = option(
        100, "first epoch without them after that", range=NATURAL, metavar="EPOCH"
    )
