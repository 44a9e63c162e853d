"""Test runs with TensorBoard's groups and with --track, with a stand-in for the tracker."""

import json
import re

import pytest
from conftest import shell
from fault_helpers import TWO
from run_helpers import SMALL, digests, evaluation, facts, load, log, refused, same, succeeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco.engine.board import tag

TRACK = ("--track", "trackio")


def scalars(run) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each tag of a run's TensorBoard events."""
    found = EventAccumulator(str(run)).Reload()
    return {
        name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]
    }


def test_tensorboard_has_the_log_s_metrics_in_groups(pretraining):
    found, lines = scalars(pretraining), log(pretraining)
    names = {name for line in lines for name in line} - {"step"}
    assert found.keys() == {tag(name) for name in names}
    assert {name.split("/")[0] for name in found} == {"loss", "optim", "features", "time"}
    for name in names:
        wanted = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert found[tag(name)] == wanted


def test_a_finished_run_has_hyperparameters_and_views(pretraining):
    tags = EventAccumulator(str(pretraining)).Reload().Tags()
    assert tags["images"] == ["views/first_batch"]
    assert "config/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in EventAccumulator(
        str(pretraining)
    ).Reload().PluginTagToContent("hparams")


def test_a_tracked_run_is_the_same_run(script, shared_images, pretraining, fake_tracker, tmp_path):
    """The tracker gets each line of the log, and changes no bit of the weights."""
    words = (*SMALL, "--knn-every", 1, "--save-dir", tmp_path / "run")
    status, out, err = script("main_synco", shared_images, *words, *TRACK)
    assert status == 0, err
    name = "checkpoint_0000.pth.tar"
    states = [load(folder / name)["state_dict"] for folder in (pretraining, tmp_path / "run")]
    assert same(*states)
    *logged, final = fake_tracker.calls("log")
    lines = log(tmp_path / "run")
    assert logged == [
        ["log", {tag(n): value for n, value in line.items() if n != "step"}, line["step"]]
        for line in lines
    ]
    assert final[1].keys() == {"eval/best_knn", "time/seconds"}
    assert final[1]["eval/best_knn"] == lines[-1]["knn"]
    assert len(re.findall("--track trackio: trackio show", out)) == 1 and "noise" not in out + err


def test_a_resumed_run_continues_its_tracked_run(script, shared_images, run, fake_tracker):
    words = ("--save-dir", run, "--resume", "auto", *TRACK)
    for epochs in (2, 3):
        status, _, err = script("main_synco", shared_images, *SMALL[:-1], epochs, *words)
        assert status == 0, err
    first, second = fake_tracker.calls("init")
    assert (first[3], second[3]) == ("never", "allow") and second[2] == first[2]


@pytest.mark.parametrize("name", ["main_knn", "main_lincls", "main_semisup"])
def test_an_evaluation_is_tracked(name, script, shared_images, run, fake_tracker):
    words = evaluation(name, shared_images, run / "checkpoint_0000.pth.tar")
    status, _, err = script(*words, "--save-dir", run, *TRACK)
    assert status == 0, err
    folder = name.removeprefix("main_")
    (init,) = fake_tracker.calls("init")
    assert init[2].startswith(f"run/{folder}-")
    metrics = json.loads((run / folder / "results.json").read_text())["metrics"]
    assert fake_tracker.calls("log")[-1][1] == {f"eval/{n}": v for n, v in metrics.items()}
    # the log's lines come before, if the evaluation trains
    trains = name != "main_knn"
    assert len(fake_tracker.calls("log")) == 1 + trains * len(log(run / folder) if trains else ())


@pytest.mark.parametrize("fault", ["init raise", "log raise", "log exit"])
def test_a_failed_tracker_does_not_change_the_run(
    fault, script, shared_images, pretraining, fake_tracker, tmp_path
):
    fake_tracker.fails(fault)
    status, out, err = script("main_synco", shared_images, *SMALL, *TRACK, "--save-dir", tmp_path)
    assert (status, err) == (0, "")
    assert out.count("warning: --track trackio stops: ") == 1
    assert facts(tmp_path) == facts(pretraining)
    assert out.splitlines()[-1].startswith("  ")  # the commands that follow


@pytest.mark.parametrize("program", ["main_synco", "main_knn"])
@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_before_anything_starts(
    program, package, script, shared_images, tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = (shared_images, "--track", package, "--save-dir", tmp_path / "run")
    refused(script(program, *words), f"--track {package}", f"pip install {package}")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(script, shared_images):
    refused(script("main_synco", shared_images, "--track", "comet"), "--track", "wandb", "mlflow")


def test_an_error_before_the_first_step_leaves_nothing(script, fake_tracker, tmp_path):
    done = script("main_synco", tmp_path / "none", *SMALL, *TRACK, "--save-dir", tmp_path / "run")
    refused(done, "none")
    assert fake_tracker.calls() == [] and digests(tmp_path) == {}


@pytest.mark.slow
def test_only_rank_0_tracks(shared_images, fake_tracker, tmp_path):
    words = ("main_synco.py", shared_images, *SMALL, "-b", 16, *TWO, *TRACK)
    out = succeeded(
        shell(*words, "--save-dir", tmp_path, env={"PYTHONPATH": fake_tracker.python_path})
    )
    assert out.count("--track trackio: ") == 1
    assert len(fake_tracker.calls("init")) == len(fake_tracker.calls("finish")) == 1
