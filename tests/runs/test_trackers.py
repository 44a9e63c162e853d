"""Test --track with the real packages, without a network, if they are installed.

`make test` installs wandb, and `make test-track` installs all three.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import in_process
from fault_helpers import until_true
from run_helpers import SMALL, log

from moco.config import Pretraining, replaced
from moco.engine import tracking
from moco.engine.board import tag

pytestmark = pytest.mark.slow

Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def package(request, tmp_path, monkeypatch) -> str:
    """The name of an installed tracker, for which the user is not logged in."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed; make test-track installs it")
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TRACKIO_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # without the user's login
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return request.param


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: parts in blocks of 32 KiB, after a header of 7 bytes.

    Each part has a checksum, its length, and its type: 1 for a full record, 4 for a last part.
    """
    block, start, found = 1 << 15, 7, b""
    while start + 7 <= len(data):
        if block - start % block < 7:  # the rest of the block is padding
            start += block - start % block
            continue
        length, type_ = struct.unpack_from("<HB", data, start + 4)
        found += data[start + 7 : start + 7 + length]
        start += 7 + length
        if type_ in (1, 4):
            yield found
            found = b""


def of_wandb(run: Path) -> tuple[set[str], Points, float]:
    """Return the ids of the runs, the points of each tag, and the learning rate in the config."""
    from wandb.proto import wandb_internal_pb2

    ids, points, lr = set(), {}, 0.0
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            for update in record.config.update:
                if update.key == "lr":
                    lr = json.loads(update.value_json)
            row = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in row.items():
                if "/" in name:
                    points.setdefault(name, []).append((row["step"], value))
            for update in record.summary.update:
                key = update.key or update.nested_key[0]
                if key == "eval/final":
                    points.setdefault(key, []).append((-1, json.loads(update.value_json)))
    return ids, points, lr


def of_trackio(run: Path) -> tuple[set[str], Points, float]:
    """Return the names of the runs, the points of each tag, and the learning rate."""
    points: Points = {}
    with contextlib.closing(
        sqlite3.connect(run.parent / "trackio" / "hard-negatives.db")
    ) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id")
        names = set()
        for name, step, metrics in rows:
            names.add(name)
            for key, value in json.loads(metrics).items():
                points.setdefault(key, []).append((step, value))
        ((config,),) = set(database.execute("select config from configs"))
    return names, points, json.loads(config)["lr"]


def of_mlflow(run: Path) -> tuple[set[str], Points, float]:
    """Return the ids of the runs, the points of each tag, and the learning rate."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'hard-negatives'")
    runs = client.search_runs([experiment.experiment_id])
    points = {
        name: [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, name)]
        for one in runs
        for name in one.data.metrics
    }
    assert {one.info.status for one in runs} == {"FINISHED"}
    return {one.info.run_id for one in runs}, points, float(runs[0].data.params["lr"])


READ = {"wandb": of_wandb, "trackio": of_trackio, "mlflow": of_mlflow}


def test_a_run_and_its_resumption_are_one_tracked_run(package, shared_images, tmp_path):
    run = tmp_path / "my run"
    words = (*SMALL[:-1], 2, "--save-dir", run, "--track", package)
    for more in ((), ("--resume", "auto")):
        status, out, err = in_process("main_synco", shared_images, *words, *more)
        assert (status, err) == (0, ""), out
        words = (*SMALL[:-1], 3, *words[len(SMALL) :])
        assert "warning" not in out and f"--track {package}: " in out
        assert "initialized" not in out and "wandb:" not in out.replace("track wandb:", "")
    ids, points, lr = READ[package](run)
    assert len(ids) == 1 and lr == 0.03
    for name in ("loss", "lr", "images_per_s"):
        wanted = [(line["step"], pytest.approx(line[name])) for line in log(run) if name in line]
        assert points[tag(name)] == wanted


def started(package: str, folder: Path) -> tracking.Tracker:
    folder.mkdir()
    config = replaced(Pretraining(), track=package, save_dir=str(folder))
    tracker = tracking.Tracker(config, False)
    tracker.begin(config)
    return tracker


def test_steps_before_epoch_0_and_results_are_tracked(package, tmp_path, capfd):
    tracker = started(package, tmp_path / "run")
    points = [(-2, 0.5), (-1, 0.25), (3, 0.125)]
    for step, value in points:
        tracker.log({"loss/loss": value, "eval/knn": float("nan")}, step)
    tracker.results({"eval/final": 0.75})
    tracker.end("finished")
    assert "warning" not in capfd.readouterr().out
    _, found, _ = READ[package](tmp_path / "run")
    assert found["loss/loss"] == points
    assert [value for _, value in found["eval/final"]] == [0.75]
    assert "eval/knn" not in found


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(file.parent.name))
    return found


def test_a_killed_service_is_a_warning(package, tmp_path, capfd):
    """Kill wandb's own service, or the process of a tracker without one."""
    tracker = started(package, tmp_path / "run")
    tracker.log({"loss/loss": 1.0}, 1)
    until_true((tmp_path / "run" / f"tracked-{package}.txt").exists)
    services = children(tracker.process.pid)
    assert bool(services) == (package == "wandb")
    for pid in services or [tracker.process.pid]:
        os.kill(pid, signal.SIGKILL)

    def stopped() -> bool:
        tracker.log({"loss/loss": 1.0}, 2)
        return tracker.process is None

    until_true(stopped)
    tracker.end("finished")
    (line,) = [one for one in capfd.readouterr().out.splitlines() if one.startswith("warning")]
    assert f"--track {package} stops: " in line and "the run continues without it" in line


@pytest.mark.parametrize(
    ("package", "name", "value"),
    [
        ("wandb", "WANDB_MODE", "nonsense"),
        ("trackio", "TRACKIO_SERVER_URL", "nonsense"),
        ("mlflow", "MLFLOW_TRACKING_URI", "nonsense://there"),
    ],
    indirect=["package"],
)
def test_a_wrong_setting_of_the_tracker_is_a_warning(
    package, name, value, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv(name, value)
    tracker = started(package, tmp_path / "run")
    tracker.end("finished")
    out = capfd.readouterr().out
    assert out.startswith(f"warning: --track {package} stops: ") and out.count("\n") == 1
