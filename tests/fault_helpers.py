"""Commands of runs that tests interrupt, and how far such a run is."""

import json
import time

import pytest
from run_helpers import typed

SMALL = typed("-a resnet18 --image-size 32 -b 4 -j 1 --epochs 2 -p 1 --wd 0.1")
SYNCO = (
    "main_synco.py",
    *SMALL,
    *typed("--moco-k 24 --mlp --n-hard 8 --n1 2 --n4 2 --warmup-epochs 0"),
)
STEPS = 12  # of an epoch
TWO = ("--multiprocessing-distributed", "--nproc-per-node", 2)


def until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or process.poll() is not None:
            process.kill()
            pytest.fail(f"the process ended, or {seconds} seconds passed: {process.communicate()}")
        time.sleep(0.01)


def until_true(condition, seconds=60):
    """Wait until a condition is true, without a process to watch."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{seconds} seconds passed"
        time.sleep(0.01)


def logged(run):
    """The steps that a run has written lines of."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]
