"""The commands on docs/commands.md, and what the original of each does, by its authors' code."""

import re
from typing import NamedTuple

from conftest import ROOT
from schedule_formulas import (
    Formula,
    cosine_by_epoch,
    cosine_by_step,
    drops,
    swin_style,
    up_and_down,
)

IMAGES = 1_281_167  # of ImageNet


class Expected(NamedTuple):
    """The settings of an original command, by the code and README of its authors."""

    script: str
    processes: int
    batch: int  # images in a step
    epochs: int
    rates: dict[str, Formula]  # by option, of the first step and of 1, 2, 3 quarters and the last
    protocol: str = ""
    method: str = "synco"  # of the checkpoint
    more: dict[str, object] = {}  # noqa: RUF012
    launched: int = 0  # processes that torch.distributed.launch starts
    images: int = IMAGES


def few(lr_backbone: float, lr_classifier: float, epochs: int, batch: int, percent: int):
    rates = {
        "lr_backbone": cosine_by_epoch(lr_backbone),
        "lr_classifier": cosine_by_epoch(lr_classifier),
    }
    more = {"weights": "finetune", "train_percent": percent, "wd": 1e-6}
    images = {1: 12_811, 10: 128_116}[percent]
    kept = {"more": more, "images": images}
    return Expected("main_semisup", 8, batch, epochs, rates, "synco", "synco", **kept)


MOCO_PROBE = Expected(
    "main_lincls",
    8,
    256,
    100,
    {"lr": drops(30, 60, 80)},
    "moco",
    more={"wd": [0.0], "weights": "freeze"},
)
ADCO_MORE = {"memory_lr": 3, "mem_t": 0.02, "moco_t": 0.12, "cluster": 65536, "wd": 1e-4}
ADCO_MORE |= {"moco_m": 0.999, "mlp": True, "aug_plus": True, "ad_init": True}
SOGCLR_MORE = {"optimizer": "lars", "gamma": 0.9, "crop_min": 0.08, "wd": 1e-6, "t": 0.1}
SOGCLR_MORE |= {"loss": "sogclr"}
FNC_TUNING = {"optimizer": "lars_tf", "ft_proj": 1, "wd": 0, "zero_init_classifier": True}
FNC_TUNING |= {"crop_min": 0.2, "weights": "finetune", "learning_rate_scaling": "sqrt"}


def adco(lr: float = 0.03, **more: object) -> Expected:
    return Expected(
        "main_adco", 8, 256, 200, {"lr": cosine_by_epoch(lr, 0.0006)}, more=ADCO_MORE | more
    )


def sogclr(epochs: int, name: str, images: int = IMAGES) -> Expected:
    """Return .075 sqrt(batch), warmed up over 10 epochs from 0."""
    rates = {"lr": cosine_by_step(0.075 * 16, 10)}
    more = {**SOGCLR_MORE, "data_name": name}
    return Expected("main_sogclr", 8, 256, epochs, rates, more=more, images=images)


def sogclr_probe(name: str, images: int = IMAGES) -> Expected:
    rates = {"lr": cosine_by_epoch(0.1 * 1024 / 256)}
    more = {"wd": [0.0], "data_name": name, "weights": "freeze"}
    return Expected("main_lincls", 8, 1024, 90, rates, "sogclr", "sogclr", more, images=images)


def fnc_few(percent: int, epochs: int) -> Expected:
    rates = dict.fromkeys(("lr_backbone", "lr_classifier"), cosine_by_step(0.005 * 32, 0))
    images = {1: 12_811, 10: 128_116}[percent]
    more = {**FNC_TUNING, "train_percent": percent}
    return Expected("main_semisup", 1, 1024, epochs, rates, "fnc", more=more, images=images)


def moby_probe(weights: str, **more: object) -> Expected:
    """Return base rate 1 x batch / 512 with 512 images, so 1."""
    rates = {"lr": swin_style(1.0)}
    more |= {"weights": weights, "wd": [0.0], "nesterov": True, "momentum": 0.9, "clip_grad": 5}
    more |= {"label_smoothing": 0.1, "drop_path": 0.2, "test_resize": "margin"}
    images = 50_000 if "dataset" in more else IMAGES
    return Expected("main_lincls", 4, 512, 100, rates, "moby", "moby", more, 4, images)


def mocov3(epochs: int, base_lr: float, batch: int, warmup: int, **more: object) -> Expected:
    """Return the settings of MoCo v3's pre-training."""
    rates = {"lr": cosine_by_step(base_lr * batch / 256, warmup)}
    return Expected("main_mocov3", 8, batch, epochs, rates, more=MOCOV3_MORE | more)


def mocov3_probe(base_lr: float) -> Expected:
    rates = {"lr": cosine_by_epoch(base_lr * 1024 / 256)}
    more = {"wd": [0.0], "weights": "freeze", "momentum": 0.9}
    return Expected("main_lincls", 8, 1024, 90, rates, "mocov3", "mocov3", more)


MOCOV3_MORE = {"moco_m": 0.99, "moco_m_cos": True, "moco_dim": 256, "moco_mlp_dim": 4096}
MOCOV3_R50 = {"optimizer": "lars", "momentum": 0.9, "crop_min": 0.2, "moco_t": 1.0, "wd": 1e-6}
MOCOV3_VIT = {"optimizer": "adamw", "wd": 0.1, "moco_t": 0.2, "stop_grad_conv1": True}
MOCOV3_VIT |= {"recipe": "byol", "crop_min": None}  # .08, the recipe's

EXPECTED = {
    ("MoCo", "MoCo v1"): Expected(
        "main_synco", 8, 256, 200, {"lr": drops(0.03, 120, 160)}, more={"mlp": False}
    ),
    ("MoCo", "MoCo v2"): Expected(
        "main_synco", 8, 256, 200, {"lr": cosine_by_epoch(0.03)}, more={"mlp": True, "moco_t": 0.2}
    ),
    ("MoCo", "MoCo v2 on 4 GPUs"): Expected(
        "main_synco", 4, 128, 200, {"lr": cosine_by_epoch(0.015)}, more={"aug_plus": True}
    ),
    ("MoCo", "linear"): MOCO_PROBE,
    ("SynCo", "pre-training"): Expected(
        "main_synco",
        8,
        256,
        200,
        {"lr": cosine_by_epoch(0.03)},
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
        "main_lincls", 8, 256, 100, {"lr": cosine_by_epoch(10, 0.01)}, "adco", "adco", {"wd": [0.0]}
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
        {"lr": cosine_by_step(0.1 * 64, 10)},
        more={"optimizer": "lars_tf", "wd": 1e-4, "temperature": 0.1, "mean": [0.0] * 3},
    ),
    ("FNC", "1 % of the labels"): fnc_few(1, 60),
    ("FNC", "10 % of the labels"): fnc_few(10, 30),
    ("FNC", "linear"): Expected(
        "main_lincls",
        1,
        1024,
        90,
        {"lr": cosine_by_step(0.005 * 32, 0)},
        "fnc",
        more={"nesterov": True, "zero_init_classifier": True, "crop_min": 0.2, "wd": [0.0]},
    ),
    ("SynCo-v2, MoBY and BYOL", "pre-training"): Expected(
        "main_moby",
        4,
        512,
        300,
        {"lr": swin_style(1e-3)},
        more={"arch": "vit_small", "method": "moby", "wd": 0.05, "clip_grad": 5, "amp": "off"},
        launched=4,
    ),
    ("SynCo-v2, MoBY and BYOL", "linear"): moby_probe("freeze"),
    ("SynCo-v2, MoBY and BYOL", "fine-tuning on CIFAR-10"): moby_probe(
        "finetune", dataset="cifar10", data="./data", download=True
    ),
    ("MoCo v3", "ResNet-50, 100 epochs"): mocov3(100, 0.6, 4096, 10, **MOCOV3_R50),
    ("MoCo v3", "ResNet-50, 300 epochs"): mocov3(300, 0.3, 4096, 10, **MOCOV3_R50),
    ("MoCo v3", "ResNet-50, 1000 epochs"): mocov3(
        1000, 0.3, 4096, 10, **MOCOV3_R50 | {"moco_m": 0.996, "wd": 1.5e-6}
    ),
    ("MoCo v3", "ViT-small, batch 1024"): mocov3(
        300, 1.5e-4, 1024, 40, **MOCOV3_VIT, arch="vit_small"
    ),
    ("MoCo v3", "ViT-base"): mocov3(300, 1.5e-4, 4096, 40, **MOCOV3_VIT, arch="vit_base"),
    ("MoCo v3", "linear, ResNet-50"): mocov3_probe(0.1),
    ("MoCo v3", "linear, ViT-small"): mocov3_probe(3),
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
