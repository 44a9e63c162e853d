"""Tests of `moco.report.comparison`, `header` and `markup`: tables, and facts of runs."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from moco.report import comparison, header, markup, runs
from moco.report.runs import Log, Run


def run(name="run", folder=Path("nowhere/run"), args=None, **last):
    columns = {name: (np.array([1.0]), np.array([y])) for name, y in last.items()}
    return Run(folder, name, args or {}, Log(columns, 10.0, 20.0, 5.0, 0))


def test_the_best_is_marked_if_values_differ():
    star = "★"
    assert comparison.marked([0.5, 2, None, math.nan], "{:.1f}") == [
        "0.5",
        f"<b>{star} 2.0</b>",
        "",
        "nan",
    ]
    assert comparison.marked([0.5, 2], "{:.1f}", higher=False)[0] == f"<b>{star} 0.5</b>"
    assert comparison.marked([1, 1, None], "{:.0f}") == ["1", "1", ""]
    assert comparison.marked([1], "{:.0f}") == ["1"]


def test_columns_without_a_filled_cell_are_left_out():
    page = markup.table(["a", "b", "c"], [["1", "", "x"], ["", "", "y"]], left=1)
    assert re.findall("<th[^>]*>(.)</th>", page) == ["a", "c"] and page.count("<td") == 4
    assert page.count('class="number"') == 3  # c and its cells


def test_runs_without_labels_are_compared_by_their_features():
    page = comparison.section([run(loss=1, rankme=9, alignment=0.5), run(loss=2, rankme=5)])
    assert "★ 9" in page and "RankMe last" in page and "alignment last" in page
    assert "k-NN" not in page and "uniformity" not in page
    page = comparison.section([run(loss=1, rankme=9, knn=0.25), run(loss=2, knn=0.5)])
    assert "★ 50.0" in page and "RankMe" not in page


def write(folder, status=None):
    folder.mkdir()
    (folder / "args.yaml").write_text(yaml.safe_dump({"method": "moco", "epochs": 3}))
    (folder / "log.jsonl").write_text("")
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    return runs.read([folder])


def test_the_card_of_a_run(tmp_path):
    card = header.section(
        write(
            tmp_path / "new",
            {
                "state": "finished",
                "first_began": 1.6e9,
                "began": 1.7e9,
                "ended": 1.7e9 + 60,
                "command": "python main_x.py <b>",
                "device": "H100",
                "processes": 8,
                "versions": {"torch": "2.9"},
                "images": 1000,
                "classes": 0,
            },
        )
    )
    text = re.sub("<[^>]*>", "", card)
    for words in (
        "began 2020-09-13",
        "last resumed 2023-11-14",
        "python main_x.py &lt;b&gt;",
        "H100, 8 processes",
        "torch 2.9",
        "1,000 training images without labels",
        "0 of 3 epochs",
        "no epoch is logged yet",
        "Statefinished",
    ):
        assert words in text


ODD = ([], {}, "x", 1e300, -5, math.inf, True, None, [{"a": 1}], "\0<script>")


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_an_old_or_damaged_record_is_no_error(value, tmp_path):
    names = "first_began began ended command device processes versions images classes".split()
    found = write(tmp_path / "odd", {"state": "finished", **dict.fromkeys(names, value)})
    page = header.section(found)
    assert "<script>" not in page and "<dt>Method</dt>" in page


def test_a_folder_of_an_older_version_has_a_card(tmp_path):
    page = header.section(write(tmp_path / "old"))
    rows = re.findall("<dt>(.*?)</dt>", page)
    assert {"Method", "Training", "State"} <= set(rows) and not {"Command", "Device"} & set(rows)
