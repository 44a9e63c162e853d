"""Test the scripts of AdCo, SimCLR, SogCLR and FNC.

The tests cover published commands, exact resume, the readers of their checkpoints, and mistakes.
"""

import contextlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_process, settings, shell
from dataset_trees import write_voc
from run_helpers import facts, load, refused, same, succeeded

import main_adco
import main_fnc
import main_lincls
import main_sogclr
from moco.builder.adco import AdCo, Ascent
from moco.builder.fnc import FNC
from moco.builder.sogclr import SogCLR
from moco.config import MEAN, STD
from moco.encoder.resnets import resnet
from moco.rng import Progress

pytestmark = pytest.mark.slow

SMALL = ("-a", "resnet18", "--image-size", 32, "-b", 8, "-j", 0, "--epochs", 1)
METHODS = {
    "adco": ("main_adco", "--cluster", 20),
    "adco sym multi-crop": ("main_adco", "--cluster", 20, "--sym", 1, "--multi_crop", 1),
    "sogclr": ("main_sogclr", "--mlp-dim", 32, "--dim", 16),
    "fnc": (
        "main_fnc",
        "--support-size",
        1,
        "--memory-multiplier",
        5,
        "--fn-threshold",
        0.5,
        "--proj-out-dim",
        16,
    ),
}
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

FNC_SETTINGS = {
    "lr": 0.1,
    "learning_rate_scaling": "sqrt",
    "optimizer": "lars",
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
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adco_200", {**ADCO, "epochs": 200, "sym": False, "multi_crop": False}),
        ("adco_sym_200", {**ADCO, "epochs": 200, "sym": True, "multi_crop": False}),
        ("adco_multicrop_800", {**ADCO, "epochs": 800, "sym": False, "multi_crop": True}),
        ("adco_k16384_200", {**ADCO, "cluster": 16384}),
        (
            "adco_sym_k8192_200",
            {**ADCO, "lr": 0.04, "moco_t": 0.14, "mem_t": 0.03, "cluster": 8192, "sym": True},
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
            {**SOGCLR, "epochs": 400, "loss_type": "simclr", "data_name": "imagenet100"},
        ),
    ],
)
def test_recipes_hold_the_published_settings(name, expected):
    module = {"adco": main_adco, "fnc": main_fnc}.get(name.split("_")[0], main_sogclr)
    args = vars(settings(module, ["DIR", "--cfg", f"configs/{name}.yaml"]))
    assert {option: args[option] for option in expected} == expected
    if name == "fnc_100":  # all of them are the script's defaults, too
        bare = vars(settings(main_fnc, ["DIR"]))
        assert {option for option in args if args[option] != bare[option]} == {
            "cfg",
            "amp",
            "randaugment",
        }


# whole runs


@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_never_stopped(name, script, shared_images, tmp_path):
    """Compare also the bank, its velocity, u and the memory; resume at the third epoch."""
    method, *options = METHODS[name]
    command = (
        shared_images,
        *options,
        *SMALL[:-1],
        3,
        "--accumulation-steps",
        2,
        "-p",
        1,
        "--seed",
        2,
        "--cos",
        1,
    )
    for run, more in (
        ("whole", ()),
        ("parts", ("--resume", tmp_path / "whole" / "checkpoint_0001.pth.tar")),
    ):
        status, out, err = script(method, *command, "--save-dir", tmp_path / run, *more)
        assert status == 0, err
    assert "at epoch 2" in out and "before epoch 0" not in out
    second, a, b = (
        load(tmp_path / run / f"checkpoint_{epoch}.pth.tar")
        for run, epoch in (("whole", "0001"), ("whole", "0002"), ("parts", "0002"))
    )
    for key in ("epoch", "state_dict", "optimizer", "scaler", "progress"):
        assert same(a[key], b[key]), key
    assert facts(tmp_path / "parts") == facts(
        tmp_path / "whole"
    )  # the first lines are those of the run it began from
    names = ("u", "bank", "bank_velocity", "memory", "memory_index")
    kept = [n for n in a["state_dict"] if n.removeprefix("module.") in names]
    assert len(kept) == (1 if name == "sogclr" else 2)
    for n in kept:
        assert a["state_dict"][n].any() and not torch.equal(
            a["state_dict"][n], second["state_dict"][n]
        )


def test_the_bank_is_filled_before_epoch_0(script, shared_images, tmp_path):
    for fill in (1, 0):
        status, out, err = script(
            "main_adco",
            shared_images,
            *SMALL,
            "--cluster",
            60,
            "--ad-init",
            fill,
            "--save-dir",
            tmp_path / f"{fill}",
        )
        assert status == 0, err
        assert ("8 steps before epoch 0, counted from -8" in out) == bool(
            fill
        )  # 60 rows by 8, of 6 steps an epoch
        epochs = [line["epoch"] for line in facts(tmp_path / f"{fill}")]
        assert sorted(set(epochs)) == ([-2, -1, 0] if fill else [0])
        assert load(tmp_path / f"{fill}" / "checkpoint_0000.pth.tar")["progress"]["step"] == 6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, shared_images):
    """A checkpoint of each script."""
    files = {}
    for name in ("adco", "sogclr", "fnc"):
        method, *options = METHODS[name]
        run = tmp_path_factory.mktemp(name)
        assert (
            in_process(
                method, shared_images, *options, *SMALL, "--knn-every", 1, "--save-dir", run
            )[0]
            == 0
        )
        files[name] = run / "checkpoint_0000.pth.tar"
    return files


@pytest.mark.parametrize("name", ["adco", "sogclr", "fnc"])
def test_every_evaluation_reads_the_checkpoint(
    name, checkpoints, script, shared_images, tmp_path, monkeypatch, capsys
):
    file = checkpoints[name]
    voc = write_voc(tmp_path / "voc", 30, 12)
    calls = {
        "main_lincls": (shared_images, "--lr", 0.1, "--epochs", 1),
        "main_semisup": (shared_images, "--epochs", 1, "--train-percent", 10, "--ft-proj", 1),
        "main_knn": (shared_images, "--k", 5),
        "main_voc07": (voc, "--c", 1),
    }
    for evaluation, options in calls.items():
        run = tmp_path / evaluation
        sizes = ("--image-size", 32, "-b", 4, "-j", 0)
        status, out, err = script(
            evaluation, *options, *sizes, "--pretrained", file, "--save-dir", run
        )
        assert status == 0, err
        assert "120 of 120 backbone tensors matched" in out
        results = json.loads((run / "results.json").read_text())
        assert results["method"] == name and all(
            0 <= value <= 1 for value in results["metrics"].values()
        )
        used = {"image_size": 32, "mean": list(MEAN), "std": list(STD), "stem": "imagenet"}
        used |= {"features": "backbone", "temperature": 0.07} if evaluation == "main_knn" else {}
        assert results["settings"] | used == results["settings"]
    spec = importlib.util.spec_from_file_location(
        "converter", ROOT / "detection" / "convert-pretrain-to-detectron2.py"
    )
    converter = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [str(ROOT / "detection"), *sys.path])
    spec.loader.exec_module(converter)
    monkeypatch.setattr(sys, "argv", ["convert", str(file), str(tmp_path / "converted.pkl")])
    assert converter.main() in (0, None), capsys.readouterr().err
    assert (tmp_path / "converted.pkl").stat().st_size > 40e6


# no copy to the host inside a step


def test_a_step_copies_nothing_to_the_host(monkeypatch):
    """Run on tensors without storage, where copies to the host and reads of values fail."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # knows no device without storage
    encoder = {"encoder": lambda: resnet("resnet18", 8, mlp=True)}
    bank = {**encoder, "dim": 8, "K": 64, "ascent": Ascent()}
    with torch.device("meta"):
        methods = [
            (AdCo(**bank), 2),
            (AdCo(**bank, symmetric=True, multi_crop=True), 4),
            (SogCLR(**encoder, images=100), 2),
            (SogCLR(**encoder, images=100, gamma=None), 2),
            (FNC(**encoder, dim=8, memory_size=64, chunk=3, labels=torch.arange(100)), 4),
            (FNC(**encoder, dim=8, memory_size=0, chunk=3), 2),
        ]
        for method, count in methods:
            for step in (-1, 0):
                views = [torch.randn(8, 3, 32, 32) for _ in range(count)]
                loss, metrics = method(views, torch.arange(8), Progress(step=step))
                loss.backward()
                method.after_step()
                parts = [
                    part
                    for value in metrics.values()
                    for part in (value if isinstance(value, tuple) else (value,))
                ]
                assert loss.is_meta and parts and all(part.is_meta for part in parts)
    for use in (
        torch.Tensor.cpu,
        torch.Tensor.tolist,
        torch.Tensor.item,
        torch.Tensor.nonzero,
        bool,
    ):
        with pytest.raises((NotImplementedError, RuntimeError)):
            use(methods[2][0].u[:1])


# data and mistakes


def test_some_classes_of_a_folder(script, shared_images, tmp_path):
    names = tmp_path / "names.txt"
    shared_copy = Path(shutil.copytree(shared_images, tmp_path / "images"))
    for split in ("train", "val"):
        shutil.copytree(shared_copy / split / "class1", shared_copy / split / "class3")
    names.write_text("class2  a description\n\nclass0\n")
    chosen = ("--class-list", names)
    status, out, err = script(
        "main_sogclr",
        shared_images,
        *SMALL,
        *chosen,
        "--knn-every",
        1,
        "--save-dir",
        tmp_path / "run",
    )
    assert status == 0, err
    assert "32 images of 2 classes" in out
    file = tmp_path / "run" / "checkpoint_0000.pth.tar"
    assert (
        load(file)["state_dict"]["module.u"].shape == (32,)
        and (load(file)["state_dict"]["module.u"] > 0).sum() == 32
    )
    probe = ("--image-size", 32, "-j", 0, "-b", 8, "--lr", 0.1, "--epochs", 1, "--pretrained", file)
    status, out, err = script(
        "main_lincls", shared_images, *probe, *chosen, "--save-dir", tmp_path / "probe"
    )
    assert status == 0, err
    assert (
        load(tmp_path / "probe" / "checkpoint.pth.tar")["state_dict"]["module.fc.weight"].shape[0]
        == 2
    )
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert results["dataset"].endswith(" (names.txt)")
    knn = (
        "--image-size",
        32,
        "-j",
        0,
        "-b",
        8,
        "--k",
        5,
        "--pretrained",
        file,
        "--save-dir",
        tmp_path / "knn",
    )
    dump = ("--dump-features", tmp_path / "features")
    assert script("main_knn", shared_images, *knn, *chosen, *dump)[0] == 0
    refused(script("main_knn", shared_images, *knn, *dump), "holds features")
    load_them = (
        "--load-features",
        tmp_path / "features",
        "--k",
        5,
        "--save-dir",
        tmp_path / "again",
    )
    assert script("main_knn", *load_them)[0] == 0
    refused(
        script("main_knn", *load_them, "--class-list", "other.txt"),
        "--class-list other.txt",
        "names.txt",
    )
    again = (
        "--resume",
        tmp_path / "probe" / "checkpoint.pth.tar",
        "--save-dir",
        tmp_path / "probe",
    )
    refused(
        script("main_lincls", shared_images, *probe, *again), "--class-list is unset", "names.txt"
    )
    for name in ("class0", "class2"):
        shutil.rmtree(shared_copy / "val" / name)
    refused(
        script("main_knn", shared_copy, *knn, *chosen),
        "--class-list",
        "has no image of its classes",
    )
    names.write_text("class0\nclass7\n")
    refused(
        script("main_sogclr", shared_images, *SMALL, *chosen),
        "--class-list",
        "1 of its 2 classes",
        "'class7'",
    )
    refused(
        script("main_lincls", shared_images, "-a", "resnet18", *chosen), "--class-list", "'class7'"
    )
    names.write_text("\n")
    refused(script("main_adco", shared_images, *SMALL, *chosen), "--class-list", "names nothing")
    refused(
        script("main_adco", shared_images, *SMALL, "--class-list", tmp_path / "absent"),
        "--class-list",
        "No such file",
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [("Place205", "places205"), ("ImageNet", "imagenet"), ("cifar10", "cifar10")],
)
def test_data_sets_by_the_names_that_published_commands_have(given, meant):
    assert settings(main_lincls, ["DIR", "--dataset", given]).dataset == meant


def test_imagenet100_is_not_taken_for_all_of_imagenet(script, tmp_path):
    for i in range(101):
        (tmp_path / "train" / f"n{i:08d}").mkdir(parents=True)
    refused(
        script("main_sogclr", tmp_path, *SMALL, "--data_name", "imagenet100"),
        "has 100 classes",
        "101",
        "--class-list",
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("main_sogclr", ("--t", 0.001), ("--t: 0.001 is below 0.02; take one in [0.02, 100]",)),
        ("main_sogclr", ("--t", "nan"), ("--t: nan is not a number",)),
        ("main_sogclr", ("--batch-size", 1), ("each process a single image", "--batch-size")),
        ("main_sogclr", ("--gamma", 0), ("--gamma: 0 is not above 0",)),
        ("main_sogclr", ("--gamma", 1.5), ("--gamma: 1.5 is above 1",)),
        ("main_sogclr", ("--crop-min", 0), ("--crop-min: 0 is not above 0",)),
        ("main_sogclr", ("--crop-min", 2), ("--crop-min: 2 is above 1",)),
        ("main_sogclr", ("--loss_type", "dlc"), ("--loss-type", "dcl")),
        (
            "main_sogclr",
            ("--recipe", "multicrop"),
            ("--recipe multicrop", "6 views, but two are needed"),
        ),
        ("main_fnc", ("--temperature", 0), ("--temperature: 0 is below 0.001",)),
        ("main_fnc", ("--fn-threshold", 1.1), ("--fn-threshold", "[-1, 1]", "1.1")),
        ("main_fnc", ("--ema", 2), ("--ema: 2", "[0, 1]")),
        ("main_fnc", ("--fn-mode", "drop"), ("--fn-mode", "eliminate")),
        (
            "main_fnc",
            ("--memory-multiplier", 9),
            ("--memory-multiplier 9", "10 views", "give 10 or more", "0 for none"),
        ),
        ("main_fnc", ("--memory-multiplier", 4, "--accumulation-steps", 2), ("give 5 or more",)),
        ("main_fnc", ("--randaugment", 2, 11), ("--randaugment 2 11", "from 0 to 10")),
        ("main_fnc", ("--use_tpu=True",), ("--use-tpu: GPUs", "--multiprocessing-distributed")),
        ("main_fnc", ("--model_dir=gs://b/run",), ("--model-dir: use --save-dir DIR",)),
        ("main_fnc", ("--nouse_tpu",), ("--nouse-tpu: GPUs",)),
        ("main_fnc", ("-use_tpu=true",), ("-use_tpu: GPUs",)),
        ("main_fnc", ("--dataset=imagenet2013",), ("unknown dataset", "the nearest is 'imagenet'")),
        ("main_fnc", ("--train_mode=finetune",), ("--train-mode:", "main_semisup.py fine-tunes")),
        ("main_fnc", ("--train_epoch", 1), ("--train-epoch", "nearest is '--train-epochs'")),
        ("main_adco", ("--mem-t", 0), ("--mem-t",)),
        ("main_adco", ("--moco-t", -1), ("--moco-t",)),
        ("main_adco", ("--mem_momentum", 1), ("--mem-momentum",)),
        ("main_adco", ("--cos", 3), ("--cos", "0|1|2")),
        ("main_adco", ("--sym", 2), ("--sym", "0|1")),
        ("main_adco", ("--cluster", 0), ("--cluster",)),
        ("main_adco", ("--memory_rl", 1), ("--memory-rl", "--memory-lr")),
        ("main_adco", ("--recipe", "probe"), ("--recipe probe", "1 views, but two are needed")),
        ("main_adco", ("--recipe", "mocov2", "--multi-crop"), ("--recipe mocov2", "more than two")),
        ("main_adco", ("--crop-min", 1.5), ("--crop-min: 1.5 is above 1",)),
        ("main_adco", ("--sym=maybe",), ("'maybe'", "true or false")),
        ("main_adco", ("--data", "elsewhere", "--sym", "False"), ("two data folders", "elsewhere")),
        ("main_adco", ("--momentum", -1), ("--momentum: -1 is below 0",)),
        ("main_adco", ("--momentum", 0, "--nesterov"), ("--momentum 0", "above 0")),
    ],
)
def test_mistakes_are_one_line(name, options, words, script, shared_images):
    refused(script(name, shared_images, *SMALL, *options), *words)


def test_a_checkpoint_of_another_data_set_is_not_resumed(checkpoints, images, script, tmp_path):
    method, *options = METHODS["sogclr"]
    command = (images, *options, *SMALL, "--resume", checkpoints["sogclr"], "--save-dir", tmp_path)
    refused(script(method, *command), "was trained on 48 images", "has 24")


@pytest.mark.parametrize("word", ["0", "False", "false"])
def test_a_switch_takes_a_word_or_a_number_and_leaves_the_folder_alone(word):
    off, on = (
        ("--sym", word, "--mlp", word, "--no-aug-plus"),
        ("--sym", "True", "--mlp", "1", "--aug-plus"),
    )
    for options, state in ((off, False), (on, True)):
        for argv in ((*options, "DIR"), ("DIR", *options), ("--data=DIR", *options)):
            args = settings(main_adco, argv)
            assert (args.data, args.sym, args.mlp, args.aug_plus) == ("DIR", state, state, state), (
                argv
            )
    assert settings(main_adco, ["--cos", "DIR"]).cos is True


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("randaugment: [2]", ("randaugment: [2] is not a list of 2",)),
        ("randaugment: [2, 7, 1]", ("is not a list of 2",)),
        ("use_tpu: true", ("use_tpu: GPUs are found automatically",)),
    ],
)
def test_mistakes_in_yaml_are_one_line(line, words, script, shared_images, tmp_path):
    (tmp_path / "c.yaml").write_text(line)
    refused(script("main_fnc", shared_images, "--cfg", tmp_path / "c.yaml"), *words)


def test_off_in_yaml_is_a_word(tmp_path):
    (tmp_path / "c.yaml").write_text("fn-mode: off\namp: off\n")
    args = settings(main_fnc, ["DIR", "--cfg", str(tmp_path / "c.yaml")])
    assert (args.fn_mode, args.amp) == ("off", "off")


def test_yaml_has_no_negated_names(script, shared_images, tmp_path):
    (tmp_path / "c.yaml").write_text("no-mlp: true")
    refused(script("main_adco", shared_images, "--cfg", tmp_path / "c.yaml"), "no-mlp", "nearest")


def test_no_labels_no_precision(script, shared_images, tmp_path):
    """Log the precision of false negatives only if the images have labels, in several folders."""
    method, *options = METHODS["fnc"]
    (tmp_path / "images" / "train").mkdir(parents=True)
    shutil.copytree(shared_images / "train", tmp_path / "images" / "train" / "all")
    seen = {}
    for data in (shared_images, tmp_path / "images"):
        status, _, err = script(
            method, data, *options, *SMALL, "-p", 1, "--save-dir", tmp_path / data.name / "run"
        )
        assert status == 0, err
        seen[data] = [set(line) for line in facts(tmp_path / data.name / "run")]
    with_labels, without = seen.values()
    assert all("fn_found" in names for names in with_labels + without)
    assert any("fn_precision" in names for names in with_labels) and not any(
        "fn_precision" in names for names in without
    )


def test_less_memory_the_same_run(script, shared_images, tmp_path):
    """Blocks computed again for the gradient, and the loss in chunks of another size."""
    method, *options = METHODS["fnc"]
    states = []
    for more in ((), ("--grad-checkpoint",), ("--loss-chunk", 3)):
        run = tmp_path / "".join(map(str, more))
        status, _, err = script(method, shared_images, *options, *SMALL, *more, "--save-dir", run)
        assert status == 0, err
        states.append(load(run / "checkpoint_0000.pth.tar")["state_dict"])
    assert same(states[0], states[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[2][name], tensor, rtol=1e-3, atol=1e-4)


def test_rates_follow_the_step_and_the_total_batch(script, shared_images, tmp_path):
    """Train with 48 images, in 3 steps of 2 x 8 per epoch.

    The warm-up from 0 takes one epoch, the half cosine two.
    """
    options = (
        "--mlp-dim",
        16,
        "--dim",
        8,
        "--accumulation-steps",
        2,
        "--lr",
        0.1,
        "--warmup-epochs",
        1,
        "-p",
        1,
    )
    command = (shared_images, *SMALL[:-1], 3, *options, "--save-dir", tmp_path)
    status, out, err = script("main_sogclr", *command)
    assert status == 0 and "lr after scaling 0.4 (sqrt scaling)" in out, err
    rates = [line["lr"] for line in facts(tmp_path)]
    cosine = [0.2 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([0, 0.4 / 3, 0.8 / 3, *cosine])
