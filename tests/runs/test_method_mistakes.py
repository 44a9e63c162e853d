"""Test the data sets that methods name, and mistakes in their options and recipes."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import settings
from method_helpers import METHODS, SMALL
from run_helpers import load, refused, typed

import main_adco
import main_fnc
import main_lincls

pytestmark = pytest.mark.slow


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
        *typed("--knn-every 1 --save-dir {}", tmp_path / "run"),
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
        *typed("--image-size 32 -j 0 -b 8 --k 5 --pretrained {}", file),
        "--save-dir",
        tmp_path / "knn",
    )
    dump = ("--dump-features", tmp_path / "features")
    assert script("main_knn", shared_images, *knn, *chosen, *dump)[0] == 0
    refused(script("main_knn", shared_images, *knn, *dump), "holds features")
    load_them = (
        *typed("--load-features {} --k 5 --save-dir {}", tmp_path / "features", tmp_path / "again"),
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
        ("main_sogclr", ("--loss_type", "hcl"), ("--loss-type", "'hcl' is not dcl or simclr")),
        ("main_sogclr", ("--loss", "hlc"), ("--loss", "hcl")),
        ("main_sogclr", ("--loss", "hcl", "--tau-plus", 1), ("--tau-plus: 1 is not below 1",)),
        ("main_sogclr", ("--loss", "hcl", "--anneal", "down", "--epochs", 8), ("--anneal down",)),
        (
            "main_sogclr",
            ("--loss", "isogclr", "--t-range", 0.2, 0.5),
            ("--t-range 0.2 0.5", "--t is 0.1"),
        ),
        (
            "main_synco",
            ("--loss", "hcl", "--n-hard", 8, "--n1", 2),
            ("--loss hcl", "2 synthetic negatives"),
        ),
        (
            "main_sogclr",
            ("--recipe", "multicrop"),
            ("--recipe multicrop", "6 views, but two are needed"),
        ),
        ("main_fnc", ("--temperature", 0), ("--temperature: 0 is below 0.001",)),
        ("main_fnc", ("--fn-threshold", 1.1), ("--fn-threshold", "[-1, 1]", "1.1")),
        ("main_fnc", ("--ema", 2), ("--ema: 2", "[0, 1]")),
        ("main_fnc", ("--fn-mode", "drop"), ("--fn-mode", "eliminate")),
        ("main_fnc", ("--fn-from", "label"), ("--fn-from", "labels")),
        ("main_fnc", ("--fn-from", "labels", "--fn-topk", 0), ("--fn-topk 0", "--fn-from labels")),
        (
            "main_fnc",
            ("--memory-multiplier", 9),
            ("--memory-multiplier 9", "10 views", "give 10 or more", "0 for none"),
        ),
        ("main_fnc", ("--memory-multiplier", 4, "--accumulation-steps", 2), ("give 5 or more",)),
        ("main_fnc", ("--recipe", "multicrop"), ("--recipe multicrop: its views have", "one size")),
        ("main_fnc", ("--randaugment", 2, 11), ("--randaugment 2 11", "from 0 to 10")),
        ("main_fnc", ("--use_tpu=True",), ("--use-tpu: GPUs", "--multiprocessing-distributed")),
        ("main_fnc", ("--model_dir=gs://b/run",), ("--model-dir: use --save-dir DIR",)),
        ("main_fnc", ("--nouse_tpu",), ("--nouse-tpu: GPUs",)),
        ("main_fnc", ("-use_tpu=true",), ("-use_tpu: GPUs",)),
        ("main_fnc", ("--dataset=imagenet2013",), ("unknown dataset", "the nearest is 'imagenet'")),
        ("main_fnc", ("--train_mode=finetune",), ("here is: main_lincls.py --protocol fnc",)),
        ("main_fnc", ("--train_epoch", 1), ("--train-epoch", "nearest is '--train-epochs'")),
        ("main_adco", ("--mem-t", 0), ("--mem-t",)),
        ("main_adco", ("--moco-t", -1), ("--moco-t",)),
        ("main_adco", ("--mem_momentum", 1), ("--mem-momentum",)),
        ("main_adco", ("--cos", 3), ("--cos", "0|1|2")),
        ("main_adco", ("--sym", 2), ("--sym", "0|1")),
        ("main_adco", ("--cluster", 0), ("--cluster",)),
        ("main_adco", ("--memory_rl", 1), ("--memory-rl", "--memory-lr")),
        ("main_adco", ("--recipe", "probe"), ("--recipe probe", "1 view, but two are needed")),
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


@pytest.mark.parametrize("form", ["folder", "list"])
def test_a_checkpoint_of_other_images_is_resumed_with_a_warning(
    form, checkpoints, shared_images, script, tmp_path
):
    """Give as many images, with other names or labels, or in another order."""
    method, *options = METHODS["sogclr"]
    data = Path(shutil.copytree(shared_images, tmp_path / "images"))
    run = tmp_path / "run"

    def resumed(*more):
        words = (data, *options, *SMALL, "--save-dir", run, *more)
        status, out, err = script(method, *words)
        assert status == 0, err
        return "was trained on other images than those in" in out

    if form == "folder":
        again = ("--resume", checkpoints["sogclr"], "--epochs", 2, "--allow-change", "epochs")
        assert not resumed(*again)  # in another place
        shutil.rmtree(run)
        (data / "train" / "class0" / "0.jpg").rename(data / "train" / "class1" / "moved.jpg")
        assert resumed(*again)
        return
    names = sorted(str(path) for path in data.rglob("train/*/*.jpg"))
    names_file = tmp_path / "names.txt"
    names_file.write_text("\n".join(names))
    assert not resumed("--file-list", names_file)
    again = ("--file-list", names_file, "--resume", "auto", "--epochs", 2)
    again += ("--allow-change", "epochs")
    names_file.write_text("\n".join(reversed(names)))
    assert resumed(*again)


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
        ("randaugment: [2]", ("randaugment: [2] is not a list of 2, each a whole number",)),
        ("randaugment: 2", ("randaugment: 2 is not a list of 2, each a whole number",)),
        ("grad-compress: true", ("c.yaml: grad-compress: true is not one of off, bf16",)),
        ("fn-topk: true", ("c.yaml: fn-topk: true is not a whole number in [0, ",)),
        ("lr: [1, 2]", ("c.yaml: lr: [1, 2] is not a number in [0, ",)),
        ("save-dir: true", ("c.yaml: save-dir: true is not text",)),
        ("schedule: 0.5", ("schedule: 0.5 is not a list of values, each a whole number in [0, ",)),
        ("train-epochs: 3\nepochs: 4", ("train-epochs and epochs are the same option",)),
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
