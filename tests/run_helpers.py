"""Helpers for tests of runs: read a run folder, and check how a script ended."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import ROOT, own_lines, settings

import main_synco
from moco.engine import record, run_folder

TIMES = {"images_per_s", "data_wait", "time"}


def typed(line: str, *values: object) -> tuple:
    """Split a command line at its spaces; each word {} becomes the next of `values`."""
    left = iter(values)
    return tuple(next(left) if word == "{}" else word for word in line.split())


INPUT = typed("-a resnet18 --image-size 32 -b 8 -j 0")
PRETRAIN = (*INPUT, "--moco-k", 32)  # of main_synco.py
SMALL = (*PRETRAIN, "--epochs", 1)
TINY = (
    *typed("-a resnet18 --image-size 32 -b 8 --moco-k 64 --moco-dim 16 --n-hard 8 --n1 2"),
    *typed("--n3 2 --n4 2"),
)
VOC_SMALL = (*INPUT, *typed("--c 0.1 1 10 100"))  # of main_voc07.py


def options(*command: object) -> SimpleNamespace:
    """Return the settings that main_synco.py takes from its command line."""
    return settings(main_synco, command)


def succeeded(result: subprocess.CompletedProcess) -> str:
    """Return the output of a script that must have succeeded."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refused(result: tuple[int, str, str], *words: str, lines: int = 1) -> None:
    """Fail unless a script ended with status 2, and with so many lines that contain `words`."""
    status, _, err = result
    assert status == 2, err
    assert len(own_lines(err)) == lines, err
    for word in words:
        assert word in err, err


def log(run: Path) -> list[dict]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def facts(run: Path) -> list[dict]:
    """Return the lines of a run's log without what depends on the machine's speed."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in log(run)]


def load(path: Path) -> dict:
    """Return a checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a: object, b: object) -> bool:
    """Return whether two values are equal bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def digests(folder: Path, below: bool = True) -> dict[str, str]:
    """Return the hash of each file by its path, without locks and records of starts.

    Unless `below`, subfolders are left out.
    """
    files = folder.rglob("*") if below else folder.glob("*")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.name not in (run_folder.LOCK, record.STATUS)
    }


def evaluation(name: str, data: Path, checkpoint: Path) -> tuple:
    """Return a short command of the evaluation script `name`."""
    options = {
        "main_knn": ("--k", 1, "-b", 8, "-j", 0),
        "main_lincls": ("--lr", 0.1, "--epochs", 1, "-b", 8, "-j", 0),
        "main_semisup": ("--train-percent", 100, "--epochs", 1, "-b", 8, "-j", 0),
    }
    return (name, data, "--pretrained", checkpoint, *options[name])


def bash(*words, env=None, **more):
    words = ["bash", *map(str, words)]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        **{"timeout": 60, **more},
    )
