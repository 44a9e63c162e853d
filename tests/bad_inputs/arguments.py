"""Bad arguments: wrong values, misspelled options, missing paths and conflicts."""

import importlib.util
import random
from argparse import BooleanOptionalAction

from conftest import ROOT
from run_helpers import INPUT

from bad_inputs.base import EVALUATE, PRETRAIN, Case, Place
from moco.cli.actions import Switch


def pretrain(rng: random.Random, place: Place, *words: object, program: str | None = None) -> Case:
    program = program or rng.choice(PRETRAIN)
    return Case(program, (place.data, *INPUT, "--save-dir", place.own / "run", *words))


def evaluate(rng: random.Random, place: Place, *words: object, program: str | None = None) -> Case:
    return Case(
        program or rng.choice(EVALUATE[:3]),
        (place.data, *INPUT, "--save-dir", place.own / "run", *words),
    )


def is_flag(action) -> bool:
    return action.nargs == 0 and not isinstance(action, BooleanOptionalAction)


def wrong_values(action) -> list[str]:
    """Return values that an option of this kind must refuse."""
    kind = getattr(action.type, "__name__", "")
    if isinstance(action, Switch):
        return ["7", "-1", "1.0e9"]
    if action.choices:
        return ["", "nosuch", "nan", "-1", "\N{SNOWMAN}"]
    never = ["many", "", "1e", "0x10", "--", "1,5", "nan.0"]
    if interval := getattr(action.type, "interval", None):
        least, most = map(float, interval[1:-1].split(","))
        outside = [
            "9" * 30,
            f"{least - max(1, abs(least)):.0f}",
            *([interval[1:-1].split(",")[0]] if interval[0] == "(" else []),
        ]
        return [
            *never,
            *outside,
            "nan",
            "inf",
            *(["1.5"] if kind == "int" else ["1e999", f"{2 * most + 1:.0f}"]),
        ]
    return ["", "x", "1.5"] if kind == "int" else [" ", ""]


def wrong_value(rng: random.Random, place: Place) -> Case:
    """Return a command in which an option has a value that it must refuse."""
    program = rng.choice(PRETRAIN + EVALUATE)
    actions = [
        a
        for a in importlib.import_module(program).parser()._actions
        if a.option_strings and a.dest != "help" and not is_flag(a)
    ]
    action = rng.choice(actions)
    value = rng.choice(wrong_values(action))
    option = rng.choice(
        [
            name
            for name in action.option_strings
            if name.startswith("--") and not name.startswith("--no-")
        ]
    )
    count = action.nargs if isinstance(action.nargs, int) and action.nargs else 1
    words = [f"{option}={value}"] if count == 1 else [option, *[value] * count]
    return Case(program, (place.data, *INPUT, "--save-dir", place.own / "run", *words))


def misspelled(rng: random.Random, place: Place) -> Case:
    """Return a case with a misspelled option; its message must name the right one.

    A letter is missing or added, or two are swapped.
    """
    program = rng.choice(PRETRAIN + EVALUATE)
    names = [
        n
        for n in importlib.import_module(program).parser().names()
        if len(n) > 8 and not n.startswith("--no-")
    ]
    name = rng.choice(names)
    at = rng.randrange(4, len(name) - 1)
    wrong = rng.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + "q" + name[at:],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        ]
    )
    if (
        wrong in (names := importlib.import_module(program).parser().names())
        or wrong.replace("_", "-") in names
    ):
        wrong = name + "q"
    return Case(program, (place.data, wrong, "3"), ("unknown option", "the nearest is '--"))


def nowhere(rng: random.Random, place: Place) -> Case:
    """Paths that are not there, or are of another kind."""
    (place.own / "file").write_text("words\n")
    file, folder = place.own / "file", place.own / "folder"
    folder.mkdir()
    odd = rng.choice(
        [
            "no where",
            "a\nb",
            'it\'s "quoted"',
            "x" * 300,
            "\N{SNOWMAN}/é",
            "-",
            "%s%n",
            "{0}",
            "y/" * 200,
            "a\tb\r",
        ]
    )
    kind = rng.randrange(9)
    if kind == 0:
        return Case(rng.choice(PRETRAIN + EVALUATE), (place.own / odd, *INPUT))
    if kind == 1:
        return Case(rng.choice(PRETRAIN + EVALUATE), (file, *INPUT))
    if kind == 2:
        return pretrain(rng, place, "--resume", rng.choice([place.own / odd, folder, file]))
    if kind == 3:
        return evaluate(rng, place, "--pretrained", rng.choice([place.own / odd, folder, file]))
    if kind == 4:
        return pretrain(rng, place, "--cfg", rng.choice([place.own / odd, folder, file]))
    if kind == 5:
        return Case(
            "main_synco",
            (place.data, *INPUT, "--save-dir", rng.choice([file, file / "below"])),
            ("--save-dir",),
        )
    if kind == 6:
        return evaluate(rng, place, "--class-list", rng.choice([place.own / odd, folder]))
    if kind == 7:
        return Case("main_knn", ("--load-features", rng.choice([place.own / odd, folder, file])))
    return Case(
        "main_knn",
        (place.data, *INPUT, "--dump-features", rng.choice([file, file / "below"])),
        ("--dump-features",),
    )


def conflict(rng: random.Random, place: Place) -> Case:
    """Options that do not go together, or miss something."""
    there = ("--save-dir", place.own / "run")
    program, *words = rng.choice(
        [
            ("main_synco", "--data", place.own),
            ("main_synco", "--tag", "t"),
            ("main_synco", "--n1", "4"),
            ("main_synco", "--n-hard", "90000", "--n1", "1"),
            ("main_synco", "--recipe", "multicrop"),
            ("main_synco", "-a", "vit_small"),
            ("main_synco", "--resume", "auto", "--moco-k"),
            ("main_synco", "--crop-min", "0"),
            ("main_synco", "--crop-scale", "0.5", "0.2"),
            ("main_synco", "--jitter", "1", "1", "1", "0.6"),
            ("main_synco", "--vertical-flip", "2"),
            ("main_synco", "--rotate", "-10"),
            ("main_synco", "--randaugment", "2", "11"),
            ("main_synco", "--randaugment", "2"),
            ("main_synco", "--momentum", "1"),
            ("main_synco", "--nesterov", "--momentum", "0"),
            ("main_synco", "-b", "1"),
            ("main_synco", "-b", "1000"),
            ("main_synco", "--opts", "TRAIN.EPOCHS", "3"),
            ("main_synco", "--dist-backend", "nccl", "--multiprocessing-distributed"),
            ("main_synco", "--multiprocessing-distributed", "--dist-url", "tcp://127.0.0.1:99999"),
            ("main_synco", "--multiprocessing-distributed", "--dist-url", "http://x"),
            (
                "main_synco",
                "--multiprocessing-distributed",
                "--dist-url",
                "tcp://no.such.host.invalid:4000",
            ),
            ("main_synco", "--world-size", "2"),
            ("main_synco", "--moco-k", "2000000000", "--moco-dim", "2000000000"),
            ("main_synco", "--data-name", "imagenet100", "--class-list", place.own),
            ("main_adco", "--mem-t", "0"),
            ("main_adco", "--sym", "2"),
            ("main_adco", "--multi-crop", "--recipe", "mocov2"),
            ("main_sogclr", "--t", "0.001"),
            ("main_sogclr", "--gamma", "0"),
            ("main_fnc", "--memory-multiplier", "2"),
            ("main_fnc", "--fn-threshold", "1.5"),
            ("main_fnc", "--use-tpu", "True"),
            ("main_moby", "--online-drop-path", "1"),
            ("main_moby", "--method", "synco", "--synthetic-first", "5", "--synthetic-last", "5"),
            ("main_moby", "--stop-grad-conv1"),
            ("main_moby", "--target-drop-path", "0.5"),
            ("main_lincls", "--lr", "1", "1"),
            ("main_lincls", "--weights", "finetune", "--lr", "1", "2"),
            ("main_lincls", "--evaluate"),
            ("main_lincls", "--dataset", "cifra10"),
            ("main_lincls", "--dataset", "cifar10"),
            ("main_lincls", "--val-from-train", "1"),
            ("main_semisup", "--train-percent", "5"),
            ("main_semisup", "--ft-proj", "1"),
            ("main_semisup", "--weights", "finetune"),
            ("main_semisup", "--lr", "1"),
            ("main_knn", "--k", "0"),
            ("main_knn", "--temperature", "0"),
            ("main_knn", "--dataset", "voc2007"),
            ("main_knn", "--load-features", place.own, "--dump-features", place.own),
            ("main_voc07", "--c", "0"),
            ("main_voc07", "--c", "nan"),
            ("main_voc07", "--dataset", "imagenet"),
        ]
    )
    return Case(program, (place.data, *INPUT, *there, *words))


def tool_arguments(rng: random.Random, place: Place) -> Case:
    """The tools' command lines."""
    (place.own / "file").write_text("words\n")
    good, own = next(place.good.glob("*.tar")), place.own
    recipe = ROOT / "configs/lincls_moco.yaml"
    program, *words = rng.choice(
        [
            ("tools.collect",),
            ("tools.collect", own),
            ("tools.collect", own / "no\nwhere"),
            ("tools.collect", own, "--uot", "x"),
            ("tools.collect", ""),
            ("tools.export",),
            ("tools.export", good),
            ("tools.export", good, own / "x.bin"),
            ("tools.export", good, own),
            ("tools.export", good, own / "x.pth", "-a", "resnet81"),
            ("tools.export", good, own / "x.pth", "-a", "resnet50"),
            ("tools.export", good, own / "x.pth", "--image-size", "0"),
            ("tools.export", own / "file", own / "x.pth"),
            ("tools.export", own / ("n" * 300), own / "x.pth"),
            ("tools.export", good, own / "file" / "x.pth"),
            ("tools.export", good, good),
            ("tools.export", good, own / "x.pth", "--frce"),
            ("tools.schedule",),
            ("tools.schedule", own / "nowhere"),
            ("tools.schedule", own),
            ("tools.schedule", own / "file"),
            ("tools.schedule", recipe, "--rows", "0"),
            ("tools.schedule", recipe, "--images", "0"),
            ("tools.schedule", recipe, "--procesess", "9"),
            ("tools.schedule", recipe, "--plot", own / "x.jpg"),
            ("tools.schedule", recipe, "--plot", own / "file" / "x.png"),
            ("tools.schedule", recipe, "--lr", "many"),
            ("tools.show_views",),
            ("tools.show_views", "mocov3"),
            ("tools.show_views", "mocov2", own / "nowhere"),
            ("tools.show_views", "mocov2", own),
            ("tools.show_views", "mocov2", own / "file"),
            ("tools.show_views", "mocov2", place.data, "--out", own / "x.jpg"),
            ("tools.show_views", "mocov2", place.data, "--out", own / "file" / "x.png"),
            ("tools.show_views", "mocov2", place.data, "--crop-min", "2"),
            ("tools.show_views", "mocov2", place.data, "--images", "-1"),
            ("tools.show_views", "mocov2", place.data, "--imags", "1"),
            ("tools.show_views", "mocov2", "a", "b"),
            ("tools.show_views", "--cfg", own / "file"),
            ("tools.show_views", "--cfg", own),
            ("convert-pretrain-to-detectron2", good),
            ("convert-pretrain-to-detectron2", good, own / "x.pth"),
            ("convert-pretrain-to-detectron2", own / "file", own / "x.pkl"),
            ("convert-pretrain-to-detectron2", good, own / "x.pkl", "-a", "vit_tiny"),
            ("convert-pretrain-to-detectron2", good, own / "x.pkl", "-a", "resnet34"),
            ("convert-pretrain-to-detectron2", good, own / "file" / "x.pkl"),
            ("convert-pretrain-to-detectron2", good, own / "x.pkl", "--chekc"),
        ]
    )
    return Case(program, tuple(words))
