"""Test the commands on docs/commands.md: their resolved settings are those of the originals.

The tests pretend that the machine has 8 GPUs, or 4 for commands of 4 processes. EXPECTED has the
settings of the originals. A row without an entry in it fails, too.
"""

import math
import re
import shlex
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT

import main_adco
import main_fnc
import main_lincls
import main_moby
import main_semisup
import main_sogclr
import main_synco
from moco import devices
from moco.config import flat
from moco.engine.lr_schedule import lr_of_step, lr_scale
from moco.errors import InputError
from moco.launch import processes

SCRIPTS = {
    "main_adco": main_adco,
    "main_fnc": main_fnc,
    "main_lincls": main_lincls,
    "main_moby": main_moby,
    "main_semisup": main_semisup,
    "main_sogclr": main_sogclr,
    "main_synco": main_synco,
}
# scripts of other repositories, and those that do the same here
THEIRS = {
    ("MoCo", "main_moco"): "main_synco",
    ("AdCo", "lincls"): "main_lincls",
    ("SogCLR", "train"): "main_sogclr",
    ("SogCLR", "lincls"): "main_lincls",
    ("FNC", "run"): "main_lincls",
    ("SynCo-v2, MoBY and BYOL", "main_pretrain"): "main_moby",
    ("SynCo-v2, MoBY and BYOL", "main_linear"): "main_lincls",
}
IMAGES = 1_281_167  # of ImageNet

# a learning rate as a function of step, steps per epoch and epochs
Rate = Callable[[int, int, int], float]


def at_milestones(lr: float, *milestones: int) -> Rate:
    """Return a learning rate that falls to a tenth at each of these epochs."""
    return lambda step, per, _: lr * 0.1 ** sum(step // per >= epoch for epoch in milestones)


def half_cosine(top: float, end: float, passed: float) -> float:
    return end + (top - end) * (1 + math.cos(math.pi * passed)) / 2


def by_epoch(lr: float, end: float = 0) -> Rate:
    """Return a half cosine that changes at the start of each epoch."""
    return lambda step, per, epochs: half_cosine(lr, end, (step // per) / epochs)


def by_step(lr: float, warmup: int = 0) -> Rate:
    """Return a linear warm-up from 0, then a half cosine to 0 over the rest of the run."""

    def rate(step: int, per: int, epochs: int) -> float:
        first = warmup * per
        if step < first:
            return lr * step / first
        return half_cosine(lr, 0, (step - first) / (epochs * per - first))

    return rate


def swin(lr: float, start: float, end: float, warmup: int) -> Rate:
    """Return the learning rate of Swin-style code: step s + 1 uses that of step s."""

    def rate(step: int, per: int, epochs: int) -> float:
        step, first = max(0, step - 1), warmup * per
        if step < first:
            return start + (lr - start) * step / first
        return half_cosine(lr, end, step / (epochs * per))

    return rate


def up_and_down(lr: float, period: int) -> Rate:
    """Return a cosine that falls to 0 in `period` epochs, rises in the next, and so on."""
    return lambda step, per, _: half_cosine(lr, 0, step / per / period)


class Expected(NamedTuple):
    """The settings of an original command, from the code and the README of its authors."""

    script: str
    processes: int
    batch: int  # images in a step
    epochs: int
    rates: dict[str, Rate]  # by option; compared at the first, three middle and the last step
    protocol: str = ""
    method: str = "synco"  # of the checkpoint
    more: dict[str, object] = {}  # noqa: RUF012
    launched: int = 0  # processes that torch.distributed.launch starts
    images: int = IMAGES


def few(lr_backbone: float, lr_classifier: float, epochs: int, batch: int, percent: int):
    rates = {"lr_backbone": by_epoch(lr_backbone), "lr_classifier": by_epoch(lr_classifier)}
    more = {"weights": "finetune", "train_percent": percent, "wd": 1e-6}
    images = {1: 12_811, 10: 128_116}[percent]
    kept = {"more": more, "images": images}
    return Expected("main_semisup", 8, batch, epochs, rates, "synco", "synco", **kept)


MOCO_PROBE = Expected(
    "main_lincls",
    8,
    256,
    100,
    {"lr": at_milestones(30, 60, 80)},
    "moco",
    more={"wd": [0.0], "weights": "freeze"},
)
ADCO_MORE = {"memory_lr": 3, "mem_t": 0.02, "moco_t": 0.12, "cluster": 65536, "wd": 1e-4}
ADCO_MORE |= {"moco_m": 0.999, "mlp": True, "aug_plus": True, "ad_init": True}
SOGCLR_MORE = {"optimizer": "lars", "gamma": 0.9, "crop_min": 0.08, "wd": 1e-6, "t": 0.1}
SOGCLR_MORE |= {"loss_type": "dcl"}
FNC_TUNING = {"optimizer": "lars_tf", "ft_proj": 1, "wd": 0, "zero_init_classifier": True}
FNC_TUNING |= {"crop_min": 0.2, "weights": "finetune", "learning_rate_scaling": "sqrt"}


def adco(lr: float = 0.03, **more: object) -> Expected:
    return Expected("main_adco", 8, 256, 200, {"lr": by_epoch(lr, 0.0006)}, more=ADCO_MORE | more)


def sogclr(epochs: int, name: str, images: int = IMAGES) -> Expected:
    """Return a pre-training with lr .075 sqrt(batch), and 10 epochs of warm-up from 0."""
    rates = {"lr": by_step(0.075 * 16, 10)}
    more = {**SOGCLR_MORE, "data_name": name}
    return Expected("main_sogclr", 8, 256, epochs, rates, more=more, images=images)


def sogclr_probe(name: str, images: int = IMAGES) -> Expected:
    rates = {"lr": by_epoch(0.1 * 1024 / 256)}
    more = {"wd": [0.0], "data_name": name, "weights": "freeze"}
    return Expected("main_lincls", 8, 1024, 90, rates, "sogclr", "sogclr", more, images=images)


def fnc_few(percent: int, epochs: int) -> Expected:
    rates = dict.fromkeys(("lr_backbone", "lr_classifier"), by_step(0.005 * 32))
    images = {1: 12_811, 10: 128_116}[percent]
    more = {**FNC_TUNING, "train_percent": percent}
    return Expected("main_semisup", 1, 1024, epochs, rates, "fnc", more=more, images=images)


def moby_probe(weights: str, **more: object) -> Expected:
    """Return a probe with lr 1 x batch / 512, which is 1 for 512 images."""
    rates = {"lr": swin(1, 5e-7, 5e-6, 5)}
    more |= {"weights": weights, "wd": [0.0], "nesterov": True, "momentum": 0.9, "clip_grad": 5}
    more |= {"label_smoothing": 0.1, "drop_path": 0.2, "test_resize": "margin"}
    images = 50_000 if "dataset" in more else IMAGES
    return Expected("main_lincls", 4, 512, 100, rates, "moby", "moby", more, 4, images)


EXPECTED = {
    ("MoCo", "MoCo v1"): Expected(
        "main_synco", 8, 256, 200, {"lr": at_milestones(0.03, 120, 160)}, more={"mlp": False}
    ),
    ("MoCo", "MoCo v2"): Expected(
        "main_synco", 8, 256, 200, {"lr": by_epoch(0.03)}, more={"mlp": True, "moco_t": 0.2}
    ),
    ("MoCo", "MoCo v2 on 4 GPUs"): Expected(
        "main_synco", 4, 128, 200, {"lr": by_epoch(0.015)}, more={"aug_plus": True}
    ),
    ("MoCo", "linear"): MOCO_PROBE,
    ("SynCo", "pre-training"): Expected(
        "main_synco",
        8,
        256,
        200,
        {"lr": by_epoch(0.03)},
        more={"n_hard": 1024, "n1": 256, "n6": 64, "warmup_epochs": 10, "moco_k": 65536},
    ),
    ("SynCo", "linear"): MOCO_PROBE,
    ("SynCo", "few labels"): few(0.005, 0.005, 60, 256, 1),
    ("SynCo", "the paper's sweep, one run"): few(0.02, 0.5, 30, 1024, 10),
    ("AdCo", "one direction"): adco(sym=False),
    ("AdCo", "symmetric"): adco(sym=True),
    ("AdCo", "symmetric, 8192 negatives"): adco(
        0.04, sym=True, cluster=8192, moco_t=0.14, mem_t=0.03
    ),
    ("AdCo", "multi-crop"): adco(multi_crop=True),
    ("AdCo", "linear"): Expected(
        "main_lincls", 8, 256, 100, {"lr": by_epoch(10, 0.01)}, "adco", "adco", {"wd": [0.0]}
    ),
    ("AdCo", "linear on Places205"): Expected(
        "main_lincls",
        8,
        256,
        100,
        {"lr": up_and_down(5, 12)},
        "adco",
        "adco",
        {"dataset": "places205", "test_resize": "stretched"},
    ),
    ("SogCLR", "ImageNet"): sogclr(800, "imagenet1000"),
    ("SogCLR", "ImageNet-100"): sogclr(400, "imagenet100", 126_689),
    ("SogCLR", "linear on ImageNet"): sogclr_probe("imagenet1000"),
    ("SogCLR", "linear on ImageNet-100"): sogclr_probe("imagenet100", 126_689),
    ("FNC", "pre-training"): Expected(
        "main_fnc",
        1,
        4096,
        100,
        {"lr": by_step(0.1 * 64, 10)},
        more={"optimizer": "lars_tf", "wd": 1e-4, "temperature": 0.1, "mean": [0.0] * 3},
    ),
    ("FNC", "1 % of the labels"): fnc_few(1, 60),
    ("FNC", "10 % of the labels"): fnc_few(10, 30),
    ("FNC", "linear"): Expected(
        "main_lincls",
        1,
        1024,
        90,
        {"lr": by_step(0.005 * 32)},
        "fnc",
        more={"nesterov": True, "zero_init_classifier": True, "crop_min": 0.2, "wd": [0.0]},
    ),
    ("SynCo-v2, MoBY and BYOL", "pre-training"): Expected(
        "main_moby",
        4,
        512,
        300,
        {"lr": swin(1e-3, 5e-7, 5e-6, 5)},
        more={"arch": "vit_small", "method": "moby", "wd": 0.05, "clip_grad": 5, "amp": "off"},
        launched=4,
    ),
    ("SynCo-v2, MoBY and BYOL", "linear"): moby_probe("freeze"),
    ("SynCo-v2, MoBY and BYOL", "fine-tuning on CIFAR-10"): moby_probe(
        "finetune", dataset="cifar10", data="./data", download=True
    ),
}


def rows() -> dict[tuple[str, str], tuple[str, str, str]]:
    """Return the rows of the page's tables of commands: original, ours, what differs."""
    found, section = {}, ""
    for line in (ROOT / "docs/commands.md").read_text().splitlines():
        section = line[3:] if line.startswith("## ") else section
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0] not in ("", "---"):
            name, original, ours, differs = (cell.replace(r"\|", "|") for cell in cells)
            found[section, name] = original.strip("`"), ours.strip("`"), differs
    return found


ROWS = rows()
VOC07 = ("AdCo", "a linear layer on VOC07")  # its original has no command line
DETECTIONS = {key for key in ROWS if key[0] == "Detection"}


def test_every_row_is_checked():
    assert ROWS.keys() - DETECTIONS - {VOC07} == EXPECTED.keys()
    assert len(DETECTIONS) == 4
    assert all(differs for _, _, differs in ROWS.values())


@pytest.fixture
def resolve(monkeypatch, tmp_path):
    """Return a function that resolves a command of a row on a machine with 8 GPUs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(devices, "resolve_type", lambda _: "cuda")

    def resolved(script: str, words: list[str], expected: Expected) -> object:
        monkeypatch.setattr(devices, "count", lambda _: 4 if expected.processes == 4 else 8)
        if expected.launched:
            n = str(expected.launched)
            found = {"RANK": "0", "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "LOCAL_RANK": "0"}
            for name, value in (found | {"MASTER_ADDR": "::1", "MASTER_PORT": "12345"}).items():
                monkeypatch.setenv(name, value)
        checkpoint = tmp_path / "T" / "checkpoint_0000.pth.tar"
        checkpoint.parent.mkdir(exist_ok=True)
        torch.save({"method": expected.method, "state_dict": {}}, checkpoint)
        files = {"CKPT": str(checkpoint), "OUT": str(tmp_path)}
        words = [files.get(word, word.replace("=CKPT", f"={checkpoint}")) for word in words]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        return SCRIPTS[script].parser().parse(words)

    return resolved


def settings_of(config: object, expected: Expected) -> dict[str, object]:
    """Return the settings to compare: processes, batch, epochs, learning rates, protocol, more."""
    settings = flat(config)
    n = processes.plan(config.launch).world_size
    each = processes.batch_per_process(config.input, n)
    batch = each * n * config.optimizer.accumulation_steps
    scale = lr_scale(config.optimizer.learning_rate_scaling, batch)
    per_epoch = expected.images // batch
    last = per_epoch * config.optimizer.epochs - 1
    steps = [0, *(last * quarter // 4 for quarter in (1, 2, 3)), last]
    rates = {}
    for name in expected.rates:
        lr = settings[name][0] if isinstance(settings[name], list) else settings[name]
        rates[name] = [
            lr_of_step(config.optimizer, lr * scale, step, per_epoch, scale) for step in steps
        ]
    return {
        "processes": n,
        "batch": batch,
        "epochs": config.optimizer.epochs,
        "protocol": settings.get("protocol") or "",
        "steps": steps,
        "per_epoch": per_epoch,
        "rates": rates,
        "more": {name: settings[name] for name in expected.more},
    }


@pytest.mark.parametrize("key", EXPECTED, ids=lambda key: f"{key[0]}, {key[1]}")
def test_a_command_has_the_settings_of_the_original(key, resolve, capsys):
    expected, (_, ours, _) = EXPECTED[key], ROWS[key]
    name, *words = shlex.split(ours)
    script = name.removesuffix(".py")
    assert script == expected.script
    found = settings_of(resolve(script, words, expected), expected)
    assert (found["processes"], found["batch"]) == (expected.processes, expected.batch)
    assert (found["epochs"], found["protocol"]) == (expected.epochs, expected.protocol)
    assert found["more"] == expected.more
    for option, rate in expected.rates.items():
        want = [rate(step, found["per_epoch"], expected.epochs) for step in found["steps"]]
        assert found["rates"][option] == pytest.approx(want, rel=1e-9, abs=1e-15)
    if script in ("main_lincls", "main_semisup"):
        assert f"protocol {expected.protocol}" in capsys.readouterr().out


@pytest.mark.parametrize("key", EXPECTED, ids=lambda key: f"{key[0]}, {key[1]}")
def test_an_original_command_resolves_to_the_same_or_names_ours(key, resolve, capsys):
    expected, (original, ours, _) = EXPECTED[key], ROWS[key]
    name, *words = shlex.split(original)
    theirs = name.removesuffix(".py")
    script = THEIRS.get((key[0], theirs), theirs)
    if key[0] == "FNC":
        with pytest.raises(InputError) as refused:
            resolve(script, words, expected)
        named = re.sub(r"/\S+checkpoint_0000.pth.tar", "CKPT", str(refused.value))
        assert named.endswith(f"the same here is: {ours}")
        return
    got = settings_of(resolve(script, words, expected), expected)
    out = capsys.readouterr().out
    want = settings_of(resolve(expected.script, shlex.split(ours)[1:], expected), expected)
    if theirs == "main_linear":  # its batch is that of each process, and a line says what to give
        assert "for 128 each, give --batch-size 512" in out
        assert (got.pop("batch"), want.pop("batch")) == (128, 512)
        for one in (got, want):
            for name in ("rates", "steps", "per_epoch"):
                del one[name]
    assert got == want


@pytest.mark.parametrize("key", sorted(DETECTIONS), ids=lambda key: key[1])
def test_commands_of_detection_name_files_that_exist(key):
    original, ours, _ = ROWS[key]
    program, *words = shlex.split(ours)
    assert program == "python" and (ROOT / words[0]).is_file()
    theirs, *rest = shlex.split(original)
    assert words[0] == f"detection/{theirs}"
    assert [word.removeprefix("detection/") for word in words[1:]] == rest
    configs = [word for word in words if word.endswith(".yaml")]
    assert all((ROOT / config).is_file() for config in configs)
    assert bool(configs) == (theirs == "train_net.py")
