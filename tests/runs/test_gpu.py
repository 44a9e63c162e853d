"""Tests of benchmarks/gpu.py in tiny sizes on a CPU.

All stages run, checks fail if they should, and a part that fails, dies or hangs stops no other.
"""

import json
import pickle
import shutil
import tarfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, shell, write_images

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


@pytest.fixture
def cifar(gpu) -> ModuleType:
    import gpu_cifar

    return gpu_cifar


@pytest.fixture
def setup(gpu, tmp_path):
    return gpu.Setup(torch.device("cpu"), True, tmp_path / "work")


def test_all_stages_in_three_minutes(tmp_path):
    """No part fails, and each stage has results.

    On a busy machine, the three minutes may be too short for the last stages: then they run again.
    """
    file, folder = tmp_path / "gpu.json", tmp_path / "runs" / "cifar10-moco"
    words, began = ("benchmarks/gpu.py", "--json", file, "--run-folder", folder), time.monotonic()
    result = shell(*words, "--minutes", 3)
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - began < 200
    parts = {
        stage: found.values() for stage, found in json.loads(file.read_text())["stages"].items()
    }
    if late := [
        stage for stage in parts if all(part["status"] == "not run" for part in parts[stage])
    ]:
        result = shell(*words, "--minutes", 20, "--stages", *late)
    found = json.loads(file.read_text())
    passed = {
        stage: [name for name in parts if parts[name]["status"] == "passed"]
        for stage, parts in found["stages"].items()
    }
    assert found["failed"] == [] and passed.keys() == {"1", "2", "3", "4"} and all(passed.values())
    statuses = {part["status"] for parts in found["stages"].values() for part in parts.values()}
    assert statuses <= {"passed", "not run"}
    assert found["stages"]["1"]["step mocov1"]["figures"]["fp32 gradient"] <= 1e-4
    assert found["stages"]["3"]["moco"]["figures"]["rows"][0]["published k-NN"] == 31.98
    assert "target for one H100" in result.stdout and "published" in result.stdout


CHECKS = [
    "resume",
    "k-NN",
    "probe",
    "NCCL",
    "torchrun",
    "compile",
    "views",
    "hardest",
    "accumulation",
]
CHECKS += [
    "checkpointing",
    "channels_last",
    "step synco",
    "step symmetric",
    "step fnc",
    "step synco-v2",
]


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_between_cpu_and_cpu(gpu, setup, name):
    """Runs each check by itself, because the test above may lack the time for some."""
    import gpu_setup

    setup.work.mkdir()
    notes = gpu_setup.Notes()
    gpu.PARTS[1][name][0](setup, notes)
    assert notes.failures == [] and len(notes) > 0


PARTS = """
import os, sys, time
sys.path.insert(0, {folder!r})
import gpu

def differs(setup, notes):
    notes.at_most("difference", 1.0, 1e-4)

def dies(setup, notes):
    os._exit(9)

def hangs(setup, notes):
    time.sleep(600)

def raises(setup, notes):
    notes["before"] = 1
    raise ValueError("a reason")

def passes(setup, notes):
    notes.at_most("difference", 1e-5, 1e-4)

gpu.PARTS[1] = {{part.__name__: (part, 0) for part in (differs, dies, hangs, raises, passes)}}
sys.exit(gpu.main())
"""


def test_a_part_that_fails_dies_or_hangs_does_not_stop_the_others(
    gpu, tmp_path, monkeypatch, capsys
):
    import gpu_visit as visit

    script, file = tmp_path / "parts.py", tmp_path / "gpu.json"
    script.write_text(PARTS.format(folder=str(ROOT / "benchmarks")))
    names = ("differs", "dies", "hangs", "raises", "passes")
    monkeypatch.setattr(visit, "SCRIPT", script)
    monkeypatch.setitem(gpu.PARTS, 1, {name: (None, 0) for name in names})
    monkeypatch.setattr(visit, "LIMIT", 2.0)
    monkeypatch.setattr(visit, "START", 600.0)  # this test has no process that hangs at its start
    args = gpu.parser().parse_args(
        ["--minutes", "30", "--stages", "1", "--json", str(file), "--device", "cpu"]
    )
    assert gpu.Visit(args, torch.device("cpu")).run() == 1
    found = json.loads(file.read_text())["stages"]["1"]
    statuses = {name: found[name]["status"] for name in names}
    assert statuses == {**dict.fromkeys(names, "failed"), "passes": "passed"}
    assert found["differs"]["failures"] == ["difference 1 exceeds 0.0001"]
    assert "ended with status 9" in found["dies"]["error"] and "killed" in found["hangs"]["error"]
    assert "ValueError: a reason" in found["raises"]["error"] and found["raises"]["figures"] == {
        "before": 1
    }
    out = capsys.readouterr().out
    assert all(f"failed: stage 1, {name}" in out for name in names if name != "passes")


def test_a_part_without_time_left_is_not_run_and_keeps_earlier_results(gpu, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    earlier = {
        "views": {
            "status": "passed",
            "seconds": 1.0,
            "figures": {"mocov1 64": 1e-6},
            "failures": [],
            "error": "",
        }
    }
    file.write_text(json.dumps({"stages": {"1": earlier}, "visits": [{"minutes": 9}]}))
    words = [
        "--minutes",
        "0.05",
        "--stages",
        "1",
        "--parts",
        "views",
        "hardest",
        "--json",
        str(file),
        "--device",
        "cpu",
    ]
    assert gpu.Visit(gpu.parser().parse_args(words), torch.device("cpu")).run() == 0
    found = json.loads(file.read_text())
    assert (
        found["stages"]["1"]["views"] == earlier["views"]
        and found["stages"]["1"]["hardest"]["status"] == "not run"
    )
    assert len(found["visits"]) == 2
    assert "not run: stage 1, hardest: no time left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--minutes 0", "--minutes 0: no time"),
        ("--minutes -1", "--minutes -1: no time"),
        ("--minutes nan", "--minutes nan: no time"),
        ("--stages 3 4 --parts views", "--parts: stages 1 and 2 have parts, but --stages is 3 4"),
        ("--stages 1 --parts steps", "--parts steps: not in --stages 1; give --stages 2"),
        ("--parts step", "--parts step: no such part"),
        ("--data {}", "{}: holds no CIFAR-10; give a folder"),
        ("--data {}/gone", "{}/gone: holds no CIFAR-10; give a folder"),
    ],
)
def test_wrong_options_are_one_line_before_the_first_stage(
    gpu, words, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "Visit", None)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", *words.format(tmp_path).split()])
    assert gpu.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said.format(tmp_path) in err


def test_ctrl_c_prints_a_line_and_the_table(gpu, tmp_path, monkeypatch, capsys):
    def stage(self, number):
        self.record(number, "views", figures={"speed": 2.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Visit, "_stage", stage)
    args = gpu.parser().parse_args(["--json", str(tmp_path / "gpu.json"), "--device", "cpu"])
    visit = gpu.Visit(args, torch.device("cpu"))
    assert visit.run() == 130
    visit.record(1, "views", "its process was killed")  # by a lane that ends later
    out = capsys.readouterr().out
    assert out.count("interrupted by Ctrl-C") == 1
    assert "speed 2" in out.split("interrupted")[1] and "target for one H100" in out
    assert (
        json.loads((tmp_path / "gpu.json").read_text())["stages"]["1"]["views"]["status"]
        == "passed"
    )


def test_a_step_that_differs_fails(gpu, setup, monkeypatch):
    """Changes the weights of the second of both networks."""
    import gpu_checks
    import gpu_setup

    build, made = gpu_checks.method, []

    def other(*args, **more):
        made.append(build(*args, **more))
        if len(made) == 2:
            with torch.no_grad():
                for weight in made[1].module.parameters():
                    weight.add_(1e-3 * torch.randn_like(weight))
        return made[-1]

    monkeypatch.setattr(gpu_checks, "method", other)
    notes = gpu_setup.Notes()
    gpu_checks.step("byol", setup, notes)
    assert any(line.startswith("fp32 gradient") for line in notes.failures), notes.failures
    notes = gpu_setup.Notes()
    gpu_checks.step("byol", setup, notes)
    assert notes.failures == [] and notes["fp32 gradient"] <= 1e-4 and notes["off falls"]


def test_data_is_found_as_image_files_batches_or_archive(cifar, setup, tmp_path):
    images = write_images(tmp_path / "images", train=2, val=1)
    (images / "val").rename(images / "test")
    with tarfile.open(tmp_path / "cifar10_jpeg.tar.gz", "w:gz") as file:
        for split in ("train", "test"):
            file.add(images / split, split)
    batches = tmp_path / "python" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    (batches / "data_batch_1").write_bytes(pickle.dumps({}))

    folder = tmp_path / "runs"
    for given in (images, tmp_path / "cifar10_jpeg.tar.gz"):
        (place,) = cifar.find(given, folder, setup).words
        assert (
            len(list(Path(place).glob("test/*/*.jpg"))) == 2
            and len(list(Path(place).glob("train/*/*.jpg"))) == 4
        )
    shutil.rmtree(images)  # the archive is not unpacked again, and is also found by its folder
    only = tmp_path / "only"
    only.mkdir()
    (tmp_path / "cifar10_jpeg.tar.gz").rename(only / "cifar10_jpeg.tar.gz")
    assert cifar.find(only, folder, setup).words == (place,)
    for given in (batches, batches.parent):
        assert cifar.find(given, folder, setup).words == (
            str(batches.parent),
            "--dataset",
            "cifar10",
        )
    with pytest.raises(cifar.Failed, match="holds no CIFAR-10"):
        cifar.find(tmp_path / "empty", folder, setup)


def test_rows_and_summary_of_a_run_next_to_the_published_log(cifar, tmp_path):
    """An epoch's loss is the mean over its steps, for log lines at any interval.

    Of an epoch that was stopped, the steps done count.
    """
    lines = [
        {"epoch": 0, "step": 10, "loss": 7.0, "time": 1.0},
        {"epoch": 0, "step": 15, "loss": 6.4, "time": 1.5},
        {"epoch": 1, "step": 25, "loss": 6.0, "time": 2.5},
        {"epoch": 1, "step": 30, "loss": 5.0, "time": 3.0},
        {"epoch": 1, "step": 30, "knn": 0.335, "time": 5.0},
        {"epoch": 2, "step": 34, "loss": 4.0, "time": 6.0},
    ]
    tmp_path.joinpath("log.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + '{"epoch": 2, "st'
    )
    rows = cifar.rows(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert np.allclose([row["loss"] for row in rows], [6.8, 17 / 3, 4.0])
    assert [row["published loss"] for row in rows] == [6.957, 7.25, 7.29]
    assert [row["k-NN"] for row in rows] == [None, 33.5, None] and rows[1][
        "published k-NN"
    ] == 33.52
    summary = cifar.summary(tmp_path)
    assert (summary["epochs"], summary["k-NN"], summary["k-NN epoch"]) == (3, 33.5, 2)
    assert summary["minutes of 200 epochs"] == pytest.approx((3.5 + 1.0) / 2 * 200 / 60)


RUN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("started", flush=True)
time.sleep({seconds})
sys.exit({status})
"""


@pytest.mark.parametrize(
    ("seconds", "status", "state"),
    [(600, 0, "stopped"), (0, 0, "finished"), (0, 2, "ended with status 2")],
)
def test_a_run_is_ended_in_time(cifar, gpu, setup, tmp_path, monkeypatch, seconds, status, state):
    from gpu_setup import python

    program = RUN.format(seconds=seconds, status=status)
    monkeypatch.setattr(
        cifar, "python", lambda setup, *_, **more: python(setup, "-c", program, **more)
    )
    config = tmp_path / "moco.yaml"
    config.write_text("# python main_synco.py DIR --cfg moco.yaml\n")
    end = time.monotonic() + cifar.SAVING + 3

    def train() -> str:
        return cifar.train(
            setup, cifar.Data(("DIR",), "none"), config, tmp_path / "run", end, "off"
        )

    if status:
        with pytest.raises(gpu.Failed, match=state):
            train()
    else:
        assert train() == state
    assert time.monotonic() < end
