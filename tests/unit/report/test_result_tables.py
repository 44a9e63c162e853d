"""Test the tables of tools/collect.py on hand-written results.json files."""

import csv
import io
import json
import re

import pytest
import yaml

from moco.report import tables
from moco.report.results import collect


def write(folder, method="synco", checkpoint="runs/a/c.pth", dataset="/data/imagenet", **more):
    """Write the results.json of a linear probe; `settings` and `metrics` may be given."""
    folder.mkdir(parents=True)
    found = {"method": method, "arch": "resnet50", "checkpoint": checkpoint, "dataset": dataset}
    found |= {"pretrain_epochs": 200, "protocol": "linear", "metrics": {"acc1": 0.6, "acc5": 0.9}}
    if method == "random":
        found |= {"checkpoint": None, "pretrain_epochs": None}
    (folder / "results.json").write_text(json.dumps(found | {"settings": {"seed": 0}} | more))


def read_csv(cells):
    return list(csv.DictReader(io.StringIO(tables.as_csv(cells), newline="")))


def linear(top1, **more):
    return {"metrics": {"acc1": top1, "acc5": 0.9, **more}}


LINEAR = ("imagenet", "linear, top-1 / top-5")


def test_the_random_encoder_is_first_and_the_others_show_their_gain(tmp_path):
    write(tmp_path / "a", "adco", **linear(0.651))
    write(tmp_path / "b", "synco", **linear(0.15))
    write(tmp_path / "c", "random", **linear(0.2))
    write(tmp_path / "d", "random", **linear(0.22), settings={"seed": 1})
    write(tmp_path / "e", "synco", **linear(0.9), dataset="pets")  # no baseline
    cells = collect(tmp_path)
    head, *rows = tables.grid(cells)
    assert [row[0] for row in rows] == ["random", "adco", "synco"]
    assert [row[head.index(" ".join(LINEAR))] for row in rows] == [
        "21.0 ± 1.4 / 90.0",
        "65.1 / 90.0 (+44.1)",
        "15.0 / 90.0 (-6.0)",
    ]
    assert rows[2][head.index("pets linear, top-1 / top-5")] == "90.0 / 90.0"
    gains = {(row["method"], row["dataset"]): row["gain"] for row in read_csv(cells)}
    assert gains.pop(("adco", "imagenet"))[:5] == "0.441"
    assert gains == {
        ("random", "imagenet"): "",
        ("synco", "imagenet"): gains["synco", "imagenet"],
        ("synco", "pets"): "",
    }
    assert any(line.startswith("(+): gain over the random encoder") for line in tables.notes(cells))


def test_no_gain_over_an_encoder_of_another_architecture_or_image_size(tmp_path):
    write(tmp_path / "a", **linear(0.6), settings={"image_size": 224})
    write(tmp_path / "b", "random", **linear(0.2), arch="resnet18", settings={"image_size": 224})
    write(tmp_path / "c", "random", **linear(0.2), settings={"image_size": 32})
    cells = collect(tmp_path)
    assert all(row["gain"] == "" for row in read_csv(cells))
    assert not any("gain" in line for line in tables.notes(cells))


def test_numbers_in_titles_are_in_numeric_order(tmp_path):
    ks = {f"knn_{k}": 0.5 for k in (200, 1, 20, 100, 10)}
    write(tmp_path / "a", protocol="knn", metrics=ks)
    for temperature in (0.5, 0.07):
        settings = {"temperature": temperature, "features": "backbone"}
        name = f"b{temperature}"
        write(tmp_path / name, protocol="knn", metrics={"knn_5": 0.5}, settings=settings)
    titles = tables.grid(collect(tmp_path))[0][3:]
    assert [re.search(r"k (\d+)", title)[1] for title in titles] == "1 5 5 10 20 100 200".split()
    assert "T 0.07" in titles[1] and "T 0.5" in titles[2]


@pytest.mark.parametrize("held_out", [True, False])
def test_a_classifier_chosen_among_several_in_one_run_is_marked(held_out, tmp_path):
    tried = {f"acc1_lr{lr}": 0.5 for lr in ("0.1", "1", "10")}
    more = {"held_out_acc1": 0.58} if held_out else {}
    found = linear(0.6, **tried, best_lr=10.0, **more)
    write(tmp_path / "a", **found, settings={"lr": [0.1, 1.0, 10.0], "seed": 0})
    cells = collect(tmp_path)
    (row,) = read_csv(cells)
    assert (row["settings_tried"], row["chosen_on"]) == ("3", "held out" if held_out else "val")
    assert tables.grid(cells)[1][-1] == "60.0 / 90.0" + " *" * (not held_out)
    line = "imagenet linear, top-1 / top-5, synco resnet50: the best of 3 settings is lr 10"
    assert line in tables.notes(cells)


def test_seeds_are_averaged_although_each_prefers_another_learning_rate(tmp_path):
    for seed, lr in enumerate((0.1, 1.0)):
        tried = {"acc1_lr0.1": 0.5, "acc1_lr1": 0.5, "best_lr": lr}
        write(
            tmp_path / f"{seed}",
            **linear(0.6 + seed / 10, **tried),
            settings={"lr": [0.1, 1.0], "seed": seed},
        )
    cells = collect(tmp_path)
    assert tables.grid(cells)[1][-1] == "65.0 ± 7.1 / 90.0 *"
    assert any(
        line.endswith("best of 2 settings is lr 0.1 or lr 1") for line in tables.notes(cells)
    )


def pretrained(folder, seed, **options):
    """Write the args.yaml of a pre-training, and the results of a probe of its checkpoint below."""
    folder.mkdir(parents=True)
    args = {"script": "synco", "lr": 0.03, "batch_size": 256, "data": "/d/imagenet", "seed": seed}
    (folder / "args.yaml").write_text(yaml.safe_dump(args | {"save_dir": str(folder)} | options))


def test_pretraining_runs_that_differ_only_in_the_seed_are_averaged(tmp_path):
    for seed in range(3):
        pretrained(tmp_path / f"s{seed}", seed, data=f"/disk{seed}/imagenet", workers=seed)
        # the path as it was typed, relative to a folder that is unknown now
        name = f"s{seed}/checkpoint_0199.pth.tar"
        write(tmp_path / f"s{seed}" / "lincls", checkpoint=name, **linear(0.5 + seed / 10))
    pretrained(tmp_path / "other", 3, lr=0.1)
    write(tmp_path / "o", checkpoint="other/checkpoint_0199.pth.tar", **linear(0.4))
    cells = collect(tmp_path)
    rows = read_csv(cells)
    assert [row["pretrain_seeds"] for row in rows] == ["", "0 1 2"]
    assert rows[1]["checkpoint"] == ", ".join(f"s{i}/checkpoint_0199.pth.tar" for i in range(3))
    assert tables.grid(cells)[2][-1] == "60.0 ± 10.0 / 90.0"
    assert tables.notes(cells) == [
        "±: standard deviation over 3 runs that differ only in their seeds"
    ]


@pytest.mark.parametrize("damage", ["", "lr: [", "seed: zero\nscript: synco\n"])
def test_pretraining_runs_are_apart_if_their_options_are_unknown(damage, tmp_path):
    for seed in range(2):
        pretrained(tmp_path / f"s{seed}", seed)
        write(tmp_path / f"s{seed}" / "lincls", checkpoint=f"s{seed}/c.pth")
    (tmp_path / "s1" / "args.yaml").write_text(damage)
    assert len(tables.encoders(collect(tmp_path))) == 2


def test_the_same_seed_twice_is_not_averaged(tmp_path):
    for name in ("a", "b"):
        pretrained(tmp_path / name, 0)
        write(tmp_path / name / "lincls", checkpoint=f"{name}/c.pth")
    assert len(tables.encoders(collect(tmp_path))) == 2


ODD = "a|b_c & 50%\\x_ #1 {~^} *x* <i>`"


def test_names_with_special_characters(tmp_path):
    write(tmp_path / "a", dataset=ODD, arch='two\nlines, "quoted"')
    cells = collect(tmp_path)
    (row,) = read_csv(cells)
    assert (row["dataset"], row["arch"]) == (ODD, 'two\nlines, "quoted"')
    head, _, line = tables.markdown(cells).splitlines()
    assert r"| a\|b_c & 50%\\x\_ #1 {~^} \*x\* \<i\>\` linear, top-1 / top-5 |" in head
    assert '| two lines, "quoted" |' in line
    bars = [len(re.findall(r"(?<!\\)\|", one)) for one in (head, line)]
    assert bars == [5, 5]
    head = tables.latex(cells).splitlines()[3]
    name = r"a\textbar{}b\_c \& 50\%\textbackslash{}x\_ \#1 \{\textasciitilde{}"
    assert f"& {name}\\textasciicircum{{}}\\}} *x* \\textless{{}}i\\textgreater{{}}` lin" in head


def test_latex_has_as_many_cells_in_each_row_as_columns(tmp_path):
    write(tmp_path / "a", "random", **linear(0.2))
    for seed in range(2):
        write(tmp_path / f"b{seed}", **linear(0.6 + seed / 100), settings={"seed": seed, "lr": 1})
    write(tmp_path / "c", **linear(0.1), settings={"lr": 2})
    text = tables.latex(collect(tmp_path))
    assert text.startswith("% needs \\usepackage{booktabs}\n% imagenet linear")
    assert "\\begin{tabular}{lllr}\n\\toprule\nmethod & arch & epochs & imagenet linear" in text
    assert "synco & resnet50 & 200 & 60.5 $\\pm$ 0.7 / 90.0 (+40.5)$^{*}$ \\\\\n" in text
    assert text.count(" \\\\\n") == 3 and text.endswith("\\bottomrule\n\\end{tabular}\n")
