"""Test the record of a run: what the run is, and how it ended."""

import json
import os
import sys

import pytest
import torch

from moco.config import Pretraining, replaced
from moco.engine import record, run_folder
from moco.errors import DivergedError, InputError
from moco.launch.interrupt import Interrupted
from moco.launch.launch import LostRankError


def config(folder, **more):
    return replaced(Pretraining(), save_dir=str(folder), script="synco", **more)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", None),
        (Interrupted("SIGTERM: saved x"), "stopped", "SIGTERM: saved x"),
        (KeyboardInterrupt(), "stopped", "SIGINT: interrupted, nothing saved"),
        (InputError("no such file"), "failed", "no such file"),
        (DivergedError("the loss is nan"), "diverged", "the loss is nan"),
        (LostRankError("rank 1 was killed"), "crashed", "LostRankError: rank 1 was killed"),
        (ValueError("two\n lines"), "crashed", "ValueError: two lines"),
    ],
)
def test_each_end_is_recorded(error, state, reason, tmp_path):
    folder = tmp_path / "run"

    def start():
        with run_folder.claim(config(folder), False, True, "s"):
            found = record.read(folder)
            assert (found["state"], found["pid"], found["start"]) == ("running", os.getpid(), "s")
            record.add(folder, steps=7)
            (folder / "log.jsonl").write_text("{}\n")
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            start()
    else:
        start()
    found = record.read(folder)
    assert (found["state"], found["reason"], found["steps"]) == (state, reason, 7)
    assert found["ended"] >= found["began"]
    assert (found["script"], found["epochs"]) == ("synco", Pretraining().optimizer.epochs)


def test_a_failed_start_of_a_finished_run_changes_nothing(tmp_path):
    with run_folder.claim(config(tmp_path), False, True):
        record.add(tmp_path, steps=7)
        (tmp_path / "log.jsonl").write_text("{}\n")
    before = record.read(tmp_path)
    with pytest.raises(InputError), run_folder.claim(config(tmp_path), True, True):
        raise InputError("--lr differs")
    assert record.read(tmp_path) == before
    with pytest.raises(InputError), run_folder.claim(config(tmp_path), True, True):
        record.add(tmp_path, steps=14)  # it has begun to train
        raise InputError("the disk is full")
    assert record.read(tmp_path)["state"] == "failed"


def test_the_record_gets_the_words_of_the_process_that_started_the_others(tmp_path):
    folder, words = tmp_path / "run", "rank 1 was killed by SIGKILL"

    def rank_0(start):
        with run_folder.claim(config(folder), False, True, start):
            (folder / "log.jsonl").write_text("{}\n")
            raise RuntimeError("Connection closed by peer")

    with (
        pytest.raises(LostRankError),
        run_folder.recorded(config(folder), False, True) as start,
    ):
        with pytest.raises(RuntimeError):
            rank_0(start)
        assert record.read(folder)["reason"] == "RuntimeError: Connection closed by peer"
        raise LostRankError(words)
    assert record.read(folder)["reason"] == f"LostRankError: {words}"
    # another start, whose error is not of the run in this folder; and an error printed elsewhere
    for error in (InputError("holds another run"), InputError()):
        with pytest.raises(InputError), run_folder.recorded(config(folder), False, True):
            raise error
    assert record.read(folder)["reason"] == f"LostRankError: {words}"


def test_a_damaged_record_is_none_and_is_replaced(tmp_path):
    for text in ("", "{", "[1]", '{"state": null}'):
        (tmp_path / record.STATUS).write_text(text)
        assert record.read(tmp_path) == {}
        record.add(tmp_path, steps=3)
        assert (tmp_path / record.STATUS).read_text() == text
    with run_folder.claim(config(tmp_path), False, True):
        pass
    assert json.loads((tmp_path / record.STATUS).read_text())["state"] == "finished"


def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / record.STATUS).mkdir()
    with run_folder.claim(config(tmp_path), False, True):
        record.add(tmp_path, steps=3)
        assert record.read(tmp_path) == {}


def test_the_record_has_the_command_the_versions_and_the_first_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/main_synco.py", "--save-dir", "a b", "DIR"])
    with run_folder.claim(config(tmp_path), False, True):
        (tmp_path / "log.jsonl").write_text("{}\n")
    found = record.read(tmp_path)
    assert found["command"] == "python main_synco.py --save-dir 'a b' DIR"
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "torchvision", "timm"} <= found["versions"].keys()
    assert found["first_began"] == found["began"]
    with run_folder.claim(config(tmp_path, resume="auto"), True, True):
        pass
    resumed = record.read(tmp_path)
    assert resumed["first_began"] == found["began"] < resumed["began"]
