"""Fixtures and helpers of all tests.

They provide tiny image folders, and call the scripts in this process or from a shell.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock
from PIL import Image

from moco.config import flat

if TYPE_CHECKING:
    from tracker_helpers import FakeTracker

ROOT = Path(__file__).resolve().parent.parent

# More threads do not make the tests faster, and make them much slower if other programs keep the
# cores busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that they start
# tools that the tests start import this clone, whatever is installed
os.environ["PYTHONPATH"] = str(ROOT)


wants_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="detectron2 is not installed"
)


def settings(script: ModuleType, words: Sequence[object]) -> SimpleNamespace:
    """Return the settings that a script takes from its command line, before they are completed."""
    return SimpleNamespace(**flat(script.parser().parse(list(map(str, words)))))


def write_images(
    root: Path, classes: int = 2, train: int = 12, val: int = 5, size: int = 40
) -> Path:
    """An ImageNet-style folder of JPEGs; each class has a colour of its own, with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for c in range(classes):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (
                    rng.integers(0, 120, (size, size, 3))
                    + np.array([c % 2, c // 2 % 2, c // 4 % 2]) * 130
                )
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests leave the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=3, train=16)


@pytest.fixture(scope="session")
def pretraining(shared_images: Path, tmp_path_factory) -> Path:
    """The run folder of one epoch of main_synco.py, which no test may write to."""
    from run_helpers import SMALL

    folder = tmp_path_factory.mktemp("pretraining") / "run"
    status, _, err = in_process("main_synco", shared_images, *SMALL, "--save-dir", folder)
    assert status == 0, err
    return folder


@pytest.fixture
def run(pretraining: Path, tmp_path: Path) -> Path:
    """A copy of `pretraining`, which a test may write to."""
    return Path(shutil.copytree(pretraining, tmp_path / "run"))


@pytest.fixture(scope="session")
def checkpoints(shared_images: Path, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of AdCo, SogCLR and FNC."""
    from method_helpers import METHODS, SMALL

    files = {}
    for name in ("adco", "sogclr", "fnc"):
        method, *options = METHODS[name]
        folder = tmp_path_factory.mktemp(name)
        words = (shared_images, *options, *SMALL, "--knn-every", 1, "--save-dir", folder)
        status, _, err = in_process(method, *words)
        assert status == 0, err
        files[name] = folder / "checkpoint_0000.pth.tar"
    return files


def shell(
    *command: object, env: dict[str, str] | None = None, wait: bool = True
) -> subprocess.CompletedProcess | subprocess.Popen:
    """Run `python COMMAND` from the project's root, as a user would."""
    words = [sys.executable, *map(str, command)]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
        "env": {**os.environ, **(env or {})},
    }
    if not wait:
        return subprocess.Popen(words, **pipes)
    # the ports of the published commands: one at a time
    port = next(
        (
            port
            for port in ("10001", "12345")
            if any(word.endswith((f":{port}", f"port={port}")) for word in words)
        ),
        None,
    )
    with (
        FileLock(Path(tempfile.gettempdir()) / f"hard-negatives-port-{port}.lock")
        if port
        else contextlib.nullcontext()
    ):
        return subprocess.run(words, timeout=600, **pipes)


def own_lines(err: str) -> list[str]:
    """Return the lines of stderr without warnings of other packages, which change with versions.

    Raises AssertionError if there is a traceback.
    """
    assert "Traceback" not in err, err
    python = r"^\S.*:\d+: \w*Warning: .*\n(?:  .*\n)?"  # where, what, and the line of code
    torch_cpp = r"^(?:\[rank\d+\]: ?)?\[[WI]\d{3,}.*\n"
    return re.sub(f"{python}|{torch_cpp}", "", f"{err}\n", flags=re.MULTILINE).strip().splitlines()


def in_process(name: str, *options: object) -> tuple[int, str, str]:
    """Call a script's command line in this process: returns exit status, stdout and stderr.

    A process of its own takes seconds to import what is here already.
    """
    from moco.cli import entry

    module, status = importlib.import_module(name), 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as monkeypatch,
    ):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        try:
            entry.main(module.parser(), module.complete, module.worker)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def script():
    return in_process


@pytest.fixture
def call(script, capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """A script's or a tool's command line, in this process."""

    def run(program: str, *words: object) -> tuple[int, str, str]:
        if program.startswith("main_"):
            return script(program, *words)
        module = importlib.import_module(program)
        monkeypatch.setattr(sys, "argv", [f"{program.removeprefix('tools.')}.py", *map(str, words)])
        try:
            status = module.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def fake_tracker(tmp_path_factory, monkeypatch) -> "FakeTracker":
    """Trackio as a package that records its calls."""
    from tracker_helpers import FakeTracker

    return FakeTracker(tmp_path_factory.mktemp("tracker"), monkeypatch)


@pytest.fixture
def no_launcher(monkeypatch):
    """Remove the environment variables of launchers."""
    launchers = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    for name in (*launchers.split(), *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)


def on_two_ranks(checks: dict[str, tuple], folder: Path) -> Callable[[str], list]:
    """Call each check on two processes; see `on_ranks`."""
    return on_ranks(2, checks, folder)


def on_ranks(n: int, checks: dict[str, tuple], folder: Path) -> Callable[[str], list]:
    """Call each check (a function and its arguments after the rank) on n processes over loopback.

    Returns a function that takes the name of a check and returns the results of all ranks. It
    fails the test if the check failed on a rank.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (n, port, checks, str(folder)), nprocs=n)
    files = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(n)]

    def of(check: str) -> list:
        for rank, file in enumerate(files):
            if isinstance(file[check], str):
                pytest.fail(f"rank {rank}: {file[check]}")
        return [file[check] for file in files]

    return of


def _rank(rank: int, n: int, port: int, checks: dict[str, tuple], folder: str) -> None:
    torch.set_num_threads(1)
    url = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", init_method=url, rank=rank, world_size=n, timeout=timedelta(seconds=60)
    )
    found = {name: _attempt(check, rank, *args) for name, (check, *args) in checks.items()}
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _attempt(check: Callable, *args: object) -> object:
    """Return the result of the check, or the traceback if it failed.

    So a failing check does not prevent the other checks.
    """
    try:
        return check(*args)
    except Exception:
        return traceback.format_exc()
