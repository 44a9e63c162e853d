"""The report: one page that needs nothing else, whatever lies in the run folders."""

import json
import math
import re
import shutil
import sys
from html import escape

import numpy as np
import pytest
import torch
import yaml
from conftest import own_lines, shell, write_images
from report_helpers import LOGGED, Page, made, write_run

from moco.config import Pretraining, replaced
from moco.engine.log import RunLog
from moco.errors import InputError
from moco.files import write_json
from moco.report import curves, plots, runs
from moco.report.page import write
from moco.report.results import Result, read
from tools import report

pytestmark = pytest.mark.slow


def test_two_runs_from_the_shell(tmp_path, shared_images):
    hostile = "<script>alert(1)</script>&\"'$x_$".replace("/", "")
    (tmp_path / "_b").mkdir()
    a = write_run(tmp_path / hostile, shared_images, logged=LOGGED)
    b = write_run(tmp_path / "_b" / "run", shared_images, logged=LOGGED[:4], lr=0.06)
    evaluation = {
        "method": "synco",
        "arch": "resnet18",
        "pretrain_epochs": 3,
        "protocol": "knn",
        "dataset": "x",
    }
    evaluation["settings"] = {"features": "head", "temperature": 0.1, "image_size": 32}
    ours = str(b / "checkpoint_0002.pth.tar")
    for name, checkpoint, top1 in (
        ("ours", ours, 0.613),
        ("larger", ours, 0.591),
        ("random", None, 0.287),
    ):
        (b.parent / name).mkdir()
        found = evaluation | {"checkpoint": checkpoint, "metrics": {"knn_20": top1}}
        found["settings"] = (
            found["settings"] | {"image_size": 64} if name == "larger" else found["settings"]
        )
        (b.parent / name / "results.json").write_text(json.dumps(found))
    done = shell("tools/report.py", a, b, "--out", tmp_path / "out" / "page.html", "--images", 20)
    assert (done.returncode, done.stderr) == (0, "")
    page = Page(tmp_path / "out" / "page.html")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object"} and "alert(1)" in page.text
    assert "$x_$" in page.text  # not read as mathematics
    for _, attributes in page.tags:
        assert not {"href", "onload", "onerror"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"url\((?!#)|@import|https?://", page.source)
    titles = [panel.title for panel in curves.PANELS if panel.name != "cosine"]
    types = titles.index("Positive among the first five, %") + 1
    titles.insert(types, f"Hardness by type of negative: {escape(hostile)}")
    titles += ["Moving averages u", "Gradient norm: encoder", f"Recipe mocov2 ({escape(hostile)})"]
    # each run's neighbours, and the maps; the recipe, being one, once
    titles += [escape(hostile), "run", "random resnet18", escape(hostile), "run"]
    assert page.titles == titles
    assert page.source.count("<figure>") == len(titles)
    assert "x k-NN (k 20, T 0.1, head features)" in page.text
    assert "the best of 2 settings is image_size 32" in page.text
    assert (
        "★ 61.3 *" not in page.text
        and "61.3 (+32.6) *" in page.text
        and "28.7" in page.text
        and "1 option in which the runs differ" in page.text
    )
    assert "3 of 3" in page.text and "53.0" in page.text  # epochs and k-NN


@pytest.mark.parametrize(
    "what, says",
    [
        ("checkpoint", "no checkpoint in the folder; no features are shown"),
        ("damaged checkpoint", "truncated or damaged"),
        ("data", "no such folder"),
        ("image", "unreadable image"),
        ("options", "image_size is 'large'"),
        ("another network", "does not fit the encoder"),
        ("diverged", "training diverged"),
    ],
)
def test_curves_come_where_the_rest_is_gone(tmp_path, what, says):
    data = write_images(tmp_path / "images")
    run = write_run(tmp_path / "run", data, weights=what != "checkpoint")
    weights = run / "checkpoint_0002.pth.tar"
    if what == "damaged checkpoint":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "data":
        shutil.rmtree(data)
    elif what == "image":
        next(data.glob("train/*/*.jpg")).write_bytes(b"no image")
    elif what in ("options", "another network"):
        args = yaml.safe_load((run / "args.yaml").read_text())
        args |= {"image_size": "large"} if what == "options" else {"arch": "resnet50"}
        (run / "args.yaml").write_text(yaml.safe_dump(args))
    elif what == "diverged":
        state = torch.load(weights)
        state["state_dict"]["module.encoder_q.conv1.weight"] *= torch.nan
        torch.save(state, weights)
    page = made([run], tmp_path)
    assert page.titles[0] == "Loss" and "Nearest neighbours" not in page.text.split(says)[-1]
    assert says in page.text


def test_an_earlier_checkpoint_where_the_last_is_cut(tmp_path, shared_images):
    run = write_run(tmp_path / "run", shared_images)
    shutil.copy(run / "checkpoint_0002.pth.tar", run / "checkpoint_0001.pth.tar")
    (run / "checkpoint_0002.pth.tar").write_bytes(b"PK")
    page = made([run], tmp_path, images=10)
    assert (
        "checkpoint_0002.pth.tar: not a readable checkpoint" in page.text
        and "encoder of checkpoint_0001.pth.tar" in page.text
    )


def test_log_lines(tmp_path):
    """Skip damaged lines and add up the time of all starts; a run without lines has a page."""
    run = write_run(tmp_path / "run", "gone", lines=12, weights=False)
    good = (run / "log.jsonl").read_bytes()
    more = {
        "epoch": 2,
        "step": 25,
        "loss": float("nan"),
        "time": 2.5,
        "flag": True,
        "words": "x",
        "huge": 10**400,
    }
    bad = (b"[1]", b"{}", b"[" * 100_000, b"\0\0\0", json.dumps(more).encode(), b'{"epoch": 2, "st')
    (run / "log.jsonl").write_bytes(good + b"\n" + b"\n".join(bad))
    log = runs.read_log(run / "log.jsonl")
    assert log.damaged == 6 and log.steps_per_epoch == 10
    (run / "log.jsonl").write_bytes(
        good
        + b'{"epoch": 2, "step": 25, "loss": NaN, "time": 2.5}\n'
        + b'{"epoch": 2, "step": 26, "time": 1}\n{"ep'
    )
    log = runs.read_log(run / "log.jsonl")
    assert log.damaged == 1 and log.seconds == 3.5 and log.last_step == 26
    assert list(log.columns["knn"][0]) == [10] and list(log.columns["loss"][0]) == [
        *range(1, 13),
        25,
    ]
    page = made([run], tmp_path)
    assert "1 damaged line" in page.text and "nan" in page.text and "Loss" in page.titles
    (run / "log.jsonl").write_text("")
    assert "no epoch is logged yet" in made([run], tmp_path).text


def test_a_long_log_is_thinned(tmp_path):
    x = np.arange(300_000.0)
    y = np.where(x == 123_456, 50.0, np.sin(x))
    middle, low, high, center = plots.thinned(x, y)
    assert (
        len(middle) == plots.POINTS
        and high.max() == 50
        and low.min() >= -1
        and abs(center).max() < 0.2
    )
    assert (np.diff(middle) > 0).all() and abs(middle.mean() - x.mean()) < 1
    line = plots.smooth(np.r_[np.zeros(500), 100, np.zeros(499)])
    assert len(line) == 1000 and not line.any()
    assert np.allclose(plots.smooth(np.arange(1000.0)), np.arange(1000))


def test_names_tell_runs_apart(tmp_path):
    a, b = (
        write_run(tmp_path / "a" / "pretrain", "gone"),
        write_run(tmp_path / "b" / "pretrain", "gone"),
    )
    assert [run.name for run in runs.read([a, b, a])] == ["a/pretrain", "b/pretrain"]
    assert [run.name for run in runs.read([a])] == ["pretrain"]


def test_evaluations_are_those_of_the_run(tmp_path):
    run = write_run(tmp_path / "run", "gone", weights=False)
    found = {
        "method": "synco",
        "arch": "resnet18",
        "pretrain_epochs": 3,
        "protocol": "knn",
        "dataset": "x",
    }
    places = {
        "run/below": "elsewhere/c.pth.tar",
        "beside": "run/checkpoint_0002.pth.tar",
        "other": "run2/checkpoint_0002.pth.tar",
    }
    for place, checkpoint in places.items():
        (tmp_path / place).mkdir()
        text = json.dumps(
            found | {"checkpoint": str(tmp_path / checkpoint), "metrics": {"knn_20": 0.5}}
        )
        (tmp_path / place / "results.json").write_text(text)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.json").write_text('{"protocol": 1}')
    figures, trouble = runs.evaluations(runs.read([run])[0])
    assert (
        [type(figure) for figure in figures] == [Result] * 2
        and len(trouble) == 1
        and "odd" in trouble[0]
    )
    assert dict(runs.by_checkpoint(figures)).keys() == {"c.pth.tar", "checkpoint_0002.pth.tar"}


def test_mistakes(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", "gone", weights=False)
    (tmp_path / "empty").mkdir()
    probe = write_run(tmp_path / "probe", "gone", weights=False, script="lincls")
    listed = write_run(tmp_path / "listed", "gone", weights=False)
    (listed / "args.yaml").write_text("!!python/object/apply:os.system ['true']")
    mistakes = {
        "no such folder": {"folders": [tmp_path / "gone"]},
        "holds no args.yaml and no log.jsonl": {"folders": [run, tmp_path / "empty"]},
        "is the folder of an evaluation": {"folders": [probe]},
        "not YAML": {"folders": [listed]},
        "is for one run": {"folders": [run, probe], "pretrained": run / "args.yaml"},
        "no such file": {"folders": [run], "pretrained": run / "gone"},
        "at least one image": {"folders": [run], "images": 0},
        "is a folder": {"folders": [run], "out": run},
        "cannot be written": {"folders": [run], "out": run / "args.yaml" / "page.html"},
    }
    for says, options in mistakes.items():
        with pytest.raises(InputError, match=says):
            write(**{"out": tmp_path / "page.html"} | options)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "empty")])
    assert report.main() == 2
    said = capsys.readouterr().err
    assert len(own_lines(said)) == 1 and said.startswith(
        f"report.py: error: {tmp_path / 'empty'}: holds no args.yaml"
    )


def test_numbers_that_are_not_finite_are_null_in_every_file(tmp_path):
    """In log.jsonl, results.json and similar files; what reads them accepts null."""
    strict = {"parse_constant": lambda word: pytest.fail(word)}
    config = replaced(Pretraining(), batch_per_process=8, save_dir=str(tmp_path / "run"))
    log = RunLog(config, 10)
    for step, value in enumerate((0.5, math.nan, math.inf, -math.inf), 1):
        log.line(
            0, step, {"loss": 1.0, "hardness": value, "grad_encoder": float(np.float64(value))}
        )
    log.close()
    lines = [
        json.loads(line, **strict)
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert [line["hardness"] for line in lines] == [0.5, None, None, None] and all(
        line["loss"] == 1 for line in lines
    )
    found = runs.read_log(tmp_path / "run" / "log.jsonl")
    assert found.damaged == 0 and np.isnan(found.columns["hardness"][1]).tolist() == [
        False,
        True,
        True,
        True,
    ]
    results = {
        "method": "moco",
        "arch": "resnet18",
        "checkpoint": None,
        "dataset": "d",
        "protocol": "linear",
    }
    metrics = {
        "acc1": 0.5,
        "acc5": 0.75,
        "acc1_lr1e+20": math.nan,
        "of": [math.inf, {"each": math.nan}],
    }
    write_json(tmp_path / "results.json", {**results, "metrics": metrics})
    written = json.loads((tmp_path / "results.json").read_text(), **strict)
    assert written["metrics"] == {
        "acc1": 0.5,
        "acc5": 0.75,
        "acc1_lr1e+20": None,
        "of": [None, {"each": None}],
    }
    assert [run.value for run in read(tmp_path / "results.json")] == [0.5]
    write_json(
        tmp_path / "results.json",
        {**results, "protocol": "detection", "metrics": {"bbox_ap": math.nan, "bbox_ap50": 0.5}},
    )
    assert [run.value for run in read(tmp_path / "results.json")] == [0.5]
