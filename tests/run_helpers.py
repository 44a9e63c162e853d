"""Helpers for tests of runs: read a run folder, and check how a script ended."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import torch
from conftest import own_lines, settings

import main_synco

TIMES = {"images_per_s", "data_wait", "time"}


def typed(line: str, *values: object) -> tuple:
    """Split a command line at its spaces; each word {} becomes the next of `values`."""
    left = iter(values)
    return tuple(next(left) if word == "{}" else word for word in line.split())


INPUT = typed("-a resnet18 --image-size 32 -b 8 -j 0")
SMALL = (*INPUT, *typed("--epochs 1 --moco-k 32"))  # of main_synco.py
VOC_SMALL = (*INPUT, *typed("--c 0.1 1 10 100"))  # of main_voc07.py


def options(*command: object) -> SimpleNamespace:
    """Return the settings that main_synco.py takes from its command line."""
    return settings(main_synco, command)


def succeeded(result: CompletedProcess) -> str:
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
