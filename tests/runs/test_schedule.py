"""Pin the schedules of every recipe at five points, and test tools/schedule.py.

The expected values are formulas of the papers and of the authors' code, in schedule_formulas.py.
They are functions of the step s, the steps n of an epoch and the epochs E.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import yaml
from conftest import ROOT
from PIL import Image
from schedule_formulas import (
    Formula,
    authors_momentum,
    constant,
    cosine_by_epoch,
    cosine_by_step,
    cosine_from_epoch_1,
    drops,
    in_epochs,
    rising_momentum,
    swin_style,
    up_and_down,
    up_and_down_by_epoch,
    warm_by_epoch,
)

from moco.cli import scripts
from moco.report import schedules
from tools import schedule as tool

IMAGENET, IMAGENET_100, PLACES, CIFAR = 1_281_167, 128_117, 2_448_873, 50_000
STL_10 = 105_000  # train and unlabeled
VOC_TRAIN = 2_501
ONE_PERCENT, TEN_PERCENT = 12_811, 128_116  # labelled images


@dataclass(frozen=True)
class Facts:
    """The schedules of a recipe, from its paper or its authors' code.

    Attributes:
        epochs: E.
        batch: images in a step, over all processes.
        quantities: the formula of each quantity, by its name in the table.
        images: training images.
        keeps_last: whether the smaller last batch of an epoch makes a step. It does in evaluations.
        warmup: epochs of warm-up; 0: none.
    """

    epochs: int
    batch: int
    quantities: dict[str, Formula] = field(repr=False)
    images: int = IMAGENET
    keeps_last: bool = False
    warmup: int = 0

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.images, self.batch)
        return full + (self.keeps_last and rest > 0)


def moco(epochs: int, lr: Formula, counts: tuple[int, ...] = ()) -> Facts:
    """Return the facts of MoCo, MoCHI and SynCo, with synthetic negatives from epoch 10 on."""
    synthetic = in_epochs(10, epochs, *counts)
    return Facts(epochs, 256, {"lr": lr, "momentum": constant(0.999), **synthetic})


def adco(epochs: int, lr: float = 0.03) -> Facts:
    rates = {"lr": cosine_by_epoch(lr, 0.0006), "bank lr": constant(3.0)}
    return Facts(epochs, 256, {**rates, "momentum": constant(0.999)})


def sogclr(epochs: int, images: int) -> Facts:
    """Return the facts of SimCLR and SogCLR: .075 sqrt(256) = 1.2."""
    return Facts(epochs, 256, {"lr": cosine_by_step(1.2, 10)}, images, warmup=10)


def transformer(lr: float, m: float, synthetic: dict[str, Formula] | None = None) -> Facts:
    """Return the facts of MoBY, BYOL and SynCo-v2: 4 processes of 128 images, `lr` for 512."""
    quantities = {"lr": swin_style(lr), "momentum": rising_momentum(m), **(synthetic or {})}
    return Facts(300, 512, quantities, warmup=5)


def mocov3(epochs: int, base_lr: float, warmup: int, m: float) -> Facts:
    """Return the facts of MoCo v3 at batch 4096."""
    lr = cosine_by_step(base_lr * 4096 / 256, warmup)
    return Facts(epochs, 4096, {"lr": lr, "momentum": authors_momentum(m)}, warmup=warmup)


def probe(epochs: int, batch: int, lr: Formula, images: int = IMAGENET, warmup: int = 0) -> Facts:
    return Facts(epochs, batch, {"lr": lr}, images, keeps_last=True, warmup=warmup)


def few_labels(epochs: int, images: int, lr: Callable[[float], Formula], *rates: float) -> Facts:
    """Return the facts of fine-tuning at batch 1024; `rates` are the classifier's, the backbone's.

    `lr` makes the formula of each rate.
    """
    quantities = {"lr classifier": lr(rates[0]), "lr backbone": lr(rates[1])}
    return Facts(epochs, 1024, quantities, images, keeps_last=True)


def cifar(lr: Formula, warmup: int = 0, **more: Formula) -> Facts:
    """Return the facts of a recipe for CIFAR-10: MoCo's demo, or its training with warm-up."""
    quantities = {"lr": lr, **{name.replace("_", " "): one for name, one in more.items()}}
    return Facts(200, 512, quantities, CIFAR, warmup=warmup)


V2 = cosine_by_epoch(0.03)
SYNCO = (256, 256, 256, 64, 64, 64)
MOBY, BYOL = (0.001, 0.99), (2e-4, 0.996)
PUBLISHED = in_epochs(30, 100, *[128] * 6)
AS_RUN = in_epochs(120, 300, 128, 128, 128, 64, 64, 64)
DEMO, WARM = cosine_from_epoch_1(0.06), cosine_by_step(0.06, 10)
MOMENTUM = constant(0.99)
FNC_HEAD = 0.005 * math.sqrt(1024)


def simclr_style(lr: float) -> Formula:
    return cosine_by_step(lr, 0)


FACTS = {
    # MoCo; MoCHI (N, s, s'): n3 = s, n1 = s'; SynCo
    "mocov1_200": moco(200, drops(0.03, 120, 160)),
    "mocov2_200": moco(200, V2),
    "mocov2_800": moco(800, V2),
    "mochi_1024_512_256_200": moco(200, V2, (256, 0, 512)),
    "mochi_512_1024_512_200": moco(200, V2, (512, 0, 1024)),
    "synco_200": moco(200, V2, SYNCO),
    "synco_800": moco(800, V2, SYNCO),
    # AdCo
    **{f"adco_{name}200": adco(200) for name in ("", "k16384_", "sym_", "sym_k16384_")},
    **{f"adco_{name}200": adco(200, 0.04) for name in ("k8192_", "sym_k8192_")},
    **{f"adco_multicrop_{epochs}": adco(epochs) for epochs in (200, 800)},
    "adco_800": adco(800),
    # SogCLR and SimCLR
    **{f"{name}_800": sogclr(800, IMAGENET) for name in ("simclr", "sogclr")},
    **{f"{name}_imagenet100_400": sogclr(400, IMAGENET_100) for name in ("simclr", "sogclr")},
    # FNC: .1 sqrt(4096) = 6.4
    "fnc_100": Facts(
        100, 4096, {"lr": cosine_by_step(6.4, 10), "momentum": constant(0.999)}, warmup=10
    ),
    # MoBY, BYOL and SynCo-v2
    **{
        f"{method}_{arch}": transformer(*rates, synthetic)
        for method, rates, synthetic in (
            ("moby", MOBY, None),
            ("byol", BYOL, None),
            ("synco", MOBY, PUBLISHED),
        )
        for arch in ("vit_small", "vit_base", "swin_tiny", "swin_small", "swin_base")
    },
    "moby_vit_tiny": transformer(*MOBY),
    **{f"synco_{arch}_as_run": transformer(*MOBY, AS_RUN) for arch in ("vit_small", "swin_tiny")},
    # MoCo v3
    "mocov3_r50_100": mocov3(100, 0.6, 10, 0.99),
    "mocov3_r50_300": mocov3(300, 0.3, 10, 0.99),
    "mocov3_r50_1000": mocov3(1000, 0.3, 10, 0.996),
    **{f"mocov3_{arch}": mocov3(300, 1.5e-4, 40, 0.99) for arch in ("vit_small", "vit_base")},
    # linear probes and MoBY's fine-tuning
    "lincls_moco": probe(100, 256, drops(30, 60, 80)),
    "lincls_adco": probe(100, 256, cosine_by_epoch(10, 0.01)),
    "lincls_adco_places205": probe(100, 256, up_and_down(5, 12), PLACES),
    "voc07_adco": probe(100, 16, up_and_down_by_epoch(0.05, 12), VOC_TRAIN),
    "lincls_sogclr": probe(90, 1024, cosine_by_epoch(0.1 * 1024 / 256)),
    "lincls_mocov3": probe(90, 1024, cosine_by_epoch(0.1 * 1024 / 256)),
    "lincls_mocov3_vit": probe(90, 1024, cosine_by_epoch(3 * 1024 / 256)),
    "lincls_fnc": probe(90, 1024, simclr_style(FNC_HEAD)),
    **{
        f"{name}_moby": probe(100, 512, swin_style(1.0), warmup=5)
        for name in ("lincls", "finetune")
    },
    # few labels
    "semisup_1pct": few_labels(60, ONE_PERCENT, cosine_by_epoch, 0.5, 0.02),
    "semisup_10pct": few_labels(30, TEN_PERCENT, cosine_by_epoch, 0.5, 0.02),
    "semisup_100pct": few_labels(90, IMAGENET, cosine_by_epoch, 0.5, 0.02),
    "semisup_fnc_1pct": few_labels(60, ONE_PERCENT, simclr_style, FNC_HEAD, FNC_HEAD),
    "semisup_fnc_10pct": few_labels(30, TEN_PERCENT, simclr_style, FNC_HEAD, FNC_HEAD),
    # CIFAR-10: MoCo's demo, and its training for other methods
    **{f"cifar10/{name}": cifar(DEMO, momentum=MOMENTUM) for name in ("moco", "moco_symmetric")},
    "cifar10/mochi": cifar(DEMO, momentum=MOMENTUM, **in_epochs(10, 200, 32, 0, 64)),
    "cifar10/synco": cifar(DEMO, momentum=MOMENTUM, **in_epochs(10, 200, 16, 16, 16, 4, 4, 4)),
    "cifar10/adco": cifar(DEMO, bank_lr=constant(3.0), momentum=MOMENTUM),
    **{f"cifar10/{name}": cifar(DEMO) for name in ("simclr", "sogclr")},
    "cifar10/fnc": cifar(DEMO, momentum=MOMENTUM),
    **{
        f"cifar10/{name}": cifar(WARM, 10, momentum=rising_momentum(0.99))
        for name in ("moby", "byol")
    },
    "cifar10/mocov3": cifar(WARM, 10, momentum=authors_momentum(0.99)),
    # other losses of SimCLR's encoder: Adam with a constant learning rate; iSogCLR with LARS
    **{
        f"cifar10/{name}_batch32": Facts(100, 32, {"lr": constant(0.001)}, CIFAR)
        for name in ("dcl", "dclw")
    },
    **{
        f"stl10/{name}": Facts(400, 256, {"lr": constant(0.001)}, STL_10)
        for name in ("debiased", "hcl")
    },
    "cifar10/supcon": Facts(
        1000, 1024, {"lr": cosine_by_step(0.5, 10, 0.01, 0.0005)}, CIFAR, warmup=10
    ),
    "cifar100/isogclr": Facts(
        400, 128, {"lr": warm_by_epoch(0.8, 10, cosine_by_epoch(0.8, 0.0008))}, CIFAR, warmup=10
    ),
}
RECIPES = {
    str(path.relative_to(ROOT / "configs").with_suffix("")): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not path.name.startswith("retrieval_")  # nothing is trained
}
# small networks, because the schedules do not depend on them
SMALL = {
    "main_moby": ("-a", "resnet18", "--online-drop-path", "0"),
    "main_mocov3": ("-a", "resnet18", "--no-stop-grad-conv1"),
    "": ("-a", "resnet18"),
}


def test_every_recipe_has_its_facts():
    assert RECIPES.keys() == FACTS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_follows_its_schedules(name):
    facts, path = FACTS[name], RECIPES[name]
    script = scripts.script_of(path)
    small = SMALL.get(script, SMALL[""])
    of = tool.load(path, small)
    n, E = facts.steps_per_epoch, facts.epochs
    assert (of.images, of.batch) == (facts.images, facts.batch)
    assert (of.steps_per_epoch, of.steps) == (n, n * E)
    first = n * facts.warmup or n * E // 4
    for s in (0, first, first + 1, n * E // 2, 3 * n * E // 4, n * E - 1):
        expected = {name: formula(s, n, E) for name, formula in facts.quantities.items()}
        assert of.at(s) == pytest.approx(expected, rel=1e-12, abs=1e-15), s


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("synco_200", 10, 200),
        ("synco_swin_tiny", 30, 100),
        ("synco_swin_tiny_as_run", 120, 300),
        ("mochi_1024_512_256_200", 10, 200),
    ],
)
def test_synthetic_negatives_begin_and_end_with_an_epoch(name, first, last):
    """Check these epochs here, because the five points above do not."""
    small = SMALL["main_moby"] if "swin" in name else SMALL[""]
    of = tool.load(RECIPES[name], small)
    n = of.steps_per_epoch
    for step, active in (
        (n * first - 1, False),
        (n * first, True),
        (n * last - 1, True),
        (n * last, False),
    ):
        if step < of.steps:
            assert (of.at(step)["n1"] > 0) == active, step


def test_the_beta_of_hcl_falls_in_nine_steps():
    of = tool.load(RECIPES["stl10/hcl"], ("--anneal", "down", "-a", "resnet18"))
    n = of.steps_per_epoch
    found = [of.at(n * epoch)["beta"] for epoch in (0, 43, 44, 88, 351, 352, 399)]
    assert found == [1, 1, 0.875, 0.75, 0.125, 0, 0]


def test_the_lr_of_adcos_probe_on_places205_rises_again():
    of = tool.load(RECIPES["lincls_adco_places205"], ())
    n = of.steps_per_epoch
    found = [of.at(n * epoch)["lr"] for epoch in (0, 6, 12, 18, 24, 36)]
    assert found == pytest.approx([5, 2.5, 0, 2.5, 5, 0])


def test_cos_2_concerns_the_encoder_alone():
    """--cos 2 is AdCo's other schedule, a quarter of a cosine."""
    of = tool.load(RECIPES["adco_200"], ("--cos", "2", "-a", "resnet18"))
    n = of.steps_per_epoch
    for epoch in (0, 50, 100, 199):
        values = of.at(n * epoch)
        assert values["lr"] == pytest.approx(0.03 * math.cos(math.pi * epoch / 400), rel=1e-12)
        assert values["bank lr"] == 3


# The tool.
@pytest.fixture
def call(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["schedule.py", *map(str, words)])
        try:
            status = tool.main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr()

    return run


def test_the_table_has_the_epochs_at_which_something_turns(call):
    status, said = call(RECIPES["lincls_moco"], "--rows", 2, "--images", 2560, "--epochs", 90)
    head, *rows = [line.split() for line in said.out.splitlines()[1:]]
    assert status == 0 and not said.err and head == ["epoch", "step", "lr"]
    assert rows == [
        ["0", "0", "30"],
        ["45", "450", "30"],
        ["59", "590", "30"],
        ["60", "600", "3"],
        ["79", "790", "3"],
        ["80", "800", "0.3"],
        ["89", "899", "0.3"],
    ]
    assert said.out.startswith(
        f"{RECIPES['lincls_moco']}: 2560 images; total batch 256 = 32 per process x 8 processes x "
        "1 accumulation; 90 epochs x 10 steps\n"
    )


def test_a_run_of_one_step(call, tmp_path):
    words = ("--epochs", 1, "--images", 256, "--rows", 50, "--plot", tmp_path / "one.png")
    status, said = call(RECIPES["lincls_moco"], *words)
    assert status == 0 and said.out.splitlines()[2:-1] == ["    0     0  30"]


def test_each_learning_rate_is_a_column_and_a_curve(call, tmp_path):
    """Test several classifiers, and a classifier with its backbone."""
    picture = tmp_path / "a folder" / "schedule.png"
    words = ("--lr", 30, 3, "--processes", 2, "--plot", picture)
    status, said = call(RECIPES["lincls_moco"], *words)
    assert status == 0 and said.out.splitlines()[1].split() == [
        "epoch",
        "step",
        *"lr 30 lr 3".split(),
    ]
    assert said.out.splitlines()[-1] == str(picture) and "128 per process x 2" in said.out
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.height > 400
    of = tool.load(RECIPES["semisup_1pct"], ("--lr-backbone", "0.1"))
    assert of.at(0) == {"lr classifier": 0.5, "lr backbone": 0.1}
    of = tool.load(RECIPES["semisup_1pct"], ("--weights", "freeze"))
    assert of.at(0) == {"lr classifier": 0.5}


def test_the_picture_shows_every_quantity():
    of = tool.load(RECIPES["synco_200"], SMALL[""])
    axes = schedules.figure(of, "$title$ of a _recipe").axes
    assert [axis.get_ylabel() for axis in axes] == ["lr", "momentum", "synthetic negatives"]
    line = axes[0].lines[0]
    for x, y in (line.get_xydata()[0], line.get_xydata()[700], line.get_xydata()[-1]):
        assert y == of.at(round(x * of.steps_per_epoch))["lr"]
    legend = [text.get_text() for text in axes[2].get_legend().get_texts()]
    assert legend == ["n1", "n2", "n3", "n4", "n5", "n6"]


def test_the_args_yaml_of_a_run_has_the_images_and_processes_of_the_run(run, call, tmp_path):
    known = "16 images; total batch 8 = 8 per process x 1 process x 1 accumulation"
    status, said = call(run / "args.yaml")
    assert status == 0 and "48 images; total batch 8 = 8 per process x 1 process x 1" in said.out
    assert "no record" not in said.out
    status, said = call(run / "args.yaml", "--images", 16)
    assert status == 0 and known in said.out
    facts = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**facts, "processes": 4}))
    options = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({**options, "nodes": 2}))
    _, said = call(run / "args.yaml")
    assert "48 images; total batch 16 = 4 per process x 4 processes x 1" in said.out
    assert call(run / "args.yaml", "--processes", 4)[1].out == said.out
    (run / "args.yaml").write_text(yaml.safe_dump({**options, "nodes": "two"}))
    assert "total batch 8 = 2 per process x 4" in call(run / "args.yaml")[1].out
    (run / "args.yaml").write_text(yaml.safe_dump({**options, "nodes": 2}))
    (run / "status.json").unlink()
    status, said = call(run / "args.yaml", "--processes", 2)
    assert "1281167 images; total batch 16 = 8 per process x 2 processes" in said.out
    assert "no record of the number of images, so the line above assumes one; give" in said.out


def test_the_args_yaml_of_a_run_is_a_recipe(run):
    """Find its script by a key. The number of processes is 8 by default."""
    options = yaml.safe_load((run / "args.yaml").read_text())
    of = tool.load(run / "args.yaml", (), images=64, processes=1)
    assert of.at(0) == {"lr": options["lr"], "momentum": options["moco_m"]}
    assert (of.batch, of.epochs) == (options["batch_size"], options["epochs"])
    assert tool.processes_of("") == 8


@pytest.mark.parametrize("script", ["adco", "fnc", "mocov3", "sogclr"])
def test_a_run_may_have_used_devices_that_this_machine_lacks(script, tmp_path):
    (tmp_path / "args.yaml").write_text(f"script: {script}\ngpu: 99\ndist-backend: nccl\n")
    of = tool.load(tmp_path / "args.yaml", (), images=50_000, processes=4)
    assert of.processes == 4 and of.steps_per_epoch == 50_000 // of.batch


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "RECIPE"),
        (["nowhere.yaml"], "nowhere.yaml: No such file"),
        (["bad.yaml"], "bad.yaml: not YAML"),
        (["nowhere/args.yaml"], "nowhere/args.yaml: No such file"),
        (["silent.yaml"], "no comment names its script; add a line such as # python main_synco.py"),
        (["other.yaml"], "main_other.py: no such script"),
        (["knn.yaml"], "main_knn.py trains nothing by steps"),
        (["svm.yaml"], "main_voc07.py trains nothing by steps"),
        (["svm.yaml", "--classifier", "sgd"], "svm.yaml: give --epochs and --lr"),
        (["pets.yaml"], "--images N is needed: the number of training images of pets"),
        ([RECIPES["synco_200"], "--epcohs", "3"], "the nearest is '--epochs'"),
        ([RECIPES["synco_200"], "--images", "200"], "200 images do not fill one batch of 256"),
        ([RECIPES["synco_200"], "--processes", "300"], "--batch-size 256 is smaller than the 300"),
        ([RECIPES["synco_200"], "--sgdr-t0", "3"], "--sgdr-t0 has no effect"),
        ([RECIPES["synco_200"], "--plot", "x.jpg"], "must end with .png"),
        ([RECIPES["synco_200"], "--force"], "--force has no effect"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_a_mistake_is_one_line(words, what, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("epochs: [")
    (tmp_path / "silent.yaml").write_text("epochs: 3\n")
    (tmp_path / "other.yaml").write_text("# python main_other.py --cfg other.yaml DIR\nepochs: 3\n")
    (tmp_path / "knn.yaml").write_text("# python main_knn.py --cfg knn.yaml DIR\nk: 3\n")
    (tmp_path / "svm.yaml").write_text(
        "# python main_voc07.py --cfg svm.yaml DIR\nclassifier: svm\n"
    )
    (tmp_path / "pets.yaml").write_text(
        "# python main_lincls.py --cfg pets.yaml DIR\ndataset: pets\n"
    )
    status, said = call(*words)
    line = said.err.splitlines()[-1]
    assert status == 2 and line.startswith("schedule.py: error: ") and what in line, said.err
