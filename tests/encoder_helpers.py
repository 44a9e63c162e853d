"""Networks, options and recipes that several test modules use."""

import torch
import yaml
from conftest import ROOT
from run_helpers import typed
from torchvision import models

PREFIXES = [
    "module.encoder_q.",
    "module.base_encoder.",
    "module.encoder.",
    "encoder.",
    "module.backbone.",
    "backbone.",
    "module.",
    "",
]


def random_resnet18(seed):
    """Return a resnet18 whose batch norm tensors are random, too; torchvision starts all alike."""
    torch.manual_seed(seed)
    net = models.resnet18(num_classes=16)
    for tensor in net.state_dict().values():
        if not tensor.is_floating_point():
            tensor.fill_(seed)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    return net


# options of main_moby.py for the smallest networks and images
SIZES = ("--image-size", 32, "-b", 8, "-j", 0, "--epochs", 1, "--mlp-dim", 32, "--moco-dim", 16)
QUEUE = ("--queue", 40)
SMALL = (*SIZES, "-a", "test_vit", "--online-drop-path", 0.2)
VIT = (*SIZES, "-a", "vit_tiny")
SYNCO = (
    "--n-hard",
    8,
    *(word for i in range(1, 7) for word in (f"--n{i}", 2)),
    *typed("--synthetic-first 1 --synthetic-last 2"),
)
METHODS = {"moby": QUEUE, "synco": (*SYNCO, *QUEUE), "byol": ("--moco-m", 0.9)}
ARCHS = {"moby": "swin_tiny", "synco": "test_vit", "byol": "vit_tiny"}


def settings(path):
    """Return the options in the recipe `path`."""
    return yaml.safe_load(path.read_text())


# the recipes of main_moby.py
RECIPES = [
    path
    for family in ("vit", "swin")
    for path in sorted(ROOT.glob(f"configs/*_{family}_*.yaml"))
    if "method" in settings(path)
]


def to_moby_name(name):
    """Return the name that MoBY's own code gives to a tensor of timm's Swin.

    MoBY downsamples at the end of a stage, timm at the beginning of the next one.
    """
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(["encoder", *parts])
