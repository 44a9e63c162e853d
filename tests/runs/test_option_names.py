"""Test names that scripts do not know: the error names the nearest option, or what to use."""

import pytest
from conftest import ROOT
from run_helpers import SMALL, options, refused

import main_synco
from moco.errors import unknown


def test_unknown_arch_names_the_nearest(script, images):
    refused(script("main_synco", images, "-a", "resnet81"), "resnet81", "nearest is 'resnet18'")


def test_unknown_recipe_names_the_nearest(script, images):
    refused(
        script("main_synco", images, *SMALL, "--recipe", "moco_v2"),
        "moco_v2",
        "nearest is 'mocov2'",
    )


@pytest.mark.parametrize(
    ("name", "one", "other", "agreeing", "said"),
    [
        (
            "main_mocov3",
            "--eta=0.1",
            "--synthetic-eta=0.2",
            "--synthetic-eta=0.1",
            "--eta sets --synthetic-eta to 0.1, but --synthetic-eta is also given, as 0.2",
        ),
        (
            "main_sogclr",
            "--loss_type=dcl",
            "--loss=hcl",
            "--loss=sogclr",
            "--loss-type sets --loss to sogclr, but --loss is also given, as hcl",
        ),
        (
            "main_synco",
            "--max-epochs=2",
            "--epochs=3",
            "--epochs=2",
            "--max-epochs sets --epochs to 2, but --epochs is also given, as 3",
        ),
        (
            "main_fnc",
            "--max-epochs=4",
            "--train-epochs=3",
            "--train-epochs=4",
            "--max-epochs sets --epochs to 4, but --train-epochs sets it to 3; leave out one",
        ),
    ],
)
def test_two_names_of_one_option_must_agree(script, name, one, other, agreeing, said):
    for words in ((one, other), (other, one)):
        refused(script(name, "nowhere", *words), said)
    refused(script(name, "nowhere", agreeing, one), "nowhere: no such folder")


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
        ("lr: fast\n", ["lr", "fast", "is not a number"]),
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


def test_options_of_another_script_are_one_line(script, images, tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text("script: synco\nmoco_k: 32\nn6: 3\nmlp: true\n")
    result = script("main_sogclr", images, "--cfg", file)
    refused(result, f"--cfg {file}: holds the options of main_synco.py", "use that script")


@pytest.mark.parametrize("kind", ["folder", "missing", "binary"])
def test_a_cfg_that_is_no_text_says_where_recipes_are(kind, script, images, tmp_path):
    path = tmp_path / "cfg"
    if kind == "folder":
        path.mkdir()
    if kind == "binary":
        path.write_bytes(bytes(range(256)))
    result = script("main_synco", images, *SMALL, "--cfg", path)
    refused(result, f"--cfg {path}: ", f"a recipe, such as those in {ROOT / 'configs'}")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("configs/semisup_synco_1pct.yaml", "semisup_1pct.yaml"),  # its name in earlier versions
        ("configs/semisup_synco_10pct.yaml", "semisup_10pct.yaml"),
        ("configs/semi_sup_100pct.yml", "semisup_100pct.yaml"),
        ("configs/cifar10/mocco.yaml", "cifar10/moco.yaml"),
        ("elsewhere/synco_20.yaml", "synco_200.yaml"),
    ],
)
def test_a_missing_recipe_names_the_nearest(script, given, nearest):
    result = script("main_semisup", "DIR", "--cfg", given)
    near = f"the nearest recipe is {ROOT / 'configs' / nearest}"
    refused(result, f"--cfg {given}: No such file or directory; {near}")


@pytest.mark.parametrize(
    ("option", "said"),
    [("--epochs 1e3", "'1e3' is not a whole number"), ("--lr many", "'many' is not a number")],
)
def test_a_word_that_is_no_number_says_what_to_give(option, said, script, images):
    refused(script("main_synco", images, *SMALL, *option.split()), said, "take one in [")


@pytest.mark.parametrize("tag", ["../x", "a/../../x", "/x"])
def test_a_tag_stays_inside_its_output(tag, script, images, tmp_path):
    words = (images, *SMALL, "--output", tmp_path / "out", "--tag", tag)
    refused(script("main_synco", *words), f"--tag {tag}: must be a folder inside --output")
    assert not (tmp_path / "out").exists()
