"""Test what tools/status.py says about run folders, written by hand as scripts leave them."""

import json
import os
import socket
import time

import pytest
from conftest import own_lines
from filelock import FileLock

from moco.engine import record, run_folder
from moco.report import status, status_table

NOW = 1_800_000_000.0
FACTS = {
    "script": "synco",
    "method": "synco",
    "data": "/data/imagenet",
    "dataset": "imagenet",
    "epochs": 20,
    "host": socket.gethostname(),
    "steps": 200,
    "steps_per_epoch": 10,
}


def write(folder, lines=(), state=None, age=60.0, **facts):
    """Write a run folder whose last sign of life is `age` seconds old."""
    folder.mkdir(parents=True, exist_ok=True)
    if state:
        content = {"state": state, "reason": None, **FACTS, **facts}
        (folder / record.STATUS).write_text(json.dumps(content, indent=2))
    text = "".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines)
    if lines:
        (folder / "log.jsonl").write_text(text)
    for path in folder.iterdir():
        os.utime(path, (NOW - age, NOW - age))
    return folder


def line(step, per_epoch=10, **metrics):
    return {"epoch": (step - 1) // per_epoch, "step": step, "time": 2.0 * step, **metrics}


def read(folder):
    return status.read(folder, NOW)


@pytest.fixture
def locked():
    """Return a function that locks a run folder until the test ends, as a run does."""
    locks = []

    def lock(folder):
        locks.append(FileLock(folder / run_folder.LOCK))
        locks[-1].acquire()

    yield lock
    for one in locks:
        one.release()


def test_a_running_run(tmp_path, locked):
    lines = [line(step, loss=5 - step / 100) for step in range(5, 105, 5)]
    folder = write(tmp_path / "a", lines, "running", age=7)
    locked(folder)
    found = read(folder)
    assert (found.method, found.data, found.state, found.reason) == (
        "synco",
        "imagenet",
        "running",
        None,
    )
    assert (found.epochs_done, found.epochs, found.loss) == (10.0, 20, 4.0)
    assert found.seconds_left == 2 * 100 - 7 and found.seen == NOW - 7


@pytest.mark.parametrize(
    ("state", "age", "host", "held", "expected", "words"),
    [
        ("finished", 60, None, False, "finished", None),
        ("stopped", 60, None, False, "stopped", "the reason"),
        ("diverged", 60, None, False, "diverged", "the reason"),
        ("finished", 60, None, True, "running", None),  # continued with more epochs
        ("running", 60, None, False, "killed", "ended without recording why"),
        ("running", 599, None, True, "running", None),
        ("running", 3600, None, True, "silent", "no log line for 1:00:00"),
        # a file system may not show the locks of other machines
        ("running", 60, "node7", False, "running", "on node7"),
        ("running", 3600, "node7", False, "killed", "no sign of life from node7"),
    ],
)
def test_states(state, age, host, held, expected, words, tmp_path, locked):
    facts = {"reason": "the reason"} if words == "the reason" else {}
    facts |= {"host": host} if host else {}
    folder = write(tmp_path / "a", [line(10)], state, age, **facts)
    if held:
        locked(folder)
    found = read(folder)
    assert found.state == expected
    assert found.reason is None if words is None else words in found.reason


def test_a_run_that_logs_rarely_is_not_silent(tmp_path, locked):
    lines = [{**line(step), "time": 400.0 * step} for step in (1, 2, 3)]
    folder = write(tmp_path / "a", lines, "running", age=1100)  # less than three times 400 s
    locked(folder)
    assert read(folder).state == "running"


def test_runs_of_older_versions_have_no_record(tmp_path, locked):
    args = "script: synco\nmethod: moco\nepochs: 2\ndata: /d/cifar\ndataset: imagenet\n"
    folder = write(tmp_path / "a", [line(10, loss=3), line(20, loss=2)])
    (folder / "args.yaml").write_text(args)
    found = read(folder)
    assert (found.state, found.method, found.data) == ("finished", "moco", "cifar")
    assert (found.epochs_done, found.epochs) == (2, 2)
    folder = write(tmp_path / "b", [line(10), line(13), line(15)])
    (folder / "args.yaml").write_text(args.replace("epochs: 2", "epochs: 9"))
    assert (read(folder).state, read(folder).reason) == ("unfinished", "has no record of its end")
    (folder / "checkpoint_0008.pth.tar").touch()
    assert read(folder).state == "finished"
    locked(folder)
    assert read(folder).state == "running"
    assert read(folder).epochs_done == 1.5


@pytest.mark.parametrize("gain", [None, 0.2, -0.1, "no number"])
def test_the_gain_over_the_encoder_before_training(gain, tmp_path):
    metrics = {"knn": 0.5} | ({} if gain is None else {"knn_gain": gain})
    lines = [{"epoch": 0, "step": 0, "knn": 0.3}, line(10, **metrics)]
    lines += [line(10 + i, note="x" * 1000) for i in range(100)]  # more than is parsed
    found = read(write(tmp_path / "a", lines, "finished"))
    assert (found.metric, found.accuracy) == ("k-NN", 0.5)
    assert found.gain == (gain if isinstance(gain, float) else None)


def test_damaged_logs(tmp_path):
    good = line(10, loss=1.5)
    for i, tail in enumerate(
        [
            ['{"epoch": 1, "step": 12, "lo'],
            ["\n\n", "\x00\x00\x00"],
            ["[1]\n", '"step"\n', '{"step": 4}\n', '{"epoch": null, "step": 1}\n'],
            [f'{{"epoch": 1, "step": {"9" * 400}}}\n', "[" * 5_000],
        ]
    ):
        found = read(write(tmp_path / f"{i}", [good, *tail], "finished"))
        assert (found.loss, found.epochs_done) == (1.5, 1.0)
    found = read(write(tmp_path / "nan", [{**good, "loss": None, "knn": None}], "diverged"))
    assert found.loss != found.loss and found.accuracy is None
    assert read(write(tmp_path / "empty", [""], "finished")).loss is None


def test_damaged_records_and_options(tmp_path):
    for i, text in enumerate(
        ["", "{", "[]", '{"state": 3}', '{"state": "finished", "epochs": []}']
    ):
        folder = write(tmp_path / f"{i}", [line(10)])
        (folder / record.STATUS).write_text(text)
        (folder / "args.yaml").write_text("epochs: many\nmethod: [a]\ndata: 3\ndataset: [x]\n")
        found = read(folder)
        assert found.epochs is None and found.method is None and found.data is None
        assert found.state == ("finished" if i == 4 else "unfinished")
        assert str(folder) in status_table.table([found], NOW)


def test_an_evaluation_shows_its_result(tmp_path):
    folder = write(tmp_path / "a" / "lincls")
    content = {"method": "synco", "arch": "resnet50", "checkpoint": "c.pth", "dataset": "/d/pets"}
    content |= {"protocol": "linear", "metrics": {"acc1": 0.612, "acc5": 0.9}}
    (folder / "results.json").write_text(json.dumps(content))
    found = read(folder)
    assert (found.method, found.data, found.state) == ("synco linear", "pets", "finished")
    assert (found.metric, found.accuracy, found.epochs) == ("top-1", 0.612, None)


def test_only_run_folders_are_found(tmp_path):
    write(tmp_path / "b" / "deep" / "run", [line(10)], "finished")
    write(tmp_path / "a", [line(10)], "finished")
    write(tmp_path / "a" / "knn", (), "finished")
    for name, text in (
        ("results.json", '{"knn": 0.5}'),
        ("results.json", "{"),
        ("log.jsonl", '{"event": 1}\n'),
        ("status.json", '{"ok": true}'),
        ("args.yaml", "epochs: 3\n"),
    ):
        folder = tmp_path / "foreign" / name / str(len(text))
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
    write(tmp_path / ".hidden", [line(10)], "finished")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    runs = [tmp_path / "a", tmp_path / "a" / "knn", tmp_path / "b" / "deep" / "run"]
    assert list(status.find([tmp_path, tmp_path / "a"])) == runs


def test_hundreds_of_runs_with_long_logs_are_read_quickly(tmp_path):
    long = "".join(f"{json.dumps(line(i, loss=1.0))}\n" for i in range(1, 40_000))
    first = write(tmp_path / "0", [long], "finished")
    for i in range(1, 300):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in ("log.jsonl", record.STATUS):
            os.link(first / name, folder / name)
    began = time.process_time()
    found = [status.read(folder, NOW) for folder in status.find([tmp_path])]
    assert len(found) == 300 and {one.loss for one in found} == {1.0}
    assert time.process_time() - began < 15  # whole logs would take a minute


def test_the_table(tmp_path):
    lines = [line(5, loss=3.25), line(25, loss=3.125, knn=0.5, knn_gain=-0.125)]
    write(tmp_path / "a", lines, "stopped", reason="SIGTERM: saved\nx\x1b[31m " + "y" * 300)
    found = [read(folder) for folder in status.find([tmp_path])]
    text = status_table.table(found, NOW, width=200)
    head, row, count = text.splitlines()
    assert head.split() == "run method data epoch loss accuracy left seen state".split()
    cells = f"{tmp_path}/a  synco   imagenet  2.5/20  3.125  k-NN 50.0 (-12.5)        0:01:00 ago"
    assert row.startswith(f"{cells}  stopped  SIGTERM: saved x [31m yyy")
    assert len(row) <= 200 and row.endswith("yyy ...") and count == "1 run: 1 stopped"


def test_the_tool(call, tmp_path, monkeypatch):
    write(tmp_path / "a", [line(10, loss=None)], "finished")
    code, out, _ = call("tools.status", tmp_path)
    assert code == 0 and out.endswith("1 run: 1 finished\n")
    code, out, _ = call("tools.status", tmp_path, "--json")
    (found,) = json.loads(out)
    assert (found["state"], found["loss"], found["epochs"]) == ("finished", None, 20)
    waited = []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    code, out, _ = call("tools.status", tmp_path, "--watch", 5)
    assert code == 0 and out.count("1 run: ") == 2 and waited == [5, 5]
    (tmp_path / "new").mkdir()
    waited.clear()
    code, out, _ = call("tools.status", tmp_path / "new", "--watch", 5)
    assert code == 0 and out.count("0 runs") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent"], "absent: no such folder"),
        (["."], "no run in or below"),
        ([".", "--watch", "0"], "--watch 0: must be"),
        ([".", "--watch", "nan"], "--watch nan: must be"),
        ([], "RUNS"),
    ],
)
def test_mistakes_are_one_line(words, said, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("tools.status", *words)
    assert code == 2 and said in err and len(own_lines(err)) == 1
