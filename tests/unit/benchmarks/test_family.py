"""The benchmark of all methods: its recipe, its time limit, and its table."""

import json
import math
import shlex
import statistics
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from moco.cli.scripts import config_and_builder
from moco.config import flat
from moco.errors import InputError

sys.path.insert(0, str(ROOT / "benchmarks"))

import family
import family_budget
import family_runs
import family_table
from family_methods import FAMILY, NAMES, RECIPES, chosen
from gpu_setup import Failed

SHARED = """arch stem image_size recipe mean std batch_size epochs optimizer momentum wd cos lr_by
learning_rate_scaling lr_warmup_epochs lr_final clip_grad knn_every knn_k knn_t knn_features
accumulation_steps crop_min randaugment""".split()
OUTCOME = family_runs.Outcome(0, 0.4, 0.55, 12.0, 100.0, 2.0**30)


@pytest.mark.parametrize("data", RECIPES)
@pytest.mark.parametrize("epochs", [1, 10])
def test_every_method_has_the_same_recipe(data, epochs):
    """Each script accepts its options, and all methods have the same values of `SHARED`."""
    recipe, found = RECIPES[data], {}
    for entry in FAMILY:
        options = [*recipe.options(epochs), *recipe.own_options(entry, epochs)]
        config, _ = config_and_builder(entry.script, options, torch.device("cpu"))
        settings = flat(config)
        assert settings["lr"] == pytest.approx(recipe.lr * entry.lr)
        found[entry.name] = {name: settings.get(name) for name in SHARED}
    first = found[NAMES[0]]
    assert all(settings == first for settings in found.values())
    assert (first["epochs"], first["batch_size"]) == (epochs, recipe.batch)


def test_entries_are_chosen_in_the_order_of_the_table():
    assert [entry.name for entry in chosen(["synco", "mocov1"])] == ["mocov1", "synco"]
    assert len(set(NAMES)) == len(NAMES)
    with pytest.raises(InputError, match="nearest is 'sogclr'"):
        chosen(["sogcl"])


@pytest.fixture
def budget():
    draw = np.random.default_rng()
    step = dict(zip(NAMES, draw.uniform(0.01, 1, len(NAMES)).tolist(), strict=True))
    fill = dict.fromkeys(NAMES, 0) | {"adco": 8}
    return family_budget.Budget(step, fill, start=7.5, steps_per_epoch=35, probe=3.0)


def test_the_budget_is_the_sum_over_all_runs(budget):
    entries, total = chosen(["adco", "synco", "fnc"]), 0.0
    for _seed in range(2):
        total += 3.0  # the probe of the random encoder
        for entry in entries:
            total += 7.5 + 3.0
            for _step in range(4 * 35 + (8 if entry.name == "adco" else 0)):
                total += budget.step[entry.name]
    assert budget.seconds(entries, 2, 4) == pytest.approx(total)


def test_the_number_of_epochs_is_the_largest_that_fits(budget):
    entries = list(FAMILY)
    for minutes in (60, 120, 300):
        epochs = budget.epochs(entries, 2, 60 * minutes, minutes)
        usable = (1 - family_budget.SPARE) * 60 * minutes
        assert budget.seconds(entries, 2, epochs) <= usable
        assert budget.seconds(entries, 2, epochs + 1) > usable


def test_too_little_time_is_an_error_that_names_enough(budget):
    spent = 50.0  # seconds of the calibration
    with pytest.raises(InputError, match="--minutes 1: ") as error:
        budget.epochs(list(FAMILY), 1, 60 - spent, 1)
    needed = int(str(error.value).split("about ")[1].split()[0])
    assert budget.epochs(list(FAMILY), 1, 60 * needed - spent, needed) == 1
    with pytest.raises(InputError):
        budget.epochs(list(FAMILY), 1, 60 * (needed - 2) - spent, needed - 2)


def test_rows_are_means_and_standard_deviations_over_seeds():
    draw = np.random.default_rng().uniform(0.2, 0.9, (3, 2))
    runs = [replace(OUTCOME, seed=i, knn_before=a, knn=b) for i, (a, b) in enumerate(draw)]
    few = [replace(OUTCOME, probe=0.7)]
    lone, mine = family_table.rows({"synco": runs, "mocov1": few, "fnc": []})
    assert (lone["method"], mine["method"], mine["runs"]) == ("mocov1", "synco", 3)
    gains = [b - a for a, b in draw]
    assert mine["gain"] == pytest.approx(np.mean(gains))
    assert mine["gain_std"] == pytest.approx(np.std(gains, ddof=1))
    assert "probe" not in mine and lone["probe"] == 0.7 and math.isnan(lone["knn_std"])


def test_the_table_shows_one_seed_without_a_deviation(tmp_path):
    runs = [replace(OUTCOME, seed=i, knn=0.5 + i / 10) for i in range(2)]
    table = family_table.rows({"synco": runs, "mocov1": [replace(OUTCOME, knn_before=0.35)]})
    lines = family_table.markdown(table).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "method",
        "k-NN",
        "gain",
        "random encoder's k-NN",
        "training, s",
        "images/s",
        "peak memory, GiB",
    ]
    assert cells[2][:3] == ["random encoder", "0.350 - 0.400", ""]
    assert cells[3] == ["MoCo v1", "0.550", "+0.200", "0.350", "12", "100", "1.00"]
    std = f"{statistics.stdev([0.5, 0.6]):.3f}"
    assert cells[4][1:3] == [f"0.550 ± {std}", f"+0.150 ± {std}"]
    assert len({len(line) for line in lines}) == 1
    family_table.plot(table, "two methods", tmp_path / "family.png")
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")


def write_run(folder, command, state="finished"):
    """Write the log and the record of a run with steps before epoch 0."""
    folder.mkdir(parents=True)
    lines = [
        {"epoch": -1, "step": -1, "loss": 1.0, "images_per_s": 900.0, "time": 1.0},
        {"epoch": 0, "step": 0, "knn": 0.3, "time": 1.0},
        {"epoch": 0, "step": 10, "loss": 1.0, "images_per_s": 10.0, "time": 4.0},
        {"epoch": 0, "step": 20, "loss": 1.0, "images_per_s": 30.0, "time": 5.0},
        {"epoch": 0, "step": 25, "loss": 1.0, "images_per_s": 40.0, "time": 6.5},
        {"epoch": 0, "step": 25, "knn": 0.5, "time": 9.0},
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    facts = {"state": state, "command": command, "peak_memory": 5 * 2**30}
    (folder / "status.json").write_text(json.dumps(facts))


def test_a_finished_run_is_read_and_not_repeated(tmp_path, monkeypatch):
    settings = family_runs.Family(tmp_path, RECIPES["photos"], ["photos"])
    (entry,) = chosen(["adco"])
    folder = tmp_path / "adco-3"
    words = settings.command(entry, 3, 1, folder)
    write_run(folder, f"python {shlex.join(words)}")
    monkeypatch.setattr(family_runs, "call", lambda *_: pytest.fail("it runs again"))
    found = settings.run(entry, 3, 1)
    assert found.gain == pytest.approx(0.2) and found.before_this_call
    assert (found.seconds, found.images_per_s, found.memory) == (6.5, 30.0, 5 * 2**30)
    with pytest.raises(InputError, match="other options"):
        settings.run(entry, 3, 2)


def test_a_failed_method_is_listed_and_the_others_run(tmp_path, monkeypatch, capsys):
    def run(_, entry, seed, epochs):
        if (entry.name, seed) == ("mochi", 1):
            raise Failed("status 1: its last line")
        return replace(OUTCOME, seed=seed)

    monkeypatch.setattr(family_runs.Family, "run", run)
    monkeypatch.setattr(family_runs, "call", lambda *_: pytest.fail("a probe starts"))
    words = "--epochs 2 --seeds 0 1 --methods mochi fnc --out {} --json {}"
    words = words.format(tmp_path / "out", tmp_path / "found.json").split()
    monkeypatch.setattr(sys, "argv", ["family.py", *words])
    monkeypatch.setattr(family.signal, "signal", lambda *_: None)
    assert family.main() == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "FAILED: mochi, seed 1: status 1: its last line"
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: len(runs) for name, runs in found["runs"].items()} == {"mochi": 1, "fnc": 2}
    assert [row["runs"] for row in found["rows"]] == [1, 2]
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 0",
        "--minutes 0",
        "--minutes nan",
        "--seeds 0 0",
        "--data DIR",
        "--dataset cifar10",
        "--workers -1",
        "--epochs 3",
        "--workers 2",
    ],
)
def test_a_mistake_is_one_line(words, tmp_path, monkeypatch, capsys):
    """The folder of --out has runs of two epochs, with one loader process."""
    plan = {"common": ["photos", "--workers", "1", "--amp", "off"], "epochs": 2}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    argv = ["family.py", *words.split(), "--methods", "synco", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(family.signal, "signal", lambda *_: None)
    monkeypatch.setattr(family.devices, "resolve_type", lambda _: "cpu")
    monkeypatch.setattr(family_runs, "call", lambda *_: pytest.fail("a run starts"))
    assert family.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"epochs": 1}', '{"epochs": 1, "common": 3}'])
def test_a_damaged_plan_is_named(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"plan.json: is damaged; give another --out"):
        family.earlier(path)
    path.write_text('{"epochs": 2, "common": ["photos"], "minutes": 3}')
    assert family.earlier(path) == (2, ["photos"])
