"""Backbones of timm: MoCo v3's ViTs and the Swins by short names, and whatever else timm has."""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import InputError

SHORT = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
}
MOCO_V3 = {
    "vit_tiny": {},
    "vit_small": {"num_heads": 12},
    "vit_base": {},
    "vit_large": {},
}  # where they are not timm's own


def is_known(arch: str) -> bool:
    """Whether timm has an architecture of this name, or a short name is meant."""
    return arch in SHORT or _timm().is_model(arch)


def stock_arguments(arch: str, image_size: int) -> tuple[str, dict[str, int]]:
    """timm's own name of `arch`, and the options with which timm makes a network that the weights fit, for such images."""
    name = SHORT.get(arch, arch)
    described = _timm().get_pretrained_cfg(name)
    sized = {"img_size": image_size} if described is not None and described.fixed_input_size else {}
    return name, sized | MOCO_V3.get(arch, {})


def create(arch: str, out: int, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """timm's network `arch`, randomly initialised, whose last layer maps to `out` features, with none for 0.

    The short ViTs are MoCo v3's (Chen et al., arXiv 2104.02057): initialised as there, with fixed sine and cosine positions, and
    with 12 heads in the small one. `drop_path` is the rate of stochastic depth of the last block,
    in [0, 1). Dropout is off, whatever timm's defaults are. Raises InputError if the
    architecture is not for images of `image_size` pixels, has no stochastic depth but should, or
    ends in anything but one linear layer.
    """
    name, options = stock_arguments(arch, image_size)
    if arch in MOCO_V3:
        options["weight_init"] = "moco"
    try:
        net = _made(
            name, {**options, "num_classes": out, "drop_path_rate": drop_path, "drop_rate": 0.0}
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(
            f"{arch} at --image-size {image_size}: timm cannot make it: {' '.join(str(error).split())}"
        ) from None
    _remove_dropout(net)
    if not _set_stochastic_depth(net, drop_path):
        raise InputError(
            f"{arch}: has no stochastic depth; leave --online-drop-path and --target-drop-path at 0"
        )
    last = net.pretrained_cfg.get("classifier")
    if not isinstance(last, str) or (out and not isinstance(net.get_submodule(last), nn.Linear)):
        raise InputError(
            f"{arch}: its last layer is not one linear layer, which the evaluations need; choose another"
        )
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    sides = patch if isinstance(patch, tuple) else (patch or 1,)
    if any(image_size % side for side in sides):
        raise InputError(
            f"--image-size {image_size}: must be a multiple of {arch}'s patches, {max(sides)} pixels"
        )
    if arch in MOCO_V3:
        _as_in_moco_v3(net)
        net.namesake = name if MOCO_V3[arch] else None
    return net


def _made(name: str, options: dict[str, Any]) -> nn.Module:
    """Return timm's network `name`, randomly initialised; drop the rates that it has no option for.

    A rate of 0 is passed, too, because timm's default may differ (Swin: .1).
    """
    try:
        return _timm().create_model(name, pretrained=False, **options)
    except TypeError as error:
        rates = [rate for rate in ("drop_path_rate", "drop_rate") if rate in options]
        unknown = [rate for rate in rates if f"'{rate}'" in str(error)]
        if not unknown:
            raise
    return _made(name, {key: value for key, value in options.items() if key not in unknown})


def _remove_dropout(net: nn.Module) -> None:
    """Set every dropout rate to 0, because some of timm's networks have a fixed one.

    MaxViT has .125 in the bias of its relative positions, CPUBone .1 in its attention.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _set_stochastic_depth(net: nn.Module, rate: float) -> bool:
    """Turn stochastic depth off if `rate` is 0; return whether the network now has this rate."""
    depths = [module for module in net.modules() if hasattr(module, "drop_prob")]
    if rate == 0:
        for module in depths:
            module.drop_prob = 0.0
        return True
    return any(0 < module.drop_prob <= rate + 1e-6 for module in depths)


def _timm():
    """Imported where it is needed: it takes seconds."""
    try:
        import timm
    except ImportError:
        raise InputError(
            "networks beside torchvision's ResNets come from timm: pip install timm"
        ) from None
    return timm


@torch.no_grad()
def _as_in_moco_v3(vit: nn.Module) -> None:
    """What timm's own initialisation leaves out: the positions, the patch projection and the class token."""
    patches = vit.patch_embed
    positions = sine_positions(*patches.grid_size, vit.embed_dim)
    vit.pos_embed.copy_(torch.cat([torch.zeros(1, vit.embed_dim), positions])[None]).requires_grad_(
        False
    )
    bound = math.sqrt(6 / (patches.proj.weight[0].numel() + vit.embed_dim))
    nn.init.uniform_(patches.proj.weight, -bound, bound)
    nn.init.zeros_(patches.proj.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)


def sine_positions(height: int, width: int, dim: int) -> Tensor:
    """Positions of a grid in row order, [height width, dim]: sine and cosine of the row, then of the column.

    Each at dim / 4 wavelengths in a geometric row from 2 pi to 10,000 x 2 pi (MoCo v3, after Vaswani et al., arXiv 1706.03762).
    """
    rates = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (row, column)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Pooled features [B, D] before the classifier."""
    return net.forward_head(net.forward_features(images), pre_logits=True)


def to_timm_names(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published backbone with the names and sizes of timm's: other software's Swins, position tables of other image sizes.

    Raises InputError for another network of the same shapes.
    """
    if (
        getattr(net, "namesake", None)
        and "pos_embed" in tensors
        and not _fixed(tensors["pos_embed"])
    ):
        raise InputError(
            f"its positions are learned, so it is not this ViT but one with other heads; give -a {net.namesake}"
        )
    head = f"{net.pretrained_cfg['classifier']}." if hasattr(net, "pretrained_cfg") else "fc."
    mine = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith(head)}
    if all(name in tensors and tensors[name].shape == mine[name].shape for name in mine):
        return tensors
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    try:
        found = convert(tensors, net) if convert else tensors
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ):
        return tensors  # not of this kind of network, which its names and shapes will show
    patches = "patch_embed.proj.weight"
    if patches in found and patches in tensors and tensors[patches].dim() == 4:
        found[patches] = tensors[patches]  # timm would make other patches of them
    return found


def _fixed(table: Tensor) -> bool:
    """Whether positions [1, 1 + N, D] are sines and cosines of a square grid: row first (MoCo v3), or column first (MAE)."""
    if table.dim() != 3 or table.shape[1] < 1 or not table.is_floating_point():
        return False
    table = table[0].float()
    side = math.isqrt(len(table) - 1)
    if len(table) != 1 + side * side or table.shape[1] % 4:
        return False
    row_first = sine_positions(side, side, table.shape[1])
    column_first = row_first.roll(table.shape[1] // 2, 1)
    return any(
        torch.allclose(table[1:], sines, rtol=0, atol=1e-3) for sines in (row_first, column_first)
    )
