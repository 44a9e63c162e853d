"""Test that an option without effect is refused, or announced."""

import pytest
from run_helpers import options, refused
from voc_tree import write_voc

from moco.launch import launch

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
    ("main_synco", "--sgdr --lr-by epoch-end", "--lr-by has no effect: --sgdr changes"),
    ("main_synco", "--sgdr 2 --lr-by previous-step", "--lr-by has no effect: --sgdr changes"),
    ("main_synco", "--lr-by previous-step", "--lr-by has no effect"),
    (
        "main_synco",
        "--cos --lr-by step --lr-warmup-from 0.01",
        "--lr-warmup-from has no effect: it is the start of the warm-up; give --lr-warmup-epochs",
    ),
    (
        "main_synco",
        "--cos --lr-warmup-epochs 3 --lr-warmup-from 0.01",
        "--lr-warmup-from has no effect: with --lr-by epoch, the warm-up rises from 0",
    ),
    ("main_adco", "--cos 2 --lr-final 0.1", "--lr-final has no effect: the cosine of --cos 2"),
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
    ("main_sogclr", "--loss dcl --tau-plus 0.2", "only --loss debiased and hcl use it"),
    ("main_sogclr", "--loss debiased --beta 2", "only --loss hcl uses it"),
    ("main_sogclr", "--loss isogclr --beta 0.5", "isogclr has --beta-u"),
    ("main_sogclr", "--loss hcl --beta 0 --anneal down", "--anneal has no effect: --beta is 0"),
    ("main_sogclr", "--loss dcl --dclw-sigma 1", "--dclw-sigma has no effect: only --loss dclw"),
    ("main_sogclr", "--rho 1", "--rho has no effect: only --loss isogclr uses it"),
    ("main_sogclr", "--loss simclr --t-range 0.1 0.5", "--t-range has no effect"),
    ("main_synco", "--tau-plus 0.2", "--tau-plus has no effect: only --loss debiased and hcl"),
    ("main_synco", "--optimizer adam --momentum 0.8", "--momentum has no effect"),
    ("main_sogclr", "--num-proj-layers 1 --mlp-dim 64", "--mlp-dim has no effect"),
    ("main_fnc", "--fn-mode off --fn-topk 3", "--fn-topk has no effect"),
    ("main_fnc", "--fn-topk 0 --fn-threshold 0.1", "--fn-threshold has no effect"),
    ("main_fnc", "--fn-topk 0 --fn-threshold 0", "--fn-threshold has no effect"),
    ("main_fnc", "--fn-from labels --fn-threshold 0", "--fn-threshold has no effect: only"),
    ("main_synco", "--sigma 0", "--sigma has no effect: there are no noise negatives"),
    ("main_synco", "--optimizer adamw --momentum 0", "--momentum has no effect"),
    ("main_fnc", "--fn-mode off --fn-from labels", "--fn-from has no effect"),
    ("main_fnc", "--fn-from labels --fn-topk 3", "--fn-topk has no effect: only --fn-from sim"),
    ("main_fnc", "--fn-from labels --fn-threshold 0.5", "--fn-threshold has no effect: only"),
    ("main_sogclr", "--loss supcon --gamma 0.5", "--gamma has no effect"),
    ("main_sogclr", "--loss supcon --tau-plus 0.2", "--tau-plus has no effect"),
    ("main_fnc", "--memory-multiplier 0 --ema 0.9", "--ema has no effect"),
    ("main_fnc", "--memory-multiplier 0 --ema 0", "--ema has no effect"),
    ("main_moby", "--method byol --queue 64", "--queue has no effect"),
    ("main_moby", "--method byol --moco-t 0.1", "--moco-t has no effect"),
    ("main_moby", "--n4 3", "--n4 has no effect: only --method synco has synthetic negatives"),
    ("main_moby", "--synthetic-first 3", "--synthetic-first has no effect"),
    ("main_moby", "--proj-layers 1 --pred-layers 1 --mlp-dim 64", "--mlp-dim has no effect"),
    ("main_knn", "--shrink-on-decode", "--shrink-on-decode has no effect: this script uses centre"),
    ("main_synco", "--output elsewhere", "--output has no effect: --save-dir names the run folder"),
    (
        "main_lincls",
        "--grad-checkpoint",
        "--grad-checkpoint has no effect: --weights freeze trains no block",
    ),
    ("main_lincls", "--drop-path 0.1", "--drop-path has no effect: the network has no"),
    ("main_lincls", "--save-every 2", "--save-every has no effect"),
    ("main_lincls", "--download", "--download has no effect"),
    ("main_semisup", "--weights freeze --lr-backbone 0.1", "--lr-backbone has no effect"),
    ("main_lincls", "--sync-bn", "--sync-bn has no effect: --weights freeze uses the running"),
    ("main_knn", "--recipe mocov2", "--recipe has no effect"),
    ("main_knn", "--crop-min 0.5", "--crop-min has no effect"),
    ("main_knn", "--blur-sigma 1 2", "--blur-sigma has no effect: this script uses centre crops"),
    *(
        ("main_knn", f"--{name} {value}", f"--{name} has no effect: this script uses centre crops")
        for name, value in (
            ("crop-scale", "0.5 1"),
            ("jitter", "1 1 1 0.1"),
            ("jitter-p", "0.5"),
            ("grayscale-p", "0.5"),
            ("blur-p", "0.5"),
            ("solarize-p", "0.5"),
            ("flip-p", "0.2"),
            ("vertical-flip-p", "0.5"),
            ("rotate", "30"),
        )
    ),
    ("main_synco", "--crop-scale 0.3 1 --crop-min 0.2", "--crop-min has no effect: --crop-scale"),
    ("main_synco", "--jitter-p 0 --jitter 1 1 1 0.1", "--jitter has no effect: the views have no"),
    ("main_lincls", "--jitter 1 1 1 0.1", "--jitter has no effect: the views have no"),
    ("main_synco", "--jitter 0 0 0 0 --jitter-p 0.5", "--jitter-p has no effect: --jitter 0 0 0 0"),
    ("main_synco", "--blur-sigma 1 2", "--blur-sigma has no effect: the recipe's views are not"),
    ("main_synco", "--aug-plus --blur-p 0 --blur-sigma 1 2", "--blur-sigma has no effect"),
    ("main_knn", "--grad-checkpoint", "--grad-checkpoint has no effect"),
    ("main_knn", "--grad-compress bf16", "--grad-compress has no effect: this script uses centre"),
    ("main_synco", "--grad-compress bf16", "--grad-compress has no effect: the run has one"),
    ("main_lincls", "--grad-compress bf16", "--grad-compress has no effect: the run has one"),
]


@pytest.fixture
def until_launch(script, images, tmp_path, monkeypatch):
    """Call a script up to the point where processes would start."""
    monkeypatch.setattr(launch, "launch", lambda worker, args: None)
    small = (images, "-a", "resnet18", "--image-size", 32, "-b", 8, "--save-dir", tmp_path / "run")
    return lambda name, words: script(name, *small, *words.split())


COPIES = [
    ("main_synco", "--n-hard 8 --n4 2 --sigma 0", "--sigma 0: all noise negatives", "--n4 2"),
    ("main_synco", "--n-hard 8 --n5 2 --delta 0", "--delta 0: all perturbed negatives", "--n5 0"),
    ("main_moby", "--method synco --n6 2 --eta 0", "--eta 0: all adversarial negatives", "queue"),
    (
        "main_mocov3",
        "--n-hard 4 --n6 2 --synthetic-eta 0",
        "--synthetic-eta 0: all adversarial",
        "negatives of the batch",
    ),
    ("main_sogclr", "--loss simclr --n-hard 1 --n3 2", "--n-hard 1: all mixup", "--n3 0"),
]


@pytest.mark.parametrize(("name", "words", "said", "what"), COPIES)
def test_synthetic_negatives_that_are_copies_are_refused(until_launch, name, words, said, what):
    refused(until_launch(name, words), said, what)


def test_one_hard_negative_suffices_for_types_that_mix_it_with_the_query(until_launch):
    words = "--n-hard 1 --n1 1 --n2 1 --n4 1 --n5 1 --n6 1"
    assert until_launch("main_synco", words) == (0, "", "")


@pytest.mark.parametrize(("name", "words", "said"), IDLE)
def test_an_option_without_effect_is_refused(until_launch, name, words, said):
    refused(until_launch(name, words), said)


def test_label_smoothing_is_refused_for_images_with_several_labels(script, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda worker, args: None)
    data = write_voc(tmp_path / "voc", 30, 12)
    command = (data, "--dataset", "voc2007", "-a", "resnet18", "--save-dir", tmp_path / "run")
    assert script("main_lincls", *command)[0] == 0
    result = script("main_lincls", *command, "--label-smoothing", 0.1)
    refused(result, "--label-smoothing has no effect", "several labels")


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
        ("main_synco", "--sgdr 2 --lr-warmup-epochs 1 --lr-warmup-from 0.1"),
        ("main_adco", "--cos 2"),
        ("main_moby", "--method moby --lr-by previous-step --lr-warmup-from 0.1"),
        ("main_moby", "--method synco --n-hard 8 --n1 1 --sigma 1 --queue 64 --moco-t 0.5"),
        ("main_fnc", "--fn-topk 3 --fn-threshold 0.1 --ema 0.5"),
        ("main_semisup", "--weights finetune --lr-backbone 0.1 --rotate 9 --flip-p 0"),
        ("main_semisup", "--weights finetune --lr-backbone 0.1 --zero-init-classifier"),
        ("main_knn", "--k 3 --temperature 0.5"),
        (
            "main_synco",
            "--crop-scale 0.3 1 --jitter 1 1 1 0.1 --jitter-p 0.5 --grayscale-p 0 --blur-p 0.5 "
            "--blur-sigma 1 2 --solarize-p 0.1 --flip-p 0 --vertical-flip 0.5 --rotate 180",
        ),
        ("main_moby", "--method moby --crop-min 0.1 --blur-p 0.3 --vertical-flip-p 0.5"),
    ):
        status, out, err = until_launch(name, words)
        said = "" if name != "main_semisup" else "protocol synco: the default, because there is no"
        assert (status, err) == (0, "") and out.startswith(said), (name, words)
        assert len(out.splitlines()) == bool(said), (name, words)


def test_a_recipe_may_hold_what_another_choice_leaves_without_effect(until_launch, tmp_path):
    (tmp_path / "c.yaml").write_text("n-hard: 8\nn4: 2\nsigma: 0.5\ndelta: 0.01\nsave-dir: null\n")
    status, out, err = until_launch("main_synco", f"--cfg {tmp_path / 'c.yaml'} --n4 0")
    assert status == 0 and not err
    assert [line.split(":")[0] for line in out.splitlines()] == [
        f"--sigma of {tmp_path}/c.yaml has no effect",
        f"--n-hard of {tmp_path}/c.yaml has no effect",
    ]
    assert until_launch("main_synco", f"--cfg {tmp_path / 'c.yaml'}") == (0, "", "")
    (tmp_path / "c.yaml").write_text("sigma: 0\n")
    status, out, err = until_launch("main_synco", f"--cfg {tmp_path / 'c.yaml'}")
    assert status == 0 and not err
    assert out.startswith(f"--sigma of {tmp_path}/c.yaml has no effect: there are no noise")
    assert until_launch(
        "main_moby",
        "--cfg configs/moby_swin_tiny.yaml --method byol -a resnet18 --online-drop-path 0",
    )[1:] == ("", "")


def test_what_was_given_is_not_among_the_options():
    assert not {"given", "own", "recipe_values", "rules"} & vars(options("d", "--lr", 1)).keys()
