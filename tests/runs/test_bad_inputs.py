"""Generate some hundred bad inputs from a seed.

Each must end with one line and status 2, run nothing, and leave nothing behind. BAD_INPUTS_SEED=...
generates others. Unusual but valid images must train.
"""

import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
import zlib
from argparse import BooleanOptionalAction
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process, own_lines, wants_detectron2, write_images
from PIL import Image
from torch import nn

from moco.cli.actions import Switch
from moco.data.images import decode
from moco.errors import InputError
from moco.files import read_pickle, read_yaml
from moco.launch import launch

SEED = int(os.environ.get("BAD_INPUTS_SEED", 0))
PRETRAIN = ("main_synco", "main_adco", "main_sogclr", "main_fnc", "main_moby")
EVALUATE = ("main_lincls", "main_semisup", "main_knn", "main_voc07")
SMALL = ("-a", "resnet18", "--image-size", 32, "-b", 8, "-j", 0)
LONGEST = 1200  # characters of a line, without what the user typed


class Case(NamedTuple):
    """A command that must be refused, and words that its one line must hold."""

    program: str
    words: tuple
    said: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a case finds good data and puts its bad files."""

    data: Path  # 3 classes x 16 images
    good: Path  # a run folder with a good checkpoint
    own: Path  # empty, of this case alone


Generator = Callable[[random.Random, Place], Case]


# (a) Arguments.


def pretrain(rng: random.Random, place: Place, *words: object, program: str | None = None) -> Case:
    program = program or rng.choice(PRETRAIN)
    return Case(program, (place.data, *SMALL, "--save-dir", place.own / "run", *words))


def evaluate(rng: random.Random, place: Place, *words: object, program: str | None = None) -> Case:
    return Case(
        program or rng.choice(EVALUATE[:3]),
        (place.data, *SMALL, "--save-dir", place.own / "run", *words),
    )


def is_flag(action) -> bool:
    return action.nargs == 0 and not isinstance(action, BooleanOptionalAction)


def wrong_values(action) -> list[str]:
    """What an option of this kind must not take."""
    kind = getattr(action.type, "__name__", "")
    if isinstance(action, Switch):
        return ["7", "-1", "1.0e9"]
    if action.choices:
        return ["", "nosuch", "nan", "-1", "\N{SNOWMAN}"]
    never = ["many", "", "1e", "0x10", "--", "1,5", "nan.0"]
    if interval := getattr(action.type, "interval", None):
        least, most = map(float, interval[1:-1].split(","))
        outside = [
            "9" * 30,
            f"{least - max(1, abs(least)):.0f}",
            *([interval[1:-1].split(",")[0]] if interval[0] == "(" else []),
        ]
        return [
            *never,
            *outside,
            "nan",
            "inf",
            *(["1.5"] if kind == "int" else ["1e999", f"{2 * most + 1:.0f}"]),
        ]
    return ["", "x", "1.5"] if kind == "int" else [" ", ""]


def wrong_value(rng: random.Random, place: Place) -> Case:
    """One option of one script with a value that it must not have."""
    program = rng.choice(PRETRAIN + EVALUATE)
    actions = [
        a
        for a in importlib.import_module(program).parser()._actions
        if a.option_strings and a.dest != "help" and not is_flag(a)
    ]
    action = rng.choice(actions)
    value = rng.choice(wrong_values(action))
    option = rng.choice(
        [
            name
            for name in action.option_strings
            if name.startswith("--") and not name.startswith("--no-")
        ]
    )
    count = action.nargs if isinstance(action.nargs, int) and action.nargs else 1
    words = [f"{option}={value}"] if count == 1 else [option, *[value] * count]
    return Case(program, (place.data, *SMALL, "--save-dir", place.own / "run", *words))


# Unusual numbers that are valid: defaults, or a threshold that accepts all images.
MEANT = {("--seed", "-1"), ("--world-size", "-1"), ("--rank", "-1"), ("--fn-threshold", "-1")}


@pytest.mark.parametrize("program", (*PRETRAIN, *EVALUATE))
def test_numbers_that_make_no_sense_are_refused(program, script, data, tmp_path, monkeypatch):
    """-1, nan and 1e30 for every option that takes a number: one line that names the option."""
    monkeypatch.setattr(launch, "launch", accepted)
    actions = [
        action
        for action in importlib.import_module(program).parser()._actions
        if action.option_strings
    ]
    numbers = [action for action in actions if hasattr(action.type, "interval")]
    assert len(numbers) > 10
    for action, value in itertools.product(numbers, ("-1", "nan", "1e30")):
        option = next(name for name in action.option_strings if name.startswith("--"))
        words = (
            [option, *[value] * action.nargs]
            if isinstance(action.nargs, int)
            else [f"{option}={value}"]
        )
        if (option, value) in MEANT:
            continue
        status, _, err = script(program, data, *SMALL, "--save-dir", tmp_path / "run", *words)
        assert status == 2 and err.count("\n") == 1 and err.startswith(f"{program}.py: error: "), (
            words,
            err,
        )
        assert option in err, (words, err)


@pytest.mark.parametrize("program", (*PRETRAIN, *EVALUATE))
def test_every_number_has_a_range_with_its_default_inside(program):
    for action in importlib.import_module(program).parser()._actions:
        if action.type in (int, float):
            assert action.choices or action.dest == "local_rank", action.dest
        elif hasattr(action.type, "interval"):
            for default in action.default if isinstance(action.default, list) else [action.default]:
                assert default is None or action.type(str(default)) == default, action.dest


def misspelled(rng: random.Random, place: Place) -> Case:
    """Return a case with a misspelled option; its message must name the right one.

    A letter is missing or added, or two are swapped.
    """
    program = rng.choice(PRETRAIN + EVALUATE)
    names = [
        n
        for n in importlib.import_module(program).parser().names()
        if len(n) > 8 and not n.startswith("--no-")
    ]
    name = rng.choice(names)
    at = rng.randrange(4, len(name) - 1)
    wrong = rng.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + "q" + name[at:],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        ]
    )
    if (
        wrong in (names := importlib.import_module(program).parser().names())
        or wrong.replace("_", "-") in names
    ):
        wrong = name + "q"
    return Case(program, (place.data, wrong, "3"), ("unknown option", "the nearest is '--"))


def nowhere(rng: random.Random, place: Place) -> Case:
    """Paths that are not there, or are of another kind."""
    (place.own / "file").write_text("words\n")
    file, folder = place.own / "file", place.own / "folder"
    folder.mkdir()
    odd = rng.choice(
        [
            "no where",
            "a\nb",
            'it\'s "quoted"',
            "x" * 300,
            "\N{SNOWMAN}/é",
            "-",
            "%s%n",
            "{0}",
            "y/" * 200,
            "a\tb\r",
        ]
    )
    kind = rng.randrange(9)
    if kind == 0:
        return Case(rng.choice(PRETRAIN + EVALUATE), (place.own / odd, *SMALL))
    if kind == 1:
        return Case(rng.choice(PRETRAIN + EVALUATE), (file, *SMALL))
    if kind == 2:
        return pretrain(rng, place, "--resume", rng.choice([place.own / odd, folder, file]))
    if kind == 3:
        return evaluate(rng, place, "--pretrained", rng.choice([place.own / odd, folder, file]))
    if kind == 4:
        return pretrain(rng, place, "--cfg", rng.choice([place.own / odd, folder, file]))
    if kind == 5:
        return Case(
            "main_synco",
            (place.data, *SMALL, "--save-dir", rng.choice([file, file / "below"])),
            ("--save-dir",),
        )
    if kind == 6:
        return evaluate(rng, place, "--class-list", rng.choice([place.own / odd, folder]))
    if kind == 7:
        return Case("main_knn", ("--load-features", rng.choice([place.own / odd, folder, file])))
    return Case(
        "main_knn",
        (place.data, *SMALL, "--dump-features", rng.choice([file, file / "below"])),
        ("--dump-features",),
    )


def conflict(rng: random.Random, place: Place) -> Case:
    """Options that do not go together, or miss something."""
    there = ("--save-dir", place.own / "run")
    program, *words = rng.choice(
        [
            ("main_synco", "--data", place.own),
            ("main_synco", "--tag", "t"),
            ("main_synco", "--n1", "4"),
            ("main_synco", "--n-hard", "90000", "--n1", "1"),
            ("main_synco", "--recipe", "multicrop"),
            ("main_synco", "-a", "vit_small"),
            ("main_synco", "--resume", "auto", "--moco-k"),
            ("main_synco", "--crop-min", "0"),
            ("main_synco", "--randaugment", "2", "11"),
            ("main_synco", "--randaugment", "2"),
            ("main_synco", "--momentum", "1"),
            ("main_synco", "--nesterov", "--momentum", "0"),
            ("main_synco", "-b", "1"),
            ("main_synco", "-b", "1000"),
            ("main_synco", "--opts", "TRAIN.EPOCHS", "3"),
            ("main_synco", "--dist-backend", "nccl", "--multiprocessing-distributed"),
            ("main_synco", "--multiprocessing-distributed", "--dist-url", "tcp://127.0.0.1:99999"),
            ("main_synco", "--multiprocessing-distributed", "--dist-url", "http://x"),
            (
                "main_synco",
                "--multiprocessing-distributed",
                "--dist-url",
                "tcp://no.such.host.invalid:4000",
            ),
            ("main_synco", "--world-size", "2"),
            ("main_synco", "--moco-k", "2000000000", "--moco-dim", "2000000000"),
            ("main_synco", "--data-name", "imagenet100", "--class-list", place.own),
            ("main_adco", "--mem-t", "0"),
            ("main_adco", "--sym", "2"),
            ("main_adco", "--multi-crop", "--recipe", "mocov2"),
            ("main_sogclr", "--t", "0.001"),
            ("main_sogclr", "--gamma", "0"),
            ("main_fnc", "--memory-multiplier", "2"),
            ("main_fnc", "--fn-threshold", "1.5"),
            ("main_fnc", "--use-tpu", "True"),
            ("main_moby", "--online-drop-path", "1"),
            ("main_moby", "--method", "synco", "--synthetic-first", "5", "--synthetic-last", "5"),
            ("main_moby", "--stop-grad-conv1"),
            ("main_moby", "--target-drop-path", "0.5"),
            ("main_lincls", "--lr", "1", "1"),
            ("main_lincls", "--weights", "finetune", "--lr", "1", "2"),
            ("main_lincls", "--evaluate"),
            ("main_lincls", "--dataset", "cifra10"),
            ("main_lincls", "--dataset", "cifar10"),
            ("main_lincls", "--val-from-train", "1"),
            ("main_semisup", "--train-percent", "5"),
            ("main_semisup", "--ft-proj", "1"),
            ("main_semisup", "--lr", "1"),
            ("main_knn", "--k", "0"),
            ("main_knn", "--temperature", "0"),
            ("main_knn", "--dataset", "voc2007"),
            ("main_knn", "--load-features", place.own, "--dump-features", place.own),
            ("main_voc07", "--c", "0"),
            ("main_voc07", "--c", "nan"),
            ("main_voc07", "--dataset", "imagenet"),
        ]
    )
    return Case(program, (place.data, *SMALL, *there, *words))


def tool_arguments(rng: random.Random, place: Place) -> Case:
    """The tools' command lines."""
    (place.own / "file").write_text("words\n")
    good, own = next(place.good.glob("*.tar")), place.own
    program, *words = rng.choice(
        [
            ("tools.collect",),
            ("tools.collect", own),
            ("tools.collect", own / "no\nwhere"),
            ("tools.collect", own, "--uot", "x"),
            ("tools.collect", ""),
            ("tools.export",),
            ("tools.export", good),
            ("tools.export", good, own / "x.bin"),
            ("tools.export", good, own),
            ("tools.export", good, own / "x.pth", "-a", "resnet81"),
            ("tools.export", good, own / "x.pth", "-a", "resnet50"),
            ("tools.export", good, own / "x.pth", "--image-size", "0"),
            ("tools.export", own / "file", own / "x.pth"),
            ("tools.export", own / ("n" * 300), own / "x.pth"),
            ("tools.export", good, own / "file" / "x.pth"),
            ("tools.export", good, good),
            ("tools.export", good, own / "x.pth", "--frce"),
            ("tools.show_views",),
            ("tools.show_views", "mocov3"),
            ("tools.show_views", "mocov2", own / "nowhere"),
            ("tools.show_views", "mocov2", own),
            ("tools.show_views", "mocov2", own / "file"),
            ("tools.show_views", "mocov2", place.data, "--out", own / "x.jpg"),
            ("tools.show_views", "mocov2", place.data, "--out", own / "file" / "x.png"),
            ("tools.show_views", "mocov2", place.data, "--crop-min", "2"),
            ("tools.show_views", "mocov2", place.data, "--images", "-1"),
            ("tools.show_views", "mocov2", place.data, "--imags", "1"),
            ("tools.show_views", "mocov2", "a", "b"),
            ("tools.show_views", "--cfg", own / "file"),
            ("tools.show_views", "--cfg", own),
            ("convert-pretrain-to-detectron2", good),
            ("convert-pretrain-to-detectron2", good, own / "x.pth"),
            ("convert-pretrain-to-detectron2", own / "file", own / "x.pkl"),
            ("convert-pretrain-to-detectron2", good, own / "x.pkl", "-a", "vit_tiny"),
            ("convert-pretrain-to-detectron2", good, own / "x.pkl", "-a", "resnet34"),
            ("convert-pretrain-to-detectron2", good, own / "file" / "x.pkl"),
            ("convert-pretrain-to-detectron2", good, own / "x.pkl", "--chekc"),
        ]
    )
    return Case(program, tuple(words))


# (b) YAML and JSON.


def bad_yaml(rng: random.Random, place: Place) -> Case:
    marker = place.own / "ran"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
    )
    key = rng.choice(
        [
            "lr",
            "epochs",
            "batch_size",
            "workers",
            "seed",
            "wd",
            "momentum",
            "image-size",
            "print_freq",
        ]
    )
    texts = [
        "",
        "#\n",
        "- a\n- b\n",
        "word\n",
        "3\n",
        "null\n",
        "a: [1\n",
        "a: b: c\n",
        "\t- x\n",
        "%YAML 9\n---\n",
        "lr: 1\n---\nlr: 2\n",
        "{" * 3000,
        "[" * 3000,
        f"lr: !!python/object/apply:os.system ['touch {marker}']\n",
        f"!!python/object/apply:os.system ['touch {marker}']\n",
        f"lr: !!python/object/new:subprocess.Popen [['touch', '{marker}']]\n",
        "lr: !!python/name:os.system\n",
        "lr: !nosuch 1\n",
        "cos: !!binary =\n",
        bomb,
        f"lr: {bomb.splitlines()[0][3:]}\n",
        "a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
        "lr: &l [*l]\n",
        f"{key}: 1\n{key}: 2\n",
        "batch_size: 8\nbatch-size: 9\n",
        f"{key}: many\n",
        f"{key}: [1, 2]\n",
        f"{key}: {{a: 1}}\n",
        f"{key}: yes\n",
        f"{key}: .nan\n",
        f"{key}: .inf\n",
        f"{key}: -7\n" if key != "seed" else "seed: x\n",
        f"{key}: ''\n",
        f"{key}: 2001-02-30\n",
        f"{key}: {'9' * 5000}\n",
        f"{key}: 0o9\n",
        "cos: 3\n",
        "cos: maybe\n",
        "mlp: [true]\n",
        "schedule: 120\n",
        "schedule: [a]\n",
        "schedule: [[1]]\n",
        "randaugment: [1]\n",
        "randaugment: 3\n",
        "arch: resnet81\n",
        "arch: [resnet18]\n",
        "recipe: moco\n",
        "amp: fp8\n",
        "optimizer: adam\n",
        "compile: 1\n",
        "knn-t: 0\n",
        "resume: ''\n",
        "? [1, 2]\n: 3\n",
        "1: 2\n",
        "~: 2\n",
        "true: false\n",
        f"{'k' * 3000}: 1\n",
        f"arch: {'v' * 3000}\n",
        "moco_kk: 5\n",
        "epohcs: 5\n",
        "nhard: 5\n",
    ]
    data: list[bytes] = [text.encode() for text in texts]
    data += [
        b"\xff\xfe\x00",
        rng.randbytes(200),
        b"lr: \x00\n",
        "lr: \ud800".encode("utf-16", "surrogatepass"),
        pickle.dumps({"lr": 1}),
    ]
    (place.own / "c.yaml").write_bytes(rng.choice(data))
    words = (
        place.data,
        "--save-dir",
        place.own / "run",
        "--cfg",
        place.own / "c.yaml",
        "--image-size",
        32,
        "-j",
        0,
        "-b",
        8,
    )
    return Case("main_synco", words)


def bad_yaml_of_views(rng: random.Random, place: Place) -> Case:
    marker = place.own / "ran"
    texts = [
        "",
        "- a\n",
        "a: [1\n",
        "recipe: mocov3\n",
        "recipe: [mocov2]\n",
        "recipe: mocov2\nrecipe: byol\n",
        "recipe: mocov2\nviews: 0\n",
    ]
    texts += [
        "recipe: mocov2\nimage-size: big\n",
        "recipe: mocov2\ncrop-min: .nan\n",
        "recipe: mocov2\nrandaugment: [1]\n",
        "lr: 3\n",
    ]
    texts += [
        f"recipe: !!python/object/apply:os.system ['touch {marker}']\n",
        "recipe: {a: b}\n",
        "aug-plus: 7\n",
        "recipe: &a [*a]\n",
    ]
    (place.own / "c.yaml").write_text(rng.choice(texts))
    return Case(
        "tools.show_views",
        ("--cfg", place.own / "c.yaml", place.data, "--out", place.own / "v.png"),
    )


def bad_results(rng: random.Random, place: Place) -> Case:
    """results.json for the table."""
    good = {
        "method": "synco",
        "arch": "resnet18",
        "checkpoint": "c",
        "pretrain_epochs": 1,
        "protocol": "linear",
        "dataset": "photos",
    }
    good |= {"metrics": {"acc1": 0.5, "acc5": 0.9}, "settings": {"seed": 0}}
    if rng.random() < 0.4:
        data = rng.choice(
            [
                b"",
                b"{",
                b"\xff\xfe",
                b"[" * 100_000,
                b'{"protocol": NaN',
                b"9" * 5000,
                rng.randbytes(100),
            ]
        )
    else:
        key = rng.choice(["method", "arch", "dataset", "metrics", "settings", "protocol"])
        value = rng.choice([None, 3, [], ["x"], {"acc1": "x"}, {"acc1": None}, True])
        if rng.random() < 0.3 and key not in ("settings", "protocol"):
            del good[key]
        else:
            good[key] = value if key != "settings" else rng.choice([3, ["x"], None, "word"])
        data = json.dumps(good).encode()
    (place.own / "results.json").write_bytes(data)
    return Case("tools.collect", (place.own,), ("results.json",))


# (c) Lists.


def bad_list(rng: random.Random, place: Place) -> Case:
    names = ["class0", "class1", "class2"]
    texts = [
        "",
        "\n\n \n",
        "class7\n",
        "class0\nclas1\n",
        "../train/class0\n",
        f"{place.data}/train/class0\n",
        "class0/0.jpg\n",
    ]
    texts += [
        "class0,class1\n",
        "CLASS0\n",
        "class0\x00\n",
        "\n".join(["zebra"] * 50),
        f"{'n' * 3000}\n",
        "/etc/passwd\n",
        ".\n",
        "..\n",
        "\u202eclass0\n",
    ]
    images = [
        "",
        "class0/99.jpg\n",
        "../val/class0/0.jpg\n",
        f"{place.data}/train/class0/0.jpg\n",
        "0.jpg\n",
        "class0\n",
        "class0/0.jpg class1\n",
    ]
    images += [
        "class0\\0.jpg\n",
        "class0/0.jpeg\n",
        "/etc/passwd\n",
        "./class0/0.jpg\n",
        f"{'n' * 3000}\n",
        "class0/0.jpg,1\n",
    ]
    file = place.own / "list.txt"
    binary = rng.choice(
        [
            b"\xff\xfe\x00\x01",
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(50),
            pickle.dumps(names),
            b"class0\xff\n",
        ]
    )
    if rng.random() < 0.5:
        file.write_bytes(rng.choice([*(text.encode() for text in texts), binary]))
        program = rng.choice(("main_synco", "main_knn", "main_lincls"))
        return Case(
            program,
            (place.data, *SMALL, "--save-dir", place.own / "run", "--class-list", file),
            ("--class-list",),
        )
    file.write_bytes(rng.choice([*(text.encode() for text in images), binary]))
    return Case(
        "main_semisup",
        (place.data, *SMALL, "--save-dir", place.own / "run", "--subset-file", file),
        ("list.txt",),
    )


# (d) Images. Of eight in a folder, one or two are bad.


def small(im: Image.Image, kind: str, **more: object) -> bytes:
    data = io.BytesIO()
    im.save(data, kind, **more)
    return data.getvalue()


def picture(width: int = 40, height: int = 40) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 6 % 256, y * 6 % 256, 255 - (x + y) * 3 % 256], -1).astype(np.uint8)
    )


def png(width: int, height: int, pixels: bytes) -> bytes:
    """With a header that says what its pixels need not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    )


def jpeg(width: int, height: int) -> bytes:
    data = small(picture(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def bad_image(rng: random.Random, place: Place) -> Case:
    cut = rng.choice(
        [("JPEG", 0.97), ("PNG", 0.7), ("GIF", 0.8), ("WEBP", 0.9), ("TIFF", 0.9), ("BMP", 0.9)]
    )
    whole = small(picture(), cut[0])
    gif = small(picture().quantize(), "GIF")
    data = rng.choice(
        [
            *[whole[: int(len(whole) * cut[1] * rng.random())]] * 5,
            b"",
            b"\xff",
            b"\xff\xd8",
            b"a page of text",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch ran) (w) file\n",
            rng.randbytes(300),
            png(60_000, 60_000, b"0" * 1000),
            png(40, 40, b"0" * 1000),
            jpeg(60_000, 60_000),
            gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:],
            pickle.dumps([1]),
            None,  # a link to nowhere
            "fifo",
        ]
    )
    count, mode = rng.choice([(1, "error"), (2, "skip")])
    for split, c, i in itertools.product(("train", "val"), range(2), range(4)):
        file = (
            place.own
            / "images"
            / split
            / f"class{c}"
            / f"{i}.{rng.choice(('jpg', 'JPEG', 'png', 'tif'))}"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        if split == "val" or c or i >= count:
            file.symlink_to(place.data / "train" / f"class{c}" / f"{i}.jpg")
        elif data is None:
            file.symlink_to(place.own / "nowhere")
        elif data == "fifo":
            os.mkfifo(file)
        else:
            file.write_bytes(data)
    words = (place.own / "images", *SMALL, "--save-dir", place.own / "run")
    if rng.random() < 0.3:
        return Case("main_knn", words, ("class0", "image"))
    return Case("main_synco", (*words, "--moco-k", 32, "--on-bad-image", mode), ("image",))


# (e) Checkpoints.


class Code:
    """A pickle that touches `ran` in the folder of the case."""

    def __init__(self, marker: Path, how: str):
        self.marker, self.how = marker, how

    def __reduce__(self):
        import subprocess

        touch = f"open({str(self.marker)!r}, 'w')"
        calls = {
            "system": (os.system, (f"touch '{self.marker}'",)),
            "eval": (eval, (touch,)),
            "exec": (exec, (touch,)),
            "popen": (subprocess.Popen, (["touch", str(self.marker)],)),
            "open": (open, (str(self.marker), "w")),
            "load": (torch.load, (str(self.marker) + ".pth",)),
        }
        return calls[self.how]


CODE = ("system", "eval", "exec", "popen", "open", "load")


def thin(value: object) -> object:
    """A checkpoint of the same shapes in a small file: each tensor repeats its first number."""
    if isinstance(value, torch.Tensor):
        return (
            value.flatten()[:1].clone().expand(value.shape)
            if value.dim() and value.numel()
            else value
        )
    if isinstance(value, dict):
        return type(value)((key, thin(one)) for key, one in value.items())
    return [thin(one) for one in value] if isinstance(value, list) else value


def good_state(place: Place) -> dict:
    return torch.load(place.good / "thin.pth.tar", weights_only=True)


def bad_file(rng: random.Random, place: Place, state: dict) -> bytes:
    """What is no checkpoint, or only a part of one, or code."""
    marker = place.own / "ran"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    kind = rng.choice(
        ["cut", "cut", "cut", "code", "code", "code", "old code", "zip code", "changed", "other"]
    )
    if kind == "cut":
        return data[: rng.randrange(len(data) - 20)]
    if kind == "changed":  # in the pickle
        at = data.index(b"data.pkl") + rng.randrange(40, 400)
        return data[:at] + rng.randbytes(200) + data[at + 200 :]
    code = Code(marker, rng.choice(CODE))
    if code.how == "load":
        torch.save(Code(marker, "open"), str(marker) + ".pth")
    if kind in ("code", "old code"):
        holder = rng.choice(
            [
                code,
                {"state_dict": code},
                {**state, "args": code},
                {"state_dict": {"x": [code]}},
                [code],
            ]
        )
        buffer = io.BytesIO()
        if rng.random() < 0.3:
            return pickle.dumps(holder, protocol=rng.choice([0, 2, 4]))
        torch.save(holder, buffer, _use_new_zipfile_serialization=kind == "code")
        return buffer.getvalue()
    buffer = io.BytesIO()
    if kind == "zip code":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(code, protocol=2))
            file.writestr("archive/version", "3\n")
        return buffer.getvalue()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("words.txt", "words")
    arrays = io.BytesIO()
    np.savez(arrays, x=np.zeros(3))
    module = io.BytesIO()
    torch.save(nn.Linear(2, 2), module)
    lists = io.BytesIO()
    torch.save([1, 2], lists)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    safe = struct.pack("<Q", len(header)) + header + b"0000"
    others = [
        b"",
        b"words",
        rng.randbytes(500),
        buffer.getvalue(),
        arrays.getvalue(),
        module.getvalue(),
        lists.getvalue(),
        safe,
    ]
    return rng.choice(
        [
            *others,
            pickle.dumps({"model": {"x": np.zeros(3)}, "source": {}}),
            json.dumps({"state_dict": {}}).encode(),
        ]
    )


def bad_resume(rng: random.Random, place: Place) -> Case:
    """--resume of a checkpoint in which something is absent, or of another kind."""
    state = good_state(place)
    file = place.own / "checkpoint_0000.pth.tar"
    if rng.random() < 0.3:
        file.write_bytes(bad_file(rng, place, state))
    else:
        weights, optimizer, progress = state["state_dict"], state["optimizer"], state["progress"]
        name = rng.choice(
            [name for name, x in weights.items() if x.is_floating_point() and x.dim()]
        )
        x, p = weights[name], rng.choice(list(optimizer["state"]))
        key = rng.choice(["epoch", "args", "state_dict", "optimizer", "progress", "arch", "method"])
        strange = rng.choice(["words", None, [1], -1, 10**30, 1.5, {}, torch.zeros(2), True])
        change = rng.choice(
            [
                lambda: state.pop(key),
                lambda: state.update({key: strange if (key, strange) != ("args", {}) else None}),
                lambda: state.update(
                    {
                        "epoch": rng.choice(
                            ["1", -1, 10**30, 1.5, True, None, math.nan, torch.tensor(1)]
                        )
                    }
                ),
                lambda: weights.pop(name),
                lambda: weights.update({"module.stranger": torch.zeros(1)}),
                lambda: weights.update({name: rng.choice(["words", None, [0.0], 3])}),
                lambda: weights.update(
                    {
                        name: rng.choice(
                            [
                                x[:-1],
                                x[None],
                                x.int(),
                                x.cfloat(),
                                x.to_sparse(),
                                x > 0,
                                x * math.nan,
                                x / 0,
                            ]
                        )
                    }
                ),
                lambda: weights.update({3: x}),
                lambda: state.update(
                    {"state_dict": rng.choice([[], list(weights.items()), "words", x])}
                ),
                lambda: optimizer.update(
                    {
                        "param_groups": rng.choice(
                            [[], optimizer["param_groups"] * 2, {}, None, [3], [{}], "words"]
                        )
                    }
                ),
                lambda: optimizer.update(
                    {
                        "state": rng.choice(
                            [None, [1], "words", {0: "words"}, {0: {"momentum_buffer": [1]}}]
                        )
                    }
                ),
                lambda: optimizer.pop(rng.choice(["state", "param_groups"])),
                lambda: optimizer["param_groups"][0]["params"].pop(),
                lambda: optimizer["param_groups"][0].update(
                    rng.choice([{"momentum": "x"}, {"weight_decay": "x"}, {"nesterov": [1]}])
                ),
                lambda: optimizer["state"][p].update(
                    {
                        "momentum_buffer": rng.choice(
                            [torch.zeros(7, 7), "x", [1], torch.tensor(math.nan)]
                        )
                    }
                ),
                lambda: optimizer["state"].update(
                    {p: {"exp_avg": torch.zeros(1), "step": torch.zeros(1)}}
                ),
                lambda: progress.pop(rng.choice(["step", "seed"])),
                lambda: progress.update(
                    {
                        rng.choice(["step", "seed"]): rng.choice(
                            ["3", None, 1.5, [1], torch.zeros(1)]
                        )
                    }
                ),
                lambda: progress.update(
                    {rng.choice(["batch", "steps_per_epoch"]): rng.choice([0, -1, "8", None, 1.5])}
                ),
                lambda: state.update({"images": rng.choice([47, "48", None, [48]])}),
                lambda: state.update({"arch": rng.choice(["resnet50", 3, ["resnet18"]])}),
                lambda: state.update({"method": rng.choice(["synco", None, {}])}),
            ]
        )
        change()
        torch.save(state, file)
    resume = ("--save-dir", place.own / "run", "--resume", file)
    if rng.random() < 0.2:
        resume = ("--save-dir", place.own, "--resume", "auto")
        if (
            "state_dict" in state and file.stat().st_size > 100_000
        ):  # only what cannot be read is skipped
            file.write_bytes(file.read_bytes()[: rng.randrange(90_000)])
    return Case("main_synco", (place.data, *SMALL, "--moco-k", 32, "--epochs", 2, *resume))


def bad_encoder(rng: random.Random, place: Place) -> Case:
    """--pretrained, and what the exporter and the converter read."""
    state = good_state(place)
    file = place.own / "encoder.pth.tar"
    if rng.random() < 0.4:
        file.write_bytes(bad_file(rng, place, state))
    else:
        weights = state["state_dict"]
        mine = [
            name
            for name, x in weights.items()
            if name.startswith("module.encoder_q.") and ".fc" not in name
        ]
        name = rng.choice([name for name in mine if weights[name].is_floating_point()])
        x = weights[name]
        change = rng.choice(
            [
                lambda: weights.pop(name),
                lambda: weights.update(
                    {name.replace("encoder_q", "encoder_q.layer9"): weights.pop(name)}
                ),
                lambda: weights.update({"module.encoder_q.layer1.7.conv1.weight": x}),
                lambda: weights.update({name: rng.choice(["words", None, [0.0], 3, {}])}),
                lambda: weights.update(
                    {
                        name: rng.choice(
                            [
                                x[:-1],
                                x[None],
                                x.int(),
                                x.cfloat(),
                                x.to_sparse(),
                                x > 0,
                                x * math.nan,
                                x / 0,
                            ]
                        )
                    }
                ),
                lambda: state.update(
                    {
                        "state_dict": rng.choice(
                            [{}, [], "words", {"x": x}, {1: x}, OrderedDict(a=torch.zeros(1))]
                        )
                    }
                ),
                lambda: state.update(
                    {
                        "arch": rng.choice(
                            [
                                "resnet81",
                                "resnet50",
                                3,
                                ["resnet18"],
                                "",
                                "vit_small",
                                "x" * 3000,
                                "a\nb",
                            ]
                        )
                    }
                ),
                lambda: state.pop("arch"),
            ]
        )
        change()
        torch.save(state, file)
    run = ("--image-size", 32, "-b", 8, "-j", 0, "--save-dir", place.own / "run")
    commands = [
        *(
            (program, place.data, *run, "--pretrained", file)
            for program in ("main_knn", "main_lincls", "main_semisup")
        ),
        ("tools.export", file, place.own / "out.pth"),
        ("convert-pretrain-to-detectron2", file, place.own / "out.pkl"),
    ]
    program, *words = rng.choice(commands)
    return Case(program, tuple(words))


def bad_features(rng: random.Random, place: Place) -> Case:
    """--load-features of a folder in which a file is damaged."""
    meta = {
        "arch": "resnet18",
        "method": "moco",
        "checkpoint": None,
        "pretrain_epochs": 1,
        "dataset": "imagenet",
        "data": "d",
    }
    meta |= {"class_list": None, "image_size": 32, "amp": "off", "seed": 0, "classes": ["a", "b"]}
    arrays = {f"{split}_features": np.ones((4, 3), np.float32) for split in ("train", "val")}
    arrays |= {f"{split}_labels": np.array([0, 1, 0, 1]) for split in ("train", "val")}
    name, key = (
        rng.choice(sorted(arrays)),
        rng.choice(sorted(set(meta) - {"checkpoint", "class_list", "pretrain_epochs"})),
    )
    rows = rng.choice(
        [
            np.zeros(3),
            np.array(1.0),
            np.full((4, 3), np.nan, np.float32),
            np.zeros((2, 2, 2)),
            np.zeros((0, 3), np.float32),
        ]
    )
    labels = rng.choice(
        [
            np.zeros(4),
            np.array(1),
            np.array([0, 1, 2, 3]),
            np.array([-5] * 4),
            np.zeros(3, int),
            np.zeros((4, 9), int),
        ]
    )
    kind = rng.randrange(4)
    if kind == 0:
        arrays[name] = labels if "labels" in name else rows
    if kind == 1:
        meta[key] = rng.choice([None, 1.5, {}, [1], []])
    if kind == 2:
        del meta[key]
    for array, value in arrays.items():
        np.save(place.own / f"{array}.npy", value)
    (place.own / "meta.json").write_text(json.dumps(meta))
    if kind == 3:
        file = place.own / rng.choice([f"{name}.npy", "meta.json"])
        npz = io.BytesIO()
        np.savez(npz, x=np.zeros(3))
        objects = io.BytesIO()
        np.save(
            objects, np.array([Code(place.own / "ran", "system")], dtype=object), allow_pickle=True
        )
        others = [
            b"",
            b"[" * 100_000,
            rng.randbytes(80),
            npz.getvalue(),
            objects.getvalue(),
            file.read_bytes()[:60],
        ]
        file.write_bytes(rng.choice([*others, pickle.dumps(Code(place.own / "ran", "system"))]))
    return Case(
        "main_knn",
        ("--load-features", place.own, "--k", 1, "--save-dir", place.own / "run"),
        ("--load-features",) if kind else (),
    )


GENERATORS: dict[Generator, int] = {
    wrong_value: 60,
    misspelled: 15,
    nowhere: 30,
    conflict: 35,
    tool_arguments: 20,
    bad_yaml: 45,
    bad_yaml_of_views: 6,
    bad_results: 10,
    bad_list: 20,
    bad_image: 20,
    bad_resume: 32,
    bad_encoder: 32,
    bad_features: 12,
}
CASES = [(generator, i) for generator, count in GENERATORS.items() for i in range(count)]


# The cases.


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("bad-inputs"), classes=3, train=16)


@pytest.fixture(scope="module")
def good(data, tmp_path_factory) -> Path:
    """A run folder with a checkpoint after one epoch of two, and the same in a small file."""
    run = tmp_path_factory.mktemp("good")
    assert (
        in_process("main_synco", data, *SMALL, "--moco-k", 32, "--epochs", 1, "--save-dir", run)[0]
        == 0
    )
    torch.save(
        thin(torch.load(run / "checkpoint_0000.pth.tar", weights_only=True)), run / "thin.pth.tar"
    )
    return run


@pytest.fixture
def call(script, capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """A script's or a tool's command line, in this process."""

    def run(program: str, *words: object) -> tuple[int, str, str]:
        if program.startswith("main_"):
            return script(program, *words)
        if "-" in program and str(ROOT / "detection") not in sys.path:
            monkeypatch.syspath_prepend(str(ROOT / "detection"))
        module = importlib.import_module(program)
        monkeypatch.setattr(sys, "argv", [f"{program.removeprefix('tools.')}.py", *map(str, words)])
        try:
            status = module.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def contents(*folders: Path) -> dict[str, tuple[int, int]]:
    files = (file for folder in folders for file in folder.rglob("*"))
    return {
        str(file): (file.lstat().st_size, file.lstat().st_mtime_ns)
        for file in files
        if not file.is_dir()
    }


def accepted(*_: object) -> None:
    raise AssertionError("a bad input was accepted: training would begin")


def test_there_are_enough():
    assert len(CASES) >= 300


@pytest.mark.parametrize(
    ("generator", "i"), CASES, ids=[f"{generator.__name__}-{i}" for generator, i in CASES]
)
def test_it_is_refused_in_one_line(generator, i, call, data, good, tmp_path, monkeypatch):
    place = Place(data, good, tmp_path / "own")
    place.own.mkdir()
    monkeypatch.chdir(place.own)
    case = generator(random.Random(f"{SEED} {generator.__name__} {i}"), place)
    told = f"BAD_INPUTS_SEED={SEED}: {case.program} {' '.join(map(repr, map(str, case.words)))}"[
        :2000
    ]
    before = contents(data, good, place.own)
    if generator is not bad_image:
        monkeypatch.setattr("moco.engine.trainer.RunLog", accepted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, out, err = call(case.program, *case.words)
    assert status == 2, f"{told}\n{out}\n{err}"
    *others, line = err.splitlines() or [""]
    assert line.startswith(f"{case.program.removeprefix('tools.')}.py: error: "), f"{told}\n{err}"
    assert all("skipped, another image is used instead" in other for other in others), (
        f"{told}\n{err}"
    )
    typed = sum(2 * len(repr(str(word))) for word in case.words)
    assert len(line) <= LONGEST + typed and "Traceback" not in err, f"{told}\n{err}"
    assert all(word in line for word in case.said), f"{told}\n{line}"
    after = contents(data, good, place.own)
    log = {
        str(place.own / "run" / name) for name in ("log.jsonl", "args.yaml", ".lock", "subset.txt")
    }
    left = [f for f in after.keys() - before.keys() - log if "events.out.tfevents" not in f]
    assert not left and all(after[file] == before[file] for file in before), f"{told}\n{left}"
    if generator is not bad_image:
        assert not (place.own / "run").exists(), told
    (place.own / "line").write_text(line)


def test_what_the_bad_ones_were_made_of_is_good(call, data, good, tmp_path, monkeypatch):
    thin = good / "thin.pth.tar"
    run = ("--save-dir", tmp_path / "run")
    status, out, err = call(
        "main_synco", data, *SMALL, "--moco-k", 32, "--epochs", 2, *run, "--resume", thin
    )
    assert status == 0 and "resumed from" in out, err
    assert call("main_knn", data, *SMALL, "--k", 3, *run, "--pretrained", thin)[0] == 0
    assert call("convert-pretrain-to-detectron2", thin, tmp_path / "x.pkl")[0] == 0


# Odd images.


def odd_images() -> dict[str, tuple[bytes, Image.Image]]:
    """Valid files by name, and the picture that each one shows."""
    im, grey = picture(48, 40), picture(48, 40).convert("L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    turned = im.rotate(180)
    palette = im.quantize(32)
    cmyk = small(im.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe")
    plain = (
        cmyk[: adobe - 4] + cmyk[adobe + 12 :]
    )  # without the marker that says that the inks are inverted
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    more = {"save_all": True, "append_images": [turned]}
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    found = {
        "cmyk.jpg": (cmyk, Image.open(io.BytesIO(cmyk))),
        "cmyk_plain.jpg": (plain, Image.open(io.BytesIO(plain))),
        "cmyk.tif": (small(im.convert("CMYK"), "TIFF"), im.convert("CMYK")),
        "grey.jpg": (small(grey, "JPEG", quality=98), grey),
        "grey.png": (small(grey, "PNG"), grey),
        "la.png": (small(im.convert("LA"), "PNG"), grey),
        "alpha.png": (small(im.convert("RGBA"), "PNG"), im),
        "palette.png": (small(palette, "PNG", transparency=3), palette),
        "bits.png": (small(im.convert("1"), "PNG"), im.convert("1")),
        "deep.png": (small(Image.fromarray(deep), "PNG"), grey),
        "deep.tif": (small(Image.fromarray(deep), "TIFF"), grey),
        "deep.pgm": (b"P5 48 40 65535\n" + deep.astype(">u2").tobytes(), grey),
        "deeper.tif": (small(Image.fromarray(deep.astype(np.int32)), "TIFF"), grey),
        "float.tif": (small(floats, "TIFF"), grey),
        "animated.gif": (
            small(palette, "GIF", save_all=True, append_images=[turned.quantize(32)]),
            palette,
        ),
        "animated.webp": (small(im, "WEBP", lossless=True, **more), im),
        "animated.png": (small(im, "PNG", **more), im),
        "progressive.jpeg": (small(im, "JPEG", quality=98, progressive=True), im),
        "turned.jpg": (small(im, "JPEG", quality=98, exif=exif), im),
        "profile.png": (small(im, "PNG", icc_profile=b"no profile"), im),
        "really a png.jpg": (small(im, "PNG"), im),
        "dot.png": (small(im.crop((0, 0, 1, 1)), "PNG"), im.crop((0, 0, 1, 1))),
        "line.png": (small(picture(300, 1), "PNG"), picture(300, 1)),
        "wide.png": (small(picture(20_000, 3), "PNG"), picture(20_000, 3)),
        "high.jpg": (
            small(picture(3, 20_000), "JPEG", quality=98, subsampling=0),
            picture(3, 20_000),
        ),
        "na\u00efve \u96ea'\"\n.BMP": (small(im, "BMP"), im),
        os.fsdecode(b"latin-1 \xe9.tiff"): (small(im, "TIFF"), im),
    }
    return found


@pytest.mark.parametrize("name", odd_images(), ids=ascii)
def test_an_odd_image_looks_right(name, tmp_path):
    data, shown = odd_images()[name]
    (tmp_path / name).write_bytes(data)
    found = decode(str(tmp_path / name))
    assert found.dtype == torch.uint8
    difference = np.abs(
        found.permute(1, 2, 0).numpy().astype(int) - np.asarray(shown.convert("RGB")).astype(int)
    )
    assert difference.mean() < (3 if name.lower().endswith(("jpg", "jpeg")) else 0.5), (
        difference.mean()
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Return a data folder of unusual images.

    It also has an empty folder named like an image, and a file that is not an image.
    """
    root = tmp_path_factory.mktemp("odd")
    for split, label in itertools.product(("train", "val"), ("a", "b \u96ea")):
        folder = root / split / label
        (folder / "folder.jpg").mkdir(parents=True)
        (folder / "notes.txt").write_text("words")
        for name, (data, _) in odd_images().items():
            (folder / name).write_bytes(data)
    return root


def test_odd_images_train(call, odd, tmp_path):
    options = (odd, *SMALL, "-b", 18, "--on-bad-image", "error", "--epochs", 1, "-p", 1)
    status, _, err = call("main_synco", *options, "--moco-k", 32, "--save-dir", tmp_path / "pre")
    assert status == 0, err
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "pre" / "log.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    encoder = ("--pretrained", tmp_path / "pre" / "checkpoint_0000.pth.tar")
    status, _, err = call("main_lincls", *options, *encoder, "--save-dir", tmp_path / "lin")
    assert status == 0, err
    status, _, err = call(
        "main_knn", odd, *SMALL, *encoder, "--k", 3, "--save-dir", tmp_path / "knn"
    )
    assert status == 0, err
    for run, metric in (("lin", "acc1"), ("knn", "knn_3")):
        assert (
            0 <= json.loads((tmp_path / run / "results.json").read_text())["metrics"][metric] <= 1
        )


# Pickles and YAML.


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_arrays_is_read(protocol, tmp_path):
    value = {
        "model": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "n": np.float64(2),
        "of": OrderedDict(x=(1, [None, True])),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    found = read_pickle(tmp_path / "x.pkl")
    assert (
        np.array_equal(found["model"]["w"], value["model"]["w"])
        and found["n"] == 2
        and found["of"] == {"x": (1, [None, True])}
    )


@pytest.mark.parametrize("how", CODE)
def test_a_pickle_of_code_is_not_run(how, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": [Code(tmp_path / "ran", how)]}))
    with pytest.raises(InputError, match="only plain values and numpy's arrays are read"):
        read_pickle(tmp_path / "x.pkl")
    objects = pickle.dumps(np.array([Code(tmp_path / "ran", how)], dtype=object))
    (tmp_path / "x.pkl").write_bytes(objects)
    with pytest.raises(InputError):
        read_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "ran").exists()


def test_batches_of_cifar_that_are_code_are_not_run(script, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Code(tmp_path / "ran", "system")))
    status, _, err = script(
        "main_knn", tmp_path, "--dataset", "cifar10", "--save-dir", tmp_path / "run"
    )
    assert (
        status == 2
        and len(own_lines(err)) == 1
        and "no usable cifar10" in err
        and not (tmp_path / "ran").exists()
    )


@pytest.mark.slow
@wants_detectron2
def test_weights_and_configs_of_detectors_that_are_code_are_not_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "detection"))
    c4 = importlib.import_module("c4")
    config, weights = tmp_path / "c.yaml", tmp_path / "w.pkl"
    weights.write_bytes(pickle.dumps({"model": Code(tmp_path / "ran", "system")}))
    with pytest.raises(InputError, match=r"w\.pkl: holds"):
        c4.config(
            c4.CONFIGS / "pascal_voc_R_50_C4_24k_moco.yaml", ["MODEL.WEIGHTS", str(weights)], 0
        )
    config.write_text(f"MODEL: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(InputError, match=r"c\.yaml"):
        c4.config(config, [], 0)
    assert not (tmp_path / "ran").exists()


def test_yaml_of_options(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "\ufefflr: 1\nschedule: &s [1, 2]\nmilestones: *s\nnone:\nday: 2001-02-03\n",
        encoding="utf-8",
    )
    found = {"lr": 1, "schedule": [1, 2], "milestones": [1, 2], "none": None, "day": "2001-02-03"}
    assert read_yaml(tmp_path / "c.yaml") == found
