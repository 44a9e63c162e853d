"""Write the page about the negatives of checkpoints, and refuse files that have none."""

import re
import shutil

import pytest
import torch
from conftest import in_process, write_images
from report_helpers import Page
from run_helpers import TINY, load, refused, typed

from moco.cli.rebuild import rebuild
from moco.errors import InputError
from moco.loss.contrastive import normalize
from moco.loss.synthetic import TYPES
from moco.rng import Progress

SMALL = typed("-a resnet18 --image-size 32 -b 8 -j 0 --epochs 1")
METHODS = {
    "mocov2": ("main_synco", *typed("--moco-k 32 --mlp --moco-dim 16 --aug-plus")),
    "adco": ("main_adco", *typed("--cluster 20 --moco-dim 16 --no-ad-init")),
    "sogclr": ("main_sogclr", *typed("--mlp-dim 32 --dim 16")),
    "fnc": (
        "main_fnc",
        *typed("--support-size 1 --memory-multiplier 3 --proj-out-dim 16 --randaugment 0 0"),
    ),
    "mocov3": ("main_mocov3", *typed("--moco-dim 16 --moco-mlp-dim 32 --batch-size 8")),
}
MOBY = ("main_moby", *typed("--mlp-dim 32 --online-drop-path 0 --method"))
SECTIONS = ["Hardness", "False negatives", "Nearest negatives", "Over training", "Numbers"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("negatives"), classes=3, train=12)


@pytest.fixture(scope="module")
def synco(images, tmp_path_factory):
    """The run folder of two epochs of SynCo, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("synco") / "run"
    words = ("--epochs", 2, "--keep", "all", "--warmup-epochs", 1, "-j", 0, "--save-dir", folder)
    status, _, err = in_process("main_synco", images, *TINY, *words)
    assert status == 0, err
    return folder


def train(images, folder, script, *options):
    status, _, err = in_process(script, images, *SMALL, *options, "--save-dir", folder)
    assert status == 0, err
    return folder / "checkpoint_0000.pth.tar"


def sections_of(page):
    return re.findall("<h2>(.*?)</h2>", page.source)


def test_the_page_of_a_run(call, synco, images, tmp_path):
    files, out = sorted(synco.glob("checkpoint_*")), tmp_path / "page.html"
    assert len(files) == 2
    command = ("tools.negatives", *files, images, "--out", out, "--queries", 20)
    status, printed, err = call(*command)
    assert status == 0 and printed.endswith(f"{out}\n"), err
    page = Page(out)
    assert sections_of(page) == SECTIONS
    similarities = [title for title in page.titles if title.endswith(": similarity")]
    used = {TYPES[0].name, TYPES[2].name, TYPES[3].name}  # of TINY
    expected = {"Positive", "All negatives", "Hardest 4", *(name.capitalize() for name in used)}
    assert {title.removesuffix(": similarity") for title in similarities} == expected
    assert page.titles.count("After 1 epoch") == page.titles.count("After 2 epochs") == 2
    assert "2 interpolated, 2 mixup, 2 noise, from the hardest 8 of 64" in page.text
    assert "here from the hardest 4 of 35 negatives" in page.text  # 8 / 64 of 36 images
    assert "they join after 1 epoch;" in page.text
    shown = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(shown) == 2 * 8 * 7 and all(src.startswith("data:image/jpeg") for src in shown)
    assert not re.search(r"(?:src|href)=.(?!data:|#)|url\((?!#)|@import|<script", page.source)
    marked = page.source.count('class="hit wrong"')
    said = re.findall(r">(\d+) of these 48 negatives are false", page.source)
    assert marked == sum(map(int, said)) > 0
    refused(call(*command), "exists; give --force")
    first = out.read_bytes()
    assert call(*command, "--force")[0] == 0
    assert out.read_bytes() == first  # the same checkpoints and seed: the same page


@pytest.mark.slow
def test_several_methods_and_images_without_labels(call, synco, images, tmp_path):
    files = [
        train(images, tmp_path / name, *METHODS[name]) for name in ("adco", "sogclr", "mocov3")
    ]
    (tmp_path / "flat").mkdir()
    for i, file in enumerate((images / "train").rglob("*.jpg")):
        shutil.copy(file, tmp_path / "flat" / f"{i}.jpg")
    out = tmp_path / "page.html"
    files += [synco / "checkpoint_0001.pth.tar"]
    status, _, err = call("tools.negatives", *files, tmp_path / "flat", "--out", out)
    assert status == 0, err
    page = Page(out)
    assert sections_of(page) == ["Hardness", "Nearest negatives", "Numbers"]
    assert "Negatives of 4 runs" in page.text and "The images have no labels" in page.text
    assert "false negatives, %" not in page.text and "✗" not in page.text
    assert page.text.count("learned") > 1  # AdCo's bank has a row in the picture and the table
    assert page.text.count("none in training") == 3


@pytest.mark.parametrize("name", METHODS)
def test_the_networks_of_a_checkpoint(name, images, tmp_path):
    """The rebuilt queries and keys are those that the method contrasts."""
    path = train(images, tmp_path / "run", *METHODS[name])
    method, config, epoch = rebuild(path)
    assert (epoch, config.run.script) == (1, METHODS[name][0].removeprefix("main_"))
    saved = {n.removeprefix("module."): x for n, x in load(path)["state_dict"].items()}
    mine = method.state_dict()
    compared = [n for n in mine if n in saved and mine[n].shape == saved[n].shape]
    assert all(torch.equal(mine[n], saved[n]) for n in compared)
    assert {n for n in mine if "." in n} <= set(compared)
    seen = []
    method.contrast = lambda *args: seen.append(args) or (torch.zeros(()), {})
    if name == "mocov3":
        method.direction = lambda q, k, *_: seen.append((q, k)) or (torch.zeros(()), {})
    views = [torch.randn(8, 3, 32, 32) for _ in range(3 if name == "fnc" else 2)]
    method(views, torch.arange(8), Progress())
    q, k = (normalize(net(views[i])) for i, net in enumerate(method.query_and_key))
    of_q, of_k = {
        "mocov2": lambda args: args[:2],
        "adco": lambda args: args[0][0],
        "sogclr": lambda args: args[0],
        "fnc": lambda args: (args[0][0], args[1][1]),
        "mocov3": lambda args: args,
    }[name](seen[0])
    torch.testing.assert_close(q, of_q)
    torch.testing.assert_close(k, of_k)


OF_BATCH = typed("--n-hard 7 --n1 2 --synthetic-first 0")
FNC = ("--support-size", 0, *METHODS["fnc"][3:])
NAMED = {
    "supcon": (*METHODS["sogclr"], "--loss", "supcon"),
    "fnc-labels": (METHODS["fnc"][0], *FNC, "--fn-from", "labels"),
    "simclr": (*METHODS["sogclr"], "--loss", "simclr", *OF_BATCH),
    "mocov3": (*METHODS["mocov3"], *OF_BATCH),
}


@pytest.mark.parametrize("name", NAMED)
def test_labels_in_training_and_negatives_of_the_batch(name, call, images, tmp_path):
    path, out = train(images, tmp_path / name, *NAMED[name]), tmp_path / "page.html"
    status, _, err = call("tools.negatives", path, images, "--out", out, "--queries", 4)
    assert status == 0, err
    text = Page(out).text
    assert f"{name} (main_" in text
    known = name in ("supcon", "fnc-labels")
    assert (", trained on labels" in text) == ("The training used labels" in text) == known
    assert ("Labels are used for nothing else" in text) != known
    among = {"simclr": 14, "mocov3": 7}.get(name)  # of 8 images
    if among is None:
        assert "none in training" in text
    else:
        assert f"2 interpolated, from the hardest 7 of {among}" in text
        assert f"here from the hardest {round(7 / among * 36) - (among == 7)} of 35" in text
    state = load(path)  # as if eight nodes had made it, each with a batch of 8 images
    state["progress"]["batch"] = 64
    if among:
        state["args"]["n_hard"] = 60
    torch.save(state, path)
    assert call("tools.negatives", path, images, "--out", out, "--force")[0] == 0
    if among:
        assert f"from the hardest 60 of {126 if among == 14 else 63}" in Page(out).text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moby", "synco", "byol"])
def test_online_and_target(method, call, images, tmp_path):
    options = {"byol": (), "moby": typed("--queue 32")}
    options["synco"] = typed("--queue 32 --n-hard 8 --synthetic-first 0 --synthetic-last 1")
    path = train(images, tmp_path / "run", *MOBY, method, *options[method])
    result = call("tools.negatives", path, images, "--out", tmp_path / "page.html")
    if method == "byol":
        return refused(result, "byol has no negatives")
    assert result[0] == 0, result
    rebuilt = rebuild(path).method
    seen, views = [], [torch.randn(8, 3, 32, 32) for _ in range(2)]
    rebuilt.contrast = lambda *args: seen.append(args)
    rebuilt(views, torch.arange(8), Progress())
    query, key = rebuilt.query_and_key
    torch.testing.assert_close(normalize(query(views[0])), seen[0][0][0])
    torch.testing.assert_close(normalize(key(views[1])), seen[0][1][1])


def test_files_that_are_refused(call, synco, images, tmp_path):
    good, out = synco / "checkpoint_0001.pth.tar", tmp_path / "page.html"
    state = load(good)

    def saved(name, **changes):
        torch.save({**state, **changes}, tmp_path / name)
        return tmp_path / name

    (tmp_path / "text.pth.tar").write_text("no checkpoint")
    tensors = state["state_dict"]
    weights = tmp_path / "weights.pth.tar"
    torch.save({"state_dict": tensors, "arch": "resnet18"}, weights)
    less = {n: x for n, x in tensors.items() if "layer4" not in n}
    bad = {
        **tensors,
        "module.encoder_q.fc.weight": tensors["module.encoder_q.fc.weight"] * torch.nan,
    }
    args = state["args"]
    for file, words in (
        (tmp_path / "none.pth.tar", "no such checkpoint"),
        (synco, "is a folder; give its checkpoints"),
        (tmp_path / "text.pth.tar", "text.pth.tar"),
        (weights, "lacks epoch, args, optimizer, progress"),
        (saved("probe.pth.tar", method="linear"), "is a classifier's checkpoint"),
        (saved("less.pth.tar", state_dict=less), "does not fit the network"),
        (saved("nan.pth.tar", state_dict=bad), "NaN or infinite"),
        (saved("other.pth.tar", args={**args, "script": "os"}), "does not name a pre-training"),
        (saved("dim.pth.tar", args={**args, "moco_dim": "x"}), "its options are not valid"),
        (saved("arch.pth.tar", args={**args, "arch": "resnet9"}), "resnet9"),
    ):
        refused(call("tools.negatives", good, file, images, "--out", out), words)
        assert not out.exists()
    refused(call("tools.negatives", good, tmp_path / "no", "--out", out), "no such folder")
    many = ("--n-hard", 36)
    refused(call("tools.negatives", good, images, "--out", out, *many), "lower --n-hard")
    refused(call("tools.negatives", good, images, "--out", tmp_path), "is a folder")
    (tmp_path / "single").mkdir()
    shutil.copy(next((images / "train").rglob("*.jpg")), tmp_path / "single")
    result = call("tools.negatives", good, tmp_path / "single", "--out", out)
    refused(result, "a single image has no negatives")
    refused(call("tools.negatives", good, "https://x/y", "--out", out), "is a URL")
    words = ("photos", "--dataset", "cifar10", "--out", out)
    refused(call("tools.negatives", good, *words), "leave it out")


def test_a_checkpoint_of_an_older_version(synco, tmp_path):
    """Options that this version lacks are ignored, and missing ones have their defaults."""
    state = load(synco / "checkpoint_0001.pth.tar")
    args = {name: x for name, x in state["args"].items() if name not in ("stem", "symmetric")}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({**state, "args": {**args, "no_longer": [1]}}, path)
    assert rebuild(path).epoch == 2
    torch.save({**state, "args": {**args, "moco_t": -1.0}}, path)
    with pytest.raises(InputError, match=r"--moco-t|moco_t"):
        rebuild(path)
