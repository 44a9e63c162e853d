"""Test tools/collect.py, the table of what evaluations wrote, from the shell."""

import csv
import json
import os

import pytest
from conftest import own_lines, shell

pytestmark = pytest.mark.slow


def write(
    folder,
    method="synco",
    epochs=200,
    protocol="semisup1",
    dataset="/data/imagenet",
    metrics=None,
    **settings,
):
    folder.mkdir(parents=True)
    found = {
        "method": method,
        "arch": "resnet50",
        "checkpoint": f"{method}.pth",
        "pretrain_epochs": epochs,
        "protocol": protocol,
    }
    (folder / "results.json").write_text(
        json.dumps(found | {"dataset": dataset, "metrics": metrics, "settings": settings})
    )


def collect(folder, *options):
    done = shell("tools/collect.py", folder, "--out", folder, *options)
    assert done.returncode == 0, done.stderr
    lines = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")
    ]
    with (folder / "table.csv").open(newline="") as file:
        return (
            done.stdout,
            [dict(zip(lines[0], line, strict=False)) for line in lines[2:]],
            list(csv.DictReader(file)),
        )


def test_the_best_setting_is_chosen_on_held_out_images(tmp_path):
    for lr, top1, held in ((0.01, 0.50, 0.40), (0.02, 0.45, 0.60), (0.05, 0.55, 0.30)):
        write(
            tmp_path / f"a{lr}",
            metrics={"acc1": top1, "acc5": 0.8, "held_out_acc1": held},
            lr_backbone=lr,
            wd=0.1,
            seed=0,
        )
    text, (row,), (line,) = collect(tmp_path)
    assert row == {
        "method": "synco",
        "arch": "resnet50",
        "epochs": "200",
        "imagenet 1 % labels, top-1 / top-5": "45.0 / 80.0",
    }
    assert (line["chosen_on"], line["settings_tried"], float(line["value"])) == (
        "held out",
        "3",
        0.45,
    )
    assert json.loads(line["settings"]) == {"lr_backbone": 0.02, "wd": 0.1} and "\\*" not in text
    column = "imagenet 1 % labels, top-1 / top-5"
    assert f"{column}, synco resnet50: the best of 3 settings is lr_backbone 0.02\n" in text
    assert (tmp_path / "table.md").read_text() in text


def test_a_data_set_s_name_that_is_not_utf_8(tmp_path):
    write(
        tmp_path / "a", dataset=os.fsdecode(b"/data/donn\xe9es"), metrics={"acc1": 0.5, "acc5": 0.8}
    )
    text, (row,), _ = collect(tmp_path)
    assert (
        "donn\\udce9es 1 % labels, top-1 / top-5" in row
        and (tmp_path / "table.md").read_text() in text
    )


def test_a_choice_on_val_is_marked(tmp_path):
    write(
        tmp_path / "a", metrics={"acc1": 0.50, "acc5": 0.8, "held_out_acc1": 0.9}, lr_backbone=0.01
    )
    write(tmp_path / "b", metrics={"acc1": 0.55, "acc5": 0.9}, lr_backbone=0.02)
    text, (row,), (line,) = collect(tmp_path)
    assert (
        row["imagenet 1 % labels, top-1 / top-5"] == "55.0 / 90.0 \\*"
        and line["chosen_on"] == "val"
    )
    assert "chosen on the test images" in text


def test_seeds_are_averaged_and_never_chosen_among(tmp_path):
    for seed, top1 in enumerate((0.50, 0.52, 0.54)):
        write(
            tmp_path / f"a{seed}",
            metrics={"acc1": top1, "acc5": 0.8},
            lr=30.0,
            seed=seed,
            protocol="linear",
        )
    write(tmp_path / "b", metrics={"acc1": 0.53, "acc5": 0.8}, lr=10.0, seed=1, protocol="linear")
    _, (row,), (line,) = collect(tmp_path)
    assert (
        row["imagenet linear, top-1 / top-5"] == "53.0 / 80.0 \\*"
    )  # one seed of .53 beats three of .52 on average
    write(tmp_path / "c", metrics={"acc1": 0.51, "acc5": 0.8}, lr=10.0, seed=2, protocol="linear")
    write(tmp_path / "d", metrics={"acc1": 0.5, "acc5": 0.8}, lr=10.0, seed=3, protocol="linear")
    _, (row,), (line,) = collect(tmp_path, "--force")
    assert (
        row["imagenet linear, top-1 / top-5"] == "52.0 ± 2.0 / 80.0 \\*"
        and line["seeds"] == "0 1 2"
    )


def test_results_of_other_temperatures_features_or_image_sizes_are_not_averaged(tmp_path):
    setting = {"features": "backbone", "temperature": 0.07, "image_size": 224, "mean": [0.5] * 3}
    others = ({"temperature": 0.5}, {"features": "head"}, {"image_size": 64}, {"mean": [0.4] * 3})
    for seed, other in enumerate(({}, *others)):
        found = {"knn_20": 0.5 + seed / 10}
        write(
            tmp_path / f"{seed}", protocol="knn", metrics=found, **{**setting, **other}, seed=seed
        )
    text, (row,), _ = collect(tmp_path)
    column = "imagenet k-NN (k 20, T 0.07, backbone features)"
    assert row[column] == "90.0 \\*"
    assert row["imagenet k-NN (k 20, T 0.5, backbone features)"] == "60.0"
    assert row["imagenet k-NN (k 20, T 0.07, head features)"] == "70.0"
    best = (
        f"{column}, synco resnet50: the best of 3 settings is image_size 224, mean [0.4, 0.4, 0.4]"
    )
    assert best in text and "±" not in text


def test_the_batch_size_is_no_setting_of_frozen_features(tmp_path):
    for size in (16, 32):
        found = {"features": "backbone", "temperature": 0.07, "batch_size": size}
        write(tmp_path / f"{size}", protocol="knn", metrics={"knn_20": 0.5}, **found)
    text, (row,), _ = collect(tmp_path)
    assert row["imagenet k-NN (k 20, T 0.07, backbone features)"] == "50.0"
    assert "best of" not in text


def test_a_row_for_each_encoder_and_a_column_for_each_protocol(tmp_path):
    for method, epochs in (("synco", 800), ("synco", 200), ("mocov2", 200)):
        where = tmp_path / f"{method}{epochs}"
        write(where / "linear", method, epochs, "linear", metrics={"acc1": 0.6, "acc5": 0.9})
        write(where / "ten", method, epochs, "semisup10", metrics={"acc1": 0.7, "acc5": 0.9})
        write(
            where / "frozen",
            method,
            epochs,
            "semisup10_frozen",
            metrics={"acc1": 0.65, "acc5": 0.9},
        )
        write(
            where / "pets",
            method,
            epochs,
            "linear",
            "pets",
            metrics={"mean_per_class": 0.8, "acc1": 0.81, "acc5": 0.9},
        )
        write(
            where / "voc",
            method,
            epochs,
            "voc07",
            "voc2007",
            metrics={"map11": 0.85, "map": 0.87, "ap_cat": 0.9},
        )
        write(where / "knn", method, epochs, "knn", metrics={"knn_10": 0.5, "knn_20": 0.51})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text('{"knn": 0.5}')  # of no evaluation
    _, rows, lines = collect(tmp_path)
    assert [(row["method"], row["epochs"]) for row in rows] == [
        ("mocov2", "200"),
        ("synco", "200"),
        ("synco", "800"),
    ]
    assert {k: v for k, v in rows[0].items() if k not in ("method", "arch", "epochs")} == {
        "imagenet 10 % labels, top-1 / top-5": "70.0 / 90.0",
        "imagenet 10 % labels, frozen, top-1 / top-5": "65.0 / 90.0",
        "imagenet k-NN (k 10)": "50.0",
        "imagenet k-NN (k 20)": "51.0",
        "imagenet linear, top-1 / top-5": "60.0 / 90.0",
        "pets linear, mean per class": "80.0",
        "voc2007 voc07, mAP": "85.0",
    }
    assert len(lines) == 21


def test_a_missing_cell_is_empty_and_two_files_of_one_kind_are_told_apart(tmp_path):
    write(tmp_path / "a", metrics={"acc1": 0.6, "acc5": 0.9})
    write(tmp_path / "b", metrics={"acc1": 0.7, "acc5": 0.9}, protocol="linear")
    found = json.loads((tmp_path / "b" / "results.json").read_text())
    (tmp_path / "b" / "results.json").write_text(json.dumps(found | {"checkpoint": "other.pth"}))
    _, rows, _ = collect(tmp_path)
    assert [row["checkpoint"] for row in rows] == ["other.pth", "synco.pth"]
    assert (
        rows[0]["imagenet 1 % labels, top-1 / top-5"] == ""
        and rows[1]["imagenet 1 % labels, top-1 / top-5"] == "60.0 / 90.0"
    )


@pytest.mark.parametrize(("text", "said"), [(None, "no results.json"), ("{", "cannot be read")])
def test_a_mistake_is_one_line(text, said, tmp_path):
    if text:
        (tmp_path / "results.json").write_text(text)
    done = shell("tools/collect.py", tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(own_lines(done.stderr)) == 1
