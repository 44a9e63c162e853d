"""The names of architectures, and the heads of networks of both libraries."""

import sys

import pytest
import timm
import torch
from torch import nn

from moco.encoder import networks, trial
from moco.encoder.networks import Arch, canonical, find
from moco.errors import InputError
from moco.sections import Network

TIMM, TORCHVISION = "timm", "torchvision"


@pytest.mark.parametrize(
    ("arch", "library", "name", "saved"),
    [
        ("resnet50", TORCHVISION, "resnet50", "resnet50"),
        ("torchvision:resnet50", TORCHVISION, "resnet50", "resnet50"),
        ("timm:resnet50", TIMM, "resnet50", "timm:resnet50"),
        ("resnet26d", TIMM, "resnet26d", "resnet26d"),
        ("vit_small", TIMM, "vit_small", "vit_small"),
        ("convnext_tiny", TIMM, "convnext_tiny", "convnext_tiny"),
        ("timm:convnext_tiny", TIMM, "convnext_tiny", "convnext_tiny"),
        ("torchvision:convnext_tiny", TORCHVISION, "convnext_tiny", "torchvision:convnext_tiny"),
        ("vit_b_16", TORCHVISION, "vit_b_16", "torchvision:vit_b_16"),
        ("torchvision:vit_b_16", TORCHVISION, "vit_b_16", "torchvision:vit_b_16"),
        ("timm:vit_tiny_patch16_224", TIMM, "vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_name_selects_the_library(arch, library, name, saved):
    assert find(arch) == Arch(library, name) and canonical(arch) == saved
    assert find(saved) == find(arch)  # a checkpoint selects the same network
    assert networks.is_same(arch, saved)


def test_network_is_that_of_the_library():
    for arch, module in (
        ("resnet18", "torchvision"),
        ("timm:resnet18", "timm"),
        ("efficientnet_b0", "timm"),
        ("torchvision:efficientnet_b0", "torchvision"),
    ):
        assert type(networks.create(arch, 0, 32)).__module__.split(".")[0] == module
    assert not networks.is_same("efficientnet_b0", "torchvision:efficientnet_b0")
    assert not networks.is_same("efficientnet_b0", "no such network")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("timm:convnext_ato", "the nearest is 'timm:convnext_atto'"),
        ("torchvision:vit_b16", "the nearest is 'torchvision:vit_b_16'"),
        ("mobilenet_v3_smal", "the nearest is 'mobilenet_v3_small'"),
        ("convnext_ato", "the nearest is 'convnext_atto'"),
        ("torchvision:convnext_atto", "unknown arch 'torchvision:convnext_atto'"),
        ("timm:vit_b_16", "unknown arch 'timm:vit_b_16'"),
        ("keras:resnet50", "the word before the colon must be timm or torchvision"),
        ("timm:vit_small", "vit_small_patch16_224; give -a vit_small, without timm:"),
        ("zzzzzz", "timm.list_models.. and torchvision.models.list_models.. list"),
        ("", "unknown arch ''"),
        ("timm:", "unknown arch 'timm:'"),
        (":resnet50", "before the colon must be"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(wrong, words):
    with pytest.raises(InputError, match=words):
        find(wrong)


def test_timm_is_needed_only_for_names_that_may_be_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert canonical("resnet50") == canonical("torchvision:resnet50") == "resnet50"
    assert canonical("torchvision:vit_b_16") == "torchvision:vit_b_16"
    for arch in ("vit_b_16", "timm:resnet50"):
        with pytest.raises(InputError, match="not installed: pip install timm, or give torchv"):
            canonical(arch)


# networks of many families of timm, and the sides of their images
FAMILIES = {
    "test_vit": 32,
    "test_convnext": 32,
    "test_efficientnet": 32,
    "test_nfnet": 32,
    "test_resnet": 32,
    "test_byobnet": 32,
    "test_mambaout": 32,
    "vit_tiny_patch16_224": 32,
    "eva02_tiny_patch14_224": 28,
    "swin_tiny_patch4_window7_224": 64,
    "xcit_nano_12_p16_224": 32,
    "mixer_s32_224": 224,
    "regnetx_002": 32,
    "ghostnet_050": 32,
    "mobilenetv3_small_050": 32,
    "edgenext_xx_small": 64,
    "pvt_v2_b0": 64,
    "fasternet_t0": 32,
    "repvit_m1": None,
    "levit_128": None,
    "deit_tiny_distilled_patch16_224": None,
    "resnetv2_18": None,
}
FAMILIES = {name: size for name, size in FAMILIES.items() if timm.is_model(name)}


@pytest.mark.parametrize("arch", FAMILIES)
def test_encoder_with_a_head_for_each_family_of_timm(arch):
    size = FAMILIES[arch]
    if size is None:
        with pytest.raises(InputError, match="its last layer is not one linear layer"):
            networks.create(arch, 3, 224)
        return
    net = networks.create_encoder(Network(arch=arch), size, 6, mlp=True)
    width, images = networks.num_features(net), torch.randn(2, 3, size, size)
    first, relu, last = networks.head(net)
    assert isinstance(relu, nn.ReLU) and first.weight.shape == (width, width)
    assert last.weight.shape == (6, width) and last.weight.any()
    with torch.no_grad():
        x = networks.features(net.eval(), images)
        assert x.shape == (2, width)
        torch.testing.assert_close(networks.embedding(net, images), net(images))
    head = f"{networks.head_name(net)}."
    assert not [name for name in networks.backbone_keys(net) if name.startswith(head)]
    trial.check(net, arch, [size])


def test_head_of_a_network_whose_classifier_starts_at_zero_does_not():
    zeros = networks.create("mixer_s32_224", 4, 224)
    assert not networks.classifier(zeros).weight.any()  # timm's own classifier
    net = networks.create_encoder(Network(arch="mixer_s32_224"), 224, 4)
    assert networks.head(net).weight.std() > 0.01


def test_resnet_keeps_the_weights_that_a_seed_has_always_given():
    torch.manual_seed(3)
    net = networks.create_encoder(Network(arch="resnet18"), 32, 5, mlp=True)
    torch.manual_seed(3)
    from moco.encoder.resnets import resnet

    before = resnet("resnet18", 5, mlp=True).state_dict()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    blocks = networks.create_encoder(Network(arch="resnet18"), 32, 5, zero_init_residual=True)
    assert not blocks.layer1[0].bn2.weight.any()


@pytest.mark.parametrize(
    ("arch", "has"),
    [
        ("resnet18", True),
        ("test_efficientnet", True),
        ("mobilenet_v3_small", True),
        ("test_convnext", False),
    ],
)
def test_batch_norm_is_found(arch, has):
    assert trial.has_batch_norm(Network(arch=arch), 32) is has
