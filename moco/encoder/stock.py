"""Write the Python code that creates an encoder's network with torchvision or timm alone.

tools/export.py uses it, so that exported weights load without this project.
"""

import importlib.util
from typing import NamedTuple

from moco.encoder import archs, networks, timm_networks, torchvision_networks


class StockModel(NamedTuple):
    """Python code that creates a stock torchvision or timm model without its last layer.

    The model maps [B, 3, H, W] to [B, D]. It loads the encoder's tensors with `strict=True`.
    """

    library: str  # torchvision or timm
    lines: tuple[str, ...]  # of Python; they define `net`, after torch and the library are imported


_CIFAR = (
    "net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)",
    "net.maxpool = torch.nn.Identity()",
)


# the epsilons of a Swin's layer norms in SynCo-v2's code, see `timm_networks.create`
_SYNCO_V2_EPS = (
    "[setattr(norm, 'eps', 1e-5 if name.endswith('.norm2') else 1e-6)"
    " for name, norm in net.named_modules() if isinstance(norm, torch.nn.LayerNorm)]"
)


def stock_models(
    arch: str, image_size: int, stem: str = "imagenet", norm_eps: str = "timm"
) -> list[StockModel]:
    """Return the stock models that can load an encoder of architecture `arch`.

    A ResNet of torchvision has one there and, if timm is installed, one in timm. Other networks
    have one in their own library. Raises InputError for an unknown `arch`.
    """
    library, bare = networks.find(arch)  # its name becomes code below
    if library == "torchvision" and bare not in archs.ARCHS:
        return [_torchvision_model(bare, image_size)]
    arch = networks.canonical(arch)
    found, first = [], _CIFAR if stem == "cifar" else ()
    if norm_eps == "synco-v2" and archs.is_swin(arch):
        first = (_SYNCO_V2_EPS,)
    if arch in archs.ARCHS:
        found.append(
            StockModel(
                "torchvision",
                (f"net = torchvision.models.{arch}()", *first, "net.fc = torch.nn.Identity()"),
            )
        )
        if importlib.util.find_spec("timm") is None:
            return found
    name, options = timm_networks.stock_arguments(bare, image_size)
    given = "".join(f", {option}={value!r}" for option, value in options.items())
    return [
        *found,
        StockModel("timm", (f"net = timm.create_model({name!r}, num_classes=0{given})", *first)),
    ]


def _torchvision_model(name: str, image_size: int) -> StockModel:
    """Return the stock model of a torchvision network that is not a ResNet."""
    options = torchvision_networks.create_arguments(name, image_size)
    given = ", ".join(f"{option}={value!r}" for option, value in options.items())
    last = torchvision_networks.last_layer(torchvision_networks.create(name, 1, image_size))
    return StockModel(
        "torchvision",
        (
            f"net = torchvision.models.{name}({given})",
            f"net.set_submodule({last.name!r}, torch.nn.Identity())",
        ),
    )
