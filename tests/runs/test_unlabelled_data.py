"""Pre-training on images without labels: flat folders, nested folders, and lists of files."""

import importlib
import os
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT, write_images
from run_helpers import INPUT, PRETRAIN, facts, refused, typed
from voc_tree import write_voc

from moco.launch import launch

STEPS = (*PRETRAIN, *typed("--epochs 4 -p 1 --n-hard 8 --n1 2 --n4 2 --warmup-epochs 1"))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same 24 images as class folders, flat, nested, without val, and as a list."""
    top = tmp_path_factory.mktemp("layouts")
    classes = write_images(top / "classes")
    files = sorted((classes / "train").rglob("*.jpg"))
    for name in ("flat", "split/train"):
        (top / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, top / name / f"{file.parent.name}-{file.name}")
    shutil.copytree(classes / "train", top / "nested" / "of" / "all")
    shutil.copytree(classes / "train", top / "train_only" / "train")
    lines = [f"classes/train/{file.relative_to(classes / 'train')}" for file in files]
    (top / "list.txt").write_text("\n".join(lines))
    return top


@pytest.fixture(scope="module")
def run_of(layouts, tmp_path_factory):
    """Pre-train on a layout. Return what the run printed, and its folder. Each run runs once."""
    from conftest import in_process

    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("run") / "run"
            data = ("--file-list", layouts / "list.txt") if name == "list" else (layouts / name,)
            status, out, err = in_process("main_synco", *data, *STEPS, "--save-dir", folder)
            assert (status, err) == (0, ""), err
            done[name] = out, folder
        return done[name]

    return run


@pytest.mark.parametrize("name", ["flat", "split", "nested", "train_only", "list"])
def test_losses_are_those_of_the_same_images_in_class_folders(name, run_of):
    log = facts(run_of("classes")[1])
    assert len(log) == 12 and len({line["loss"] for line in log}) == 12
    assert facts(run_of(name)[1]) == log


@pytest.mark.parametrize("name", ["classes", "flat", "nested", "train_only", "list"])
def test_the_start_says_what_the_images_are(name, run_of, layouts):
    out, folder = run_of(name)
    place = {"list": layouts, "classes": layouts / "classes" / "train"}.get(name, layouts / name)
    place = place / "train" if name == "train_only" else place
    labels = "of 2 classes" if name in ("classes", "train_only") else "without labels"
    assert f"synco resnet18: 24 images {labels} in {place}\n" in out
    assert (
        "its folders are not classes; to use them as classes, move them into train/" in out
    ) == (name == "nested")
    assert (f"the images are those that {layouts / 'list.txt'} names" in out) == (name == "list")
    options = yaml.safe_load((folder / "args.yaml").read_text())
    assert options["file_list"] == (str(layouts / "list.txt") if name == "list" else None)


@pytest.mark.parametrize("name", ["classes", "flat", "train_only", "list"])
def test_the_end_suggests_commands_that_work(name, run_of):
    said = run_of(name)[0].split("commands to run next:")[1]
    evaluated = name == "classes"
    assert ("main_knn.py" in said) == ("main_lincls.py" in said) == evaluated
    embeds = (ROOT / "tools" / "embed.py").exists() and name in ("flat", "train_only")
    assert ("tools/embed.py" in said) == embeds and "tools/report.py" in said


def test_every_method_takes_a_list(layouts, tmp_path, monkeypatch, script):
    monkeypatch.setattr(launch, "launch", lambda worker, args: None)
    for path in sorted(ROOT.glob("main_*.py")):
        pretrains = not hasattr(importlib.import_module(path.stem).parser().config, "encoder")
        words = (path.stem, *typed("--image-size 32 -b 8 -j 0"), "--save-dir", tmp_path / path.stem)
        words += ("--file-list", layouts / "list.txt")
        if path.stem == "main_fnc":
            words += ("--fn-topk", 1)
        result = script(*words)
        if pretrains:
            assert result[0] == 0, result
        else:
            refused((result[0], result[1], result[2].replace("no data folder", "")), "--file-list")


def test_fnc_counts_no_true_labels_without_labels(layouts, tmp_path, script):
    words = (
        *INPUT,
        *typed(
            "--epochs 1 -p 1 --fn-topk 1 --support-size 0 --memory-multiplier 2 --fn-threshold 0"
        ),
    )
    for name in ("flat", "train_only"):
        folder = tmp_path / name
        status, _, err = script("main_fnc", layouts / name, *words, "--save-dir", folder)
        assert status == 0, err
        logged = {metric for line in facts(folder) for metric in line}
        assert "fn_found" in logged and ("fn_precision" in logged) == (name == "train_only")


WRONG = [
    ("flat --knn-every 1", "its images have no labels", "--knn-every 0"),
    ("split --knn-every 1", "no class folders", "--knn-every 0"),
    ("train_only --knn-every 1", "has no val/ folder", "--knn-every 0"),
    ("flat --probe-online", "its images have no labels", "; or leave out --probe-online"),
    ("train_only --probe-online", "has no val/ folder", "; or leave out --probe-online"),
    ("--file-list {list} --probe-online", "--probe-online: the images of --file-list have no"),
    ("flat --class-list {list}", "--class-list: the images of", "have no labels; leave"),
    ("flat --data-name imagenet100", "--data-name: the images of", "have no labels; leave"),
    ("--file-list {list} --knn-every 1", "--knn-every: the images of --file-list have no labels",
     "give --knn-every 0"),
    ("--file-list {list} --class-list {list}", "--class-list: the images of --file-list have"),
    ("--file-list {list} --data-name imagenet100", "--data-name: the images of --file-list have"),
    ("--file-list {list} photos", "--file-list has no effect: --dataset, or the word photos"),
    ("--file-list {list} --dataset photos", "--file-list has no effect: --dataset, or the word"),
    ("--file-list {list} --dataset cifar10", "--file-list has no effect: --dataset, or the word"),
    ("--file-list {list} nowhere", "nowhere: no such folder; give the one at which the paths"),
    ("--file-list {list} flat", "list.txt, line 1: ", "no such file; relative paths start at"),
    ("--file-list none.txt", "--file-list none.txt: cannot be read (No such file or directory)"),
    ("--file-list s3://bucket/list.txt", "--file-list s3://bucket/list.txt: is a URL"),
    ("list.txt", "is a file, and a folder is needed"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), [(words, said) for words, *said in WRONG])
def test_what_needs_labels_or_contradicts_is_refused(words, said, script, layouts, monkeypatch):
    monkeypatch.chdir(layouts)
    words = words.format(list="list.txt").split()
    refused(script("main_synco", *words, *PRETRAIN, "--save-dir", layouts / "refused"), *said)
    assert not (layouts / "refused").exists() and not (layouts / "data").exists()


LABELS = [("main_sogclr", "--loss supcon"), ("main_fnc", "--fn-from labels")]
NO_LABELS = [
    ("flat", "have no labels"),
    ("nested", "have no labels"),
    ("--file-list {list}", "have no labels"),
    ("classes --class-list {one}", "are of one class"),
    ("--dataset voc2007 {voc}", "each image of voc2007 has several labels"),
]


@pytest.mark.parametrize(("name", "option"), LABELS)
@pytest.mark.parametrize(("words", "said"), NO_LABELS)
def test_a_loss_with_labels_refuses_data_without_before_processes_start(
    words, said, name, option, script, layouts, tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "launch", lambda worker, args: pytest.fail("processes start"))
    monkeypatch.chdir(layouts)
    (tmp_path / "one.txt").write_text(min(os.listdir("classes/train")))
    voc = write_voc(tmp_path / "voc", 12, 6)
    words = words.format(list="list.txt", one=tmp_path / "one.txt", voc=voc).split()
    command = (name, *words, *INPUT, *option.split(), "--save-dir", tmp_path / "run")
    refused(script(*command), f"{option}: trains on labels, but", said, "train/CLASS/")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("saved", "warns"), [("supcon", 1), ("fnc-labels", 1), ("simclr", 0)])
def test_few_labels_after_a_training_on_all_of_them(saved, warns, script, shared_images, tmp_path):
    """A line says that pre-training has used more labels than the evaluation."""
    method = {
        "supcon": ("main_sogclr", "--loss", "supcon"),
        "simclr": ("main_sogclr", "--loss", "simclr"),
        "fnc-labels": (
            "main_fnc",
            *"--fn-from labels --support-size 0 --memory-multiplier 2 --randaugment 0 0".split(),
        ),
    }[saved]
    run = (method[0], *INPUT, *method[1:], "--epochs", 1, "--save-dir", tmp_path / "run")
    status, _, err = script(*run, shared_images)
    assert status == 0, err
    few = ("main_semisup", *INPUT[2:], "--epochs", 1, "--train-percent", 10, "--protocol", "synco")
    few = (*few, "--pretrained", tmp_path / "run" / "checkpoint_0000.pth.tar")
    status, out, err = script(*few, "--save-dir", tmp_path / "few", shared_images)
    assert status == 0, err
    assert "training images are labelled" in out
    said = f"the encoder was pre-trained with {saved} on the labels of all its images"
    assert out.count(said) == warns


def test_a_list_of_a_recipe_gives_way_to_a_data_set(script, layouts, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda worker, args: None)
    (tmp_path / "c.yaml").write_text(f"file-list: {layouts / 'list.txt'}\n")
    words = ("--cfg", tmp_path / "c.yaml", *PRETRAIN, "--save-dir", tmp_path / "run")
    status, out, err = script("main_synco", "photos", *words)
    assert (status, err) == (0, "") and "c.yaml has no effect: --dataset, or the word" in out
    assert script("main_synco", *words) == (0, "", "")


@pytest.mark.parametrize("name", ["main_knn", "main_lincls", "main_semisup"])
@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("flat", "its images have no labels"),
        ("nested", "its images have no labels"),
        ("split", "holds images but no class folders"),
        ("train_only", "docs/data.md has a command that makes val/"),
    ],
)
def test_an_evaluation_needs_labels_and_val(name, layout, said, script, layouts, tmp_path):
    words = (layouts / layout, *INPUT, "--save-dir", tmp_path / "run")
    result = script(name, *words)
    refused(result, said, "tools/embed.py writes the features of the images in any folder")
    assert "image-net.org" not in result[2]


def test_features_of_a_folder_without_val_are_left_to_another_tool(script, layouts, tmp_path):
    words = (layouts / "train_only", *INPUT[:4], "--dump-features", tmp_path / "dump")
    refused(script("main_knn", *words), "tools/embed.py writes the features")
    assert not (tmp_path / "dump").exists()


def test_a_resumed_run_needs_the_same_list(script, layouts, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other.txt"
    lines = (layouts / "list.txt").read_text().splitlines()
    base = ("main_synco", layouts, *PRETRAIN, "--epochs")
    first = (*base, 1, "--save-dir", run, "--file-list")
    assert script(*first, layouts / "list.txt")[0] == 0
    again = (*base, 2, "--save-dir", run, "--resume", "auto", "--file-list")
    other.write_text("\n".join(reversed(lines)))
    refused(script(*again, other), "--file-list is", "and was", "--allow-change file-list")
    unset = ("main_synco", layouts / "flat", *again[2:-1])
    refused(script(*unset), "--file-list is unset, and was")
    other.write_text("\n".join(lines[:-1]))
    changed = (*again, other, "--allow-change", "file-list")
    refused(script(*changed), "was trained on 24 images, but", "has 23")
    status, out, err = script(*again, layouts / "list.txt")
    assert (status, err) == (0, "") and "resumed from" in out


def test_an_image_of_a_list_that_cannot_be_read_is_named(script, layouts, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    lines = (layouts / "list.txt").read_text().splitlines()
    (tmp_path / "list.txt").write_text("\n".join([*lines, f"{tmp_path}/bad.jpg"]))
    words = (layouts, *PRETRAIN, "--epochs", 1, "--save-dir", tmp_path / "run")
    words += ("--file-list", tmp_path / "list.txt", "--on-bad-image", "error")
    refused(script("main_synco", *words), f"{tmp_path}/bad.jpg: unreadable image")


def test_the_documented_command_makes_val(layouts, tmp_path, script):
    page = (ROOT / "docs" / "data.md").read_text().split("## Make val/")[1]
    command = page.split("```")[1].strip()
    data = shutil.copytree(layouts / "train_only", tmp_path / "DIR")
    before = {file.name for file in data.rglob("*.jpg")}
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True)
    counts = {
        str(folder.relative_to(data)): len(list(folder.iterdir())) for folder in data.glob("*/*")
    }
    assert counts == {
        "train/class0": 10, "train/class1": 10, "val/class0": 2, "val/class1": 2
    }  # fmt: skip
    assert {file.name for file in data.rglob("*.jpg")} == before
    words = (data, *INPUT, "--k", 1, "--save-dir", tmp_path / "run")
    assert script("main_knn", *words)[0] == 0


def test_show_views_draws_a_list(layouts, tmp_path, call):
    for words in (
        ("mocov2", "--file-list", layouts / "list.txt"),
        ("mocov2", layouts, "--file-list", layouts / "list.txt"),
    ):
        out = tmp_path / f"{len(words)}.png"
        more = (*typed("--images 2 --image-size 32"), "--out", out)
        assert call("tools.show_views", *words, *more)[0] == 0
    assert (tmp_path / "3.png").read_bytes() == (tmp_path / "4.png").read_bytes()
    wrong = ("mocov2", "photos", "--file-list", layouts / "list.txt", "--out", tmp_path / "w.png")
    refused(call("tools.show_views", *wrong), "--file-list has no effect: the word photos")
    (tmp_path / "empty.txt").write_text("")
    wrong = ("mocov2", "--file-list", tmp_path / "empty.txt", "--out", tmp_path / "w.png")
    refused(call("tools.show_views", *wrong), "names no image")


def test_show_views_draws_the_list_of_a_run_unless_data_is_given(run_of, layouts, tmp_path, call):
    cfg = ("--cfg", run_of("list")[1] / "args.yaml", *typed("--images 2"))
    flat = ("--cfg", run_of("flat")[1] / "args.yaml", *typed("--images 2"))
    for i, words in enumerate((cfg, flat, (layouts / "flat", *cfg))):
        status, _, err = call("tools.show_views", *words, "--out", tmp_path / f"{i}.png")
        assert status == 0, err
    pictures = [(tmp_path / f"{i}.png").read_bytes() for i in range(3)]
    assert pictures[1] == pictures[2] != pictures[0]  # the names of the images differ
