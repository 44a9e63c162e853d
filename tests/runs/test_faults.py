"""Test runs that are interrupted, killed or hindered.

The tests check what is lost, the messages, and the resumed runs.
"""

import json
import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import own_lines, shell, write_images
from fault_helpers import SMALL, SYNCO, TWO, logged, until
from run_helpers import load, refused, same, typed

from moco.engine import checkpoint
from moco.errors import InputError
from moco.launch import interrupt

pytestmark = pytest.mark.slow


def children(process):
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


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


def test_auto_needs_a_folder(script, shared_images):
    refused(
        script("main_synco", shared_images, "--resume", "auto"),
        "--resume auto: give the run folder with --save-dir",
    )


def test_the_last_few_are_kept(script, shared_images, tmp_path):
    command = (
        shared_images,
        *SMALL,
        "--moco-k",
        24,
        "--epochs",
        4,
        "--save-dir",
        tmp_path,
        "-j",
        0,
    )
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


def test_two_runs_do_not_share_a_folder(script, shared_images, tmp_path):
    process = shell(*SYNCO, shared_images, "--save-dir", tmp_path, "--epochs", 50, wait=False)
    until(lambda: logged(tmp_path), process)
    refused(
        script("main_synco", shared_images, *SMALL, "--moco-k", 24, "--save-dir", tmp_path),
        "another run is writing there",
    )
    process.kill()
    process.communicate()


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
        *typed("--moco-k 24 --knn-every 1 --knn-k 7 --save-dir {}", run),
    )
    status, _, err = script(*command)
    assert status == 0 and err.count(line) == 1, err
    status, _, err = script(*command, "--resume", "auto", "--epochs", 4)
    assert status == 0 and err.count(line) == 1, err
    refused(script(*command[:-1], tmp_path / "x", "--on-bad-image", "error"), "unreadable image")
    knn = (
        "main_knn",
        images,
        *typed("--pretrained {} -b 8 -j 0 --k 7", run / "checkpoint_0003.pth.tar"),
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


def test_a_loss_that_is_no_number_ends_the_run(script, shared_images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "moco.cli.values.in_range", lambda kind, interval: kind
    )  # with which it diverges at once
    command = (shared_images, *SMALL, "--moco-k", 24, "-j", 0, "--save-dir", tmp_path)
    status, _, err = script(
        "main_synco", *command, "--epochs", 3, "--lr", 1e-3, "--lr-warmup-epochs", 0, "--epochs", 1
    )
    assert status == 0, err
    good = (tmp_path / "checkpoint_0000.pth.tar").read_bytes()
    resumed = (
        *typed("--resume {} --epochs 3 --lr 1e+38 -p 7", tmp_path / "checkpoint_0000.pth.tar"),
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


def test_a_rank_that_dies_ends_the_run(shared_images, tmp_path):
    process = shell(*SYNCO, *TWO, shared_images, "--save-dir", tmp_path, "--epochs", 50, wait=False)
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


def test_a_loader_that_the_system_ends_is_reported_as_such(shared_images, tmp_path):
    process = shell(*SYNCO, shared_images, "--save-dir", tmp_path, "--epochs", 50, wait=False)
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


def test_two_nodes_of_torchrun_write_one_set_of_checkpoints(shared_images, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2)
    torchrun = (*torchrun, "--master-addr", "127.0.0.1", "--master-port", free_port())
    command = (*SYNCO, shared_images, "--epochs", 1, "--save-dir", tmp_path / "run")
    nodes = [shell(*torchrun, "--node-rank", node, *command, wait=False) for node in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 per process x 4 processes" in outputs[0][0] and "total batch" not in outputs[1][0]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.tar")) == [
        "checkpoint_0000.pth.tar"
    ]
    assert logged(tmp_path / "run") == list(range(1, 7))


def test_a_node_that_is_lost_is_noticed_on_the_other(shared_images, tmp_path):
    """Lose a node silently, as when its power or network fails.

    Two runs at the same time lose different nodes.
    """
    runs = []
    for lost in range(2):
        run, url = tmp_path / str(lost), f"tcp://127.0.0.1:{free_port()}"
        command = (
            *SYNCO,
            shared_images,
            *typed("--epochs 50 --save-dir {} --world-size 2 --dist-url {}", run, url),
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


def test_a_full_disk_ends_a_run_and_leaves_its_last_checkpoint(script, shared_images, tmp_path):
    """By a limit on the size of files, half of a checkpoint's."""
    command = (shared_images, *SMALL, "--moco-k", 24, "-j", 0, "--save-dir", tmp_path)
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
def test_a_folder_that_cannot_be_written_is_refused(script, shared_images):
    refused(
        script(
            "main_synco", shared_images, *SMALL, "--moco-k", 24, "-j", 0, "--save-dir", "/proc/run"
        ),
        "/proc/run",
        "choose another",
    )
