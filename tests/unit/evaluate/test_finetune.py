"""Test that a new classifier learns with the recipes for fine-tuning, and joint batch norm."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import on_two_ranks

import main_semisup
from moco import distributed
from moco.encoder import networks
from moco.engine import lr_schedule, optim
from moco.evaluate.classifier import Setting
from moco.evaluate.finetune import FineTuning

CLASSES, STEPS = 100, 750
NORM = 2.0  # of a feature


def final_loss(optimizer: str) -> float:
    """Return the loss of a zero-initialised classifier after 750 steps on separable features.

    All settings but the optimizer are those of FNC's recipe, without its schedule's steps by epoch.
    """
    torch.manual_seed(0)
    words = ["DIR", "--cfg", "configs/semisup_fnc_1pct.yaml", "--optimizer", optimizer]
    config = main_semisup.parser().parse(words)
    config = replace(config, input=replace(config.input, batch_per_process=1024))
    schedule, tuning = config.optimizer, config.finetuning
    net = networks.create("resnet18", CLASSES)
    images = SimpleNamespace(train=None, val=None, held_out=None)
    setting = Setting(tuning.lr_classifier, schedule.wd)
    task = FineTuning(config, net, images, torch.device("cpu"), setting, tuning.lr_backbone)
    assert not task.classifier.weight.any()

    made = optim.make(task.parameter_groups(), schedule, "off")
    scale = lr_schedule.lr_scale(schedule.learning_rate_scaling, config.input.batch_size)
    base = [group["lr"] * scale for group in made.param_groups]
    assert base[0] == pytest.approx(0.16)
    centers, label = torch.randn(CLASSES, net.fc.in_features), torch.arange(1000) % CLASSES
    features = centers[label] + 0.3 * torch.randn(1000, net.fc.in_features)
    features = NORM * F.normalize(features, dim=1)
    for step in range(STEPS):
        loss = F.cross_entropy(task.classifier(features), label)
        loss.backward()
        for group, lr in zip(made.param_groups, base, strict=True):
            group["lr"] = lr_schedule.curve(schedule, lr, step / STEPS * schedule.epochs, scale)
        made.step()
        made.zero_grad()
    with torch.no_grad():
        return float(F.cross_entropy(task.classifier(features), label))


def test_a_classifier_of_zeros_learns_with_the_recipe_of_fnc():
    recipe = Path("configs/semisup_fnc_1pct.yaml").read_text()
    assert "optimizer: lars_tf" in recipe
    assert final_loss("lars_tf") < 0.1


def test_it_would_hardly_learn_with_layer_wise_rates():
    """The loss of zeros is log(100) = 4.6."""
    assert final_loss("lars") > 4.4


def train_two_steps(rank: int | None) -> dict[str, torch.Tensor]:
    """Return the network after two steps on this rank's half of a batch, or (None) on all of it."""
    torch.manual_seed(0)
    words = ["DIR", "--cfg", "configs/semisup_fnc_1pct.yaml"]
    config = main_semisup.parser().parse(words)
    config = replace(config, input=replace(config.input, batch_per_process=4))
    net = networks.create("resnet18", 3, 32, stem="cifar").double()
    images = SimpleNamespace(train=None, val=None, held_out=None)
    task = FineTuning(config, net, images, torch.device("cpu"), Setting(0.1, 0.0), 0.1)
    mine = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    ddp = distributed.data_parallel(task.trained_module)
    optimizer = optim.make(task.parameter_groups(), config.optimizer, "off")
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)[mine]
        logits = ddp(x).float()[None]
        task.losses(logits, torch.arange(8)[mine] % 3)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return task.module.state_dict()


def test_sync_bn_on_two_processes_is_batch_norm_of_the_joint_batch(tmp_path):
    first, second = on_two_ranks({"train": (train_two_steps,)}, tmp_path)("train")
    joint = train_two_steps(None)
    assert first.keys() == joint.keys()
    for name, tensor in joint.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
