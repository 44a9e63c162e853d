"""Names of SimCLR's TensorFlow variables: the converted network computes the same features."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bundle_helpers import SamePool, SimCLR
from conftest import ROOT

from moco.encoder import networks, pretrained, simclr_tf
from moco.encoder.tensor_bundle import Bundle
from moco.errors import InputError

SIZE = 64


class InMemory:
    """A checkpoint whose variables are NumPy arrays in memory."""

    prefix = Path("model.ckpt-9")

    def __init__(self, arrays):
        self.arrays = arrays
        self.variables = {name: SimpleNamespace(shape=x.shape) for name, x in arrays.items()}

    def tensor(self, name):
        return torch.from_numpy(self.arrays[name])


@torch.no_grad()
def called(**more):
    """Return SimCLR's network, images [B, H, W, 3], and its two outputs for them."""
    net, images = SimCLR(**more), torch.rand(2, SIZE, SIZE, 3)
    return net, images, *net(images)


@pytest.fixture(scope="module")
def resnet50():
    return called()


@pytest.fixture
def arrays(resnet50):
    """Return a copy of the ResNet-50's variables."""
    return dict(resnet50[0].variables)


def loaded(found, out=0):
    """Return a network that loads the converted tensors as --pretrained does."""
    net = networks.create(found.arch, out, stem=found.stem)
    tensors = {f"module.encoder_q.{name}": x for name, x in found.tensors.items()}
    assert pretrained.load_backbone(net, tensors, "x") == len(networks.backbone_keys(net))
    return net.eval(), tensors


@torch.no_grad()
def features(net, images):
    return net(images.permute(0, 3, 1, 2))


def test_backbone_has_the_features_of_simclr(resnet50, arrays):
    _, images, wanted, _ = resnet50
    found = simclr_tf.convert(InMemory(arrays))
    assert (found.arch, found.stem, found.layers) == ("resnet50", "imagenet", 3)
    assert found.left_out == [] and found.slots == 0
    net, _ = loaded(found)
    net.maxpool = SamePool()
    torch.testing.assert_close(features(net, images), wanted, rtol=1e-4, atol=1e-4)


def test_projection_head_has_the_output_of_simclr(resnet50, arrays):
    """All three layers, and the first one alone, which FNC keeps for fine-tuning."""
    _, images, hidden, wanted = resnet50
    net, tensors = loaded(simclr_tf.convert(InMemory(arrays)), 128)
    pretrained.load_projection(net, tensors, "x")
    net.eval().maxpool = SamePool()
    torch.testing.assert_close(features(net, images), wanted, rtol=1e-4, atol=1e-4)
    net, tensors = loaded(simclr_tf.convert(InMemory(arrays)), 10)
    pretrained.keep_projection(net, tensors, 1, "x")
    net.eval().maxpool = SamePool()
    kernel = torch.from_numpy(arrays["head_contrastive/nl_0/dense/kernel"])
    norm = {
        leaf: torch.from_numpy(arrays[f"head_contrastive/nl_0/batch_normalization/{leaf}"])
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    first = (hidden @ kernel - norm["moving_mean"]) / (norm["moving_variance"] + 1e-5).sqrt()
    first = (first * norm["gamma"] + norm["beta"]).relu()
    kept = torch.nn.Sequential(*list(net.fc)[:-1])
    assert len(kept) == 3 and net.fc[-1].out_features == 10
    net.fc = kept
    torch.testing.assert_close(features(net, images), first, rtol=1e-4, atol=1e-4)


def test_max_pooling_differs_as_by_a_shift_of_two_pixels():
    """Pooling "SAME" starts at the first pixel, PyTorch's one before it: two pixels of the image.

    In the middle of the image, the stem of PyTorch's network on the image moved by two pixels is
    TensorFlow's.
    """
    net = networks.create("resnet50", 0)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = net.bn1.eval()(net.conv1(images)).relu()
        theirs = SamePool()(before)
        moved = net.maxpool(net.bn1(net.conv1(images.roll((-2, -2), (2, 3)))).relu())
    assert not torch.allclose(net.maxpool(before), theirs)
    torch.testing.assert_close(moved[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2])


def test_cifar_stem_is_converted():
    net, images, wanted, _ = called(cifar=True, head=(2048, 64))
    found = simclr_tf.convert(InMemory(net.variables))
    assert found.stem == "cifar" and found.layers == 2
    torch.testing.assert_close(features(loaded(found)[0], images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "blocks"), [("resnet101", (3, 4, 23, 3)), ("resnet152", (3, 8, 36, 3))]
)
def test_deeper_networks_are_known(arch, blocks):
    assert simclr_tf.BLOCKS[arch] == blocks
    order = list(simclr_tf._order(arch))
    names = networks.create(arch, 0).state_dict().keys()
    assert len(set(order)) == len(order) and simclr_tf._CONVS[len(order)] == arch
    assert {f"{one}.weight" for pair in order for one in pair} == {
        name for name in names if name.endswith("weight")
    }


# what else a checkpoint holds


def test_variables_of_the_optimizer_and_others_are_left_out(arrays):
    extra = {
        f"{name}/Momentum": x for name, x in arrays.items() if not name.endswith(("mean", "iance"))
    }
    classifier = "head_supervised/linear_layer/dense/kernel"
    extra |= {
        "global_step": arrays["base_model/conv2d/kernel"][:0],
        classifier: extra["base_model/conv2d/kernel/Momentum"],
    }
    found = simclr_tf.convert(InMemory({**extra, **arrays}))
    wanted = simclr_tf.convert(InMemory(arrays))
    assert found.tensors.keys() == wanted.tensors.keys()
    assert found.left_out == ["global_step", classifier] and found.slots == len(extra) - 2


def test_order_of_the_names_does_not_matter(arrays):
    """Numbers are compared as numbers: conv2d_10 comes after conv2d_9."""
    found = simclr_tf.convert(InMemory(dict(sorted(arrays.items()))))
    wanted = simclr_tf.convert(InMemory(dict(reversed(arrays.items()))))
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(x, wanted.tensors[name]) for name, x in found.tensors.items())


def test_another_scope_is_found_or_given(arrays):
    moved = {name.replace("base_model/", "online/"): x for name, x in arrays.items()}
    assert simclr_tf.convert(InMemory(moved)).arch == "resnet50"
    both = {**moved, **{name.replace("base_model/", "ema/"): x for name, x in arrays.items()}}
    with pytest.raises(InputError, match=r"holds 2 encoders \(online, ema\); give --scope"):
        simclr_tf.convert(InMemory(both))
    assert simclr_tf.convert(InMemory(both), "ema").arch == "resnet50"
    with pytest.raises(InputError, match="--scope target: has no variable target/conv2d/kernel"):
        simclr_tf.convert(InMemory(both), "target")


def test_head_without_batch_norm_and_with_biases_is_converted(arrays):
    """A linear layer without batch norm is followed by its ReLU."""
    arrays = {name: x for name, x in arrays.items() if "head_contrastive" not in name}
    for j, width in enumerate((2048, 32)):
        arrays[f"head_contrastive/nl_{j}/dense/kernel"] = torch.rand(2048, width).numpy()
        arrays[f"head_contrastive/nl_{j}/dense/bias"] = torch.rand(width).numpy()
    found = simclr_tf.convert(InMemory(arrays))
    assert {name for name in found.tensors if name.startswith("fc")} == {
        f"fc.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    }
    net, tensors = loaded(found, 32)
    pretrained.load_projection(net, tensors, "x")
    assert [type(layer).__name__ for layer in net.fc] == ["Linear", "ReLU", "Linear"]


# networks that torchvision does not have


@torch.no_grad()
def variables(**more):
    net = SimCLR(head=(), **more)
    net(torch.rand(1, 32, 32, 3))
    return net.variables


def test_other_networks_are_refused(arrays):
    wide = variables(width=2, blocks=(1, 1, 1, 1))
    small = variables(blocks=(1, 1, 1, 1))
    kernel = "base_model/conv2d/kernel"
    selective = {**small, kernel: small[kernel][:3, :3, :, :32]}
    basic = {f"base_model/conv2d_{i}/kernel": small[kernel] for i in range(1, 21)} | {
        kernel: small[kernel]
    }
    for found, words in (
        (wide, "is a ResNet of width 2x, which torchvision does not have"),
        (small, "has 17 convolutions and 17 batch norms"),
        (selective, "selective kernels"),
        (basic, "is a ResNet-18: the first block of SimCLR's has a projection"),
        ({kernel: torch.zeros(7, 7, 4, 64).numpy()}, "does not begin with a ResNet's"),
        ({kernel: torch.zeros(64).numpy()}, "does not begin with a ResNet's"),
        ({"model/conv1/kernel": small[kernel]}, "has no variable base_model/conv2d/kernel"),
        ({}, "has no variable base_model/conv2d/kernel"),
    ):
        with pytest.raises(InputError, match=words):
            simclr_tf.convert(InMemory(found))


def test_damaged_networks_are_refused(arrays):
    third = "base_model/conv2d_3/kernel"
    norm = "base_model/batch_normalization_5/beta"
    broken = arrays[third].copy()
    broken[0, 0, 0, 0] = float("nan")
    for found, words in (
        ({**arrays, third: arrays[third][:, :, :5]}, f"{third} is .* expected"),
        ({**arrays, third: broken}, f"{third} holds NaN or infinite values"),
        ({name: x for name, x in arrays.items() if name != norm}, "has no variables for layer1"),
        ({name: x for name, x in arrays.items() if name != third}, "has 52 convolutions"),
        ({**arrays, "base_model/conv2d_99/bias": broken}, "a convolution without a kernel"),
        ({**arrays, "head_contrastive/nl_9/dense/bias": broken[0, 0, 0]}, "has no kernel"),
    ):
        with pytest.raises(InputError, match=words):
            simclr_tf.convert(InMemory(found))


def test_checkpoints_of_tensorflow_2_are_refused():
    with pytest.raises(InputError, match=r"saved by TensorFlow 2 \(tf\.train\.Checkpoint\)"):
        simclr_tf.convert(Bundle(ROOT / "tests" / "tf_checkpoints" / "objects" / "ckpt-1"))
