"""CIFAR-10 as in MoCo's demo: the script against a plain training loop.

Scripts that read a checkpoint take its stem and normalization.
"""

import json
import math
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from conftest import ROOT, shell, write_images
from run_helpers import load, refused, typed

import main_synco
from moco import rng
from moco.augment import color, recipes
from moco.data import loader, sources
from moco.engine import features, trainer

pytestmark = pytest.mark.slow

# SIZE is in pixels: below CIFAR's 32, to save time
EPOCHS, BATCH, IMAGES, K, GROUPS, SIZE = 3, 32, 72, 48, 4, 16
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write train/ with three classes of 24 images, and test/ instead of val/."""
    root = write_images(
        tmp_path_factory.mktemp("cifar"), classes=3, train=IMAGES // 3, val=8, size=SIZE
    )
    (root / "val").rename(root / "test")
    return root


def command(data: Path, run: Path, *more: object) -> tuple:
    """Return a short command with the demo's settings."""
    short = (
        *typed(
            "--epochs {} -b {} --moco-k {} --bn-splits {} --knn-every 1", EPOCHS, BATCH, K, GROUPS
        ),
        "-j",
        0,
    )
    short = (*short, "--image-size", SIZE, "--print-freq", 1)
    return (
        "main_synco",
        data,
        "--cfg",
        ROOT / "configs" / "cifar10" / "moco.yaml",
        *short,
        "--save-dir",
        run,
        *more,
    )


def network() -> torch.nn.Module:
    """Return the demo's ResNet-18 in float64."""
    net = torchvision.models.resnet18(num_classes=128)
    net.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = torch.nn.Identity()
    return net.double()


def in_groups(net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the features with batch norm by group; running statistics become the groups' mean."""
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
    """Train as the demo does, with the script's initial weights and random draws.

    Return the loss of each step, and k-NN top-1 after each epoch.
    """
    q_net, k_net = network(), network()
    for net, name in ((q_net, "encoder_q."), (k_net, "encoder_k.")):
        net.load_state_dict(
            {key.removeprefix(name): x for key, x in start.items() if key.startswith(name)}
        )
    queue, place = start["queue"].clone(), 0
    optimizer = torch.optim.SGD(q_net.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    images = sources.scan(data, "train")
    recipe = recipes.recipe("small", SIZE, mean=MEAN, std=STD)
    cut = loader.Views(images, loader.RandomCrops(recipe, 0))
    steps, losses, accuracies = IMAGES // BATCH, [], []
    for epoch in range(EPOCHS):
        order = torch.randperm(IMAGES, generator=rng.generator("cpu", rng.ORDER, 0, epoch))
        optimizer.param_groups[0]["lr"] = (
            0.06 * 0.5 * (1 + math.cos(math.pi * (epoch + 1) / EPOCHS))
        )  # from 1, as there
        for step in range(steps):
            progress = rng.Progress(0, epoch, epoch * steps + step, 0, steps, EPOCHS)
            samples = [cut[epoch, int(i)] for i in order[step * BATCH :][:BATCH]]
            views = [
                color.augment(
                    torch.stack([sample[0][v] for sample in samples]),
                    view,
                    progress.generator(rng.COLOR, "cpu", 0, v),
                )
                for v, view in enumerate(recipe)
            ]
            loss, keys = 0.0, {}
            for direction in range(1 + symmetric):
                key = 1 - direction
                q = in_groups(q_net, views[direction].double())
                shuffle = torch.randperm(
                    BATCH, generator=progress.generator(rng.SHUFFLE, "cpu", *[1] * direction)
                )
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
            losses.append(float(loss.detach()))
        accuracies.append(nearest(q_net, data))
    return losses, accuracies


@torch.no_grad()
def nearest(net: torch.nn.Module, data: Path) -> float:
    """Return k-NN top-1 with the head's output. All images vote, as they are fewer than k 200."""
    net.eval()
    found = []
    for split in ("train", "test"):
        images = sources.scan(data, split)
        x = torch.stack([images.read(i) for i in range(len(images))]).double() / 255
        x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        found.append((F.normalize(net(x.double()), dim=1), torch.tensor(images.labels)))
    net.train()
    (bank, labels), (queries, truth) = found
    votes = ((queries @ bank.T) / 0.1).exp() @ F.one_hot(labels).double()
    return float((votes.argmax(1) == truth).double().mean())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_script_trains_as_the_demo_does(symmetric, data, script, tmp_path, monkeypatch):
    build, built = main_synco.build, {}

    def double(args):
        net = build(args).double()
        built.update({name: x.clone() for name, x in net.state_dict().items()})
        return net

    monkeypatch.setattr(main_synco, "build", double)
    monkeypatch.setattr(trainer.precision, "prepare_images", lambda images: images.double())
    monkeypatch.setattr(features, "prepare_images", lambda images: images.double())
    status, _, err = script(*command(data, tmp_path / "run", *["--symmetric"] * symmetric))
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses, accuracies = plain(data, built, symmetric)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-6)
    knn = [line["knn"] for line in lines[1:] if "knn" in line]  # without that before training
    assert knn == pytest.approx(accuracies, rel=1e-6)
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([0.045, 0.045, 0.015, 0.015, 0.0, 0.0])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """Train a run with the stem and CIFAR's normalization, which later commands do not give."""
    from conftest import in_process

    run = tmp_path_factory.mktemp("trained") / "run"
    status, _, err = in_process(*command(data, run, "--epochs", 1))
    assert status == 0, err
    return run


def of(run: Path) -> tuple:
    """Return the architecture, stem, image size and normalization in a run's args.yaml."""
    args = yaml.safe_load((run / "args.yaml").read_text())
    return args["arch"], args["stem"], args["image_size"], tuple(args["mean"]), tuple(args["std"])


SETTINGS = ("resnet18", "cifar", SIZE, MEAN, STD)
SHORT = ("-b", 8, "-j", 0)


def test_a_resumed_run_keeps_its_stem_and_normalization(data, trained, script, tmp_path):
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    recipe = yaml.safe_load((ROOT / "configs" / "cifar10" / "moco.yaml").read_text())
    plain = tmp_path / "plain.yaml"
    plain.write_text(
        yaml.safe_dump(
            {name: value for name, value in recipe.items() if name not in ("stem", "mean", "std")}
        )
    )
    resumed = command(
        data, tmp_path / "run", "--cfg", plain, "--resume", "auto", "--allow-change", "epochs"
    )
    status, out, err = script(*resumed)
    assert status == 0 and "resumed from" in out, err
    assert of(tmp_path / "run") == SETTINGS
    refused(script(*resumed, "--stem", "imagenet"), "--stem is imagenet, and was cifar")
    refused(
        script(*resumed, "--mean", 0.5, 0.5, 0.5),
        "--mean is [0.5, 0.5, 0.5], and was [0.4914, 0.4822, 0.4465]",
    )


def test_evaluations_take_the_stem_and_the_normalization_from_the_checkpoint(
    data, trained, script, tmp_path
):
    checkpoint = trained / "checkpoint_0000.pth.tar"
    probe, semi = ("--lr", 0.1, "--epochs", 1), ("--train-percent", 100, "--epochs", 1)
    for name, more in (("main_knn", ("--k", 1)), ("main_lincls", probe), ("main_semisup", semi)):
        status, _, err = script(
            name, data, "--pretrained", checkpoint, *more, *SHORT, "--save-dir", tmp_path / name
        )
        assert status == 0, err
        assert of(tmp_path / name) == SETTINGS
    for name in ("main_lincls", "main_semisup"):
        saved, tested = tmp_path / name / "checkpoint.pth.tar", tmp_path / f"{name}-tested"
        status, _, err = script(name, data, "-e", "--resume", saved, *SHORT, "--save-dir", tested)
        assert status == 0, err
        accuracies = [
            json.loads((place / "results.json").read_text())["metrics"]
            for place in (tmp_path / name, tested)
        ]
        assert of(tested) == SETTINGS and accuracies[0] == accuracies[1]
        refused(
            script(name, data, "--resume", saved, *SHORT, "--stem", "imagenet"),
            "--stem imagenet",
            "was trained with cifar",
        )
    other = script("main_knn", data, "--pretrained", checkpoint, *SHORT, "--stem", "imagenet")
    refused(other, "has the stem cifar; leave --stem out")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_an_exported_stem_is_read_by_other_software_and_here(
    ending, data, trained, script, tmp_path
):
    checkpoint, out = trained / "checkpoint_0000.pth.tar", tmp_path / f"encoder{ending}"
    done = shell(
        "tools/export.py", checkpoint, out, "--hub"
    )  # loads it strictly into torchvision's and timm's networks
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("net.maxpool = torch.nn.Identity()") == 2
        and "mean (0.4914, 0.4822, 0.4465)" in done.stdout
    )
    options = next(line for line in done.stdout.splitlines() if "--pretrained" in line).split()
    status, _, err = script(
        "main_knn", data, *options, "--k", 1, *SHORT, "--save-dir", tmp_path / "knn"
    )
    assert status == 0, err
    assert of(tmp_path / "knn") == SETTINGS
    images = torch.randn(2, 3, SIZE, SIZE)
    mine = torch.hub.load(str(ROOT), "encoder", str(checkpoint), source="local")
    theirs = torch.hub.load(str(tmp_path), "encoder", source="local")
    assert mine.conv1.kernel_size == theirs.conv1.kernel_size == (3, 3)
    torch.testing.assert_close(mine(images), theirs(images))


def test_features_of_the_projection_head(data, trained, script, tmp_path):
    checkpoint = trained / "checkpoint_0000.pth.tar"
    common = (
        "main_knn",
        data,
        "--pretrained",
        checkpoint,
        *SHORT,
        *typed("--k 200 --temperature 0.1 --save-dir"),
    )
    status, _, err = script(
        *common, tmp_path / "head", "--features", "head", "--dump-features", tmp_path / "dump"
    )
    assert status == 0, err
    found = json.loads((tmp_path / "head" / "results.json").read_text())
    logged = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert (
        found["metrics"]["knn_200"] == logged[-1]["knn"] and found["settings"]["features"] == "head"
    )
    assert np.load(tmp_path / "dump" / "val_features.npy").shape == (24, 128)
    loaded = (
        "main_knn",
        *typed("--load-features {} --k 200 --temperature 0.1", tmp_path / "dump"),
        "--save-dir",
        tmp_path / "loaded",
    )
    assert script(*loaded)[0] == 0
    results = json.loads((tmp_path / "loaded" / "results.json").read_text())
    assert results["metrics"] == found["metrics"] and results["settings"]["features"] == "head"
    refused(
        script(*loaded, "--features", "backbone"),
        "--features backbone",
        "are of head; leave --features out",
    )
    refused(
        script("main_knn", data, "--features", "head", *SHORT),
        "--features head: needs a checkpoint",
    )
    state = load(checkpoint)
    state["state_dict"] = {name: x for name, x in state["state_dict"].items() if ".fc." not in name}
    torch.save(state, tmp_path / "headless.pth.tar")
    headless = (
        "main_knn",
        data,
        *typed("--pretrained {} --features head", tmp_path / "headless.pth.tar"),
        *SHORT,
    )
    refused(script(*headless), "has no projection head; leave out --features head")


def test_pretraining_reads_the_original_files_of_cifar10(script, tmp_path):
    """Images are normalized with CIFAR-10's mean and std; other data sets are refused."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {
            "data": draw.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    )
    short = typed("--stem cifar -a resnet18 --image-size 32 -b 16 -j 0 --epochs 1 --moco-k 32")
    run = tmp_path / "run"
    status, out, err = script(
        "main_synco", tmp_path, "--dataset", "cifar10", *short, "--knn-every", 1, "--save-dir", run
    )
    assert status == 0, err
    assert "100 images of 10 classes" in out and of(run)[3:] == (MEAN, STD)
    assert (
        f"main_knn.py {tmp_path} --pretrained {run}/checkpoint_0000.pth.tar --dataset cifar10"
        in out
    )
    refused(
        script("main_synco", tmp_path, "--dataset", "cifar100", *short),
        "no usable cifar100",
        "--download",
    )
    (tmp_path / "train").mkdir()
    refused(
        script("main_synco", tmp_path, "--dataset", "cifar100", *short),
        "in its train/, leave out --dataset",
    )


def test_a_folder_without_val_is_tested_on_test(data, capfd):
    assert sources.find(str(data), ("train", "val")) == data
    assert len(sources.scan(data, "val")) == 24
    assert (
        capfd.readouterr().err.count(f"{data}: has no val/; test/ is used instead") <= 1
    )  # once per process


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "configs" / "cifar10").glob("*.yaml"))
)
def test_every_recipe_trains(name, data, script, tmp_path):
    file = ROOT / "configs" / "cifar10" / f"{name}.yaml"
    words = next(
        line for line in file.read_text().splitlines() if line.startswith("# python")
    ).split()
    rows = {
        "main_synco": ("--moco-k", 256),
        "main_adco": ("--cluster", 64),
        "main_moby": ("--queue", 256),
    }
    script_name = words[2].removesuffix(".py")
    more = () if name == "byol" else rows.get(script_name, ())
    if name in ("synco", "mochi"):
        more = (*more, "--warmup-epochs", 0)
    short = typed("--epochs 1 --image-size {} -b 16 -j 0 --knn-every 1 --knn-k 20", SIZE)
    status, out, err = script(
        script_name, data, "--cfg", file, *short, *more, "--save-dir", tmp_path
    )
    assert status == 0, err
    if name == "moco":  # whose rate is that of an epoch's end
        assert "the only epoch uses the learning rate at its end, which is 0" in out
    arch = yaml.safe_load(file.read_text())["arch"]
    if arch == SETTINGS[0]:  # with the monitor of MoCo's demo
        assert "--k 20 --temperature 0.1 --features head" in out
    assert of(tmp_path) == (arch, *SETTINGS[1:])
    assert (tmp_path / "checkpoint_0000.pth.tar").exists()
