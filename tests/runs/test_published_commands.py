"""Test the published commands of AdCo, SogCLR and FNC, and the settings of recipes."""

import pytest
from conftest import settings, shell
from method_helpers import SMALL
from run_helpers import load, succeeded

import main_adco
import main_fnc
import main_lincls
import main_sogclr

pytestmark = pytest.mark.slow


# As their READMEs have them, but for the script's name.
PUBLISHED = {
    "adco": "main_adco.py --sym=0 --lr=0.03 --memory_lr=3 --moco_t=0.12 --mem_t=0.02 "
    "--data={data} --dist_url=tcp://localhost:10001",
    "sym": "main_adco.py --sym=1 --lr=0.03 --memory_lr=3 --moco_t=0.12 --mem_t=0.02 "
    "--data={data} --dist_url=tcp://localhost:10001",
    "8192": "main_adco.py --sym=1 --lr=0.04 --memory_lr=3 --moco_t=0.14 --mem_t=0.03 "
    "--cluster 8192 --data={data} --dist_url=tcp://localhost:10001",
    "multi-crop": "main_adco.py --multi_crop=1 --lr=0.03 --memory_lr=3 --moco_t=0.12 --mem_t=0.02 "
    "--data={data} --dist_url=tcp://localhost:10001",
    "sogclr": "main_sogclr.py --lr=0.075 --epochs=1 --batch-size=8 --learning-rate-scaling=sqrt "
    "--loss_type=dcl --gamma=0.9 --multiprocessing-distributed --world-size=1 --rank=0 "
    "--workers=0 --crop-min=.08 --wd=1e-6 --dist-url=tcp://localhost:10001 "
    "--data_name=imagenet1000 --data={data} --save_dir={run} --print-freq=1000",
    "simclr": "main_sogclr.py --lr=0.3 --epochs=1 --batch-size=8 --learning-rate-scaling=linear "
    "--loss_type=simclr --warmup-epochs=10 --num_proj_layers=2 --mlp-dim=32 --dim=16 --t=0.1 "
    "--optimizer=adamw --world-size=1 --rank=0 --workers=0 "
    "--data_name=imagenet100 --data={data} --save_dir={run}",
    "fnc": "main_fnc.py --train_batch_size=8 --train_epochs=1 --temperature=0.1 "
    "--learning_rate=0.1 --learning_rate_scaling=sqrt --weight_decay=1e-4 --warmup_epochs=10 "
    "--num_proj_layers=3 --proj_out_dim=16 --image_size=32 {data}",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_runs(name, shared_images, tmp_path):
    command = PUBLISHED[name].format(data=shared_images, run=tmp_path).split()
    small = ["-a", "resnet18", "-j", 0] if name == "fnc" else [*SMALL]
    small += ["--save-dir", tmp_path, "--multiprocessing_distributed", 1]
    if command[0] == "main_adco.py":
        small += [
            "--moco_dim",
            8,
            "--mlp",
            1,
            "--aug_plus",
            1,
            "--ad_init",
            0,
            "--cos",
            2,
            "--mem_wd",
            1e-4,
            "--moco_m",
            0.999,
        ]
    out = succeeded(shell(*command, *small))
    assert "48 images of 3 classes" in out and "8 per process x 1 processes" in out
    args = load(tmp_path / "checkpoint_0000.pth.tar")["args"]
    if name == "8192":
        assert (args["cluster"], args["sym"], args["mem_t"], args["lr_final"]) == (
            8192,
            True,
            0.03,
            0.0006,
        )
    if name == "multi-crop":
        assert args["recipe"] == "multicrop" and not args["sym"]
    if name == "sogclr":
        assert (args["optimizer"], args["lr_warmup_epochs"], args["lr_by"], args["recipe"]) == (
            "lars",
            10,
            "step",
            "sogclr",
        )
        assert "lr after scaling 0.212132 (sqrt scaling), lr warm-up 10 epochs" in out
    if name == "fnc":
        assert (
            "lr after scaling 0.282843 (sqrt scaling), lr warm-up 10 epochs; 1 epochs x 6 steps"
            in out
        )
        assert (
            "10 views; false negatives: attract, up to 10 above 0.7 of each image; "
            "a memory of 128 entries" in out
        )
        assert (
            args["wd"],
            args["epochs"],
            args["proj_out_dim"],
            args["image_size"],
            args["views"],
        ) == (1e-4, 1, 16, 32, 10)
    if name == "simclr":
        assert "lr after scaling 0.009375 (linear scaling)" in out


@pytest.mark.parametrize(
    "command",
    [
        "--data={data} --dist-url=tcp://localhost:10001 --pretrained={file}",
        "--arch=resnet18 --lr=0.1 --batch-size=8 --epochs=1 --workers=0 "
        "--multiprocessing-distributed --world-size=1 --rank=0 --dist-url=tcp://localhost:10001 "
        "--data_name=imagenet100 --data={data} --save_dir={run} --pretrained={file}",
    ],
)
def test_published_probe_command_runs(command, checkpoints, shared_images, tmp_path):
    file = checkpoints["sogclr" if "data_name" in command else "adco"]
    out = succeeded(
        shell(
            "main_lincls.py",
            *command.format(data=shared_images, file=file, run=tmp_path).split(),
            *SMALL[2:],
        )
    )
    assert "120 of 120 backbone tensors matched" in out


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
            {**SOGCLR, "epochs": 800, "gamma": 0.9, "loss_type": "dcl", "lr_by": "step"},
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
                "loss_type": "simclr",
                "data_name": "imagenet100",
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
