"""Test runs that are interrupted, killed or hindered.

The tests check what is lost, the messages, and the resumed runs.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pty
import re
import resource
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, own_lines, settings, shell, write_images
from run_helpers import load, refused, same, succeeded

import main_lincls
from moco.engine import checkpoint
from moco.engine.log import fold
from moco.errors import InputError
from moco.launch import interrupt
from moco.launch.interrupt import STATUS
from moco.report.runs import read_log

pytestmark = pytest.mark.slow

SMALL = (
    "-a",
    "resnet18",
    "--image-size",
    32,
    "-b",
    4,
    "-j",
    1,
    "--epochs",
    2,
    "-p",
    1,
    "--wd",
    0.1,
)
SYNCO = (
    "main_synco.py",
    *SMALL,
    "--moco-k",
    24,
    "--mlp",
    "--n-hard",
    8,
    "--n1",
    2,
    "--n4",
    2,
    "--warmup-epochs",
    0,
)
ADCO = ("main_adco.py", *SMALL, "--cluster", 30, "--moco-dim", 16)  # 8 steps before epoch 0
STEPS = 12  # of an epoch
TWO = ("--multiprocessing-distributed", "--nproc-per-node", 2)


def state(run):
    return {
        key: load(run / "checkpoint_0001.pth.tar")[key]
        for key in ("epoch", "state_dict", "optimizer", "progress")
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("faults"), classes=3, train=16)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The last state of a run that nothing disturbed, by its command."""
    done = {}

    def of(command):
        if command not in done:
            run = tmp_path_factory.mktemp("whole")
            succeeded(shell(*command, data, "--save-dir", run))
            done[command] = state(run)
        return done[command]

    return of


def until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or process.poll() is not None:
            process.kill()
            pytest.fail(f"the process ended, or {seconds} seconds passed: {process.communicate()}")
        time.sleep(0.01)


def logged(run):
    """The steps that a run has written lines of."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def children(process):
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


@pytest.mark.parametrize(
    ("command", "number", "step"),
    [(SYNCO, "SIGUSR1", 14), ((*ADCO, *TWO), "SIGTERM", -3)],
)
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_as_if_never_stopped(
    command, number, step, data, whole, tmp_path
):
    process = shell(*command, data, "--save-dir", tmp_path, "--resume", "auto", wait=False)
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
    out = succeeded(shell(*command, data, "--save-dir", tmp_path, "--resume", "auto"))
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


@pytest.mark.parametrize("command", ["main_synco.py", "tools/export.py"])
def test_ctrl_c_while_packages_are_imported_prints_nothing(command, interruptible):
    process = shell(command, "--help", wait=False)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


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


def test_a_resumed_run_s_time_continues_and_the_report_adds_no_start_twice(script, data, tmp_path):
    command = (data, *SMALL, "-j", 0, "--moco-k", 24, "--save-dir", tmp_path)
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
    assert re.search(r"^trained for 1:5[67]:\d\d$", out, re.M)


def test_a_run_s_end_says_what_follows(script, tmp_path):
    """The commands run as they are pasted, in a shell."""
    data, run = write_images(tmp_path / "my images"), tmp_path / "it's a run"
    status, out, err = script(
        "main_synco", data, *SMALL, "-j", 0, "--moco-k", 16, "--epochs", 1, "--save-dir", run
    )
    assert status == 0, err
    assert f"the last checkpoint is {run / 'checkpoint_0000.pth.tar'}; commands to run next:" in out
    assert re.search(r"^first step took \d+\.\d s, .* \d+:\d\d:\d\d for the run$", out, re.M)
    knn, probe, report = (line.strip() for line in out.splitlines() if line.startswith("  "))
    assert "main_lincls.py --cfg configs/lincls_moco.yaml" in probe and "tools/report.py" in report
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


def test_the_bar_fits_a_terminal_of_80_columns(data, tmp_path):
    command = [
        sys.executable,
        *map(
            str, (*QUICK, data, "--n-hard", 8, "--n1", 2, "--knn-every", 1, "--save-dir", tmp_path)
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


def test_stopped_when_all_steps_of_an_epoch_were_done_it_ends_the_epoch(script, data, tmp_path):
    command = (
        data,
        *SMALL,
        "--moco-k",
        24,
        "-j",
        0,
        "--save-dir",
        tmp_path / "run",
        "--resume",
        "auto",
    )
    assert script("main_synco", *command)[0] == 0
    end, inside = (tmp_path / "run" / f"checkpoint_000{name}.pth.tar" for name in ("1", "1_24"))
    kept = state(tmp_path / "run")
    torch.save({**load(end), "epoch": 1}, inside)
    end.unlink()
    status, out, err = script("main_synco", *command)
    assert status == 0 and "at epoch 1, after 12 of its steps" in out, err
    assert same(state(tmp_path / "run"), kept) and not inside.exists()


def test_damaged_checkpoints_are_set_aside_and_half_written_ones_removed(script, data, tmp_path):
    command = (
        data,
        *SMALL,
        "--moco-k",
        24,
        "-j",
        0,
        "--save-dir",
        tmp_path,
        "--epochs",
        3,
        "--resume",
        "auto",
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


def test_another_world_size_goes_on_at_the_same_place(script, data, tmp_path):
    process = shell(*SYNCO, *TWO, data, "--save-dir", tmp_path, "--save-every-steps", 5, wait=False)
    file = tmp_path / "kept.pth.tar"

    def kept():
        with contextlib.suppress(FileNotFoundError):
            os.link(tmp_path / "checkpoint_0000_10.pth.tar", file)
        return file.exists()

    until(kept, process)
    process.kill()
    process.communicate()
    before = load(file)
    resumed = ("main_synco", data, *SYNCO[1:], "--resume", file)
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


# files


def test_the_furthest_checkpoint_that_can_be_read(tmp_path, capsys):
    assert checkpoint.newest(str(tmp_path)) is None and "no checkpoint" in capsys.readouterr().out
    kept = {
        "epoch": 1,
        "args": {},
        "state_dict": {},
        "optimizer": {},
        "progress": {"step": 1, "seed": 0},
    }
    names = [
        "checkpoint_0000_-3",
        "checkpoint_0000_7",
        "checkpoint_0000",
        "checkpoint_0001_19",
        "checkpoint_0001",
        "checkpoint_0010",
    ]
    for name in reversed(names):
        torch.save(kept, tmp_path / f"{name}.pth.tar")
    for name in reversed(names):
        path = tmp_path / f"{name}.pth.tar"
        assert checkpoint.newest(str(tmp_path)) == str(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    assert (
        f"skipped: {tmp_path / 'checkpoint_0010.pth.tar'}: not a readable checkpoint"
        in capsys.readouterr().out
    )
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest(str(tmp_path))


def test_a_signal_while_a_checkpoint_is_read_is_not_taken_for_damage(monkeypatch, tmp_path):
    file = tmp_path / "checkpoint_0000.pth.tar"
    torch.save({}, file)
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(interrupt.Interrupted, match="SIGTERM"), interrupt.outside_training():
        checkpoint.load(str(file))


def test_auto_needs_a_folder(script, data):
    refused(
        script("main_synco", data, "--resume", "auto"),
        "--resume auto: give the run folder with --save-dir",
    )


def test_the_last_few_are_kept(script, data, tmp_path):
    command = (data, *SMALL, "--moco-k", 24, "--epochs", 4, "--save-dir", tmp_path, "-j", 0)
    assert script("main_synco", *command, "--keep", 2, "--save-every-steps", 5)[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [
        "checkpoint_0002.pth.tar",
        "checkpoint_0003.pth.tar",
    ]


@pytest.mark.parametrize("tenth", range(11))
def test_a_write_that_is_cut_leaves_the_last_good_one(tenth, tmp_path):
    """At every tenth of its length, by a limit on the size of files."""
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint.save(path, {"x": torch.arange(10_000)})
    size, before = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * tenth // 10, before[1]))
    try:
        if tenth == 10:
            checkpoint.save(path, {"x": torch.arange(10_000)})
        else:
            with pytest.raises(
                InputError,
                match=r"checkpoint_0000.pth.tar: cannot be written: .*; "
                r"the last checkpoint is .*0000",
            ):
                checkpoint.save(path, {"x": torch.arange(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == kept and os.listdir(tmp_path) == [path.name]


def test_two_runs_do_not_share_a_folder(script, data, tmp_path):
    process = shell(*SYNCO, data, "--save-dir", tmp_path, "--epochs", 50, wait=False)
    until(lambda: logged(tmp_path), process)
    refused(
        script("main_synco", data, *SMALL, "--moco-k", 24, "--save-dir", tmp_path),
        "another run is writing there",
    )
    process.kill()
    process.communicate()


# output


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
def test_a_reader_of_the_output_that_leaves_stops_nothing(launcher, data, tmp_path):
    process = shell(*QUICK, *launcher, data, "--save-dir", tmp_path, wait=False)
    process.stdout.readline()
    process.stdout.close()
    quiet(process.stderr.read())
    assert process.wait(60) == 0
    assert (tmp_path / "checkpoint_0000.pth.tar").exists() and logged(tmp_path) == list(
        range(1, STEPS + 1)
    )


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_output_that_is_closed_stops_nothing(closed, data, tmp_path):
    command = [sys.executable, *map(str, (*QUICK, data, "--save-dir", tmp_path))]
    shut = " ".join(f"{number}>&-" for number in closed)
    words = ["bash", "-c", f'exec "$@" {shut}', "bash", *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    quiet(done.stderr)
    assert load(tmp_path / "checkpoint_0000.pth.tar")["epoch"] == 1
    assert logged(tmp_path) == list(range(1, STEPS + 1))


def test_a_full_disk_of_the_output_stops_nothing(data, tmp_path):
    command = [sys.executable, *map(str, (*QUICK, data, "--save-dir", tmp_path))]
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


# data and numbers


def test_the_monitor_leaves_out_a_training_image_that_cannot_be_read(script, images, tmp_path):
    """Compare its accuracy with that of k-NN on a folder without the image.

    Evaluations and `--on-bad-image error` refuse the folder with the image.
    """
    bad = images / "train" / "class0" / "3.jpg"
    bad.write_text("no image")
    run, line = (
        tmp_path / "run",
        "k-NN leaves out 1 training image that cannot be read: class0/3.jpg\n",
    )
    command = (
        "main_synco",
        images,
        *SMALL,
        "--moco-k",
        24,
        "--knn-every",
        1,
        "--knn-k",
        7,
        "--save-dir",
        run,
    )
    status, _, err = script(*command)
    assert status == 0 and err.count(line) == 1, err
    status, _, err = script(*command, "--resume", "auto", "--epochs", 4)
    assert status == 0 and err.count(line) == 1, err
    refused(script(*command[:-1], tmp_path / "x", "--on-bad-image", "error"), "unreadable image")
    knn = (
        "main_knn",
        images,
        "--pretrained",
        run / "checkpoint_0003.pth.tar",
        "-b",
        8,
        "-j",
        0,
        "--k",
        7,
    )
    refused(script(*knn, "--save-dir", tmp_path / "knn"), str(bad), "unreadable image")
    bad.unlink()
    assert script(*knn, "--save-dir", tmp_path / "knn")[0] == 0
    logged = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["knn"]
    found = json.loads((tmp_path / "knn" / "results.json").read_text())["metrics"]["knn_7"]
    assert logged == pytest.approx(found, abs=1e-9)


@pytest.mark.filterwarnings(
    "error::pytest.PytestUnraisableExceptionWarning"
)  # of loader processes that are ended
def test_an_image_that_cannot_be_read_is_replaced(script, tmp_path):
    data = write_images(tmp_path / "data", classes=2, train=52)
    bad = data / "train" / "class1" / "7.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    runs = []
    for workers in (0, 2):
        runs.append(tmp_path / str(workers))
        command = (data, *SMALL, "--moco-k", 24, "-j", workers, "--save-dir", runs[-1])
        status, _, err = script("main_synco", *command)
        assert (
            status == 0
            and err.count(str(bad)) == 1
            and "skipped, another image is used instead" in err
        ), err
    assert same(*(load(run / "checkpoint_0001.pth.tar")["state_dict"] for run in runs))
    refused(
        script("main_synco", *command, "--save-dir", tmp_path / "x", "--on-bad-image", "error"),
        str(bad),
        "unreadable image",
    )
    worse = data / "train" / "class0" / "3.jpg"
    worse.write_bytes(b"")
    status, _, err = script("main_synco", *command, "--save-dir", tmp_path / "y")
    assert (
        status == 2
        and "more than 1 % of the images cannot be read (2 in this epoch" in own_lines(err)[-1]
    )


def test_a_loss_that_is_no_number_ends_the_run(script, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "moco.cli.values.in_range", lambda kind, interval: kind
    )  # with which it diverges at once
    command = (data, *SMALL, "--moco-k", 24, "-j", 0, "--save-dir", tmp_path)
    status, _, err = script(
        "main_synco", *command, "--epochs", 3, "--lr", 1e-3, "--lr-warmup-epochs", 0, "--epochs", 1
    )
    assert status == 0, err
    good = (tmp_path / "checkpoint_0000.pth.tar").read_bytes()
    resumed = (
        "--resume",
        tmp_path / "checkpoint_0000.pth.tar",
        "--epochs",
        3,
        "--lr",
        1e38,
        "-p",
        7,
    )
    resumed += ("--save-every-steps", 2, "--allow-change", "lr")
    status, _, err = script("main_synco", *command, *resumed)
    assert status == 2 and len(own_lines(err)) == 1, err
    assert (
        "the loss, or a weight, is nan at step 1" in err
        and "(epoch 1, lr 1e+38, images class" in err
    )
    assert f"the last checkpoint from before it is {tmp_path / 'checkpoint_0000.pth.tar'}" in err
    assert (tmp_path / "checkpoint_0000.pth.tar").read_bytes() == good and len(
        list(tmp_path.glob("*.tar"))
    ) == 1


def test_a_rank_that_dies_ends_the_run(data, tmp_path):
    process = shell(*SYNCO, *TWO, data, "--save-dir", tmp_path, "--epochs", 50, wait=False)
    until(lambda: logged(tmp_path), process)
    ranks = [
        pid
        for pid in children(process)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 60 and process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in own_lines(err)[-1], err
    assert not os.path.exists(f"/proc/{ranks[0]}")


def test_a_loader_that_the_system_ends_is_reported_as_such(data, tmp_path):
    process = shell(*SYNCO, data, "--save-dir", tmp_path, "--epochs", 50, wait=False)
    until(lambda: logged(tmp_path), process)
    for pid in children(process):
        os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "a loader process of rank 0 died" in own_lines(err)[-1]
    assert "when memory runs out" in err


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_nodes_of_torchrun_write_one_set_of_checkpoints(data, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2)
    torchrun = (*torchrun, "--master-addr", "127.0.0.1", "--master-port", free_port())
    command = (*SYNCO, data, "--epochs", 1, "--save-dir", tmp_path / "run")
    nodes = [shell(*torchrun, "--node-rank", node, *command, wait=False) for node in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 per process x 4 processes" in outputs[0][0] and "total batch" not in outputs[1][0]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.tar")) == [
        "checkpoint_0000.pth.tar"
    ]
    assert logged(tmp_path / "run") == list(range(1, 7))


def test_a_node_that_is_lost_is_noticed_on_the_other(data, tmp_path):
    """Lose a node silently, as when its power or network fails.

    Two runs at the same time lose different nodes.
    """
    runs = []
    for lost in range(2):
        run, url = tmp_path / str(lost), f"tcp://127.0.0.1:{free_port()}"
        command = (
            *SYNCO,
            data,
            "--epochs",
            50,
            "--save-dir",
            run,
            "--world-size",
            2,
            "--dist-url",
            url,
        )
        nodes = [shell(*command, "--rank", node, wait=False) for node in range(2)]
        until(lambda run=run: logged(run), nodes[0])
        nodes[lost].send_signal(signal.SIGSTOP)
        runs.append((nodes, time.monotonic()))
    for lost, (nodes, began) in enumerate(runs):
        _, err = nodes[1 - lost].communicate(timeout=60)
        assert time.monotonic() - began < 60 and nodes[1 - lost].returncode == 1
        assert f"rank {lost} has given no sign of life for 30 seconds" in own_lines(err)[-1], err
        nodes[lost].kill()
        nodes[lost].communicate()


def test_a_full_disk_ends_a_run_and_leaves_its_last_checkpoint(script, data, tmp_path):
    """By a limit on the size of files, half of a checkpoint's."""
    command = (data, *SMALL, "--moco-k", 24, "-j", 0, "--save-dir", tmp_path)
    assert script("main_synco", *command, "--epochs", 1)[0] == 0
    good = tmp_path / "checkpoint_0000.pth.tar"
    kept, before = good.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, before[1]))
    try:
        result = script("main_synco", *command, "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(
        result,
        "checkpoint_0001.pth.tar: cannot be written",
        f"the last checkpoint is {good}",
        "--resume auto",
    )
    assert good.read_bytes() == kept and [path.name for path in tmp_path.glob("*checkpoint*")] == [
        good.name
    ]
    assert script("main_synco", *command, "--resume", "auto")[0] == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where nobody may write")
def test_a_folder_that_cannot_be_written_is_refused(script, data):
    refused(
        script("main_synco", data, *SMALL, "--moco-k", 24, "-j", 0, "--save-dir", "/proc/run"),
        "/proc/run",
        "choose another",
    )
