"""Test that a tracker gets the run, and that no failure of it ends or delays the run."""

import contextlib
import math
import os
import signal
import time

import pytest
from fault_helpers import until_true

from moco.config import Pretraining, replaced
from moco.engine import tracking
from moco.engine.tracking import Tracker
from moco.errors import InputError
from moco.launch.interrupt import Interrupted


@pytest.fixture
def config(tmp_path) -> Pretraining:
    folder = tmp_path / "my run"
    folder.mkdir()
    return replaced(Pretraining(), track="trackio", save_dir=str(folder), method="moco")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", dict.fromkeys(tracking.PATIENCE, 1.0))


def started(config: Pretraining, continues: bool = False) -> Tracker:
    tracker = Tracker(config, continues)
    tracker.begin(config)
    return tracker


def gone(pid: int) -> bool:
    """Return whether a process has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/stat").read().split()[2] == "Z"
    return True


def warnings(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("warning: ")]


def test_the_tracker_gets_everything_in_order(config, fake_tracker, capfd):
    tracker = started(config)
    for step in (-2, 1):
        tracker.log({"loss/loss": 0.5, "eval/knn": math.nan, "optim/lr": math.inf}, step)
    tracker.results({"eval/acc1": 0.25, "eval/best_lr": math.nan})
    tracker.end("finished")
    init, *logged, end = fake_tracker.calls()[1:]
    name = init[2]
    assert name.startswith("my run-") and len(name) == len("my run-") + 6
    assert init == ["init", "hard-negatives", name, "never", "moco", tracking.sys.argv[0]]
    assert logged == [
        ["log", {"loss/loss": 0.5}, -2],
        ["log", {"loss/loss": 0.5}, 1],
        ["log", {"eval/acc1": 0.25}, 1],  # the results, at the last step
    ]
    assert end == ["finish"]
    out, err = capfd.readouterr()
    assert out == f"--track trackio: trackio show --project hard-negatives shows the run {name}\n"
    assert err == ""


def test_its_output_goes_to_a_file(config, fake_tracker, tmp_path):
    started(config).end("finished")
    said = (tmp_path / "my run" / "tracking.log").read_text()
    assert "noise of init\nmore noise\n" in said and said.endswith("noise of finish\nmore noise\n")


def test_a_continued_run_continues_its_tracked_run_and_a_new_one_does_not(config, fake_tracker):
    for continues in (False, True, False):
        started(config, continues).end("finished")
    first, second, third = fake_tracker.calls("init")
    assert (second[2], second[3]) == (first[2], "allow")
    assert third[2] != first[2] and third[3] == "never"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00", None])
def test_a_damaged_id_starts_a_new_tracked_run(content, config, fake_tracker, tmp_path, capfd):
    file = tmp_path / "my run" / "tracked-trackio.txt"
    file.mkdir() if content is None else file.write_bytes(content)
    started(config, continues=True).end("finished")
    (init,) = fake_tracker.calls("init")
    assert init[3] == "never"
    assert len(warnings(capfd.readouterr().out)) == (content is None)  # it cannot be replaced


def test_the_environment_names_the_project(config, fake_tracker, monkeypatch):
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    started(config).end("finished")
    assert fake_tracker.calls("init")[0][1] == "mine"


def test_an_evaluation_in_a_run_folder_is_named_after_both(tmp_path):
    (tmp_path / "run" / "lincls").mkdir(parents=True)
    assert tracking._name(tmp_path / "run" / "lincls") == "lincls"
    (tmp_path / "run" / "args.yaml").touch()
    assert tracking._name(tmp_path / "run" / "lincls") == "run/lincls"


@pytest.mark.parametrize("place", ["import", "init", "log", "finish"])
@pytest.mark.parametrize(
    ("action", "why"), [("raise", "RuntimeError: no room"), ("exit", "its process has ended")]
)
def test_a_tracker_that_fails_is_a_warning(place, action, why, config, fake_tracker, capfd):
    fake_tracker.fails(f"{place} {action}")
    tracker = started(config)
    tracker.log({"loss/loss": 1.0}, 1)
    tracker.end("finished")
    tracker.log({"loss/loss": 1.0}, 2)  # after its end, or without a tracker
    (line,) = warnings(capfd.readouterr().out)
    log = f"{config.run.save_dir}/tracking.log"
    assert line == (
        f"warning: --track trackio stops: {why} ({log} may say more); the run continues without it"
    )
    assert gone(fake_tracker.calls("import")[0][1])


@pytest.mark.parametrize("place", ["import", "init", "log", "finish"])
def test_a_tracker_that_hangs_delays_only_the_end(place, config, fake_tracker, impatient, capfd):
    fake_tracker.fails(f"{place} hang")
    tracker = started(config)
    until_true(lambda: fake_tracker.calls("import"))
    began = time.monotonic()
    for step in range(100):
        tracker.log({"loss/loss": 1.0}, step)
    assert time.monotonic() - began < 1
    tracker.end("finished")
    assert time.monotonic() - began < 4
    (line,) = warnings(capfd.readouterr().out)
    assert "stops: has not finished within 1 seconds" in line
    assert gone(fake_tracker.calls("import")[0][1])


def test_a_tracker_that_hangs_at_its_exit_is_killed(config, fake_tracker, monkeypatch, capfd):
    fake_tracker.fails("atexit hang")
    monkeypatch.setattr(tracking, "LAST", 0.5)
    tracker = started(config)
    began = time.monotonic()
    tracker.end("finished")
    assert time.monotonic() - began < 5
    assert warnings(capfd.readouterr().out) == []  # everything was tracked
    assert gone(fake_tracker.calls("import")[0][1])


def test_messages_do_not_fill_the_memory(config, fake_tracker, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "MOST", 300_000)
    fake_tracker.fails("init hang")
    tracker = started(config)
    until_true(lambda: fake_tracker.calls("init"))
    for step in range(10_000):
        tracker.log({"loss/loss": 1.0, "features/feature_std": 0.5}, step)
        assert len(tracker._unsent) < 301_000
    assert tracker.process is None
    tracker.end("finished")
    (line,) = warnings(capfd.readouterr().out)
    assert "stops: does not answer" in line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_tracker_is_a_warning(number, config, fake_tracker, capfd):
    tracker = started(config)
    tracker.log({"loss/loss": 1.0}, 1)
    until_true(lambda: fake_tracker.calls("log"))
    os.kill(fake_tracker.calls("import")[0][1], number)
    os.waitid(os.P_PID, tracker.process.pid, os.WEXITED | os.WNOWAIT)
    for step in range(2, 5):
        tracker.log({"loss/loss": 1.0}, step)
    tracker.end("finished")
    (line,) = warnings(capfd.readouterr().out)
    assert "stops: its process has ended" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_job_does_not_end_the_tracker(number, config, fake_tracker, capfd):
    tracker = started(config)
    until_true(lambda: fake_tracker.calls("init"))
    os.kill(tracker.process.pid, number)
    tracker.results({"eval/acc1": 1.0})
    tracker.end("stopped")
    assert fake_tracker.calls("log", "finish") == [["log", {"eval/acc1": 1.0}, 0], ["finish"]]
    assert warnings(capfd.readouterr().out) == []


def test_the_tracker_s_own_processes_end_with_it(config, fake_tracker, impatient):
    fake_tracker.fails("log start")
    tracker = started(config)
    tracker.log({"loss/loss": 1.0}, 1)
    until_true(lambda: fake_tracker.calls("service"))
    service = fake_tracker.calls("service")[0][1]
    assert not gone(service)
    tracker.end("failed")
    until_true(lambda: gone(service))


def test_the_tracker_ends_if_the_training_is_killed(config, fake_tracker):
    tracker = started(config)
    tracker.log({"loss/loss": 1.0}, 1)
    until_true(lambda: fake_tracker.calls("log"))
    tracker.process.stdin.close()  # as the system does for a killed process
    tracker.process.stdout.close()
    assert tracker.process.wait(20) == 0
    assert fake_tracker.calls("finish") == [["finish"]]


def test_a_tracker_that_cannot_be_started_is_a_warning(config, fake_tracker, monkeypatch, capfd):
    monkeypatch.setattr(tracking.sys, "executable", "/no/such/python")
    tracker = started(config)
    tracker.log({"loss/loss": 1.0}, 1)
    tracker.end("finished")
    (line,) = warnings(capfd.readouterr().out)
    assert "stops: cannot be started: No such file or directory" in line


@pytest.mark.parametrize(
    ("raised", "how"), [(None, "finished"), (Interrupted, "stopped"), (InputError, "failed")]
)
def test_the_tracker_learns_how_the_run_ended(raised, how, config, monkeypatch):
    ends = []
    monkeypatch.setattr(Tracker, "end", lambda self, how: ends.append(how))
    with (
        pytest.raises(raised) if raised else contextlib.nullcontext(),
        tracking.tracked(config, False),
    ):
        if raised:
            raise raised("why")
    assert ends == [how] and tracking._current is None


def test_a_run_that_logs_nothing_starts_no_tracker(config, fake_tracker, tmp_path):
    with tracking.tracked(config, False):
        pass
    assert fake_tracker.calls() == [] and list((tmp_path / "my run").iterdir()) == []


def test_without_the_option_nothing_is_tracked(config, fake_tracker, tmp_path):
    config = replaced(config, track=None)
    with tracking.tracked(config, False):
        tracking.begin(config)
        tracking.log({"loss/loss": 1.0}, 1)
        tracking.results({"eval/acc1": 1.0})
    assert fake_tracker.calls() == [] and list((tmp_path / "my run").iterdir()) == []


def test_a_missing_package_is_refused(config, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"trackio is not installed; .* pip install trackio"):
        tracking.check(config)
    (tmp_path / "trackio").mkdir()  # a folder of that name is no package
    with pytest.raises(InputError, match="trackio is not installed"):
        tracking.check(config)
    (tmp_path / "trackio.py").touch()
    tracking.importlib.invalidate_caches()
    tracking.check(config)
