"""Test the choice of an evaluation's protocol, and the options of other repositories' scripts."""

import importlib
import shlex

import pytest
import torch
from conftest import settings
from run_helpers import SMALL, refused

import main_fnc
import main_lincls
import main_moby
import main_semisup
import main_voc07
from moco.cli.parser import RECIPES
from moco.data import registry
from moco.errors import InputError
from moco.files import read_yaml
from moco.methods import METHODS, PROTOCOLS

SCRIPTS = {
    "main_lincls": main_lincls,
    "main_semisup": main_semisup,
    "main_voc07": main_voc07,
    "main_fnc": main_fnc,
}


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a checkpoint of a method, without weights."""

    def save(method: str, **more: object) -> str:
        path = tmp_path / f"{method}.pth.tar"
        torch.save({"method": method, "arch": "resnet18", "state_dict": {}, **more}, path)
        return str(path)

    return save


@pytest.fixture(autouse=True)
def names_of_programs(monkeypatch):
    """Make parsers name the script that they belong to, as they do in a shell."""
    for name, module in SCRIPTS.items():
        parser = module.parser

        def named(parser=parser, name=name):
            made = parser()
            made.prog = f"{name}.py"
            return made

        monkeypatch.setattr(module, "parser", named)


def expected(recipe: str) -> dict[str, object]:
    """Return the settings of a recipe by attribute name."""
    return {name.replace("-", "_"): value for name, value in read_yaml(RECIPES / recipe).items()}


def differing(args: object, recipe: str) -> list[str]:
    """Return the names of a recipe's settings that `args` do not have."""
    mine = {name: getattr(args, name) for name in expected(recipe)}
    alone = {name: [value] for name, value in expected(recipe).items()}  # --lr of a probe
    return [
        name for name, value in mine.items() if value not in (expected(recipe)[name], alone[name])
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("script", ["main_lincls", "main_semisup", "main_voc07"])
def test_the_checkpoint_s_method_chooses_the_protocol(script, method, saved, capsys):
    own = [one for one in PROTOCOLS if one.script == script]
    mine = [one for one in own if one.name == METHODS[method].protocol] or own[:1]
    one = mine[-1]  # the last one of a name is for the widest settings
    options = [word for name, value in one.options.items() for word in (f"--{name}", value)]
    in_file = METHODS[method].saved or method
    file = saved(in_file, args={"script": METHODS[method].script.removeprefix("main_")})
    args = settings(SCRIPTS[script], ["DIR", "--pretrained", file, *options])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"protocol {one.name}") and args.protocol == one.name
    assert f" {in_file} ({METHODS[method].script}.py)" in line
    if one.recipe:
        assert f"(configs/{one.recipe})" in line and not differing(args, one.recipe)
    else:
        bare = settings(SCRIPTS[script], ["DIR"])
        assert {**vars(args), "pretrained": None} == {**vars(bare), "pretrained": None}
    assert (args.multiprocessing_distributed is None) == one.every_gpu


def test_scripts_and_recipes_of_protocols_exist():
    scripts = {"main_lincls", "main_semisup", "main_voc07", "main_retrieval"}
    assert {one.script for one in PROTOCOLS} == scripts
    assert all((RECIPES / one.recipe).is_file() for one in PROTOCOLS if one.recipe)
    probes = {one.name for one in PROTOCOLS if one.script == "main_lincls"}
    assert {method.protocol for method in METHODS.values()} <= probes


def test_the_command_line_wins_over_the_protocol_and_a_recipe_replaces_it(saved, capsys):
    file = saved("adco")
    args = settings(main_lincls, ["DIR", "--pretrained", file, "--lr", "3", "--epochs", "7"])
    assert (args.lr, args.epochs, args.lr_final) == ([3.0], 7, 0.01)
    args = settings(main_lincls, ["DIR", "--pretrained", file, "--protocol", "sogclr"])
    assert args.protocol == "sogclr" and not differing(args, "lincls_sogclr.yaml")
    assert "protocol sogclr (configs/lincls_sogclr.yaml): --protocol" in capsys.readouterr().out
    cfg = RECIPES / "lincls_moco.yaml"
    args = settings(main_lincls, ["DIR", "--pretrained", file, "--cfg", cfg])
    assert args.protocol is None and not differing(args, "lincls_moco.yaml")
    assert f"protocol: the settings of {cfg} (--cfg)" in capsys.readouterr().out
    # both: the recipe wins over the protocol, as --cfg does over defaults
    args = settings(main_lincls, ["DIR", "--protocol", "sogclr", "--cfg", cfg])
    assert (args.lr, args.learning_rate_scaling, args.cos) == ([30.0], "linear", True)
    assert f"--protocol; the settings of {cfg} win (--cfg)" in capsys.readouterr().out


def test_the_default_protocol_is_printed_with_the_reason(saved, capsys):
    for words, why in (
        ([], "the default, because there is no --pretrained"),
        (["--pretrained", saved("dino")], "does not name a method of this project"),
        (["--pretrained", "missing.pth"], "missing.pth cannot be read"),
    ):
        assert settings(main_lincls, ["DIR", *words]).protocol == "moco"
        assert why in capsys.readouterr().out
    args = settings(main_semisup, ["DIR", "--pretrained", saved("adco")])
    assert args.protocol == "synco"
    assert "the default; " in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--c 1 10", "--classifier linear", "--dump-features F"])
def test_options_of_svms_choose_svms(words, saved, capsys):
    args = settings(main_voc07, ["DIR", "--pretrained", saved("adco"), *words.split()])
    assert args.protocol == "moco" and args.classifier != "sgd" and args.mean is None
    assert f"because {words.split()[0]} is given" in capsys.readouterr().out


def test_the_encoder_of_a_classifier_s_file_chooses_the_protocol(saved):
    file = saved("linear", args={"encoder_method": "sogclr", "weights": "finetune"})
    assert settings(main_lincls, ["DIR", "--pretrained", file]).protocol == "sogclr"


def test_the_network_tells_synco_v2_from_synco_if_the_file_does_not_name_the_script(saved):
    of_linear = {"encoder_method": "synco", "weights": "freeze", "script": "lincls"}
    for method, args in (("synco", {}), ("linear", of_linear)):
        for arch, protocol in (("swin_tiny", "moby"), ("resnet50", "moco")):
            file = saved(method, args=args, arch=arch)
            assert settings(main_lincls, ["DIR", "--pretrained", file]).protocol == protocol


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_is_saved_under_the_name_that_chooses_its_protocol(method):
    one = METHODS[method]
    module = importlib.import_module(one.script)
    c = module.complete(module.parser().parse(["photos", *shlex.split(one.tiny)]))
    assert c.run.method == (one.saved or one.name)


def test_output_and_tag_find_the_checkpoint(saved, tmp_path):
    run = tmp_path / "runs" / "default"
    run.mkdir(parents=True)
    saved("moby")
    (tmp_path / "moby.pth.tar").rename(run / "checkpoint_0000.pth.tar")
    args = settings(main_lincls, ["DIR", "--output", tmp_path / "runs"])
    assert args.protocol == "moby" and args.pretrained == str(run / "checkpoint_0000.pth.tar")


def test_a_test_of_a_classifier_has_no_protocol(capsys):
    args = settings(main_lincls, ["DIR", "--evaluate", "--resume", "best.pth.tar"])
    assert args.protocol is None and "protocol" not in capsys.readouterr().out


def test_wrong_protocols_say_what_to_give(script, images, saved):
    refused(script("main_lincls", images, "--protocol", "adcoo"), "the nearest is 'adco'")
    refused(script("main_voc07", images, "--protocol", "sogclr"), "unknown protocol 'sogclr'")
    few = "has settings only for --train-percent 1 or --train-percent 10; give one, or "
    few += "--protocol synco"
    refused(
        script("main_semisup", images, "--pretrained", saved("fnc"), "--train-percent", 100), few
    )


def test_both_spellings_of_weights():
    for word, meant in (("frozen", "freeze"), ("freeze", "freeze"), ("finetuned", "finetune")):
        assert settings(main_lincls, ["DIR", "--weights", word]).weights == meant
        assert settings(main_semisup, ["DIR", f"--weights={word}"]).weights == meant


OPTS = {
    "LINEAR_EVAL.WEIGHTS frozen": {"weights": "freeze"},
    "LINEAR_EVAL.WEIGHTS finetuned": {"weights": "finetune"},
    "LINEAR_EVAL.PRETRAINED FILE": {"pretrained": "FILE"},
    "DATA.DATASET cifar10": {"dataset": "cifar10"},
    "DATA.IMG_SIZE 96 DATA.NUM_WORKERS 3": {"image_size": 96, "workers": 3},
    "DATA.ZIP_MODE True DATA.CACHE_MODE part": {},
    "TRAIN.EPOCHS 30 TRAIN.WARMUP_EPOCHS 2": {"epochs": 30, "lr_warmup_epochs": 2},
    "TRAIN.BASE_LR 1e-3": {"lr": [5e-4], "learning_rate_scaling": "linear"},
    "TRAIN.MIN_LR 2e-6": {"lr_final": 1e-6},
    "TRAIN.WEIGHT_DECAY .05": {"wd": [0.05]},
    "TRAIN.CLIP_GRAD 3.": {"clip_grad": 3.0},
    "TRAIN.ACCUMULATION_STEPS 2": {"accumulation_steps": 2},
    "TRAIN.USE_CHECKPOINT True": {"grad_checkpoint": True},
    "TRAIN.USE_CHECKPOINT False": {"grad_checkpoint": False},
    "TRAIN.OPTIMIZER.NAME sgd TRAIN.OPTIMIZER.MOMENTUM 0.8": {"momentum": 0.8},
    "EVAL_MODE True MODEL.RESUME best.pth": {"evaluate": True, "resume": "best.pth"},
    "AMP_OPT_LEVEL O1 SEED 3 PRINT_FREQ 5": {"amp": "fp16", "seed": 3, "print_freq": 5},
}


@pytest.mark.parametrize("keys", OPTS)
def test_settings_after_opts_are_read_as_options(keys, capsys):
    args = settings(main_lincls, ["DIR", "--opts", *keys.split()])
    assert {name: getattr(args, name) for name in OPTS[keys]} == OPTS[keys]
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("--opts is read as: ")
    # what the line says is the same command
    said = line.removeprefix("--opts is read as: ")
    again = settings(main_lincls, ["DIR", *([] if said == "no option" else said.split())])
    assert again == args


def test_settings_after_opts_in_pre_training_yield_to_options():
    keys = "MODEL.TYPE byol MODEL.MOBY.CONTRAST_MOMENTUM 0.9 MODEL.MOBY.CONTRAST_NUM_NEGATIVE 64 "
    keys += "MODEL.MOBY.CONTRAST_TEMPERATURE .3 MODEL.MOBY.PROJ_NUM_LAYERS 3 DATA.BATCH_SIZE 16 "
    keys += "MODEL.MOBY.PRED_NUM_LAYERS 1 MODEL.MOBY.ONLINE_DROP_PATH_RATE .1 TRAIN.EPOCHS 5"
    args = settings(main_moby, ["DIR", "--opts", *keys.split(), "--epochs", 9])
    assert (args.method, args.moco_m, args.queue, args.moco_t) == ("byol", 0.9, 64, 0.3)
    assert (args.proj_layers, args.pred_layers, args.online_drop_path) == (3, 1, 0.1)
    assert (args.batch_size, args.epochs) == (16, 9)
    args = settings(main_moby, ["DIR", "--opts", "MODEL.SYNCO.N_HARD", "32", "MODEL.SYNCO.N1", "3"])
    assert (args.n_hard, args.n1) == (32, 3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("DATA.BATCH_SIZE 128", "--batch-size counts all images of the node: give 128 x"),
        ("TRAIN.EPOCS 3", "unknown key 'TRAIN.EPOCS'; the nearest is 'TRAIN.EPOCHS'"),
        ("MODEL.MOBY.CONTRAST_TEMPERATURE 1", "this script has no option for it"),
        ("MODEL.SWIN.EMBED_DIM 96", "no option for it; docs/commands.md lists the settings"),
        ("TRAIN.EPOCHS", "'TRAIN.EPOCHS' has no value; give KEY VALUE ..., and DIR before --opts"),
    ],
)
def test_wrong_opts_say_what_to_do(keys, said, script, images):
    refused(script("main_lincls", images, "--opts", *keys.split()), said)


FNC = {
    "--train_mode=pretrain --train_batch_size=4096 --train_epochs=100 --temperature=0.1 "
    "--learning_rate=0.1 --learning_rate_scaling=sqrt --weight_decay=1e-4 --dataset=imagenet2012 "
    "--image_size=224 --eval_split=validation --data_dir=gs://b/d --model_dir=gs://b/run "
    "--use_tpu=True --tpu_name=v3 --train_summary_steps=0": {
        "batch_size": 4096,
        "epochs": 100,
        "lr": 0.1,
        "wd": 1e-4,
        "temperature": 0.1,
        "data": "DIR",
    },
    "--mode=train_then_eval --train_mode=finetune --fine_tune_after_block=4 "
    "--zero_init_logits_layer=True --variable_schema='(?!global_step|(?:.*/|^)Momentum|head)' "
    "--global_bn=False --optimizer=momentum --learning_rate=0.1 --weight_decay=0.0 "
    "--train_epochs=100 --train_batch_size=512 --warmup_epochs=0 --dataset=cifar10 "
    "--image_size=32 --eval_split=test --resnet_depth=18 --checkpoint=CKPT --model_dir=RUN "
    "--use_tpu=False": {
        "protocol": "fnc",
        "weights": "freeze",
        "nesterov": True,
        "lr": [0.1],
        "epochs": 100,
        "batch_size": 512,
        "dataset": "cifar10",
        "arch": "resnet18",
        "pretrained": "CKPT",
        "save_dir": "RUN",
        "zero_init_classifier": True,
    },
    "--mode=train_then_eval --train_mode=finetune --fine_tune_after_block=-1 "
    "--ft_proj_selector=1 --zero_init_logits_layer=True --optimizer=lars --learning_rate=0.005 "
    "--learning_rate_scaling=sqrt --weight_decay=0 --warmup_epochs=0 --train_epochs=60 "
    "--train_batch_size=1024 --dataset=imagenet2012_subset/1pct --checkpoint=CKPT": {
        "protocol": "fnc",
        "weights": "finetune",
        "train_percent": 1,
        "ft_proj": 1,
        "optimizer": "lars_tf",
        "lr_backbone": 0.005,
        "lr_classifier": 0.005,
        "learning_rate_scaling": "sqrt",
        "epochs": 60,
        "batch_size": 1024,
        "data": "DIR",
        "zero_init_classifier": True,
    },
}


@pytest.mark.parametrize("script", ["main_lincls", "main_semisup", "main_fnc"])
@pytest.mark.parametrize("flags", FNC)
def test_flags_of_fnc_s_script_name_the_command_to_use(flags, script):
    with pytest.raises(InputError, match="the same here is: ") as error:
        settings(SCRIPTS[script], shlex.split(flags))
    name, *words = shlex.split(str(error.value).partition("the same here is: ")[2])
    args = settings(SCRIPTS[name.removesuffix(".py")], words)
    found = {option: getattr(args, option) for option in FNC[flags]}
    assert found == FNC[flags]


def test_options_of_this_project_do_not_replace_the_data_folder_of_fnc_s_script(script, images):
    words = ("--train_mode=pretrain", f"--data_dir={images}", "-a", "resnet18", "-j", 0)
    refused(script("main_fnc", *words), f"main_fnc.py -a resnet18 -j 0 {images}")


@pytest.mark.parametrize("flag", ["--zero_init_logits_layer=False", "--global_bn=False", ""])
def test_a_switch_of_fnc_that_is_off_stays_off(flag):
    words = f"--train_mode=finetune --ft_proj_selector=1 --checkpoint=CKPT {flag}".split()
    with pytest.raises(InputError, match="the same here is: ") as error:
        settings(main_semisup, [*words, "--dataset=imagenet2012_subset/1pct"])
    _, *words = shlex.split(str(error.value).partition("the same here is: ")[2])
    args = settings(main_semisup, words)
    assert not args.zero_init_classifier  # the default of run.py
    assert args.sync_bn == (flag != "--global_bn=False")


def test_an_option_of_fnc_without_counterpart_is_named(script, images):
    words = "--train_mode=finetune --fine_tune_after_block=2 --sk_ratio=0.0625"
    said = "no option here corresponds to --fine-tune-after-block=2, --sk-ratio=0.0625"
    refused(script("main_lincls", images, *words.split()), said)


def test_a_data_set_without_a_folder_is_downloaded_to_data(capsys):
    args = settings(main_lincls, ["--dataset", "cifar10"])
    assert (args.data, args.download) == ("./data", True)
    assert "cifar10 is read from ./data, and downloaded to it" in capsys.readouterr().out
    args = settings(main_lincls, ["--dataset", "cars"])  # to be got by hand
    assert (args.data, args.download) == ("./data", False)
    args = settings(main_voc07, [])
    assert (args.dataset, args.data, args.download) == ("voc2007", "./data", True)


def test_nothing_is_downloaded_into_a_folder_of_images(script, images, monkeypatch):
    get = registry._DATASETS["cifar10"]._replace(get=lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.setitem(registry._DATASETS, "cifar10", get)
    said = "leave the folder out: the data set is then downloaded to ./data"
    refused(script("main_lincls", images, *SMALL[:8], "--dataset", "cifar10"), said)
    refused(script("main_lincls", images, "--dataset", "cifar10", "--download"), "train/", said)
