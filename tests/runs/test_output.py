"""Test output without a reader, closed output, and a full disk behind it."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, settings, shell, write_images
from fault_helpers import SMALL, STEPS, TWO, logged
from run_helpers import load

import main_lincls
from moco.engine.log import fold

pytestmark = pytest.mark.slow


def test_a_run_s_end_says_what_follows(script, tmp_path):
    """The commands run as they are pasted, in a shell."""
    data, run = write_images(tmp_path / "my images"), tmp_path / "it's a run"
    status, out, err = script(
        "main_synco", data, *SMALL, "-j", 0, "--moco-k", 16, "--epochs", 1, "--save-dir", run
    )
    assert status == 0, err
    assert f"the last checkpoint is {run / 'checkpoint_0000.pth.tar'}; commands to run next:" in out
    assert re.search(r"^first step took \d+\.\d s, .* \d+:\d\d:\d\d for the run$", out, re.M)
    assert re.search(r"^trained for 0:0\d:\d\d at \d+ images per second$", out, re.M)
    knn, probe, report = (line.strip() for line in out.splitlines() if line.startswith("  "))
    assert "main_lincls.py" in probe and "tools/report.py" in report
    done = subprocess.run(
        f"{knn} -j 0 --k 3 --save-dir '{tmp_path}/knn'",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        rf"results in {re.escape(str(tmp_path))}/knn/results.json; the evaluation took 0:0\d:\d\d",
        last,
    )
    for command, script_name in ((probe, "main_lincls"), (report, "tools.report")):
        words = shlex.split(command)[2:]
        if script_name == "main_lincls":
            assert settings(main_lincls, words).pretrained == str(run / "checkpoint_0000.pth.tar")
        else:
            assert words == [str(run)]


def test_the_bar_fits_a_terminal_of_80_columns(shared_images, tmp_path):
    command = [
        sys.executable,
        *map(
            str,
            (
                *QUICK,
                shared_images,
                "--n-hard",
                8,
                "--n1",
                2,
                "--knn-every",
                1,
                "--save-dir",
                tmp_path,
            ),
        ),
    ]
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while more := os.read(terminal, 65536):
            shown += more
    assert os.waitpid(child, 0)[1] == 0, shown
    text = shown.decode()
    bars = [line for line in re.split(r"[\r\n]", text) if f"/{STEPS} " in line]
    assert len(bars) >= STEPS and max(map(len, bars)) < 80
    assert any(re.search(r"\| 12/12  .* left, epoch 0  loss [\d.]+", bar) for bar in bars), bars
    knn = text[text.index(f"epoch 0  step {STEPS}/{STEPS}") :].splitlines()[0]
    assert "knn" in knn and len(knn) < 80


def test_facts_are_folded_between_and_not_inside():
    facts = ["epoch 0", "val_acc1_lr30 0.5", "val_acc1_lr10 0.25", "left 0:00:00"]
    assert fold(facts, math.inf) == ["  ".join(facts)]
    assert fold(facts, 26) == ["epoch 0  val_acc1_lr30 0.5", "val_acc1_lr10 0.25", "left 0:00:00"]
    assert fold(facts, 5) == facts


QUICK = ("main_synco.py", *SMALL, "-j", 0, "--moco-k", 24, "--epochs", 1)
RESULTS = {
    "method": "moco",
    "arch": "resnet18",
    "checkpoint": "c",
    "pretrain_epochs": 1,
    "protocol": "knn",
    "dataset": "photos",
}
RESULTS |= {"metrics": {"knn_20": 0.5}, "settings": {"seed": 0}}


def quiet(err):
    for word in ("Traceback", "Error", "Exception ignored"):
        assert word not in err, err


@pytest.mark.parametrize("launcher", [(), TWO])
def test_a_reader_of_the_output_that_leaves_stops_nothing(launcher, shared_images, tmp_path):
    process = shell(*QUICK, *launcher, shared_images, "--save-dir", tmp_path, wait=False)
    process.stdout.readline()
    process.stdout.close()
    quiet(process.stderr.read())
    assert process.wait(60) == 0
    assert (tmp_path / "checkpoint_0000.pth.tar").exists() and logged(tmp_path) == list(
        range(1, STEPS + 1)
    )


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_output_that_is_closed_stops_nothing(closed, shared_images, tmp_path):
    command = [sys.executable, *map(str, (*QUICK, shared_images, "--save-dir", tmp_path))]
    shut = " ".join(f"{number}>&-" for number in closed)
    words = ["bash", "-c", f'exec "$@" {shut}', "bash", *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    quiet(done.stderr)
    assert load(tmp_path / "checkpoint_0000.pth.tar")["epoch"] == 1
    assert logged(tmp_path) == list(range(1, STEPS + 1))


def test_a_full_disk_of_the_output_stops_nothing(shared_images, tmp_path):
    command = [sys.executable, *map(str, (*QUICK, shared_images, "--save-dir", tmp_path))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 0
    quiet(done.stderr)
    assert logged(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "command",
    [("main_synco.py", "--help"), ("tools/collect.py", "runs"), ("tools/report.py", "--help")],
)
def test_output_of_a_tool_may_have_no_reader(command, tmp_path):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, *(str(tmp_path) if word == "runs" else word for word in command)]
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    done = subprocess.run(
        words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert done.returncode == 0
    quiet(done.stderr)
