"""Create torchvision's ResNets, optionally with MoCo v2's head or a stem for small images."""

from torch import nn
from torchvision import models

from moco.encoder.archs import ARCHS
from moco.errors import unknown


def resnet(
    arch: str, out: int, mlp: bool = False, stem: str | None = "imagenet", **more: bool
) -> nn.Module:
    """Return a randomly initialized torchvision ResNet.

    Args:
        arch: one of `ARCHS`.
        out: number of output features of its last layer `fc`.
        mlp: whether `fc` is MoCo v2's head: Linear(D, D), ReLU, Linear(D, out).
        stem: "imagenet" for torchvision's 7x7 convolution of stride 2 and max-pooling; "cifar" for
            a 3x3 convolution of stride 1 and no pooling, as in MoCo's demo on CIFAR-10.
        more: further options of torchvision's function.

    Raises InputError for an unknown `arch`.
    """
    if arch not in ARCHS:
        raise unknown("ResNet", arch, ARCHS)
    net = models.get_model(arch, weights=None, num_classes=out, **more)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    if mlp:
        width = net.fc.in_features
        net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), net.fc)
    return net
