"""The same networks without this project: the Python that makes them with torchvision or timm alone."""

import importlib.util
from typing import NamedTuple

from moco.encoder import networks, resnets, timm_networks


class StockModel(NamedTuple):
    """A library's own network without its last layer, [B, 3, H, W] -> [B, D], which takes up the encoder's tensors strictly."""

    library: str
    lines: tuple[
        str, ...
    ]  # of Python, which make it, as `net`, once torch and the library are imported


_CIFAR = (
    "net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)",
    "net.maxpool = torch.nn.Identity()",
)


def stock_models(arch: str, image_size: int, stem: str = "imagenet") -> list[StockModel]:
    """Where an encoder of this project is at home: a ResNet in torchvision and, where it is installed, in timm; others in timm.

    Raises InputError for an unknown `arch`, whose name becomes code here.
    """
    networks.check_arch(arch)
    found, first = [], _CIFAR if stem == "cifar" else ()
    if arch in resnets.ARCHS:
        found.append(
            StockModel(
                "torchvision",
                (f"net = torchvision.models.{arch}()", *first, "net.fc = torch.nn.Identity()"),
            )
        )
        if importlib.util.find_spec("timm") is None:
            return found
    name, options = timm_networks.stock_arguments(arch, image_size)
    given = "".join(f", {option}={value!r}" for option, value in options.items())
    return [
        *found,
        StockModel("timm", (f"net = timm.create_model({name!r}, num_classes=0{given})", *first)),
    ]
