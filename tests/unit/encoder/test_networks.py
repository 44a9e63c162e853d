"""The common functions of torchvision's networks, and the ResNets."""

import copy

import pytest
import torch
from encoder_helpers import random_resnet18
from torch import nn

from moco.encoder.networks import backbone_keys, canonical, features
from moco.encoder.resnets import resnet
from moco.errors import InputError


@pytest.fixture
def net():
    return random_resnet18(1)


@pytest.mark.parametrize("training", [False, True])
def test_features_equal_torchvisions_forward_without_the_classifier(net, training):
    net.train(training)
    headless = copy.deepcopy(net)
    headless.fc = nn.Identity()
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, expected = features(net, images), headless(images)
    assert got.shape == (4, 512)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got[0], got[1], rtol=1e-3)
    for name, t in headless.state_dict().items():
        # running statistics are the same, too
        torch.testing.assert_close(net.state_dict()[name], t, msg=name)


def test_backbone_keys_are_all_but_the_head(net):
    names = backbone_keys(net)
    assert len(names) == 120 and set(net.state_dict()) - set(names) == {"fc.weight", "fc.bias"}
    net.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    assert backbone_keys(net) == names


@pytest.mark.parametrize(("out", "mlp"), [(5, False), (7, True)])
def test_resnet_has_a_head_of_the_wanted_size(out, mlp):
    net = resnet("resnet18", out, mlp)
    linear = [m for m in net.fc.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == ([(512, 512)] if mlp else []) + [
        (512, out)
    ]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("resnet51", "resnet50"), ("resnet_18", "resnet18"), ("wide_resnet50", "wide_resnet50_2")],
)
def test_unknown_arch_error_names_the_nearest(wrong, nearest):
    with pytest.raises(InputError, match=f"'{wrong}'.*'{nearest}'"):
        resnet(wrong, 8)
    with pytest.raises(InputError, match=f"'{nearest}'"):
        canonical(wrong)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_known_archs_pass(arch):
    assert canonical(arch) == arch
