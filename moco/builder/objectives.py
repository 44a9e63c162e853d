"""Make the losses that --loss of main_sogclr.py and main_synco.py selects, and check them."""

from collections.abc import Callable

from torch import Tensor, nn

from moco.builder.isogclr import ISogCLR, temperature_step
from moco.builder.simclr import SimCLR
from moco.builder.sogclr import SogCLR
from moco.builder.supcon import SupCon
from moco.errors import InputError
from moco.loss.contrastive import InfoNCE
from moco.loss.debiased import Debiased
from moco.loss.decoupled import Decoupled
from moco.loss.settings import ANNEAL_STEPS
from moco.sections_methods import AVERAGES, BatchLoss, Loss, Temperatures
from moco.sections_negatives import Schedule


def create(settings: Loss) -> InfoNCE:
    """Return the loss of an anchor."""
    if settings.loss in ("dcl", "dclw"):
        return Decoupled(settings.dclw_sigma if settings.loss == "dclw" else None)
    if settings.loss in ("debiased", "hcl"):
        hard = settings.loss == "hcl"
        beta, anneal = settings.beta * hard, hard and settings.anneal == "down"
        return Debiased(settings.tau_plus, beta, anneal)
    return InfoNCE()


def create_method(
    settings: BatchLoss,
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


def check(settings: BatchLoss, temperatures: Temperatures, epochs: int) -> None:
    """Raise InputError if the temperatures' range, or --anneal, does not fit the run."""
    if settings.loss == "isogclr":
        temperature_step(temperatures, settings.t)
    check_anneal(settings, epochs)


def note(settings: BatchLoss) -> str:
    """Return a line that says which loss the run has."""
    negatives = "the negatives of the batch"
    if settings.loss in AVERAGES:
        negatives = f"a moving average for each image, gamma {settings.own_gamma:g}"
    if settings.uses_labels:
        negatives = "trains on the labels; an upper bound, not a self-supervised method"
    return f"loss {settings.loss}: {negatives}"


def check_queue(settings: Loss, synthetic: int, epochs: int) -> None:
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


def check_anneal(settings: Loss, epochs: int) -> None:
    """Raise InputError if the run has too few epochs for the steps of --anneal."""
    if settings.loss == "hcl" and settings.anneal and epochs < ANNEAL_STEPS:
        raise InputError(
            f"--anneal {settings.anneal}: --beta falls in {ANNEAL_STEPS} steps of at least one "
            f"epoch, but the run has --epochs {epochs}; leave out --anneal, or raise --epochs"
        )
