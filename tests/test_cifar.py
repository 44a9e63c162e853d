"""CIFAR-10 as in MoCo's demo: the script beside a plain loop, and the stem's way through all that reads a checkpoint."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from conftest import ROOT, write_images
from test_cli import refused
from test_runs import load

import main_synco
from moco import rng
from moco.augment import color, crop, recipes
from moco.data import datasets, loader
from moco.engine import features, train

EPOCHS, BATCH, IMAGES, K, GROUPS = 2, 32, 72, 48, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes of 24 images, and test/ in the place of val/."""
    root = write_images(tmp_path_factory.mktemp("cifar"), classes=3, train=IMAGES // 3, val=8, size=32)
    (root / "val").rename(root / "test")
    return root


def command(data: Path, run: Path, *more: object) -> tuple:
    """Return a short command with the demo's settings."""
    short = ("--epochs", EPOCHS, "-b", BATCH, "--moco-k", K, "--bn-splits", GROUPS, "--knn-every", 1, "-j", 0, "--print-freq", 1)
    return ("main_synco", data, "--cfg", ROOT / "configs" / "cifar10" / "moco.yaml", *short, "--save-dir", run, *more)


def network() -> torch.nn.Module:
    net = torchvision.models.resnet18(num_classes=128)
    net.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = torch.nn.Identity()
    return net.double()


def in_groups(net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features of each group by itself; the running statistics are the mean over the groups."""
    before = {name: x.clone() for name, x in net.named_buffers()}
    outputs, after = [], []
    for group in images.chunk(GROUPS):
        for name, x in net.named_buffers():
            x.data = before[name].clone()
        outputs.append(net(group))
        after.append({name: x.clone() for name, x in net.named_buffers()})
    for name, x in net.named_buffers():
        x.data = torch.stack([found[name] for found in after]).double().mean(0).to(x.dtype)
    return F.normalize(torch.cat(outputs), dim=1)


def plain(data: Path, start: dict, symmetric: bool) -> tuple[list[float], list[float]]:
    """Train as the demo does: the loss of each step, and k-NN top-1 after each epoch, with the script's weights and draws."""
    q_net, k_net = network(), network()
    for net, name in ((q_net, "encoder_q."), (k_net, "encoder_k.")):
        net.load_state_dict({key.removeprefix(name): x for key, x in start.items() if key.startswith(name)})
    queue, place = start["queue"].clone(), 0
    optimizer = torch.optim.SGD(q_net.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    images = datasets.scan(data, "train")
    recipe = recipes.recipe("small", 32, mean=MEAN, std=STD)
    cut = loader.Views(images, loader.RandomCrops(recipe, 0))
    steps, losses, accuracies = IMAGES // BATCH, [], []
    for epoch in range(EPOCHS):
        order = torch.randperm(IMAGES, generator=rng.generator("cpu", rng.ORDER, 0, epoch))
        optimizer.param_groups[0]["lr"] = 0.06 * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        for step in range(steps):
            progress = rng.Progress(0, epoch, epoch * steps + step, 0, steps, EPOCHS)
            samples = [cut[epoch, int(i)] for i in order[step * BATCH :][:BATCH]]
            views = [
                color.augment(torch.stack([sample[0][v] for sample in samples]), view, progress.generator(rng.COLOR, "cpu", 0, v))
                for v, view in enumerate(recipe)
            ]
            loss, keys = 0.0, {}
            for direction in range(1 + symmetric):
                key = 1 - direction
                q = in_groups(q_net, views[direction].double())
                shuffle = torch.randperm(BATCH, generator=progress.generator(rng.SHUFFLE, "cpu", *[1] * direction))
                with torch.no_grad():
                    keys[key] = in_groups(k_net, views[key].double()[shuffle])[shuffle.argsort()]
                logits = torch.cat([(q * keys[key]).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
                loss = loss + F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mine, theirs in zip(k_net.parameters(), q_net.parameters(), strict=True):
                    mine.mul_(0.99).add_(theirs, alpha=0.01)
                for row in torch.cat([keys[view] for view in sorted(keys)]):
                    queue[place % K] = row
                    place += 1
            losses.append(float(loss))
        accuracies.append(nearest(q_net, data))
    return losses, accuracies


@torch.no_grad()
def nearest(net: torch.nn.Module, data: Path) -> float:
    """k-NN of the head's output, k 200 (here all), temperature .1."""
    net.eval()
    found = []
    for split in ("train", "test"):
        images = datasets.scan(data, split)
        x = torch.stack([crop.center_view(images.read(i), 32) for i in range(len(images))]).double() / 255
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        found.append((F.normalize(net(x.double()), dim=1), torch.tensor(images.labels)))
    net.train()
    (bank, labels), (queries, truth) = found
    votes = ((queries @ bank.T) / 0.1).exp() @ F.one_hot(labels).double()
    return float((votes.argmax(1) == truth).double().mean())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_script_trains_as_the_demo(symmetric, data, script, tmp_path, monkeypatch):
    build, built = main_synco.build, {}

    def double(args):
        net = build(args).double()
        built.update({name: x.clone() for name, x in net.state_dict().items()})
        return net

    monkeypatch.setattr(main_synco, "build", double)
    monkeypatch.setattr(train.precision, "layout", lambda images: images.double())
    monkeypatch.setattr(features, "layout", lambda images: images.double())
    status, out, err = script(*command(data, tmp_path / "run", *["--symmetric"] * symmetric))
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses, accuracies = plain(data, built, symmetric)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-6)
    assert [line["knn"] for line in lines if "knn" in line] == pytest.approx(accuracies, rel=1e-6)
    rates = [line["lr"] for line in lines if "lr" in line]
    assert len(losses) == 4 and rates == pytest.approx([0.06, 0.06, 0.03, 0.03])
