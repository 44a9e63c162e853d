"""Test the commands on docs/commands.md: their resolved settings are those of the originals.

The tests pretend that the machine has 8 GPUs, or 4 for commands of 4 processes. EXPECTED has the
settings of the originals. A row without an entry in it fails, too.
"""

import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT
from published import DETECTIONS, EXPECTED, ROWS, VOC07, Expected

import main_adco
import main_fnc
import main_lincls
import main_moby
import main_mocov3
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
    "main_mocov3": main_mocov3,
    "main_semisup": main_semisup,
    "main_sogclr": main_sogclr,
    "main_synco": main_synco,
}
# scripts of other repositories, and those that do the same here
THEIRS = {
    ("MoCo", "main_moco"): "main_synco",
    ("MoCo v3", "main_moco"): "main_mocov3",
    ("AdCo", "lincls"): "main_lincls",
    ("SogCLR", "train"): "main_sogclr",
    ("SogCLR", "lincls"): "main_lincls",
    ("FNC", "run"): "main_lincls",
    ("SynCo-v2, MoBY and BYOL", "main_pretrain"): "main_moby",
    ("SynCo-v2, MoBY and BYOL", "main_linear"): "main_lincls",
}


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
    smaller = config.EVALUATES and expected.images % batch > 0  # the last batch, which trains, too
    per_epoch = expected.images // batch + smaller
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
