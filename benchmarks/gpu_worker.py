"""A worker process of benchmarks/gpu.py: run parts, and write their results to a file of events."""

import gc
import json
import re
import time
import traceback
from pathlib import Path

import torch
from gpu_parts import PARTS
from gpu_setup import Failed, Notes, Setup

from moco.files import to_json

BROKEN = 3  # exit status of a process whose GPU context is lost


def work(setup: Setup, stage: int, names: list[str], events: Path) -> int:
    """Run parts of a stage in order; append their results to `events`; return the exit status."""

    def event(**what: object) -> None:
        with events.open("a") as file:
            file.write(f"{to_json(what)}\n")

    for name in names:
        event(part=name, event="begin")
        notes, error, began = Notes(), "", time.perf_counter()
        try:
            PARTS[stage][name][0](setup, notes)
        except (Exception, SystemExit) as problem:
            where = "".join(traceback.format_tb(problem.__traceback__)[-2:])
            error = f"{type(problem).__name__}: {problem}" + f"\n{where}" * (
                not isinstance(problem, Failed)
            )
        seconds = time.perf_counter() - began
        event(
            part=name,
            event="end",
            seconds=seconds,
            figures=notes,
            failures=notes.failures,
            error=error[:4000],
        )
        gc.collect()
        if setup.cuda:
            if re.search(r"CUDA error|CUBLAS_|CUDNN_|device-side assert|illegal memory", error):
                return BROKEN
            torch.cuda.empty_cache()
    return 0


def events(file: Path) -> list[dict]:
    """Return the events in a worker's file, without a line that is still being written."""
    try:
        text = file.read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
