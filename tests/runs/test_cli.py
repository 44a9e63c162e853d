"""Test the command line: bad input, options, YAML defaults and launch plans.

Bad input ends with one clear line and status 2.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction

import pytest
import torch
import yaml
from conftest import ROOT, own_lines, settings, shell, wants_detectron2
from PIL import Image
from run_helpers import INPUT, SMALL, options, refused

import main_lincls
import main_synco
import moco
from moco.data import cache
from moco.errors import InputError, unknown
from moco.launch import launch


def test_what_other_packages_print_is_no_failure(tmp_path):
    """Each process prints warnings like torch's, in Python and in C++; our line is found."""
    warned = "warnings.warn('`f` is deprecated. Please use `g`.', FutureWarning)"
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys, warnings\n{warned}\n{warned[:-1]}, stacklevel=2)\n"
        "print('[rank1]:[W1126 10:00:00.1 ProcessGroup.cpp:1] Warning: no device', "
        "file=sys.stderr)\n"
    )
    done = shell("main_synco.py", tmp_path / "nowhere", *SMALL, env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr.count("FutureWarning: `f`") == 2 and "[W1126" in done.stderr
    refused((done.returncode, done.stdout, done.stderr), "nowhere", "no such folder")
    with pytest.raises(AssertionError):
        refused((2, "", f"{done.stderr}another line\n"))
    with pytest.raises(AssertionError):
        own_lines("Traceback (most recent call last):\n")


# data


def test_missing_folder(script, tmp_path):
    refused(script("main_synco", tmp_path / "nowhere", *SMALL), "nowhere", "no such folder")


def test_no_data_given(script):
    refused(script("main_synco", *SMALL), "no data folder", "photos")


def test_no_train(script, tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    refused(script("main_synco", tmp_path, *SMALL), "no train/")


def test_no_val(script, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    either = "expected val/CLASS/*.jpg or test/CLASS/*.jpg"
    refused(script("main_lincls", tmp_path, "-a", "resnet18"), "no val/", either)
    refused(script("main_knn", tmp_path, "-a", "resnet18"), "no val/", either)
    refused(
        script("main_synco", tmp_path, *SMALL, "--knn-every", 1), "no val/", either, "--knn-every 0"
    )


@pytest.mark.parametrize("launch", ["spawn", "torchrun"])
def test_the_line_on_test_in_place_of_val_is_printed_once(launch, images, tmp_path):
    (images / "val").rename(images / "test")
    words = ("main_knn.py", images, "-a", "resnet18", "--image-size", 32, "-b", 8, "-j", 0)
    if launch == "spawn":
        words += ("--device", "cpu", "--multiprocessing-distributed", "--nproc-per-node", 2)
    else:
        words = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            2,
            *words,
            "--device",
            "cpu",
        )
    done = shell(*words, "--save-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no val/; test/ is used instead") == 1, done.stderr


def test_flat_val(script, images):
    for folder in (images / "val").iterdir():
        for file in folder.iterdir():
            file.rename(images / "val" / f"{folder.name}-{file.name}")
        folder.rmdir()
    refused(script("main_lincls", images, "-a", "resnet18"), "val", "no class folders")


def test_val_with_one_class(script, images):
    (images / "val" / "class1").rename(images / "class1")
    refused(script("main_lincls", images, "-a", "resnet18"), "val", "one class")


def test_val_classes_that_are_not_trains(script, images):
    (images / "val" / "class1").rename(images / "val" / "stranger")
    refused(script("main_knn", images, "-a", "resnet18"), "stranger", "not among train's")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(script, images, tmp_path, workers):
    (images / "train" / "class0" / "3.jpg").write_text("no image")
    result = script(
        "main_synco",
        images,
        *SMALL,
        "-j",
        workers,
        "--save-dir",
        tmp_path / "run",
        "--on-bad-image",
        "error",
    )
    refused(result, "class0/3.jpg", "unreadable")


def test_empty_image_is_named(script, images, tmp_path):
    (images / "train" / "class1" / "0.jpg").write_bytes(b"")
    result = script(
        "main_synco", images, *SMALL, "--save-dir", tmp_path / "run", "--on-bad-image", "error"
    )
    refused(result, "class1/0.jpg", "empty")


def test_truncated_image_is_named(script, images, tmp_path):
    file = images / "train" / "class1" / "0.jpg"
    file.write_bytes(file.read_bytes()[:400])
    result = script(
        "main_synco", images, *SMALL, "--save-dir", tmp_path / "run", "--on-bad-image", "error"
    )
    refused(result, "class1/0.jpg", "unreadable")


def losses(run):
    """Return the losses in a run's log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_caching_images_in_memory_changes_no_loss(script, images, tmp_path):
    (images / "train" / "class0" / "3.jpg").write_text("no image")
    found = {}
    for mode in ("on", "off"):
        # views of 8 pixels are too small to crop a batch at once, which may change a pixel by 1
        options = (*SMALL, "--image-size", 8, "-p", 1, "--save-dir", tmp_path / mode)
        status, out, err = script("main_synco", images, *options, "--cache-images", mode)
        assert (
            status == 0
            and err.count("skipped, another image is used instead") == 1
            and "class0/3.jpg" in err
        )
        assert ("images stay in memory: about" in out) == (mode == "on")
        found[mode] = losses(tmp_path / mode)
    assert len(found["on"]) == 3 and found["on"] == found["off"]


def test_cache_images_on_is_refused_if_the_images_do_not_fit(script, images, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 100_000)
    result = script(
        "main_synco", images, *SMALL, "--save-dir", tmp_path / "run", "--cache-images", "on"
    )
    refused(result, "--cache-images on", "leave the option out, or free memory")


def test_cache_images_is_refused_by_a_script_that_reads_each_image_once(script, images):
    refused(
        script("main_knn", images, "-a", "resnet18", "--cache-images", "on"),
        "reads each image once",
    )


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_on_and_off_in_a_recipe_are_words(tmp_path, mode):
    """YAML reads them as true and false."""
    (tmp_path / "recipe.yaml").write_text(f"cache-images: {mode}\n")
    assert settings(main_synco, ["photos", "--cfg", tmp_path / "recipe.yaml"]).cache_images == mode


def test_fewer_images_than_a_batch(script, images, tmp_path):
    refused(
        script("main_synco", images, *SMALL, "-b", 64, "--save-dir", tmp_path / "run"),
        "24 images",
        "--batch-size",
    )


# names


def test_unknown_arch_names_the_nearest(script, images):
    refused(script("main_synco", images, "-a", "resnet81"), "resnet81", "nearest is 'resnet18'")


def test_unknown_recipe_names_the_nearest(script, images):
    refused(
        script("main_synco", images, *SMALL, "--recipe", "moco_v2"),
        "moco_v2",
        "nearest is 'mocov2'",
    )


def test_unknown_option_names_the_nearest(script, images):
    refused(
        script("main_synco", images, *SMALL, "--n-hrad", 5), "--n-hrad", "nearest is '--n-hard'"
    )


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("--wandb: no counterpart here", ["--wandb"]),
        ("--use-tpu: GPUs are found automatically", ["--use_tpu=True"]),
        ("--use-tpu: GPUs are found automatically", ["--use_tpu"]),
        ("--nouse-tpu: GPUs are found automatically", ["--nouse_tpu"]),
        ("--use-amp: use --amp fp16", ["--use_amp"]),
        ("--fp16: use --amp fp16", ["--fp16"]),
        ("--use-fp16: use --amp fp16", ["--use_fp16", "true"]),
        ("--out-dim: use --moco-dim", ["--out_dim", 256]),
        ("--lr-backbone: only main_semisup.py has this option", ["--lr-backbone", 0.1]),
        ("--sync-bn: each method chooses its batch norm", ["--sync_bn"]),
        ("--dist-on-itp: use --multiprocessing-distributed", ["--dist_on_itp"]),
        ("--queue-size: use --moco-k", ["--queue_size", 3]),
        ("--start-epoch: use --resume FILE", ["--start-epoch", 3]),
        ("unknown option '--zebra'; none is similar", ["--zebra"]),
    ],
)
def test_an_option_of_another_repository_says_what_to_use(script, images, said, options):
    refused(script("main_synco", images, *SMALL, *options), f"main_synco.py: error: {said}")


def test_what_an_option_of_another_repository_is_here_depends_on_the_script(script, images):
    for name, option in (
        ("main_adco", "--cluster"),
        ("main_moby", "--queue"),
        ("main_fnc", "--memory-multiplier"),
    ):
        refused(script(name, images, "--moco-k", 8), f"--moco-k: use {option}")
    for name in (
        "main_adco",
        "main_moby",
        "main_lincls",
        "main_semisup",
    ):  # SynCo's own is of its negatives
        refused(
            script(name, images, "--warmup-epochs", 8), "--warmup-epochs: use --lr-warmup-epochs"
        )


def test_what_is_the_same_under_another_name_is_taken(tmp_path):
    args = options(
        "d", "--num_workers", 3, "--output_dir", tmp_path, "--max_epochs=7", "--accum_iter", 2
    )
    assert (args.workers, args.save_dir, args.epochs, args.accumulation_steps) == (
        3,
        str(tmp_path),
        7,
        2,
    )


def test_the_published_command_of_fnc_shows_all_counterparts(script):
    command = (
        "--train_mode=pretrain --train_batch_size=4096 --train_epochs=100 --temperature=0.1 "
        "--learning_rate=0.1 --learning_rate_scaling=sqrt --weight_decay=1e-4 "
        "--data_dir=gs://b/d --model_dir=gs://b/run --use_tpu=True"
    )
    result = script("main_fnc", *command.split())
    refused(result, lines=4)
    names = (
        "--train-mode: this script pre-trains",
        "--data-dir: give the data folder as DIR",
        "--model-dir: use --save-dir DIR",
    )
    for line, said in zip(
        result[2].splitlines(), (*names, "--use-tpu: GPUs are found automatically"), strict=True
    ):
        assert line.startswith(f"main_fnc.py: error: {said}"), line


def test_several_unknown_options_are_a_line_each(script, images):
    result = script("main_synco", images, *SMALL, "--n-hrad", 5, "--wandb", "--bath-size=3")
    refused(
        result,
        "--n-hrad'; the nearest is '--n-hard'",
        "--wandb: no",
        "nearest is '--batch-size'",
        lines=3,
    )


@pytest.mark.parametrize(
    "name", ["wandb", "use-tpu", "fp16", "cuda", "trial", "hub", "tb-path", "name"]
)
def test_no_distant_name_is_suggested(name):
    assert "nearest" not in str(unknown("option", f"--{name}", main_synco.parser().names()))


def test_a_message_is_never_cut(script, tmp_path):
    folder = tmp_path / "a folder" / ("x" * 200) / ("y" * 200) / ("z" * 200)
    refused(
        script("main_synco", folder, *SMALL), str(folder), "no such folder", "or the word photos"
    )


@pytest.mark.parametrize(
    "text",
    ["moco_kk" + "x" * 900 + ": 3", "arch: " + "x" * 5_000_000, "lr: '" + "x" * 5_000_000 + "'"],
)
def test_what_a_file_holds_is_quoted_in_short(script, images, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    result = script("main_synco", images, "--cfg", tmp_path / "c.yaml")
    refused(result, "xxx ... xxx")
    assert len(result[2]) < 1500


def test_all_unknown_yaml_keys_are_named_up_to_a_bound(script, images, tmp_path):
    (tmp_path / "c.yaml").write_text("n_hrad: 5\nuse_tpu: true\n")
    refused(
        script("main_synco", images, "--cfg", tmp_path / "c.yaml"),
        "unknown key 'n_hrad'",
        "use_tpu: GPUs",
        lines=2,
    )
    (tmp_path / "c.yaml").write_text("".join(f"zebra{i}: 1\n" for i in range(10_000)))
    refused(
        script("main_synco", images, "--cfg", tmp_path / "c.yaml"),
        "and 9980 more unknown keys",
        lines=21,
    )


def test_unknown_yaml_key_names_the_nearest(script, images, tmp_path):
    (tmp_path / "c.yaml").write_text("n_hrad: 5\n")
    refused(
        script("main_synco", images, *SMALL, "--cfg", tmp_path / "c.yaml"),
        "unknown key 'n_hrad'",
        "nearest is 'n-hard'",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: fast\n", ["lr", "fast", "float"]),
        ("cos: 3\n", ["cos", "true or false"]),
        ("schedule: 120\n", ["schedule", "a list"]),
        ("epochs: 0\n", ["epochs", "below 1"]),
        ("amp: fp8\n", ["amp", "fp8", "bf16"]),
        ("- a\n", ["option: value"]),
        ("a: [1\n", ["not YAML"]),
    ],
)
def test_bad_yaml(script, images, tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    refused(script("main_synco", images, *SMALL, "--cfg", tmp_path / "c.yaml"), "c.yaml", *words)


def test_missing_yaml(script, images):
    refused(script("main_synco", images, "--cfg", "nowhere.yaml"), "nowhere.yaml", "No such file")


# numbers


def test_more_hard_negatives_than_queue_rows(script, images):
    refused(
        script("main_synco", images, *SMALL, "--n-hard", 33, "--n1", 1),
        "--n-hard 33",
        "--moco-k 32",
    )


def test_synthetic_negatives_without_hard_ones(script, images):
    refused(script("main_synco", images, *SMALL, "--n4", 1), "--n-hard")


@pytest.mark.parametrize(
    "option", [("--moco-t", 0), ("--moco-m", 1.5), ("--n1", -1), ("-b", 0), ("--epochs", "many")]
)
def test_numbers_out_of_range(script, images, option):
    refused(script("main_synco", images, *SMALL, *option), option[0])


def test_batch_smaller_than_processes(script, images):
    result = script(
        "main_synco",
        images,
        *SMALL,
        "-b",
        2,
        "--multiprocessing-distributed",
        "--nproc-per-node",
        3,
    )
    refused(result, "--batch-size 2", "3 processes")


# launch


ENTRIES = [
    *sorted(ROOT.glob("main_*.py")),
    *(ROOT / f"tools/{name}.py" for name in ("demo", "export", "report", "show_views")),
]
ENTRIES += [ROOT / "benchmarks" / "threads.py"]
ENTRIES += [
    ROOT / "detection" / "convert-pretrain-to-detectron2.py",
    pytest.param(ROOT / "detection" / "train_net.py", marks=(pytest.mark.slow, wants_detectron2)),
]
WHEN_TORCH_LOADS = """
import os, runpy, sys
class Finder:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.name)
def test_threads_wait_briefly_unless_the_user_chose(entry):
    """OpenMP reads the variable when torch is loaded."""
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    chosen = {"1000", "None"}  # by what else runs now
    for given, expected in (
        ({}, chosen),
        ({"GOMP_SPINCOUNT": "7"}, {"7"}),
        ({"OMP_NUM_THREADS": "1"}, {"None"}),
    ):
        command = [sys.executable, "-c", WHEN_TORCH_LOADS, str(entry)]
        done = subprocess.run(
            command, env=clean | given, capture_output=True, text=True, timeout=60, cwd=entry.parent
        )
        assert done.stdout.strip() in expected, done.stderr


@pytest.mark.parametrize(("running", "busy"), [(1, False), (2, False), (3, True), (9, True)])
def test_threads_wait_briefly_where_other_programs_run(running, busy, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    (tmp_path / "loadavg").write_text(f"0.20 0.18 0.12 {running}/257 11206\n")
    assert moco._is_busy(tmp_path / "loadavg") is busy
    assert not moco._is_busy(tmp_path / "absent")


# options without effect


IDLE = [
    ("main_synco", "--nproc-per-node 3", "--nproc-per-node has no effect"),
    ("main_synco", "--n-hard 8", "--n-hard has no effect"),
    (
        "main_synco",
        "--sigma 0.1 --n-hard 8 --n1 2",
        "--sigma has no effect: there are no noise negatives; give --n4",
    ),
    ("main_synco", "--delta 0.1", "--n5"),
    ("main_synco", "--eta 0.1", "--n6"),
    ("main_synco", "--warmup-epochs 3", "the learning rate's warm-up is --lr-warmup-epochs"),
    ("main_synco", "--lr-final 0.001", "--lr-final has no effect"),
    ("main_synco", "--cos --schedule 1 2", "--schedule has no effect"),
    ("main_synco", "--sgdr --cos", "--cos has no effect"),
    ("main_synco", "--sgdr-t0 3 --cos", "--sgdr-t0 has no effect"),
    ("main_synco", "--lr-by step", "--lr-by has no effect"),
    ("main_synco", "--sgdr --lr-by epoch-end", "--sgdr has no effect"),
    ("main_synco", "--bn-splits 1 --bn-splits-query", "--bn-splits-query has no effect"),
    ("main_synco", "--optimizer adamw --momentum 0.8", "--momentum has no effect"),
    ("main_synco", "--optimizer lars --nesterov", "--nesterov has no effect"),
    ("main_synco", "--knn-k 5", "--knn-k has no effect"),
    ("main_synco", "--knn-t 0.5", "--knn-t has no effect"),
    (
        "main_synco",
        "--aug-plus --recipe mocov1",
        "--aug-plus has no effect: --recipe already chooses the views",
    ),
    (
        "main_synco",
        "--bn-splits 4 --multiprocessing-distributed --nproc-per-node 2",
        "--bn-splits has no effect",
    ),
    ("main_adco", "--schedule 1", "--schedule has no effect"),
    ("main_adco", "--memory-lr 0 --mem-t 0.5", "--mem-t has no effect"),
    ("main_sogclr", "--loss-type simclr --gamma 0.5", "--gamma has no effect"),
    ("main_sogclr", "--num-proj-layers 1 --mlp-dim 64", "--mlp-dim has no effect"),
    ("main_fnc", "--fn-mode off --fn-topk 3", "--fn-topk has no effect"),
    ("main_fnc", "--fn-topk 0 --fn-threshold 0.1", "--fn-threshold has no effect"),
    ("main_fnc", "--memory-multiplier 0 --ema 0.9", "--ema has no effect"),
    ("main_moby", "--method byol --queue 64", "--queue has no effect"),
    ("main_moby", "--method byol --moco-t 0.1", "--moco-t has no effect"),
    ("main_moby", "--n4 3", "--n4 has no effect: only --method synco has synthetic negatives"),
    ("main_moby", "--synthetic-first 3", "--synthetic-first has no effect"),
    ("main_moby", "--proj-layers 1 --pred-layers 1 --mlp-dim 64", "--mlp-dim has no effect"),
    ("main_synco", "--output elsewhere", "--output has no effect: --save-dir names the run folder"),
    (
        "main_lincls",
        "--grad-checkpoint",
        "--grad-checkpoint has no effect: --weights freeze trains no block",
    ),
    ("main_lincls", "--save-every 2", "--save-every has no effect"),
    ("main_lincls", "--download", "--download has no effect"),
    ("main_semisup", "--weights freeze --lr-backbone 0.1", "--lr-backbone has no effect"),
    (
        "main_semisup",
        "--weights freeze --zero-init-classifier",
        "--zero-init-classifier has no effect",
    ),
    ("main_knn", "--recipe mocov2", "--recipe has no effect"),
    ("main_knn", "--crop-min 0.5", "--crop-min has no effect"),
    ("main_knn", "--blur-sigma 1 2", "--blur-sigma has no effect: this script uses centre crops"),
    ("main_knn", "--grad-checkpoint", "--grad-checkpoint has no effect"),
]


@pytest.fixture
def until_launch(script, images, tmp_path, monkeypatch):
    """Call a script up to the point where processes would start."""
    monkeypatch.setattr(launch, "launch", lambda worker, args: None)
    small = (images, "-a", "resnet18", "--image-size", 32, "-b", 8, "--save-dir", tmp_path / "run")
    return lambda name, words: script(name, *small, *words.split())


@pytest.mark.parametrize(("name", "words", "said"), IDLE)
def test_an_option_without_effect_is_refused(until_launch, name, words, said):
    refused(until_launch(name, words), said)


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        (
            "main_synco",
            "--world-size 1 --rank 0 --dist-url tcp://localhost:1",
            "--dist-url has no effect: the run has one process",
        ),
        ("main_synco", "--sigma 0.01", "--sigma has no effect"),  # as it is by default
        ("main_synco", "--cos --schedule 120 160", "--schedule has no effect"),
        ("main_sogclr", "--loss-type simclr --gamma 0.9", "--gamma has no effect"),
        ("main_knn", "--host-features", "--host-features has no effect"),
        ("main_synco", "--dist-backend gloo", "--dist-backend has no effect"),
        (
            "main_synco",
            "--schedule 30 --epochs 20",
            "--schedule has no effect: the run ends before the first of these",
        ),
    ],
)
def test_an_option_without_effect_that_changes_nothing_is_announced(
    until_launch, name, words, said
):
    status, out, err = until_launch(name, words)
    assert status == 0 and not err, err
    assert [line for line in out.splitlines() if line.startswith(said)], out


def test_options_with_an_effect_are_taken_in_silence(until_launch):
    for name, words in (
        (
            "main_synco",
            "--n-hard 8 --n1 1 --n4 2 --n5 2 --n6 2 --sigma 1 --delta 1 --eta 1 "
            "--warmup-epochs 1 --cos --lr-final 0.1",
        ),
        (
            "main_synco",
            "--no-cos --schedule 3 --no-sgdr --momentum 0.5 --nesterov "
            "--knn-every 1 --knn-k 3 --knn-t 1 --bn-splits 2",
        ),
        ("main_synco", "--sgdr --sgdr-t0 3 --lr-by step --lr-final 0.1 --world-size 1 --rank 0"),
        ("main_moby", "--method synco --n-hard 8 --n1 1 --sigma 1 --queue 64 --moco-t 0.5"),
        ("main_fnc", "--fn-topk 3 --fn-threshold 0.1 --ema 0.5"),
        ("main_semisup", "--weights finetune --lr-backbone 0.1 --zero-init-classifier"),
        ("main_knn", "--k 3 --temperature 0.5"),
    ):
        assert until_launch(name, words) == (0, "", ""), (name, words)


def test_a_recipe_may_hold_what_another_choice_leaves_without_effect(until_launch, tmp_path):
    (tmp_path / "c.yaml").write_text("n-hard: 8\nn4: 2\nsigma: 0.5\ndelta: 0.01\nsave-dir: null\n")
    status, out, err = until_launch("main_synco", f"--cfg {tmp_path / 'c.yaml'} --n4 0")
    assert status == 0 and not err
    assert [line.split(":")[0] for line in out.splitlines()] == [
        f"--sigma of {tmp_path}/c.yaml has no effect",
        f"--n-hard of {tmp_path}/c.yaml has no effect",
    ]
    assert until_launch("main_synco", f"--cfg {tmp_path / 'c.yaml'}") == (0, "", "")
    assert until_launch(
        "main_moby",
        "--cfg configs/moby_swin_tiny.yaml --method byol -a resnet18 --online-drop-path 0",
    )[1:] == (
        "",
        "",
    )


def test_what_was_given_is_not_among_the_options():
    assert not {"given", "own", "recipe_values", "rules"} & vars(options("d", "--lr", 1)).keys()


# checkpoints


@pytest.fixture
def checkpoint(script, images, tmp_path):
    status, _, err = script("main_synco", images, *SMALL, "--save-dir", tmp_path / "run")
    assert status == 0, err
    return tmp_path / "run" / "checkpoint_0000.pth.tar"


def test_truncated_checkpoint(script, images, checkpoint, tmp_path):
    broken = tmp_path / "broken.pth.tar"
    data = checkpoint.read_bytes()
    for length in (0, 100, len(data) // 2, len(data) - 10):
        broken.write_bytes(data[:length])
        refused(
            script("main_lincls", images, "--pretrained", broken),
            "broken.pth.tar",
            "not a readable checkpoint",
        )
    refused(
        script("main_synco", images, *SMALL, "--resume", broken, "--save-dir", tmp_path / "r"),
        "broken.pth.tar",
        "not a readable",
    )


def test_checkpoint_that_is_none(script, images, tmp_path):
    strange = tmp_path / "strange.pth.tar"
    strange.write_text("# a page of text")
    refused(
        script("main_lincls", images, "--pretrained", strange),
        "strange.pth.tar",
        "of another format",
    )
    torch.save({"state_dict": {}, "args": Namespace(lr=Fraction(1, 2))}, strange)
    refused(
        script("main_lincls", images, "--pretrained", strange),
        "strange.pth.tar",
        "holds Python objects",
    )


def test_checkpoint_of_another_arch(script, images, checkpoint, tmp_path):
    refused(
        script("main_lincls", images, "--pretrained", checkpoint, "-a", "resnet50"),
        "contains resnet18",
        "-a resnet18",
    )
    refused(
        script("main_lincls", images, "--pretrained", checkpoint, "-a", "resnet34"),
        "contains resnet18",
        "-a resnet18",
    )
    result = script(
        "main_synco",
        images,
        *SMALL,
        "-a",
        "resnet34",
        "--resume",
        checkpoint,
        "--save-dir",
        tmp_path / "r",
    )
    refused(result, "arch 'resnet18'", "'resnet34'")


def test_checkpoint_of_another_part(script, images, checkpoint, tmp_path):
    """A pre-training's where a classifier's is needed, and the reverse; --pretrained takes both."""
    for name, more in (("main_lincls", ()), ("main_semisup", ("--train-percent", 100))):
        resumed = (images, *INPUT, "--resume", checkpoint, "--save-dir", tmp_path / name)
        said = ("is a pre-training checkpoint", "give it with --pretrained instead of --resume")
        refused(script(name, *resumed), *said)
        refused(script(name, *resumed, "-e"), *said, "leave out --evaluate")
        trained = (images, *INPUT, *more, "--epochs", 1, "--save-dir", tmp_path / name)
        status, _, err = script(name, *trained, "--pretrained", checkpoint)
        assert status == 0, err
        classifier = tmp_path / name / "checkpoint.pth.tar"
        result = script(
            "main_synco", images, *SMALL, "--resume", classifier, "--save-dir", tmp_path / "r"
        )
        refused(
            result,
            "cannot be resumed here: it is a classifier's checkpoint",
            f"continue it with {name}.py",
        )
        knn = (
            images,
            *INPUT,
            "--k",
            3,
            "--pretrained",
            classifier,
            "--save-dir",
            tmp_path / f"knn-{name}",
        )
        status, out, err = script("main_knn", *knn)
        assert status == 0 and "120 of 120 backbone tensors matched (state_dict.module.*)" in out, (
            err
        )
        found = json.loads((tmp_path / f"knn-{name}" / "results.json").read_text())
        encoder = "moco" if name == "main_lincls" else "moco, fine-tuned"
        assert (found["method"], found["pretrain_epochs"]) == (encoder, 1)


def test_weights_of_other_software_are_not_resumed(script, images, checkpoint, tmp_path):
    weights = {"epoch": 200, "arch": "resnet18", "state_dict": {}, "optimizer": {}}
    torch.save(weights, tmp_path / "zoo.pth.tar")
    resumed = ("--resume", tmp_path / "zoo.pth.tar", "--save-dir", tmp_path / "r")
    lacks = "zoo.pth.tar: cannot be resumed: it lacks args, progress"
    refused(
        script("main_synco", images, *SMALL, *resumed), lacks, "pre-training cannot start from them"
    )
    refused(script("main_lincls", images, *INPUT, *resumed), lacks, "give it with --pretrained")


def test_checkpoint_of_another_method_or_shape(script, images, checkpoint, tmp_path):
    resume = ("--resume", checkpoint, "--save-dir", tmp_path / "r")
    refused(
        script("main_synco", images, *SMALL, *resume, "--n-hard", 4, "--n2", 1),
        "method 'moco'",
        "'synco'",
    )
    refused(
        script("main_synco", images, *SMALL, *resume, "--moco-k", 64), "--moco-k is 64, and was 32"
    )
    refused(script("main_synco", images, *SMALL, *resume, "--mlp"), "--mlp is True, and was False")


def test_missing_checkpoint(script, images):
    refused(
        script("main_lincls", images, "--pretrained", "nowhere.pth"),
        "nowhere.pth",
        "no such checkpoint",
    )


def test_checkpoint_with_code_is_not_run(script, images, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    refused(script("main_lincls", images, "--pretrained", tmp_path / "evil.pth"), "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_run_folder_of_another_run_is_kept(script, images, checkpoint):
    before = checkpoint.read_bytes()
    refused(
        script("main_synco", images, *SMALL, "--save-dir", checkpoint.parent),
        "holds another run",
        "--resume auto",
    )
    assert checkpoint.read_bytes() == before


# what options mean


def test_underscores_and_hyphens_are_the_same():
    hyphens = options("d", "--n-hard", 5, "--moco-t", 0.3, "--batch-size=7")
    underscores = options("d", "--n_hard", 5, "--moco_t", 0.3, "--batch_size=7")
    assert vars(hyphens) == vars(underscores)
    assert (hyphens.n_hard, hyphens.moco_t, hyphens.batch_size) == (5, 0.3, 7)


def test_data_is_positional_or_an_option():
    assert options("--mlp", "folder").data == "folder"
    assert options("--data", "folder").data == "folder"


def test_the_folder_may_follow_an_option_that_takes_several_values():
    args = options("--mlp", "--schedule", 120, 160, "folder")
    assert (args.schedule, args.data) == ([120, 160], "folder")
    assert settings(main_lincls, ["--lr", "30", "1e-2", "folder", "-b", "8"]).lr == [30, 0.01]
    assert settings(main_lincls, ["folder", "--lr", "30"]).lr == [30]


def test_rates_of_a_probe_are_checked(script, images, tmp_path):
    refused(script("main_lincls", images, "--lr", 3, 1, 3.0), "--lr 3 1 3", "is given twice")
    refused(script("main_lincls", images, "--lr", "-1"), "--lr", "below 0")
    (tmp_path / "one.yaml").write_text("lr: 2.5")
    assert settings(main_lincls, ["folder", "--cfg", tmp_path / "one.yaml"]).lr == [2.5]


def test_decays_and_the_held_out_part_of_a_probe_are_checked(script, images):
    refused(script("main_lincls", images, "--wd", 0, 1e-4, 0), "--wd 0 0.0001 0", "is given twice")
    for fraction in (0, 1, 1.5, "nan"):
        refused(script("main_lincls", images, "--val-from-train", fraction), "--val-from-train")
    assert settings(main_lincls, ["--wd", "0", "1e-4", "folder"]).wd == [0, 1e-4]


def test_flags_win_over_yaml(tmp_path):
    given = {
        "learning_rate": 0.5,
        "weight-decay": 0.125,
        "n_hard": 7,
        "cos": True,
        "schedule": [1, 2],
        "moco-k": 64,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given))
    args = options("d", "--cfg", tmp_path / "c.yaml", "--lr", 0.25, "--no-cos")
    assert (args.lr, args.wd, args.n_hard, args.cos, args.schedule, args.moco_k) == (
        0.25,
        0.125,
        7,
        False,
        [1, 2],
        64,
    )


def test_args_yaml_of_a_run_is_a_recipe(checkpoint):
    first = options("--cfg", checkpoint.parent / "args.yaml", "--save-dir", "elsewhere")
    assert (first.arch, first.moco_k, first.batch_size, first.image_size) == ("resnet18", 32, 8, 32)
    assert first.save_dir == "elsewhere"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("synco_200", (200, 1024, 256, 64, 0.2)), ("mocov2_800", (800, 0, 0, 0, 0.2))],
)
def test_published_recipes_parse(name, expected):
    args = options("d", "--cfg", f"configs/{name}.yaml")
    assert (args.epochs, args.n_hard, args.n1, args.n6, args.moco_t) == expected


def test_help_groups_options_and_shows_defaults(script):
    status, out, _ = script("main_synco", "--help")
    assert status == 0
    assert "synthetic negatives" in out and "launch" in out
    assert "(default: 65536)" in out
    assert "interpolated negatives per query (default: 0)" in " ".join(out.split())
    assert "local-rank" not in out


def test_bad_input_error_is_an_exception_of_its_own():
    with pytest.raises(InputError, match="nearest is 'beta'"):
        raise unknown("thing", "betta", ["alpha", "beta"])


def test_pictures_of_many_modes_are_read(script, images, tmp_path):
    folder = images / "train" / "class0"
    for i, mode in enumerate(("L", "RGBA", "P", "CMYK", "1")):
        Image.new("RGB", (40, 40), (200, 30, 90)).convert(mode).save(
            folder / f"m{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        )
    status, _, err = script("main_synco", images, *SMALL, "--save-dir", tmp_path / "run")
    assert status == 0, err


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.parametrize(
    ("variables", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, False)]
)
def test_freed_memory_is_kept_for_the_next_tensors(variables, kept):
    """Then they take no page faults. glibc's own variables have the last word."""
    code = """
import resource, moco, torch
def fill():
    return [torch.zeros(2 << 20) for _ in range(5)]
for _ in range(5):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = shell("-c", code, env=variables)
    assert result.returncode == 0, result.stderr
    pages = 5 * (2 << 22) // resource.getpagesize()
    assert (int(result.stdout) < pages / 10) == kept
