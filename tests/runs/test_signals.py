"""Test runs that a signal stops: they end after a step and resume exactly."""

import contextlib
import hashlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import shell
from fault_helpers import SMALL, STEPS, SYNCO, TWO, logged, until
from run_helpers import load, same, succeeded, typed

from moco.engine import checkpoint
from moco.launch import interrupt
from moco.launch.interrupt import STATUS
from moco.report.runs import read_log

pytestmark = pytest.mark.slow

ADCO = ("main_adco.py", *SMALL, "--cluster", 30, "--moco-dim", 16)  # 8 steps before epoch 0


def state(run):
    return {
        key: load(run / "checkpoint_0001.pth.tar")[key]
        for key in ("epoch", "state_dict", "optimizer", "progress")
    }


@pytest.fixture(scope="module")
def whole(shared_images, tmp_path_factory):
    """The last state of a run that nothing disturbed, by its command."""
    done = {}

    def of(command):
        if command not in done:
            run = tmp_path_factory.mktemp("whole")
            succeeded(shell(*command, shared_images, "--save-dir", run))
            done[command] = state(run)
        return done[command]

    return of


@pytest.mark.parametrize(
    ("command", "number", "step"), [(SYNCO, "SIGUSR1", 14), ((*ADCO, *TWO), "SIGTERM", -3)]
)
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_as_if_never_stopped(
    command, number, step, shared_images, whole, tmp_path
):
    process = shell(*command, shared_images, "--save-dir", tmp_path, "--resume", "auto", wait=False)
    until(lambda: any(done >= step for done in logged(tmp_path)), process)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=60)
    assert process.returncode == STATUS, out + err
    assert "--resume auto: no checkpoint in" in out
    assert err.count(f"{number}: finishing the step and saving\n") == 1
    assert err.splitlines()[-1].startswith(f"{command[0]}: {number}: saved ")
    (saved,) = [path for path in tmp_path.glob("checkpoint_????_*.pth.tar") if str(path) in err]
    progress = load(saved)["progress"]
    assert step <= progress["step"] < 2 * STEPS and f"after step {progress['step']};" in err
    assert progress["samples"] == progress["step"] * 4
    out = succeeded(shell(*command, shared_images, "--save-dir", tmp_path, "--resume", "auto"))
    assert f"resumed from {saved}" in out
    assert same(state(tmp_path), whole(command))
    assert [path.name for path in sorted(tmp_path.glob("*.pth.tar"))] == [
        "checkpoint_0000.pth.tar",
        "checkpoint_0001.pth.tar",
    ]
    assert (
        sorted(set(logged(tmp_path)))
        == logged(tmp_path)
        == list(range(logged(tmp_path)[0], 2 * STEPS + 1))
    )


@pytest.fixture
def interruptible():
    """Let processes that the test starts react to Ctrl-C.

    Tests that run in the background of a shell ignore it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("words", "status", "printed"),
    [
        ("main_synco.py photos", -signal.SIGINT, ""),
        ("tools/export.py x.pth y.pth", 130, "export.py: interrupted\n"),
    ],
)
def test_ctrl_c_while_packages_are_imported_prints_no_traceback(
    words, status, printed, interruptible
):
    process = shell(*words.split(), wait=False)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", printed)


def test_ctrl_c_of_other_programs_stays_theirs(interruptible):
    code = (
        "import signal, moco; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    done = shell("-c", code)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_is_acknowledged_while_the_main_thread_computes(monkeypatch):
    """In one long call, such as a backward pass, at whose end Python calls the handler."""
    heard, ended = [], []
    read, write = os.pipe()
    wrote = os.write
    monkeypatch.setattr(
        os, "write", lambda descriptor, line: wrote(write if descriptor == 2 else descriptor, line)
    )
    listener = threading.Thread(
        target=lambda: heard.append((os.read(read, 1000), time.monotonic()))
    )
    listener.start()
    with interrupt.Requests() as requests:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)  # some seconds
        ended.append(time.monotonic())
        time.sleep(0.01)
        assert requests.agreed() == "SIGINT"
    listener.join(10)
    ((line, when),) = heard
    assert (
        line.strip()
        == b"SIGINT: finishing the step and saving; Ctrl-C after 3 seconds ends at once"
    )
    assert when < ended[0]
    os.close(read)
    os.close(write)


def test_the_time_of_a_resumed_run_continues_and_no_start_counts_twice(
    script, shared_images, tmp_path
):
    command = (shared_images, *SMALL, "-j", 0, "--moco-k", 24, "--save-dir", tmp_path)
    assert script("main_synco", *command, "--epochs", 1)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lines[-1]["time"] = 7000.25  # as after two hours
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = script(
        "main_synco", *command, "--resume", tmp_path / "checkpoint_0000.pth.tar"
    )
    assert status == 0, err
    times = [json.loads(line)["time"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert times == sorted(times) and 7000.25 < times[STEPS] <= times[-1] < 7300
    assert read_log(tmp_path / "log.jsonl").seconds == times[-1]
    assert re.search(r"^trained for 1:5[67]:\d\d at \d+ images per second$", out, re.M)


def test_a_run_stopped_after_the_last_step_of_an_epoch_ends_it(script, shared_images, tmp_path):
    command = (
        shared_images,
        *SMALL,
        *typed("--moco-k 24 -j 0 --save-dir {} --resume auto", tmp_path / "run"),
    )
    assert script("main_synco", *command)[0] == 0
    end, inside = (tmp_path / "run" / f"checkpoint_000{name}.pth.tar" for name in ("1", "1_24"))
    kept = state(tmp_path / "run")
    torch.save({**load(end), "epoch": 1}, inside)
    end.unlink()
    status, out, err = script("main_synco", *command)
    assert status == 0 and "at epoch 1, after 12 of its steps" in out, err
    assert same(state(tmp_path / "run"), kept) and not inside.exists()


def test_damaged_checkpoints_are_set_aside_and_partial_ones_removed(
    script, shared_images, tmp_path
):
    command = (
        shared_images,
        *SMALL,
        *typed("--moco-k 24 -j 0 --save-dir {} --epochs 3 --resume auto", tmp_path),
    )
    assert script("main_synco", *command, "--keep", "all")[0] == 0
    copy = tmp_path / "checkpoint_0000_good.pth.tar"
    copy.write_bytes(b"mine")
    (tmp_path / ".checkpoint_0001.pth.tar-x1y2z3_4").write_bytes(b"half of one")
    newest = tmp_path / "checkpoint_0002.pth.tar"
    damaged = newest.read_bytes()[:1000]
    newest.write_bytes(damaged)
    status, out, _ = script("main_synco", *command)
    assert (
        status == 0
        and "checkpoint_0002.pth.tar is damaged: renamed to checkpoint_0002.pth.tar.damaged" in out
    )
    assert (tmp_path / "checkpoint_0002.pth.tar.damaged").read_bytes() == damaged
    names = sorted(path.name for path in tmp_path.glob("*checkpoint*"))
    kept = (
        "0000.pth.tar",
        "0000_good.pth.tar",
        "0001.pth.tar",
        "0002.pth.tar",
        "0002.pth.tar.damaged",
    )
    assert names == [f"checkpoint_{name}" for name in kept]
    assert checkpoint.newest(str(tmp_path)) == str(newest)


def test_another_world_size_goes_on_at_the_same_place(script, shared_images, tmp_path):
    process = shell(
        *SYNCO, *TWO, shared_images, "--save-dir", tmp_path, "--save-every-steps", 5, wait=False
    )
    file = tmp_path / "kept.pth.tar"

    def kept():
        with contextlib.suppress(FileNotFoundError):
            os.link(tmp_path / "checkpoint_0000_10.pth.tar", file)
        return file.exists()

    until(kept, process)
    process.kill()
    process.communicate()
    before = load(file)
    resumed = ("main_synco", shared_images, *SYNCO[1:], "--resume", file)
    changed = ("--lr", 0.5, "--cos", "--allow-change", "lr,cos")
    status, out, err = script(
        *resumed, "--save-dir", tmp_path / "one", "--save-every-steps", 11, *changed
    )
    assert status == 0 and "at epoch 0, after 10 of its steps" in out, err
    lines = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:10]] == [
        *range(1, 11)
    ]  # of the run that this one began from
    assert (lines[10]["epoch"], lines[10]["step"], lines[10]["lr"]) == (0, 11, 0.5)
    # twice the batch, with half as many steps in an epoch: five of them have seen its images
    status, out, err = script(
        *resumed, "--save-dir", tmp_path / "two", "-b", 8, "--allow-change", "batch-size"
    )
    assert status == 0 and "at epoch 0, after 5 of its steps" in out, err
    after = load(tmp_path / "one" / "checkpoint_0000.pth.tar")
    for step, saved in ((10, before), (12, after)):
        assert int(saved["state_dict"]["module.queue_ptr"]) == step * 4 % 24
    kept = (before["state_dict"]["module.queue"] == after["state_dict"]["module.queue"]).all(1)
    assert (
        kept.tolist() == [True] * 16 + [False] * 8
    )  # the rows that the two steps since have overwritten
