"""Test tools/slurm.sh with a stand-in for srun."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, own_lines
from run_helpers import bash

from tools import show_views

pytestmark = pytest.mark.slow


# tools/slurm.sh, with a stand-in for srun. It starts a process per task, and the first failure
# kills the others.
SRUN = """
import os, signal, subprocess, sys, time
options = [word for word in sys.argv[1:sys.argv.index("bash")]]
tasks = int(next(word for word in options if word.startswith("--ntasks=")).split("=")[1])
open(os.environ["SEEN"], "a").write(" ".join(options) + chr(10))
words = sys.argv[sys.argv.index("bash"):]
running = [
    subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(i)}, start_new_session=True)
    for i in range(tasks)
]
def send(number, frame):
    for task in running:
        if task.poll() is None:
            os.killpg(task.pid, number)
signal.signal(signal.SIGUSR1, send)
while any(task.poll() is None for task in running):
    if any(task.poll() for task in running):
        send(signal.SIGKILL, None)
    time.sleep(0.02)
codes = [task.wait() for task in running]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun.py").write_text(SRUN)
    stubs = {
        "srun": f'exec {sys.executable} "{folder}/srun.py" "$@"',
        "scontrol": 'echo "$@" >>"$REQUEUED"',
        "train": 'printf "<%s>" "$@" >"$0.$SLURM_PROCID"; eval "$TRAIN"',
    }
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "train"),
        "REQUEUED": str(tmp_path / "requeued"),
    }
    env |= {
        "SEEN": str(tmp_path / "seen"),
        "SLURM_JOB_ID": "77",
        "SLURM_GPUS_PER_NODE": "a100:2",
        "SLURM_JOB_NUM_NODES": "2",
    }
    env |= {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_GPU": "8"}
    return env


RUN = ["tools/slurm.sh", "main_synco.py", "--save-dir"]


def test_a_task_per_gpu_gets_every_word(tmp_path, slurm):
    run = tmp_path / "a run"
    done = bash(*RUN, run, "--tag", "two words", "a * DIR", env=slurm)
    assert done.returncode == 0, done.stderr
    for task in range(4):
        words = (tmp_path / "bin" / f"train.{task}").read_text()
        assert (
            words
            == f"<main_synco.py><--save-dir><{run}><--tag><two words><a * DIR><--resume><auto>"
        )
    seen = (tmp_path / "seen").read_text().split()
    assert {
        "--nodes=2",
        "--ntasks=4",
        "--ntasks-per-node=2",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=1",
    } == set(seen)
    assert not (tmp_path / "requeued").exists() and not list(run.iterdir())


def test_status_75_requeues_and_another_is_the_job_s(tmp_path, slurm):
    # the tasks end one after the other, which srun must not take for a failure
    done = bash(*RUN, tmp_path / "run", env={**slurm, "TRAIN": "sleep .$SLURM_PROCID; exit 75"})
    assert done.returncode == 75 and (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "requeued").unlink()
    began = time.monotonic()
    done = bash(
        *RUN,
        tmp_path / "run",
        env={**slurm, "TRAIN": '[ "$SLURM_PROCID" = 1 ] && exit 3; exec sleep 30'},
    )
    assert done.returncode == 137 and time.monotonic() - began < 20  # the others were killed
    done = bash(
        *RUN, tmp_path / "run", env={**slurm, "TRAIN": '[ "$SLURM_PROCID" = 1 ] && exit 2; exit 75'}
    )
    assert done.returncode in (2, 137)
    done = bash(*RUN, tmp_path / "run", env={**slurm, "TRAIN": "exit 4"})
    assert done.returncode in (4, 137)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_scripts(tmp_path, slurm, number):
    """Send USR1 to the tasks: the job is requeued. Send TERM to the shell, too: SLURM decides."""
    # as the scripts do: the one at rank 0 takes longer, for it saves
    train = (
        'trap "sleep .$((3 - SLURM_PROCID)); exit 75" USR1 TERM; touch "$0.up.$SLURM_PROCID"; '
        "while :; do sleep .05; done"
    )
    folder = tmp_path / "bin"
    # sent to the task's own shell alone, which has to pass it on
    (folder / "srun.py").write_text(
        SRUN.replace("SIGUSR1, send", f"{number.name}, send").replace("os.killpg", "os.kill")
    )
    words = ["bash", *map(str, RUN), str(tmp_path / "run")]
    job = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **slurm, "TRAIN": train},
        start_new_session=True,
        text=True,
    )
    end = time.monotonic() + 30
    while len(list(folder.glob("train.up.*"))) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    if number == signal.SIGTERM:
        os.killpg(job.pid, number)
    else:
        os.kill(
            int(
                subprocess.run(
                    ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
                ).stdout.split()[0]
            ),
            number,
        )
    assert job.wait(30) == 75
    assert (tmp_path / "requeued").exists() == (number == signal.SIGUSR1)


def test_what_a_job_cannot_do_is_one_line(tmp_path, slurm):
    for words, what in (
        (["main_synco.py", "DIR"], "--save-dir RUN"),
        ([], "no script"),
        (["main_nothing.py", "--save-dir", "x"], "no such script"),
        (["main_synco.py", "--save-dir=x", "--resume", "y"], "leave it out"),
        (["main_synco.py", "--output", "x", "--multiprocessing-distributed"], "leave it out"),
    ):
        done = bash("tools/slurm.sh", *words, env=slurm)
        assert done.returncode == 2 and what in done.stderr and len(own_lines(done.stderr)) == 1, (
            done.stderr
        )
    done = bash(*RUN, tmp_path / "run", env={**slurm, "SLURM_JOB_ID": ""})
    assert done.returncode == 2 and "submit it" in done.stderr and not (tmp_path / "run").exists()


def test_help_needs_nothing():
    assert "--val-labels FILE" in bash("tools/prepare_imagenet.sh", "--help").stdout
    assert "--cfg FILE.yaml" in show_views.parser().format_help()
    assert all(bash("-n", script).returncode == 0 for script in sorted(ROOT.glob("tools/*.sh")))
