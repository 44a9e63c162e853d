"""Run the commands on docs/commands.md with tiny sizes, and test the settings of recipes."""

import re
import shlex
import shutil
from pathlib import Path

import dataset_trees
import pytest
from conftest import ROOT, in_process, settings
from published import EXPECTED, ROWS

import main_adco
import main_fnc
import main_lincls
import main_sogclr

pytestmark = pytest.mark.slow


# sizes with which a command takes seconds; later options win
_RESNET = "-a resnet18 --image-size 32 -b 8 -j 0 --epochs 1 --dist-url auto"
TINY = {
    "main_adco": f"{_RESNET} --cluster 64 --moco-dim 16",
    "main_fnc": f"{_RESNET} --support-size 1 --fn-topk 2 --proj-out-dim 16",
    "main_lincls": f"{_RESNET}",
    "main_moby": "-a test_vit --mlp-dim 32 --queue 64 -b 8 -j 0 --epochs 6",
    "main_mocov3": f"{_RESNET} --warmup-epochs 0 --moco-mlp-dim 32 --moco-dim 16",
    "main_semisup": f"{_RESNET}",
    "main_sogclr": f"{_RESNET} --mlp-dim 32 --dim 16",
    "main_synco": f"{_RESNET} --moco-k 64 --moco-dim 16",
}
SYNTHETIC = "--n-hard 8 --n1 2 --n2 2 --n3 2 --n4 2 --n5 2 --n6 2 --warmup-epochs 0"


@pytest.fixture(scope="module")
def saved(checkpoints, pretraining, shared_images, tmp_path_factory) -> dict[str, Path]:
    """Return a folder with the checkpoint of a run, by method."""
    moby = tmp_path_factory.mktemp("moby") / "T"
    words = ["--method", "moby", "--lr-warmup-epochs", 1, *TINY["main_moby"].split()]
    status, _, err = in_process("main_moby", shared_images, *words, "--save-dir", moby)
    assert status == 0, err
    mocov3 = tmp_path_factory.mktemp("mocov3") / "T"
    words = (shared_images, *TINY["main_mocov3"].split())
    status, _, err = in_process("main_mocov3", *words, "--save-dir", mocov3)
    assert status == 0, err
    runs = {name: file.parent for name, file in checkpoints.items()}
    return {**runs, "synco": pretraining, "moby": moby, "mocov3": mocov3}


@pytest.mark.parametrize("key", EXPECTED, ids=lambda key: f"{key[0]}, {key[1]}")
def test_a_command_runs_with_tiny_sizes(key, saved, script, shared_images, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    expected, (_, ours, _) = EXPECTED[key], ROWS[key]
    words = shlex.split(ours)[1:]
    method = "fnc" if key[0] == "FNC" else expected.method
    run = shutil.copytree(saved[method], tmp_path / "T")
    file = next(run.glob("checkpoint_*.pth.tar"))
    data, more = shared_images, TINY[expected.script].split()
    if "dataset" in expected.more:
        data = tmp_path / "data"
        getattr(dataset_trees, expected.more["dataset"])(dataset_trees.Tree(data))
        more += ["--data", str(data)]
    if expected.more.get("stop_grad_conv1"):
        more += ["-a", "test_vit"]
    more += SYNTHETIC.split() if "n_hard" in expected.more else []
    if expected.method == "moby" and expected.script == "main_lincls":
        more = ["-a", "test_vit", *more[2:], "--epochs", "6"]
    values = {"DIR": data, "CKPT": file, "OUT": tmp_path, "RUN": tmp_path / "run"}
    if expected.script == "main_moby":
        values["OUT"] = tmp_path / "new"
    words = [
        re.sub("|".join(rf"(?<![^=]){name}$" for name in values), lambda m: str(values[m[0]]), word)
        for word in words
    ]
    if not {"OUT", "RUN"} & set(re.split("[ =]", ours)):
        more += ["--save-dir", str(tmp_path / "run")]
    status, out, err = script(expected.script, *words, *more)
    assert status == 0, err
    assert not expected.protocol or f"protocol {expected.protocol}" in out
    results = list(tmp_path.rglob("results.json"))
    assert bool(results) == (expected.script in ("main_lincls", "main_semisup"))


ADCO = {
    "lr": 0.03,
    "memory_lr": 3,
    "moco_t": 0.12,
    "mem_t": 0.02,
    "mem_wd": 1e-4,
    "lr_final": 0.0006,
    "cluster": 65536,
}
SOGCLR = {
    "lr": 0.075,
    "learning_rate_scaling": "sqrt",
    "optimizer": "lars",
    "wd": 1e-6,
    "t": 0.1,
    "lr_warmup_epochs": 10,
}
# the settings that the recipes of DCL, DCLW, the debiased loss and HCL share
OTHER_LOSSES = {
    "arch": "resnet50",
    "stem": "cifar",
    "image_size": 32,
    "recipe": "small",
    "optimizer": "adam",
    "lr": 0.001,
    "wd": 1e-6,
    "cos": False,
    "lr_warmup_epochs": 0,
    "dim": 128,
    "mlp_dim": 512,
    "num_proj_layers": 2,
    "last_bn": False,
}
PROBE = {"epochs": 100, "batch_size": 256, "wd": [0.0], "weights": "freeze", "momentum": 0.9}
FNC_SETTINGS = {
    "lr": 0.1,
    "learning_rate_scaling": "sqrt",
    "optimizer": "lars_tf",
    "wd": 1e-4,
    "batch_size": 4096,
    "epochs": 100,
}
FNC_SETTINGS |= {
    "temperature": 0.1,
    "lr_warmup_epochs": 10,
    "lr_by": "step",
    "fn_topk": 10,
    "fn_threshold": 0.7,
    "recipe": "fnc",
    "mean": [0, 0, 0],
    "std": [1, 1, 1],
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adco_200", {**ADCO, "epochs": 200, "sym": False, "multi_crop": False}),
        ("adco_sym_200", {**ADCO, "epochs": 200, "sym": True, "multi_crop": False}),
        ("adco_multicrop_800", {**ADCO, "epochs": 800, "sym": False, "multi_crop": True}),
        ("adco_k16384_200", {**ADCO, "cluster": 16384}),
        (
            "adco_k8192_200",
            {**ADCO, "cluster": 8192, "lr": 0.04, "moco_t": 0.14, "mem_t": 0.03},
        ),
        (
            "adco_sym_k8192_200",
            {**ADCO, "lr": 0.04, "moco_t": 0.14, "mem_t": 0.03, "cluster": 8192, "sym": True},
        ),
        (
            "lincls_adco",
            {**PROBE, "lr": [10.0], "cos": True, "lr_final": 0.01, "lr_by": "epoch"},
        ),
        (
            "lincls_adco_places205",
            {**PROBE, "lr": [5.0], "sgdr": 1, "test_resize": "stretched", "dataset": "places205"},
        ),
        (
            "sogclr_800",
            {**SOGCLR, "epochs": 800, "gamma": 0.9, "loss": "sogclr", "lr_by": "step"},
        ),
        (
            "fnc_100",
            {
                **FNC_SETTINGS,
                "support_size": 8,
                "memory_multiplier": 16,
                "ema": 0.999,
                "fn_mode": "attract",
            },
        ),
        (
            "simclr_imagenet100_400",
            {
                **SOGCLR,
                "optimizer": "lars_tf",
                "epochs": 400,
                "loss": "simclr",
                "data_name": "imagenet100",
            },
        ),
        (
            "cifar10/dcl_batch32",
            {**OTHER_LOSSES, "loss": "dcl", "t": 0.1, "batch_size": 32, "epochs": 100},
        ),
        (
            "cifar10/dclw_batch32",
            {**OTHER_LOSSES, "loss": "dclw", "t": 0.1, "batch_size": 32, "dclw_sigma": 0.5},
        ),
        (
            "stl10/debiased",
            {**OTHER_LOSSES, "loss": "debiased", "t": 0.5, "batch_size": 256, "tau_plus": 0.1},
        ),
        (
            "stl10/hcl",
            {
                **OTHER_LOSSES,
                "loss": "hcl",
                "t": 0.5,
                "tau_plus": 0.1,
                "beta": 1.0,
                "anneal": None,
                "epochs": 400,
                "blur_p": 0.5,
            },
        ),
        (
            "cifar10/supcon",
            {
                "loss": "supcon",
                "arch": "resnet50",
                "stem": "cifar",
                "t": 0.1,
                "optimizer": "sgd",
                "lr": 0.5,
                "wd": 1e-4,
                "batch_size": 1024,
                "epochs": 1000,
                "crop_min": 0.2,
            },
        ),
        (
            "cifar100/isogclr",
            {
                "arch": "resnet18",
                "loss": "isogclr",
                "gamma": 0.8,
                "rho": 0.4,
                "eta": 0.03,
                "beta_u": 0.5,
                "t": 0.1,
                "t_range": [0.05, 1.0],
                "t_clip": 3.0,
                "set_first": False,
                "optimizer": "lars",
                "lr": 0.8,
                "wd": 5e-4,
                "momentum": 0.9,
                "batch_size": 128,
                "epochs": 400,
                "crop_min": None,
                "recipe": "mocov2",
                "dim": 8192,
                "mlp_dim": 8192,
                "num_proj_layers": 3,
                "last_bn": False,
            },
        ),
    ],
)
def test_recipes_hold_the_published_settings(name, expected):
    module = {"adco": main_adco, "fnc": main_fnc, "lincls": main_lincls}.get(
        name.split("_")[0], main_sogclr
    )
    args = vars(settings(module, ["DIR", "--cfg", f"configs/{name}.yaml"]))
    assert {option: args[option] for option in expected} == expected
    if name == "fnc_100":  # all of them are the script's defaults, too
        bare = vars(settings(main_fnc, ["DIR"]))
        assert {option for option in args if args[option] != bare[option]} == {
            "cfg",
            "amp",
            "randaugment",
        }
