"""Published weights: which tensors of a file are the backbone, and which its projection head."""

import torch
from torch import Tensor, nn

from moco.encoder import timm_networks
from moco.encoder.networks import backbone_keys, classifier, head_name, set_head
from moco.errors import InputError


def load_backbone(net: nn.Module, tensors: dict[str, Tensor], source: str) -> int:
    """Load a published encoder into `net`, whatever prefix its names carry; returns how many tensors matched.

    The prefix is the one (of `PREFIXES`) that matches most names. What a transformer's tensors are called elsewhere, and position
    tables for images of another size, become timm's and the network's. Raises InputError where nothing matches, where a
    backbone tensor is missing or one too many, or where a shape differs.
    """
    state = net.state_dict()
    wanted = {name: state[name] for name in backbone_keys(net)}
    start = prefix(net, tensors)
    inner = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    try:
        mine = timm_networks.adapted(net, inner)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    found = {name: mine[name] for name in wanted if name in mine}
    # files older than PyTorch 0.4 lack BatchNorm's step counter, which nothing here reads
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    if not found:
        raise InputError(f"{source}: no tensor matches the encoder; its names look like '{next(iter(tensors), '')}'")
    wrong = [f"{name} {_words(t)} for {_words(wanted[name])}" for name, t in found.items() if not fits(t, wanted[name])]
    # a deeper network of the same widths holds every tensor that is wanted, and more blocks
    parts = {name.split(".")[0] for name in wanted}
    head = f"{head_name(net)}."
    extra = [name for name in mine if name.split(".")[0] in parts and name not in wanted and not name.startswith(head)]
    odd = {"tensors missing": missing, "tensors too many": extra, "shapes differ": wrong}
    if any(odd.values()):
        what = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in odd.items() if names)
        raise InputError(f"{source}: does not fit the encoder: {what}")
    if sick := [name for name, tensor in found.items() if not finite(tensor)]:
        raise InputError(f"{source}: its numbers are not finite ({some(sick)}): its training diverged; take an earlier checkpoint")
    net.load_state_dict(found, strict=False)
    return len(found)


def fits(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether a file's tensor can be copied into the `wanted` one and be the same there, but for the precision of its numbers."""
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized and not tensor.is_complex()
    return plain and tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point()


def finite(tensor: Tensor) -> bool:
    """Whether all its numbers are."""
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _words(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() and tensor.layout == torch.strided else f" of {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{kind}"


def prefix(net: nn.Module, tensors: dict[str, Tensor]) -> str:
    """What stands before the backbone's names in `tensors`."""
    wanted = backbone_keys(net)
    return max(PREFIXES, key=lambda p: sum(p + name in tensors for name in wanted))


PREFIXES = (
    "module.encoder_q.",  # MoCo, SynCo, AdCo
    "encoder_q.",
    "module.base_encoder.",  # SogCLR, MoCo v3
    "base_encoder.",
    "module.encoder.",
    "encoder.",  # MoBY, SynCo-v2 (below `model`)
    "module.backbone.",
    "backbone.",
    "module.",
    "",  # a bare torchvision state dict
)


def keep_projection(net: nn.Module, tensors: dict[str, Tensor], layers: int, source: str) -> None:
    """Put the first `layers` linear layers of a published projection head, with what follows each, below `net`'s classifier.

    The head is read from the names and shapes of its tensors: a weight of two dimensions is a linear layer, running statistics
    are batch norm's, and a place without tensors is a ReLU. Raises InputError where it has fewer layers, or other ones.
    """
    start = prefix(net, tensors)
    inside, beside = f"{start}{head_name(net)}.", start.removesuffix("encoder.") + "projector."  # MoBY has it beside the encoder
    start = beside if any(name.startswith(beside) for name in tensors) else inside
    strange = f"{source}: its projection head is not a plain sequence of layers"
    head: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(start):
            place, _, inner = name.removeprefix(start).rpartition(".")
            if place and not place.isdecimal():
                raise InputError(f"{strange} (at '{name}'); leave out --ft-proj")
            head.setdefault(int(place or 0), {})[inner] = tensor
    linear = [place for place, of in sorted(head.items()) if "running_mean" not in of]
    if len(linear) < layers:
        raise InputError(f"{source}: its projection head has {len(linear)} linear layers, not --ft-proj {layers}")
    end = linear[layers] if layers < len(linear) else max(head) + 1
    try:
        kept = [_layer(head.get(place)) for place in range(end)]
    except (KeyError, TypeError, RuntimeError):  # no weight, or one that is no matrix, or others that do not go with it
        raise InputError(f"{strange}, or their tensors do not fit each other; leave out --ft-proj") from None
    width = head[linear[layers - 1]]["weight"].shape[0]
    set_head(net, nn.Sequential(*kept, nn.Linear(width, classifier(net).out_features)))


def _layer(of: dict[str, Tensor] | None) -> nn.Module:
    """The layer that has these tensors."""
    if of is None:
        return nn.ReLU()
    if "running_mean" in of:
        layer = nn.BatchNorm1d(len(of["running_mean"]), affine="weight" in of)
    else:
        layer = nn.Linear(*reversed(of["weight"].shape), bias="bias" in of)
    layer.load_state_dict(of, strict=False)
    return layer


def some(names: list[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
