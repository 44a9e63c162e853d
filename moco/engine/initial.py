"""Start the networks of a pre-training from weights: the option `--init`."""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from moco.builder.base import Method
from moco.config import Pretraining
from moco.encoder import archs, metadata, networks, pretrained, weights
from moco.errors import InputError, short, unknown
from moco.messages import print_rank0


def check(config: Pretraining) -> None:
    """Raise InputError if the weights of `--init` cannot be read or do not fit the architecture.

    Call it before any process starts: it also downloads named weights.
    """
    if not _is_used(config):
        return
    network, views = config.network, config.views
    if _is_named(config.start.init):
        print_rank0(f"--init {config.start.init}: loads the weights, which may need the network")
    net = networks.create(
        network.arch, 0, views.image_size, stem=network.stem, norm_eps=network.norm_eps
    )
    _load_backbone(net, config, _read(config))


def load(method: Method, config: Pretraining) -> None:
    """Load the weights of `--init` into a new `method`, and print what matched.

    Heads stay new unless all their tensors are in the file, with the same names and shapes. A run
    that resumes gets its weights from its checkpoint, so nothing is loaded.

    Raises InputError if the weights cannot be read or do not fit.
    """
    if not _is_used(config):
        return
    state, net = _read(config), method.encoder
    tensors, matched = _load_backbone(net, config, state)
    line = f"{matched} of {len(networks.backbone_keys(net))} backbone tensors matched"
    if chosen := pretrained.describe_choice(net, tensors):
        line += f" ({chosen})"
    for name, (place, head) in _heads(method, pretrained.prefix(net, tensors)).items():
        fits = _load_exactly(head, tensors, place)
        line += f"; the head {name} {'matched, too' if fits else 'is new'}"
    method.reset_copies()
    print_rank0(f"--init {config.start.init}: {line}")
    _print_other_normalization(config, metadata.read_metadata(state))


def _is_used(config: Pretraining) -> bool:
    return bool(config.start.init and not config.log.resume)


def _is_named(init: str) -> bool:
    return init == "timm" or init.partition(":")[0] == "torchvision"


def _load_backbone(
    net: nn.Module, config: Pretraining, state: weights.State
) -> tuple[dict[str, Tensor], int]:
    """Load the backbone; return the named tensors in `state`, and how many of them matched.

    Raises InputError if they do not fit, with the option that would fit if it is known.
    """
    source, network = f"--init {config.start.init}", config.network
    facts, tensors = metadata.read_metadata(state), pretrained.tensors_of(net, state)
    with pretrained.suggest_arch(source, facts.arch, network.arch):
        stem = pretrained.stem_of(net, tensors)
        first = f"{pretrained.prefix(net, tensors)}conv1.weight"
        if isinstance(net, models.ResNet) and first in tensors and stem != network.stem:
            raise InputError(
                f"{source}: its stem is {stem}, not {network.stem}; give --stem {stem}"
            )
        matched = pretrained.load_backbone(net, tensors, source)
    eps = facts.norm_eps
    if archs.is_swin(network.arch) and eps not in (None, network.norm_eps):
        raise InputError(f"{source}: was trained with {eps}'s epsilons; give --norm-eps {eps}")
    return tensors, matched


def _heads(method: Method, start: str) -> dict[str, tuple[str, nn.Module]]:
    """Return the trained heads of `method` by name, each with the prefix of its tensors in a file.

    A head is the last layer of the encoder, or a module next to the encoder.

    Args:
        method: the method.
        start: the prefix of the encoder's tensors in the file.
    """
    net = method.encoder
    name = networks.head_name(net)
    heads = {name: (f"{start}{name}.", networks.head(net))}
    outer, dot, _ = start.removesuffix(".").rpartition(".")
    for name, child in method.named_children():
        if child is not net:
            heads[name] = (f"{outer}{dot}{name}.", child)
    return {
        name: (place, head)
        for name, (place, head) in heads.items()
        if any(parameter.requires_grad for parameter in head.parameters())
    }


def _load_exactly(head: nn.Module, tensors: dict[str, Tensor], start: str) -> bool:
    """Load a head if `tensors` has its tensors and no others below `start`; return whether it did.

    Batch norm's step counter may be missing, as in files from before PyTorch 0.4.
    """
    own = head.state_dict()
    found = {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
    missing = [name for name in own.keys() - found.keys() if "num_batches_tracked" not in name]
    if missing or found.keys() - own.keys():
        return False
    if not all(
        pretrained.fits(x, own[name]) and pretrained.is_finite(x) for name, x in found.items()
    ):
        return False
    head.load_state_dict(found, strict=False)
    return True


def _print_other_normalization(config: Pretraining, facts: metadata.Metadata) -> None:
    """Print a line if the weights were trained on images with another mean or std."""
    for name, then, now in (
        ("mean", facts.mean, config.views.mean),
        ("std", facts.std, config.views.std),
    ):
        if then and now and then != list(now):
            own, here = (" ".join(f"{one:g}" for one in values) for values in (then, now))
            print_rank0(
                f"--init {config.start.init}: its images were normalized with {name} {own}, and "
                f"those of this run with {here} (--{name})"
            )


def _read(config: Pretraining) -> weights.State:
    """Return the content of the file that `--init` gives, or its named weights.

    Raises InputError if the file cannot be read, or the weights are unknown or not available.
    """
    init, arch = config.start.init, config.network.arch
    library, _, name = init.partition(":")
    if library == "torchvision":
        return _torchvision_weights(arch, name)
    if init == "timm":
        return _timm_weights(arch)
    inside = Path(init) / "model.safetensors"  # of a folder of Hugging Face
    return weights.read(str(inside) if inside.is_file() else init)


def _torchvision_weights(arch: str, name: str) -> weights.State:
    library, network = networks.find(arch)
    if library != "torchvision":
        raise InputError(
            f"--init torchvision:{name}: {arch} is not a network of torchvision; "
            "give --init timm, or a file"
        )
    known = models.get_model_weights(network).__members__
    if name not in known:
        raise unknown(f"name of {arch}'s weights in torchvision", name, known)
    with _download(f"torchvision:{name}"):
        return {"arch": arch, "state_dict": known[name].get_state_dict(progress=False)}


def _timm_weights(arch: str) -> weights.State:
    if importlib.util.find_spec("timm") is None:
        raise InputError("--init timm: the weights come from timm: pip install timm")
    library, network = networks.find(arch)
    if library == "torchvision" and network not in archs.ARCHS:
        other = "is not a network of timm; give --init torchvision:NAME, or a file"
        raise InputError(f"--init timm: {arch} {other}")
    with _download("timm"):
        import timm

        name = archs.SHORT.get(network, network)
        described = timm.get_pretrained_cfg(name)
        if described is None or not described.has_weights:
            raise InputError(f"--init timm: timm has no weights for {arch}; give a file")
        # creating the network draws random numbers, which must not change those of the run
        with torch.random.fork_rng(devices=[]):
            state = timm.create_model(name, pretrained=True).state_dict()
        return {"arch": arch, "state_dict": state}


@contextlib.contextmanager
def _download(source: str) -> Iterator[None]:
    """Raise InputError for any error of a download, and hide the download's own messages."""
    try:
        logging.disable(logging.WARNING)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except InputError:
        raise
    except Exception as error:  # the libraries of networks raise errors of many types
        reason = short(" ".join(str(error).split()) or type(error).__name__)
        raise InputError(
            f"--init {source}: the library cannot load its weights: {reason}; if there is no "
            "network, download the weights elsewhere, and give the file with --init FILE"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
