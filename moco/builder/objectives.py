"""The losses that --loss of main_sogclr.py and main_synco.py selects, and their settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from moco.builder.isogclr import ISogCLR, Temperatures, temperature_step
from moco.builder.negatives import Schedule
from moco.builder.simclr import SimCLR
from moco.builder.sogclr import LEAST_T, SogCLR
from moco.builder.supcon import SupCon
from moco.errors import InputError
from moco.loss.contrastive import InfoNCE
from moco.loss.debiased import ANNEAL_STEPS, Debiased
from moco.loss.decoupled import Decoupled
from moco.options import option

# the losses that depend on the negatives only through the log-sum-exp of their logits
LOSSES = ("infonce", "dcl", "dclw", "debiased", "hcl")
# the losses that use each setting
USED_BY = {
    "tau_plus": ("debiased", "hcl"),
    "beta": ("hcl",),
    "anneal": ("hcl",),
    "dclw_sigma": ("dclw",),
}

AVERAGES = ("sogclr", "isogclr")  # losses with --gamma
GAMMA, GAMMA_ISOGCLR = 0.9, 0.8  # the authors' values


@dataclass(frozen=True)
class Settings:
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


def create(settings: Settings) -> InfoNCE:
    """Return the loss of an anchor."""
    if settings.loss in ("dcl", "dclw"):
        return Decoupled(settings.dclw_sigma if settings.loss == "dclw" else None)
    if settings.loss in ("debiased", "hcl"):
        hard = settings.loss == "hcl"
        beta, anneal = settings.beta * hard, hard and settings.anneal == "down"
        return Debiased(settings.tau_plus, beta, anneal)
    return InfoNCE()


@dataclass(frozen=True)
class BatchSettings(Settings):
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


def create_method(
    settings: BatchSettings,
    temperatures: Temperatures,
    encoder: Callable[[], nn.Module],
    images: int,
    labels: Tensor | None = None,
    synthetic: Schedule = Schedule(),  # noqa: B008 (frozen)
) -> SimCLR:
    """Return the method of a loss of the batch.

    Args:
        settings: the loss and its settings.
        temperatures: the settings of iSogCLR's temperatures.
        encoder: creates the encoder with its projection head.
        images: number of training images.
        labels: class of each training image, [N]; needed if the loss uses labels.
        synthetic: the synthetic negatives; see `check_synthetic`.
    """
    t, gamma, local = settings.t, settings.own_gamma, settings.gather_gradient == "local"
    if settings.loss == "sogclr":
        return SogCLR(encoder, images, t, gamma, local)
    if settings.loss == "isogclr":
        step = temperature_step(temperatures, t)
        return ISogCLR(encoder, images, t, gamma, local, step, temperatures.set_first)
    if settings.loss == "supcon":
        return SupCon(encoder, labels, t, local)
    return SimCLR(encoder, t, create(settings), local, synthetic)


def check(settings: BatchSettings, temperatures: Temperatures, epochs: int) -> None:
    """Raise InputError if the temperatures' range, or --anneal, does not fit the run."""
    if settings.loss == "isogclr":
        temperature_step(temperatures, settings.t)
    check_anneal(settings, epochs)


def note(settings: BatchSettings) -> str:
    """Return a line that says which loss the run has."""
    negatives = "the negatives of the batch"
    if settings.loss in AVERAGES:
        negatives = f"a moving average for each image, gamma {settings.own_gamma:g}"
    if settings.uses_labels:
        negatives = "trains on the labels; an upper bound, not a self-supervised method"
    return f"loss {settings.loss}: {negatives}"


def check_queue(settings: Settings, synthetic: int, epochs: int) -> None:
    """Raise InputError if a loss of MoCo's queue does not fit the run.

    Args:
        settings: the loss and its settings.
        synthetic: number of synthetic negatives of each query.
        epochs: number of epochs.
    """
    check_synthetic(settings.loss, synthetic, "infonce")
    check_anneal(settings, epochs)


def check_synthetic(loss: str, synthetic: int, infonce: str = "simclr") -> None:
    """Raise InputError if synthetic negatives do not fit the loss.

    Args:
        loss: the value of --loss.
        synthetic: number of synthetic negatives of each query.
        infonce: the script's name for InfoNCE, a value of --loss.
    """
    if synthetic and loss not in (infonce, "dcl", "dclw"):
        raise InputError(
            f"--loss {loss}: assumes that all negatives are real images, but there are "
            f"{synthetic} synthetic negatives; leave out --n1 to --n6, or give --loss {infonce}, "
            "dcl or dclw"
        )


def check_anneal(settings: Settings, epochs: int) -> None:
    """Raise InputError if the run has too few epochs for the steps of --anneal."""
    if settings.loss == "hcl" and settings.anneal and epochs < ANNEAL_STEPS:
        raise InputError(
            f"--anneal {settings.anneal}: --beta falls in {ANNEAL_STEPS} steps of at least one "
            f"epoch, but the run has --epochs {epochs}; leave out --anneal, or raise --epochs"
        )
