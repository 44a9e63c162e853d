"""Read the facts about the encoder in a checkpoint. See weights.py for reading the file itself."""

import math
from argparse import Namespace
from typing import Any, NamedTuple

from moco.errors import InputError
from moco.sections import NORM_EPS, STEMS
from moco.sections_eval import TEST_RESIZES
from moco.sections_images import EXIF

CLASSIFIERS = ("linear", "finetune", "semisup")  # the methods of main_lincls.py and main_semisup.py


def is_count(value: object) -> bool:
    """Return whether `value` is an integer from 1 to the largest int64."""
    return type(value) is int and 0 < value < 2**63


LARGEST_IMAGE = 1 << 14  # pixels; a larger size in a file is ignored


class Metadata(NamedTuple):
    """The facts about the encoder in a checkpoint of any origin.

    An entry that is absent from the file, or has the wrong type there, is None.
    """

    arch: str | None
    method: str  # the pre-training method; "unknown" if the file does not say
    epoch: int | None  # number of pre-training epochs
    options: dict[str, Any]  # the options of the run; {} if the file has none
    image_size: int | None  # pixels, the size that the network was trained at
    stem: str | None = None  # the stem of a ResNet, see `resnets.resnet`
    mean: list[float] | None = None  # [3], mean of RGB values in [0, 1] used for normalization
    std: list[float] | None = None  # [3], their standard deviation used for normalization
    norm_eps: str | None = None  # the epsilons of a Swin's layer norms, one of NORM_EPS
    test_resize: str | None = None  # of a classifier's test images, see `sections_eval.Views`
    exif: str | None = None  # these three: how images were decoded, see `sections_images.Decoding`
    white: float | None = None
    shrink_on_decode: bool | None = None
    script: str | None = None  # of the pre-training, such as synco for main_synco.py


def read_metadata(state: dict[str, Any]) -> Metadata:
    """Return the `Metadata` of a checkpoint's content `state`."""
    arch, method, epoch, options = (state.get(key) for key in ("arch", "method", "epoch", "args"))
    options = (
        options
        if isinstance(options, dict)
        else vars(options)
        if isinstance(options, Namespace)
        else {}
    )
    size = state.get("image_size", options.get("image_size"))
    white, shrink = options.get("white"), options.get("shrink_on_decode")
    script = options.get("script")
    if method in CLASSIFIERS:
        epoch, encoder = options.get("pretrain_epochs"), options.get("encoder_method")
        script = options.get("encoder_script")
        if isinstance(encoder, str):
            frozen = options.get("weights") == "freeze"
            method = encoder if frozen else f"{encoder}, fine-tuned"
    return Metadata(
        arch if isinstance(arch, str) and arch else None,
        method if isinstance(method, str) else "unknown",
        epoch if is_count(epoch) else None,
        options,
        size if type(size) is int and 0 < size < LARGEST_IMAGE else None,
        options.get("stem") if options.get("stem") in STEMS else None,
        *(channels(options.get(name), name) for name in ("mean", "std")),
        options.get("norm_eps") if options.get("norm_eps") in NORM_EPS else None,
        options.get("test_resize") if options.get("test_resize") in TEST_RESIZES else None,
        options.get("exif") if options.get("exif") in EXIF else None,
        white if isinstance(white, float) and 0 < white < math.inf else None,
        shrink if isinstance(shrink, bool) else None,
        script if isinstance(script, str) else None,
    )


def norm_eps(path: str, found: Metadata, given: str | None) -> str:
    """Return the epsilons of the layer norms: those in the file, else `given`, else timm's.

    Raises InputError if `given` contradicts the file.
    """
    if given and found.norm_eps not in (None, given):
        raise InputError(
            f"--norm-eps {given}: {path} was trained with {found.norm_eps}; leave --norm-eps out"
        )
    return found.norm_eps or given or NORM_EPS[0]


def normalization_note(path: str, found: Metadata) -> str:
    """Return a line to print if ImageNet's mean or std is used; "" if the file has both."""
    absent = " and ".join(name for name in ("mean", "std") if getattr(found, name) is None)
    verb = "are" if " and " in absent else "is"
    return absent and f"{path}: does not say the {absent} of its images; ImageNet's {verb} used"


def channels(value: object, name: str) -> list[float] | None:
    """Return `value` as a list if it is a valid mean or std of R, G and B; else None.

    Args:
        value: an untrusted value. Three floats in [0, 1] are valid.
        name: "mean" or "std"; a std of 0 is not valid.
    """
    three = isinstance(value, list | tuple) and len(value) == 3
    if not three or not all(isinstance(one, float) and 0 <= one <= 1 for one in value):
        return None
    return None if name == "std" and 0 in value else list(value)
