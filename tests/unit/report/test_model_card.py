"""The model card: facts of the checkpoint alone, and no text of it that does harm."""

import json
import re

import pytest
import torch
import yaml

import main_fnc
import main_moby
import main_synco
from moco.config import flat
from moco.encoder import networks
from moco.encoder.pretrained import Encoder
from moco.report import header as report_header
from moco.report.model_card import model_card
from moco.report.runs import Log, Run
from moco.sections_images import Decoding

NET = networks.create("resnet18", 0)
EVIL = (
    "`</code>\n---\nlicense: evil\n# Title | x\n<script>alert(1)</script> ![](http://x) {0} \u202e"
)


def encoder(method="synco", epoch=200, options=()):
    half = [0.5] * 3
    facts = (half, half, [], "timm", Decoding("ignore"), None, dict(options))
    about = (method, epoch, "imagenet", *facts)
    return Encoder(NET, "resnet18", 224, *about)


def header(card):
    """Return the values of the YAML header."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def rendered(card):
    """Return the card without code blocks and code spans, the part that Markdown interprets."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", card, flags=re.DOTALL))


def results(folder, checkpoint, value=0.5, **more):
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "method": "synco",
        "arch": "resnet18",
        "checkpoint": str(checkpoint),
        "pretrain_epochs": 200,
        "protocol": "linear",
        "dataset": "imagenet",
        "metrics": {"acc1": value, "acc5": 0.75},
        "settings": {"lr": 30.0, "seed": 0},
        **more,
    }
    (folder / "results.json").write_text(json.dumps(found))


def test_card_has_the_facts(tmp_path):
    options = {"dataset": "imagenet", "data": "/home/someone/imagenet100", "recipe": "mocov2"}
    card = model_card(encoder(options=options), tmp_path / "checkpoint_0199.pth.tar")
    for line in (
        "# Image encoder `resnet18`, pre-trained with `synco`",
        "- method: `synco`",
        "- epochs of pre-training: `200`",
        "- data of pre-training: `imagenet100`",
        "- views of pre-training: `mocov2`",
        "- image size: `224 pixels`",
        "- mean of RGB values in [0, 1]: `0.5 0.5 0.5`",
        "- source: `checkpoint_0199.pth.tar`",
    ):
        assert f"{line}\n" in card
    assert "maps an RGB image to 512 features" in card and "CC BY-NC 4.0" in card
    assert "someone" not in card
    assert header(card)["library_name"] == "timm" and "license" not in header(card)


def test_card_leaves_out_what_the_checkpoint_does_not_say(tmp_path):
    card = model_card(encoder("unknown", None), tmp_path / "x.pth")
    assert "# Image encoder `resnet18`\n" in card
    for words in ("unknown", "`None`", "epochs", "data of", "How it was trained", "Results", "{"):
        assert words not in card, words


def test_texts_of_a_checkpoint_stay_texts(tmp_path):
    options = {
        "dataset": EVIL,
        "recipe": EVIL,
        "init": EVIL,
        "script": "synco",
        "optimizer": EVIL,
        EVIL: 1,
        "lr": float("nan"),
        "wd": {"a": EVIL},
        "schedule": [[EVIL]],
        1: 2,
    }
    results(tmp_path, "x.pth", dataset=EVIL, protocol=EVIL)
    card = model_card(encoder(EVIL, options=options), tmp_path / "x.pth")
    assert header(card).keys() == {"library_name", "pipeline_tag", "tags"}
    plain = rendered(card)
    for words in ("script", "evil", "http:", "Title", "\u202e", "{"):
        assert words not in plain, words
    assert plain.count("---") == 2 and "\u202e" not in card and card.count("```") % 2 == 0
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]) == {
        "script": "synco"
    }


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (main_synco, "-a resnet18 --mlp --aug-plus --cos --lr 1e-5 --n1 8 --n-hard 16"),
        (main_moby, "-a vit_tiny --method synco --lr 0.003"),
        (main_fnc, "--fn-topk 5 --batch-size 64"),
    ],
)
def test_options_of_the_card_repeat_the_run(script, words, tmp_path):
    """Read them with --cfg; each setting of the encoder has its value again."""
    parser, name = script.parser(), script.__name__.removeprefix("main_")
    config = script.complete(parser.parse(["photos", *words.split()]))
    options = {**flat(config), "script": name}
    card = model_card(encoder(options=options), tmp_path / "x.pth")
    assert f"\npython {script.__name__}.py --cfg options.yaml DIR\n" in card
    file = tmp_path / "options.yaml"
    file.write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    again = flat(script.complete(script.parser().parse(["photos", "--cfg", str(file)])))
    differ = {key for key in again if again[key] != options[key]}
    assert differ <= {"cfg", "script"}, differ


def test_results_of_this_checkpoint_are_listed(tmp_path):
    file = tmp_path / "run" / "checkpoint_0199.pth.tar"
    file.parent.mkdir()
    torch.save({}, file)
    results(file.parent / "lincls", file, 0.681)
    results(file.parent / "a" / "knn", "/moved/checkpoint_0199.pth.tar", protocol="semisup1")
    results(file.parent / "other", "checkpoint_0100.pth.tar", 0.123)
    results(file.parent / "a" / "b" / "c", file, 0.987)  # too deep
    card = model_card(encoder(), file)
    assert "\n## Results\n" in card
    assert "- `imagenet, linear, top-1 / top-5`: 68.1 / 75.0\n" in card
    assert "- `imagenet, 1 % labels, top-1 / top-5`: 50.0 / 75.0\n" in card
    assert "12.3" not in card and "98.7" not in card


def test_damaged_results_are_announced(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    card = model_card(encoder(), tmp_path / "x.pth")
    assert "Results" not in card
    assert "left out of the model card" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["simclr", "fnc", "supcon", "fnc-labels", "supcon, fine-tuned"])
def test_a_method_that_trains_on_labels_is_not_called_self_supervised(method, tmp_path):
    card = model_card(encoder(method), tmp_path / "checkpoint_0199.pth.tar")
    labels = method not in ("simclr", "fnc")
    assert ("- labels: `used in pre-training`" in card) == labels
    assert ("self-supervised-learning" in header(card)["tags"]) != labels
    run = Run(tmp_path, "a run", {"method": method}, Log({}, 10.0, 20.0, 5.0, 0))
    assert (f"{method}, trained on labels" in report_header.section([run])) == labels
