"""The evaluation scripts on every data set by name, in small copies of the real formats."""

import json
import re

import pytest
import torch
from conftest import ROOT, own_lines, settings, shell
from dataset_trees import NAMES, WRITERS, Tree
from run_helpers import typed

import main_lincls
import main_semisup
from moco.data import catalog
from moco.evaluate import metrics

pytestmark = pytest.mark.slow

SMALL = ("-a", "resnet18", "--image-size", 32, "-j", 0, "-b", 2, "--epochs", 1)


def results(run) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "photos"])
def test_a_probe_on_every_data_set(name, script, tmp_path):
    WRITERS[name](Tree(tmp_path / "data"))
    options = (
        "--dataset",
        name,
        *SMALL,
        "--lr",
        0.1,
        0.01,
        tmp_path / "data",
        "--save-dir",
        tmp_path / "run",
    )
    status, out, err = script("main_lincls", *options)
    assert status == 0, err
    found, metric = results(tmp_path / "run"), catalog.METRIC[name]
    assert found["dataset"] == (str(tmp_path / "data") if name == "imagenet" else name)
    assert {metric, f"{metric}_lr0.1", f"{metric}_lr0.01"} <= found["metrics"].keys()
    *_, shown, _ = out.splitlines()  # the last line says where results.json is
    assert f"{metrics.TITLES[metric]} {100 * found['metrics'][metric]:.3f}" in shown
    assert ("mean_per_class" in found["metrics"]) == (metric == "mean_per_class")


@pytest.mark.parametrize(
    ("name", "arch"), [("cifar10", "resnet18"), ("voc2007", "resnet18"), ("flowers", "test_vit")]
)
def test_fine_tuning_on_named_data(name, arch, script, tmp_path):
    WRITERS[name](Tree(tmp_path / "data"))
    options = ("--dataset", name, *SMALL, "-a", arch, tmp_path / "data", "--save-dir")
    status, out, err = script(
        "main_lincls", *options, tmp_path / "run", "--weights", "finetune", "--lr", 0.01
    )
    assert status == 0, err
    found = results(tmp_path / "run")
    assert found["protocol"] == "finetune" and "frozen backbone" not in out
    status, _, err = script(
        "main_lincls",
        *options,
        tmp_path / "again",
        "-e",
        "--resume",
        tmp_path / "run" / "checkpoint.pth.tar",
    )
    assert status == 0 and results(tmp_path / "again")["metrics"] == found["metrics"], err
    assert results(tmp_path / "again")["protocol"] == "finetune"


def test_several_rates_cannot_fine_tune_one_network(script, images):
    status, _, err = script(
        "main_lincls", images, *SMALL, "--weights", "finetune", "--lr", 0.1, 0.01
    )
    assert (
        status == 2
        and "--lr 0.1 0.01: --weights finetune trains one network" in err
        and len(own_lines(err)) == 1
    )


def test_semi_supervised_and_nearest_neighbours_on_arrays(script, tmp_path):
    WRITERS["cifar10"](Tree(tmp_path / "data"))
    common = (
        *typed("--dataset cifar10 -a resnet18 --image-size 32 -j 0 -b 2"),
        tmp_path / "data",
        "--save-dir",
    )
    assert script("main_knn", *common, tmp_path / "knn", "--k", 1)[0] == 0
    assert results(tmp_path / "knn")["dataset"] == "cifar10"
    assert (
        script("main_semisup", *common, tmp_path / "semisup", "--epochs", 1, "--train-percent", 10)[
            0
        ]
        == 0
    )
    listed = (tmp_path / "semisup" / "subset.txt").read_text().split()
    again = ("--train-percent", 10, "--subset-file", tmp_path / "semisup" / "subset.txt")
    assert script("main_semisup", *common, tmp_path / "again", "--epochs", 1, *again)[0] == 0
    assert (tmp_path / "again" / "subset.txt").read_text().split() == listed
    assert results(tmp_path / "again")["metrics"] == results(tmp_path / "semisup")["metrics"]


def test_average_precision_over_two_processes_is_that_of_one(script, tmp_path):
    """Of images that show several classes, some of them difficult, the last batch uneven."""
    WRITERS["voc2007"](Tree(tmp_path / "data"))
    common = ("--dataset", "voc2007", *SMALL, "--lr", 0.1, tmp_path / "data")
    status, _, err = script("main_lincls", *common, "--save-dir", tmp_path / "one")
    assert status == 0, err
    again = (
        *typed("-e --resume {}", tmp_path / "one" / "checkpoint.pth.tar"),
        *typed("--multiprocessing-distributed --nproc-per-node 2"),
    )
    two = shell("main_lincls.py", *common, *again, "--save-dir", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert results(tmp_path / "one")["metrics"] == results(tmp_path / "two")["metrics"]


def test_absent_data_stops_before_any_work(script, tmp_path):
    status, _, err = script("main_lincls", "--dataset", "pets", *SMALL, tmp_path)
    assert (
        status == 2
        and "oxford-iiit-pet" in err
        and "--download" in err
        and len(own_lines(err)) == 1
    )


# The published protocols.

RECIPES = sorted(ROOT.glob("configs/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_one_of_the_script_that_it_names(recipe):
    script = re.search(rf"python (main_\w+)\.py --cfg configs/{recipe.name} ", recipe.read_text())[
        1
    ]
    module = __import__(script)
    assert settings(module, ["DIR", "--cfg", str(recipe)]).cfg == str(recipe)


FNC = {
    "optimizer": "lars_tf",
    "lr_backbone": 0.005,
    "lr_classifier": 0.005,
    "learning_rate_scaling": "sqrt",
    "batch_size": 1024,
    "lr_by": "step",
    "crop_min": 0.2,
    "sync_bn": True,
}
MOBY = {"lr": [0.5], "wd": [0], "lr_final": 2.5e-6, "learning_rate_scaling": "linear"}
MOBY |= {"batch_size": 512, "epochs": 100, "lr_warmup_epochs": 5, "cos": True, "nesterov": True}
MOBY |= {"lr_by": "previous-step", "lr_warmup_from": 2.5e-7, "test_resize": "margin"}
MOBY |= {"momentum": 0.9, "clip_grad": 5, "label_smoothing": 0.1, "drop_path": 0.2}
SYNCO = {"weights": "finetune", "lr_classifier": 0.5, "batch_size": 1024, "wd": 1e-6, "cos": True}
FNC |= {"ft_proj": 1, "zero_init_classifier": True, "wd": 0, "lr_warmup_epochs": 0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "lincls_moco",
            {
                "lr": [30],
                "batch_size": 256,
                "epochs": 100,
                "schedule": [60, 80],
                "cos": False,
                "wd": [0],
            },
        ),
        (
            "lincls_adco",
            {
                "lr": [10],
                "batch_size": 256,
                "epochs": 100,
                "cos": True,
                "lr_final": 0.01,
                "wd": [0],
            },
        ),
        ("lincls_adco_places205", {"lr": [5], "dataset": "places205", "sgdr": 1, "epochs": 100}),
        (
            "lincls_sogclr",
            {
                "lr": [0.1],
                "learning_rate_scaling": "linear",
                "batch_size": 1024,
                "epochs": 90,
                "cos": True,
                "wd": [0],
            },
        ),
        ("lincls_moby", {**MOBY, "weights": "freeze"}),
        ("finetune_moby", {**MOBY, "weights": "finetune"}),
        (
            "lincls_fnc",
            {
                "lr": [0.005],
                "learning_rate_scaling": "sqrt",
                "batch_size": 1024,
                "epochs": 90,
                "nesterov": True,
                "zero_init_classifier": True,
                "cos": True,
                "lr_by": "step",
                "crop_min": 0.2,
            },
        ),
        ("semisup_1pct", {**SYNCO, "train_percent": 1, "epochs": 60}),
        ("semisup_10pct", {**SYNCO, "train_percent": 10, "epochs": 30}),
        ("semisup_100pct", {**SYNCO, "train_percent": 100, "epochs": 90}),
        ("semisup_fnc_1pct", {**FNC, "epochs": 60, "train_percent": 1}),
        ("semisup_fnc_10pct", {**FNC, "epochs": 30, "train_percent": 10}),
    ],
)
def test_published_protocols(name, expected):
    module = main_semisup if name.startswith("semisup") else main_lincls
    args = vars(settings(module, ["DIR", "--cfg", f"configs/{name}.yaml"]))
    assert {option: args[option] for option in expected} == expected


def test_nesterov_and_lars_reach_the_optimizer(script, images, tmp_path):
    weights = []
    for options in ((), ("--nesterov",), ("--optimizer", "lars")):
        run = tmp_path / "".join(options)
        common = (images, *typed("-a resnet18 --image-size 32 -j 0 -b 8 --epochs 2 --lr 0.1"))
        assert script("main_lincls", *common, *options, "--save-dir", run)[0] == 0
        weights.append(
            torch.load(run / "checkpoint.pth.tar", weights_only=True)["state_dict"][
                "module.fc.weight"
            ]
        )
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_classifier_of_a_probe_may_start_at_zero(script, images, tmp_path):
    common = (images, *typed("-a resnet18 --image-size 32 -j 0 -b 8 --epochs 1 --lr 0"))
    for options, zero in (((), False), (("--zero-init-classifier",), True)):
        run = tmp_path / "".join(options)
        assert script("main_lincls", *common, *options, "--save-dir", run)[0] == 0
        state = torch.load(run / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        assert state["module.fc.weight"].any() != zero
