"""Test label smoothing and stochastic depth in the training of a classifier."""

import math

import pytest
import torch
from torch import nn

from moco.config import MEAN, STD, Probing, replaced
from moco.data import loader, sources
from moco.encoder import networks, timm_networks
from moco.evaluate.classifier import Setting
from moco.evaluate.finetune import FineTuning
from moco.evaluate.probe import LinearProbe
from moco.evaluate.splits import Splits
from moco.rng import Progress

CLASSES = 3


def task(images, arch, evaluation=LinearProbe, heads=1, drop_path=0.5, **options):
    sizes = {"image_size": 32, "batch_size": 4, "batch_per_process": 4, "workers": 0}
    config = replaced(
        Probing(), arch=arch, drop_path=drop_path, mean=MEAN, std=STD, **sizes, **options
    )
    torch.manual_seed(0)
    net = networks.create(arch, CLASSES, 32, drop_path)
    splits = Splits(*(sources.scan(images, split) for split in ("train", "val")))
    settings = [Setting(0.1 * (i + 1), 0.0) for i in range(heads)]
    if evaluation is FineTuning:
        return FineTuning(config, net, splits, torch.device("cpu"), settings[0], lr_backbone=0.1)
    return LinearProbe(config, net, splits, torch.device("cpu"), settings)


def loss_of(one, seed, images):
    """Return the loss of one pass, with the draws of `seed`."""
    batch = loader.Batch([images], torch.arange(4), torch.tensor([0, 1, 2, 0]), [])
    torch.manual_seed(seed)
    return one.loss(one.trained_module, [images], batch, Progress())[0]


def cross_entropy(logits, label, smoothing):
    """Return the mean cross entropy of one classifier, computed image by image."""
    total = 0.0
    for row, right in zip(logits.tolist(), label.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for c, value in enumerate(row):
            target = smoothing / len(row) + (1 - smoothing) * (c == right)
            total -= target * (value - log_sum)
    return total / len(logits)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_the_plain_formula(shared_images, heads, smoothing):
    one = task(shared_images, "test_vit", heads=heads, label_smoothing=smoothing)
    logits = 3 * torch.randn(heads, 7, CLASSES, dtype=torch.float64)
    label = torch.randint(CLASSES, (7,))
    expected = [cross_entropy(rows, label, smoothing) for rows in logits]
    loss, metrics = one.losses(logits, label)
    assert float(loss) == pytest.approx(sum(expected), rel=0, abs=1e-12)
    assert float(metrics["loss"]) == pytest.approx(min(expected), rel=0, abs=1e-12)


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_a_frozen_network_has_stochastic_depth_in_training_alone(shared_images, arch):
    one = task(shared_images, arch)
    nn.init.normal_(networks.head(one.module).weight)
    for module in one.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts with residual branches of 0
    one.loaded = {name: x.clone() for name, x in one.module.state_dict().items()}
    x = torch.randn(4, 3, 32, 32)
    tested = one.module.eval()(x)
    one.start_epoch()
    losses = [loss_of(one, seed, x) for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]
    losses[0].backward()
    head = networks.head(one.module)
    trained = {id(p) for p in head.parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in one.module.parameters())
    assert one._changed() == []  # batch norm's statistics, too
    # a test puts the network into eval mode, and the next epoch into that of training again
    one._test(one.val)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert torch.equal(one.module(x), tested)
    one.start_epoch()
    assert loss_of(one, 2, x) == losses[1]


@pytest.mark.parametrize("arch", ["test_vit", "swin_tiny"])
def test_this_is_the_training_mode_of_a_transformer(shared_images, arch):
    """MoBY's code sets the full network to training mode."""
    one, x = task(shared_images, arch), torch.randn(4, 3, 32, 32)
    one.start_epoch()
    found = []
    for mode in (lambda: None, one.module.train):
        mode()
        torch.manual_seed(3)
        found.append(networks.features(one.module, x))
    assert torch.equal(*found)


def test_without_drop_path_a_frozen_network_draws_nothing(shared_images):
    one = task(shared_images, "test_vit", drop_path=0.0)
    one.start_epoch()
    x = torch.randn(4, 3, 32, 32)
    assert loss_of(one, 1, x) == loss_of(one, 2, x)


def test_fine_tuning_has_stochastic_depth_in_training(shared_images):
    one = task(shared_images, "test_vit", FineTuning)
    nn.init.normal_(networks.head(one.module).weight)
    rates = [module.drop_prob for module in timm_networks.stochastic_depth(one.module)]
    assert max(rates) == pytest.approx(0.5)
    one.start_epoch()
    x = torch.randn(4, 3, 32, 32)
    losses = [loss_of(one, seed, x) for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]
