"""Bad checkpoints, weights and files of features."""

import io
import json
import math
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from feature_helpers import META
from run_helpers import INPUT
from torch import nn

from bad_inputs.base import Case, Place

CODE = ("system", "eval", "exec", "popen", "open", "load")


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


def damaged(x: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors that must not replace x: of another shape or type, or not finite."""
    return [x[:-1], x[None], x.int(), x.cfloat(), x.to_sparse(), x > 0, x * math.nan, x / 0]


def bad_file(rng: random.Random, place: Place, state: dict) -> bytes:
    """Return the bytes of a file that is not a full checkpoint, or that has code in it."""
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
                lambda: weights.update({name: rng.choice(damaged(x))}),
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
    return Case("main_synco", (place.data, *INPUT, "--moco-k", 32, "--epochs", 2, *resume))


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
                lambda: weights.update({name: rng.choice(damaged(x))}),
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
    meta = dict(META)
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
