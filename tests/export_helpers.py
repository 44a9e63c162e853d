"""Networks, checkpoints and calls of tools/export.py that several test modules use."""

import sys

import pytest
import timm
import torch

from moco.encoder import networks

TIMM = tuple(map(int, timm.__version__.split(".")[:3]))
loads_folders = pytest.mark.skipif(TIMM < (1, 0, 26), reason="this timm loads no local folders")


def tool_caller(tool, monkeypatch, capsys):
    """Return a function that calls a tool in this process: status, stdout and stderr."""

    def call(*options):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, options)])
        return tool.main(), *capsys.readouterr()

    return call


def network(arch, size=32, **more):
    """Return a network without its last layer, whose tensors all differ."""
    net = networks.create(arch, 0, size, **more)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return net.eval()


def saved(path, net, prefix="module.encoder_q.", **more):
    torch.save(
        {"state_dict": {prefix + name: x for name, x in net.state_dict().items()}, **more}, path
    )
    return path


def saved_resnet(folder):
    """Return a ResNet-18 and its checkpoint."""
    net = network("resnet18")
    return net, saved(folder / "moco.pth.tar", net, arch="resnet18", epoch=200)


@torch.no_grad()
def features(net, size=32):
    return net(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


def printed(out):
    """Return the network that each printed line of Python creates."""
    found = []
    for line in out.splitlines():
        if line.startswith("  import "):
            names = {}
            exec(line.strip(), names)
            found.append(names["net"])
    return found
