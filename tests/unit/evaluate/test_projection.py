"""Test the layers of a projection head that fine-tuning keeps."""

import itertools

import pytest
import torch
from torch import nn

from moco.encoder import networks
from moco.encoder.pretrained import keep_projection
from moco.encoder.resnets import resnet
from moco.errors import InputError


# The layers of a projection head that stay.
def projection(*sizes: int, norm: bool = False, last_norm: bool = False) -> nn.Sequential:
    """Return linear layers with ReLU between them.

    With `norm`, batch norm precedes each ReLU; with `last_norm`, one without scale is at the end.
    """
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(a, b, bias=not norm))
        last = i == len(sizes) - 2
        if norm and not last:
            layers.append(nn.BatchNorm1d(b))
        if last_norm and last:
            layers.append(nn.BatchNorm1d(b, affine=False))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


HEADS = {
    "moco v1": nn.Linear(512, 16),
    "moco v2": projection(512, 512, 16),
    "sogclr": projection(512, 64, 16, norm=True, last_norm=True),
    "fnc": projection(512, 64, 32, 16, norm=True, last_norm=True),
}


@pytest.mark.parametrize("style", HEADS)
@pytest.mark.parametrize("prefix", ["module.encoder_q.", "module.base_encoder.", ""])
def test_kept_layers_compute_what_the_head_did(style, prefix):
    torch.manual_seed(0)
    trained, head = resnet("resnet18", 7), HEADS[style]
    x = torch.rand(8, 512)
    head(x) if style != "moco v1" else None  # moves the running statistics
    trained.fc = head
    tensors = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    for kept in range(1, len(places) + 1):
        net = resnet("resnet18", 7)
        keep_projection(net, tensors, kept, "file")
        end = places[kept] if kept < len(places) else len(layers)
        want = nn.Sequential(*layers[:end]).eval()(x)
        assert torch.equal(net.fc[:-1].eval()(x), want)
        assert networks.classifier(net) is net.fc[-1] and net.fc[-1].weight.shape == (
            7,
            want.shape[1],
        )
    with pytest.raises(
        InputError, match=f"has {len(places)} linear layers, not --ft-proj {len(places) + 1}"
    ):
        keep_projection(resnet("resnet18", 7), tensors, len(places) + 1, "file")


def test_a_head_of_another_make_is_refused():
    trained = resnet("resnet18", 7)
    tensors = trained.state_dict() | {"fc.inner.linear.weight": torch.zeros(2, 512)}
    with pytest.raises(
        InputError,
        match=r"not a sequence of linear, BN and ReLU layers \(at 'fc.inner.linear.weight'\)",
    ):
        keep_projection(resnet("resnet18", 7), tensors, 1, "file")
