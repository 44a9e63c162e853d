"""Test that real runs record how they end, and what tools/status.py says then."""

import json
import os
import signal
import subprocess

import pytest
from conftest import shell
from fault_helpers import SYNCO, TWO, logged, until
from run_helpers import PRETRAIN, evaluation, refused

from moco.report import status


def start(images, run, *words):
    return shell(*SYNCO, *words, "--save-dir", run, images, wait=False)


def test_runs_that_finish_fail_and_diverge(script, shared_images, tmp_path):
    command = ("main_synco", shared_images, *PRETRAIN, "--save-dir")
    assert script(*command, tmp_path / "a", "--epochs", 1, "--knn-every", 1)[0] == 0
    found = status.read(tmp_path / "a")
    assert (found.state, found.epochs_done, found.epochs) == ("finished", 1.0, 1)
    assert (found.method, found.data, found.metric) == ("moco", shared_images.name, "k-NN")
    # a failed start of a finished run leaves its record
    result = script(*command, tmp_path / "a", "--epochs", 1, "--lr", 9, "--resume", "auto")
    refused(result, "--lr is 9")
    assert status.read(tmp_path / "a").state == "finished"
    refused(script(*command, tmp_path / "b", "--lr", 1e6, "--epochs", 4, "-p", 1), "is nan")
    found = status.read(tmp_path / "b")
    assert found.state == "diverged" and found.reason.startswith("the loss, or a weight, is nan")
    checkpoint = tmp_path / "a" / "checkpoint_0000.pth.tar"
    for name in ("main_knn", "main_lincls"):
        command = evaluation(name, shared_images, checkpoint)
        assert script(*command, "--save-dir", tmp_path / "a")[0] == 0
    runs = {one.folder: one for one in map(status.read, status.find([tmp_path]))}
    names = [str(tmp_path / name) for name in ("a", "a/knn", "a/lincls", "b")]
    assert list(runs) == names
    assert [runs[name].method for name in names[1:3]] == ["moco knn", "moco linear"]
    assert [runs[name].metric for name in names[1:3]] == ["k-NN (k 1)", "top-1"]
    assert {runs[name].state for name in names[:3]} == {"finished"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_or_killed(number, shared_images, tmp_path):
    run = tmp_path / "run"
    process = start(shared_images, run, "--epochs", 90)
    until(lambda: len(logged(run)) > 3, process)
    found = status.read(run)
    assert found.state == "running" and found.seconds_left > 0 and 0 < found.epochs_done < 90
    process.send_signal(number)
    process.communicate(timeout=120)
    found = status.read(run)
    if number == signal.SIGTERM:
        assert found.state == "stopped" and found.reason.startswith("SIGTERM: saved")
    else:
        assert found.state == "killed" and found.seconds_left is None
    # a second start continues; the record is of this start
    process = start(shared_images, run, "--epochs", 90, "--resume", "auto")
    until(lambda: status.read(run).state == "running", process)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_the_record_names_the_rank_that_was_lost(shared_images, tmp_path):
    run = tmp_path / "run"
    process = start(shared_images, run, "--epochs", 90, *TWO)
    until(lambda: len(logged(run)) > 1, process)
    first = json.loads((run / "status.json").read_text())["pid"]
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True
    )
    (other,) = {int(pid) for pid in ranks.stdout.split()} - {first}
    os.kill(other, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    found = status.read(run)
    assert found.state == "crashed" and "rank 1 was killed by SIGKILL" in found.reason, found
    assert found.reason.removeprefix("LostRankError: ") in err
