"""torchvision's classifiers: features, heads and names of all of them, and what is refused."""

import contextlib

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import regnet

from moco.encoder import networks, pretrained, torchvision_networks, trial
from moco.encoder.archs import ARCHS
from moco.encoder.torchvision_networks import NAMES
from moco.errors import InputError
from moco.sections import Network

REFUSED = {
    **dict.fromkeys(
        (f"mnasnet{width}" for width in ("0_5", "0_75", "1_0", "1_3")), "reads only fi"
    ),
    "googlenet": "has auxiliary outputs",
    "inception_v3": "has auxiliary outputs",
    "squeezenet1_0": "its last layer is not one linear layer",
    "squeezenet1_1": "its last layer is not one linear layer",
}
# a network of each family, with the width of its features
WIDTHS = {
    "alexnet": 4096,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "efficientnet_v2_s": 1280,
    "maxvit_t": 512,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "regnet_x_400mf": 400,
    "regnet_y_400mf": 440,
    "shufflenet_v2_x0_5": 1024,
    "swin_t": 768,
    "swin_v2_t": 768,
    "vgg11": 4096,
    "vit_b_16": 768,
}


@pytest.fixture
def without_memory(monkeypatch):
    """Create networks on the meta device, which has shapes but no values."""
    settings = regnet.BlockParams.from_init_params

    def on_cpu(*args, **kwargs):  # it computes its widths with tensors
        with torch.device("cpu"):
            return settings(*args, **kwargs)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", on_cpu)
    with torch.device("meta"):
        yield


def sides(name):
    """Return the smallest simple side of the images that a network takes."""
    return 224 if name.startswith(("maxvit", "vit_h_14")) else 64


# the quick tests have one network of each family
EVERY = [
    name if name in WIDTHS or name in REFUSED else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES
]


@pytest.mark.parametrize("name", EVERY)
def test_features_heads_and_names_of_every_classifier(name, without_memory):
    arch, size = f"torchvision:{name}", sides(name)
    if name in REFUSED:
        with pytest.raises(InputError, match=f"{arch}: {REFUSED[name]}"):
            networks.create(arch, 7, size)
        return
    net = networks.create(arch, 7, size)
    last = networks.classifier(net)
    width = networks.num_features(net)
    assert (last.in_features, last.out_features) == (width, 7)
    head = networks.head_name(net)
    keys = networks.backbone_keys(net)
    assert set(net.state_dict()) - set(keys) == {f"{head}.weight", f"{head}.bias"} or (
        name == "maxvit_t" and set(net.state_dict()) - set(keys) == {f"{head}.weight"}
    )
    networks.set_head(net, nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3)))
    assert net(torch.empty(2, 3, size, size)).shape == (2, 3)
    assert networks.backbone_keys(net) == keys
    trial.check(net, arch, [size])  # the shape of the features


SMALL = ("efficientnet_b0", "mobilenet_v3_small", "regnet_x_400mf", "shufflenet_v2_x0_5")
EACH = [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in WIDTHS]


@pytest.mark.parametrize("name", EACH)
def test_features_are_the_input_of_the_last_layer(name):
    torch.manual_seed(0)
    size = sides(name)
    net, images = networks.create(f"torchvision:{name}", 3, size), torch.randn(2, 3, size, size)
    with torch.inference_mode():
        x = networks.features(net.eval(), images)
        assert x.shape == (2, WIDTHS[name])
        assert torch.equal(networks.classifier(net)(x), net(images))
    assert not torch.equal(x[0], x[1])
    bare = networks.create(f"torchvision:{name}", 0, size)
    bare.load_state_dict({key: net.state_dict()[key] for key in networks.backbone_keys(net)})
    with torch.inference_mode():
        assert torch.equal(bare.eval()(images), x)
    stock = models.get_model(
        name, weights=None, num_classes=3, **torchvision_networks.create_arguments(name, size)
    )
    stock.load_state_dict(net.state_dict())
    with torch.inference_mode():
        assert torch.equal(stock.eval()(images), net(images))


def test_running_statistics_and_gradients_reach_the_network_through_its_features():
    net = networks.create("mobilenet_v3_small", 3, 32)
    networks.features(net.train(), torch.randn(4, 3, 32, 32)).sum().backward()
    assert int(net.features[0][1].num_batches_tracked) == 1
    assert net.features[0][0].weight.grad.any() and net.classifier[0].weight.grad.any()
    assert net.classifier[3].weight.grad is None


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_b0",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("swin_t", "convnext_tiny")),
    ],
)
def test_stochastic_depth_rises_to_the_given_rate(name):
    rates = [one.p for one in networks.stochastic_depth(networks.create(f"torchvision:{name}", 0))]
    assert rates and not any(rates)
    net = networks.create(f"torchvision:{name}", 0, drop_path=0.3)
    rates = [one.p for one in networks.stochastic_depth(net)]
    assert rates == sorted(rates) and rates[0] == 0 and max(rates) == pytest.approx(0.3)
    with pytest.raises(InputError, match=r"torchvision:mobilenet_v2: has no stochastic depth; set"):
        networks.create("mobilenet_v2", 0, 32, drop_path=0.1)
    for arch, has in ((f"torchvision:{name}", True), ("mobilenet_v2", False), ("resnet18", False)):
        assert trial.has_stochastic_depth(Network(arch=arch), 32) == has


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_network_in_training_draws_no_random_numbers(name):
    net, images = networks.create(f"torchvision:{name}", 0, 64), torch.randn(2, 3, 64, 64)
    before = torch.get_rng_state()
    net.train()(images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arch", "size", "words"),
    [
        ("vit_b_16", 40, "vit_b_16 at --image-size 40: it cannot be created: .*divisible by patch"),
        ("maxvit_t", 32, "maxvit_t at --image-size 32: it cannot be created: .*not divisible"),
        ("torchvision:googlenet", 64, "googlenet: has auxiliary outputs"),
        ("squeezenet1_1", 64, "squeezenet1_1: its last layer is not one linear layer"),
    ],
)
def test_error_names_the_network_and_the_reason(arch, size, words):
    with pytest.raises(InputError, match=words):
        networks.create(arch, 1, size)


@pytest.mark.parametrize(
    ("arch", "sizes", "words"),
    [
        ("densenet121", (32, 16), "images of 16 pixels .*next to those of 32 pixels; choose anoth"),
        ("densenet121", (16,), "densenet121: does not take images of 16 pixels .*another -a or --"),
        ("timm:inception_v3", (64,), "does not take images of 64 pixels"),
        ("vit_tiny_patch16_224", (64, 48), "images of 48 pixels .*next to those of 64"),
    ],
)
def test_network_is_refused_for_images_that_it_does_not_take(arch, sizes, words):
    net = networks.create(arch, 1, sizes[0])
    with pytest.raises(InputError, match=words):
        trial.check(net, arch, sizes)


def test_network_without_pooling_is_refused():
    net = networks.create("test_convnext", 1, 64)
    net.head.global_pool = nn.Identity()
    net.head.flatten = nn.Identity()
    with pytest.raises(InputError, match=r"features of the shape \[64, 2, 2\].*not 64 pooled"):
        trial.check(net, "test_convnext", [64])


def tiny_vit(size):
    """Return a small ViT of torchvision, with patches of 32 pixels."""
    net = models.VisionTransformer(size, 32, 1, 2, 8, 8, num_classes=3)
    net.last_layer = torchvision_networks.LastLayer("heads.head", 8)
    return net


def test_positions_of_a_vit_are_interpolated_to_the_image_size():
    torch.manual_seed(0)
    small, large = tiny_vit(64), tiny_vit(96)
    count = pretrained.load_backbone(large, small.state_dict(), "vit.pth")
    assert count == len(networks.backbone_keys(large))
    then, now = (net.encoder.pos_embedding.detach() for net in (small, large))
    assert torch.equal(now[:, 0], then[:, 0])  # the class token
    # the corners stay, and the centre is their mean
    for new, old in ((1, 1), (3, 2), (7, 3), (9, 4)):
        torch.testing.assert_close(now[:, new], then[:, old])
    torch.testing.assert_close(now[:, 5], then[:, 1:].mean(1), atol=1e-5, rtol=1e-4)
    flat = {**small.state_dict(), "encoder.pos_embedding": torch.zeros(1, 4, 8)}
    with pytest.raises(InputError, match="wrong shapes"):
        pretrained.load_backbone(large, flat, "vit.pth")


@pytest.mark.parametrize(
    ("arch", "layer"), [("vit_b_32", "conv_proj"), ("swin_t", "features.0.0"), ("alexnet", None)]
)
def test_patch_projection_is_that_of_a_vit_or_swin(arch, layer):
    net = networks.create(arch, 0, 64)
    assert networks.patch_projection(net) is (layer and net.get_submodule(layer))
    assert networks.patch_projection(networks.create("resnet18", 0)) is None


def test_all_names_of_torchvision_are_known():
    assert list(ARCHS) == [name for name in NAMES if "resn" in name] and len(NAMES) >= 80
    for name in NAMES:
        with contextlib.suppress(InputError):
            assert networks.find(name).name == name
