"""Create timm's networks, some by short names: MoCo v3's ViTs and the Swins.

networks.py calls these functions for every architecture that torchvision does not have, or that
begins with "timm:".
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from moco.encoder.archs import SHORT, is_swin
from moco.errors import InputError

# MoCo v3's ViTs, with the options by which they differ from timm's
MOCO_V3 = {"vit_tiny": {}, "vit_small": {"num_heads": 12}, "vit_base": {}, "vit_large": {}}

NO_STOCHASTIC_DEPTH = (
    "has no stochastic depth; set --online-drop-path and --target-drop-path, or --drop-path, to 0"
)
NO_LINEAR_LAYER = (
    "its last layer is not one linear layer, which the evaluations need; choose another -a"
)

ONE_SIZE = "takes square images of one size only; choose another -a"


def cannot_create(arch: str, image_size: int, error: Exception) -> InputError:
    """Return an InputError for the `error` of a library that cannot create a network."""
    why = " ".join(str(error).split())
    at = f"{arch} at --image-size {image_size}"
    return InputError(f"{at}: it cannot be created: {why}; choose another size or -a")


def is_known(name: str) -> bool:
    """Return whether timm has a network of this name. The short names are not timm's."""
    return _timm().is_model(name)


def all_names() -> list[str]:
    """Return the names of all networks of timm."""
    return _timm().list_models()


def stock_arguments(arch: str, image_size: int) -> tuple[str, dict[str, int]]:
    """Return timm's name of `arch`, and the arguments that `timm.create_model` needs.

    Args:
        arch: a short name or an architecture of timm.
        image_size: side of the square input images, in pixels.
    """
    name = SHORT.get(arch, arch)
    described = _timm().get_pretrained_cfg(name)
    sized = {"img_size": image_size} if described is not None and described.fixed_input_size else {}
    return name, sized | MOCO_V3.get(arch, {})


def create(
    arch: str,
    out: int,
    image_size: int,
    drop_path: float = 0.0,
    norm_eps: str | None = None,
    any_size: bool = False,
) -> nn.Module:
    """Return a randomly initialized network of timm, without dropout.

    MoCo v3's ViTs (Chen et al., arXiv 2104.02057) are initialized as in that paper. Their position
    embeddings are fixed sines and cosines, and vit_small has 12 heads.

    Args:
        arch: a short name or an architecture of timm.
        out: number of output features of the last layer; 0 for a network without that layer.
        image_size: side of the square input images, in pixels.
        drop_path: rate of stochastic depth of the last block, in [0, 1).
        norm_eps: the epsilons of a Swin's layer norms. "synco-v2": 1e-5 in the second norm of each
            block and 1e-6 in the others, as in SynCo-v2's code. Otherwise timm's, 1e-5 in all.
        any_size: whether the network must also take images of other sizes and shapes. Position
            embeddings are then interpolated for each batch.

    Raises InputError if the architecture does not support the image size, other sizes or stochastic
    depth, or if its last layer is not one linear layer.
    """
    name, options = stock_arguments(arch, image_size)
    if any_size and "img_size" in options:
        options["dynamic_img_size"] = True
    if arch in MOCO_V3:
        options["weight_init"] = "moco"
    try:
        net = _create_model(
            name, {**options, "num_classes": out, "drop_path_rate": drop_path, "drop_rate": 0.0}
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if "dynamic_img_size" in str(error):
            raise InputError(f"{arch}: {ONE_SIZE}") from None
        raise cannot_create(arch, image_size, error) from None
    remove_dropout(net)
    if not _set_stochastic_depth(net, drop_path):
        raise InputError(f"{arch}: {NO_STOCHASTIC_DEPTH}")
    last = net.pretrained_cfg.get("classifier")
    if not isinstance(last, str) or (out and not isinstance(net.get_submodule(last), nn.Linear)):
        raise InputError(f"{arch}: {NO_LINEAR_LAYER}")
    projection = patch_projection(net)
    # patches of other convolutions overlap, and take images of any size
    tiles = isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride
    sides = projection.stride if tiles else (1,)
    if any(image_size % side for side in sides):
        patches = f"{arch}'s patches of {max(sides)} pixels"
        raise InputError(f"--image-size {image_size}: must be a multiple of {patches}")
    if norm_eps == "synco-v2" and is_swin(arch):
        for part, norm in net.named_modules():
            if isinstance(norm, nn.LayerNorm):
                norm.eps = 1e-5 if part.endswith(".norm2") else 1e-6
    if arch in MOCO_V3:
        _init_as_moco_v3(net)
        net.namesake = name if MOCO_V3[arch] else None
    return net


def _create_model(name: str, options: dict[str, Any]) -> nn.Module:
    """Return timm's network `name`, randomly initialized.

    Dropout rates that the network does not accept are left out. A rate of 0 is passed, too, because
    timm's default may be another one (Swin: .1).
    """
    try:
        return _timm().create_model(name, pretrained=False, **options)
    except TypeError as error:
        rates = [rate for rate in ("drop_path_rate", "drop_rate") if rate in options]
        unknown = [rate for rate in rates if f"'{rate}'" in str(error)]
        if not unknown:
            raise
    return _create_model(name, {key: value for key, value in options.items() if key not in unknown})


def remove_dropout(net: nn.Module) -> None:
    """Set every dropout rate to 0, because some networks have a fixed rate.

    timm's MaxViT has .125 in its relative position bias, CPUBone .1 in its attention.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _set_stochastic_depth(net: nn.Module, rate: float) -> bool:
    """Return whether the network has stochastic depth of this rate. If it is 0, turn it off."""
    depths = stochastic_depth(net)
    if rate == 0:
        for module in depths:
            module.drop_prob = 0.0
        return True
    return any(0 < module.drop_prob <= rate + 1e-6 for module in depths)


def stochastic_depth(net: nn.Module) -> list[nn.Module]:
    """Return the modules of `net` that drop residual branches at random in training."""
    return [module for module in net.modules() if "drop_prob" in vars(module)]


def _timm():
    """Import and return timm. Called only when timm is needed, because the import takes seconds."""
    try:
        import timm
    except ImportError:
        why = "a network other than torchvision's ResNets is searched in timm"
        how = "pip install timm, or give torchvision:NAME"
        raise InputError(f"{why}, which is not installed: {how}") from None
    return timm


@torch.no_grad()
def _init_as_moco_v3(vit: nn.Module) -> None:
    """Initialize the position embeddings, patch projection and class token as MoCo v3 does.

    timm's `weight_init="moco"` leaves these three out.
    """
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
    """Return fixed position embeddings [height * width, dim] of a grid in row order.

    An embedding has the sines and cosines of the row, then those of the column. Each has dim / 4
    wavelengths, a geometric progression from 2 pi to 10,000 x 2 pi (MoCo v3, after Vaswani et al.,
    arXiv 1706.03762).
    """
    frequencies = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [index.reshape(-1, 1) * frequencies for index in (row, column)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features [B, D] of `images` [B, 3, H, W], the classifier's input."""
    return net.forward_head(net.forward_features(images), pre_logits=True)


def to_timm_names(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a pre-trained backbone's tensors with the names and shapes of timm's `net`.

    Renames the tensors of other software's Swins, and interpolates position embeddings to the
    network's image size. Returns `tensors` unchanged if they cannot be converted.

    Raises InputError for a ViT with learned position embeddings if `net` is MoCo v3's ViT with
    another number of heads.
    """
    if (
        getattr(net, "namesake", None)
        and "pos_embed" in tensors
        and not _fixed(tensors["pos_embed"])
    ):
        raise InputError(
            "its positions are learned, so it is not this ViT but one with other heads; "
            f"give -a {net.namesake}"
        )
    head = f"{head_name(net)}."
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
        return tensors  # another architecture; `load_backbone` reports its names and shapes
    patches = "patch_embed.proj.weight"
    if patches in found and patches in tensors and tensors[patches].dim() == 4:
        found[patches] = tensors[patches]  # timm would resample patches of another size
    return found


def _fixed(table: Tensor) -> bool:
    """Return whether position embeddings [1, 1 + N, D] are sines and cosines of a square grid.

    MoCo v3 puts rows first, MAE columns; both count.
    """
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


def head_name(net: nn.Module) -> str:
    """Return the name of the last layer of a network of timm, or of the head that replaces it."""
    return net.pretrained_cfg["classifier"]


def patch_projection(net: nn.Module) -> nn.Module | None:
    """Return the projection of patches of a ViT or Swin of timm; None for other networks."""
    return getattr(getattr(net, "patch_embed", None), "proj", None)
